"""Assumed routing, for a model of whose topology no trace was named, and the range that it leaves.

The run itself takes the usual locality; the same policy at low and at high locality says how much hangs on that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertflow.keys import plain, shown
from expertflow.model import ModelSpec
from sim.job.default_trace import SHIPPED_TOPOLOGY, GeneratedTrace
from sim.job.errors import one_line
from sim.job.reads import SHIPPED, note
from traces.assumed.families import FAMILIES, SETTINGS, USUAL
from traces.assumed.made import Assumed, Size, arrays_of, check_size, header_of, memory_of, usual_size
from traces.assumed.routing import Topology
from traces.limits import MAX_BYTES, max_bytes
from traces.reader import Trace

ENDS = tuple(name for name in SETTINGS if name != USUAL)
FIGURES = ("num_tokens", "elapsed_ns", "stall_ns", "num_accesses", "num_hits", "tpot_ms", "tokens_per_s")
"""What is kept of the runs at the ends of the range."""
PAGE = "docs/traces.md"
_LARGE_SHARE = 0.1
"""Of the misses, from which on it is said that they are first touches."""
_SEEN = 0.01
"""Of the run's time, which misses must have cost for that to matter."""

RunEnd = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""The metrics of a configuration's policy at a locality; must be a function of a module, for other processes."""


Outcomes = Generator[dict[str, Any] | str, None, None]
"""Of the ends, in order: figures, or the line of a user's error."""


class AssumedTrace(GeneratedTrace):
    """Routing that nobody recorded. One of a range: its other ends are to be run beside it."""

    def __init__(self, asked: Assumed, one_of_a_range: bool) -> None:
        # Of no model that files were fitted to: what they learned of its routing is not in here.
        super().__init__([Path(f"{asked.name}.trace")], header_of(asked, "assumed"), arrays_of(asked))
        self.setting, self.one_of_a_range = asked.setting, one_of_a_range


def assumed_trace(cfg: Mapping[str, Any], model: ModelSpec | None, batch_size: int) -> Trace | None:
    """The trace that is assumed for `model`; None where a trace is named or the shipped one is of its topology.

    cfg: the keys of the trace. model: None is whatever the trace is of. ValueError for sizes that do not go together.
    """
    locality, reuse = cfg.get("locality"), cfg.get("reuse")
    told = locality is not None or reuse is not None
    if model is None or cfg.get("path") is not None or cfg.get("params") is not None:
        return None
    topology = Topology(model.num_layers, model.num_experts, model.top_k)
    if not told and topology == SHIPPED_TOPOLOGY:
        return None
    size = usual_size(topology, cfg.get("num_tokens"), cfg.get("num_requests"))
    check_size(size)
    _check_memory(model, topology, size)
    if batch_size > size.num_requests:
        raise ValueError(
            f"batch_size={batch_size} is more than the {size.num_requests} requests of the assumed routing; "
            f"say trace.num_requests={batch_size}, or name a recording: trace.path=FILE"
        )
    return AssumedTrace(Assumed(topology, locality or USUAL, size, cfg.get("seed") or 0, reuse), not told)


def _check_memory(model: ModelSpec, topology: Topology, size: Size) -> None:
    """ValueError where making the routing would take more memory than what is read from a file may."""
    needed, most = memory_of(topology, size), max_bytes()
    if needed > most:
        raise ValueError(
            f"model={plain(model.name, 60)}: routing assumed for {topology} would take {needed} bytes of memory, at "
            f"most {most} are allowed; name a recording: trace.path=FILE, or allow more with {MAX_BYTES}=<bytes>"
        )


def needs_model(key: str, value: object) -> ValueError:
    """The error for a locality, or a reuse, where no model is named."""
    return ValueError(f"trace.{key}={shown(value)} is of routing that is assumed for a model; say model=NAME")


def head(trace: Trace) -> dict[str, Any]:
    """What the metrics say of assumed routing; nothing of another trace."""
    if not isinstance(trace, AssumedTrace):
        return {}
    return {"assumed": {"routing": title(trace.setting), "locality": trace.setting, "range": None}}


def title(setting: str) -> str:
    """What is assumed, in words."""
    return f"assumed routing, {setting}{' locality' if setting in SETTINGS else ''}"


@contextmanager
def ends_beside(
    cfg: Mapping[str, Any], trace: Trace, run: RunEnd, workers: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """While the block runs so does what the range needs, in `workers` or after it; the value puts it into metrics.

    Nothing is run, and nothing put, where there is no range.
    """
    if not isinstance(trace, AssumedTrace):
        yield lambda metrics: None
        return
    note(SHIPPED + FAMILIES.name)
    if not trace.one_of_a_range:
        yield lambda metrics: None
        return
    found: Outcomes = _started(cfg, run) if workers else (_attempt(cfg, end, run) for end in ENDS)

    def put(metrics: dict[str, Any]) -> None:
        metrics["assumed"]["range"] = {end: _sound(end, outcome) for end, outcome in zip(ENDS, found, strict=True)}

    try:
        yield put
    except BaseException:
        with warnings.catch_warnings():
            # joblib's advice on runs that are given up, as these are where the run itself has failed.
            warnings.simplefilter("ignore")
            found.close()
        raise


def _started(cfg: Mapping[str, Any], run: RunEnd) -> Outcomes:
    """The runs under way, each in a process of its own."""
    from joblib import Parallel, delayed

    from sim.job.pool import use_workers

    use_workers()
    under_way: Outcomes = Parallel(n_jobs=len(ENDS), return_as="generator")(
        delayed(_attempt)(cfg, end, run) for end in ENDS
    )
    return under_way


def _attempt(cfg: Mapping[str, Any], end: str, run: RunEnd) -> dict[str, Any] | str:
    """The figures of a run at one end; a user's error as a line, which any process can hand on."""
    try:
        metrics = run(cfg, end)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        return line
    return {name: metrics[name] for name in FIGURES}


def _sound(end: str, outcome: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(outcome, str):
        raise ValueError(f"at {end} locality: {outcome}")
    return outcome


def at_locality(cfg: Mapping[str, Any], locality: str) -> dict[str, Any]:
    """The same configuration at one locality."""
    return {**cfg, "trace": {**cfg["trace"], "locality": locality}}


def range_line(metrics: Mapping[str, Any]) -> str:
    """What the assumption leaves open, in one line."""
    assumed, (what, times) = metrics["assumed"], _times(metrics)
    if assumed["range"] is None:
        return f"{title(assumed['locality'])}: not recorded; record your own: {PAGE}"
    least, most = _figure(min(times)), _figure(max(times))
    if least == most:
        return f"{what} {least} ms at low, usual and high locality of the routing; it is not recorded: {PAGE}"
    span = f"{_figure(times[0])} ms, {least}–{most} by how local the routing is"
    return f"{what} {span}; record your own for one figure: {PAGE}"


def range_words(metrics: Mapping[str, Any]) -> str:
    """The range in brackets, for a line that has the figure itself; empty where there is none."""
    if "assumed" not in metrics or metrics["assumed"]["range"] is None:
        return ""
    what, times = _times(metrics)
    least, most = _figure(min(times)), _figure(max(times))
    whose = "" if what == "TPOT" else f"{what} "
    return f" ({whose}{least}–{most} ms by how local the routing is)" if least != most else ""


def _times(metrics: Mapping[str, Any]) -> tuple[str, list[float]]:
    """What is given a range, and its milliseconds: of the run, and of those at the ends."""
    runs = [metrics, *(metrics["assumed"]["range"] or {}).values()]
    if all(run["tpot_ms"]["mean"] is not None for run in runs):
        return "TPOT", [run["tpot_ms"]["mean"] for run in runs]
    return "a token", [run["elapsed_ns"] / max(run["num_tokens"], 1) / 1e6 for run in runs]


def first_touches(metrics: Mapping[str, Any]) -> list[str]:
    """A line where much of what the run waited for is that its cache began empty, which a longer run would not see.

    Of the loads that were measured all but as many as experts were evicted filled a slot that nothing had held yet.
    """
    misses, loads = metrics["num_misses"], metrics["num_misses"] + metrics["prefetch"]["issued"]
    filled = min(loads - metrics["num_evictions"], metrics["capacity"]["num_slots"])
    first = min(filled - metrics["prefetch"]["issued"], misses)
    waited = metrics["miss_stall_ns"] >= _SEEN * metrics["elapsed_ns"]
    if "assumed" not in metrics or not misses or first < _LARGE_SHARE * misses or not waited:
        return []
    return [
        f"at least {100 * first / misses:.0f} % of the misses are first touches of a short trace; "
        "warmup_forwards=N or start=popular leaves them out"
    ]


def _figure(value: float) -> str:
    """Three figures, and all that stand before the point."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 6)}f}"
