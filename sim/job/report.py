"""The table that a run prints: what was run, and each number beside what it is read against."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from sim.job.assumed import first_touches, range_line, range_words
from sim.job.batches import batch_notes, decode_notes
from sim.job.beside import WITH_PLACE
from sim.job.keys import AS_RECORDED
from sim.job.model import incomplete, remarks, size_remarks
from sim.job.predictor import chooses_by_trace
from sim.job.setup import Workload, start_note
from sim.job.title import hardware_title, stack_title
from traces.tables import console_for_tables, print_columns

_MOST = 10_000
"""Characters of a line that COLUMNS may ask for."""
_LEAST = 20
"""Characters of a line that a note is never wrapped below."""
_SHARE = "of on-demand"
"""A column that is there only where on-demand ran beside."""
_BASELINES = ("on_demand", "lru", "clairvoyant")
"""Names of the runs beside (compare=full)."""
_HOST = ("host", "on host")
"""Columns that are there only where a policy places experts on the host: stall, and their share."""
_STORAGE = ("storage", "host hits")
"""Columns that are there only where experts lie on storage: stall, and the share of copies found in host memory."""
_COLUMNS = ("TPOT ms", "ms/token", "stall ms", "late", "miss", _SHARE, "hits", "prefetch used", "link busy")


def report_console() -> Console:
    """A console on stdout; where that is no terminal, as wide as COLUMNS says, if that is set."""
    told = os.environ.get("COLUMNS", "")
    if sys.stdout.isatty() or not told.isdecimal() or not 0 < int(told) <= _MOST:
        return console_for_tables()
    return Console(soft_wrap=False, width=int(told))


def _chosen(cfg: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Behind the policy's name, which predictor was taken, if the trace decided it."""
    return f" (predictor: {metrics['predictor']})" if chooses_by_trace(cfg["policy"]) else ""


def _unfilled(cfg: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """A line where the batch cannot be filled."""
    most = metrics["trace"]["num_requests"]
    if cfg["batch_size"] == AS_RECORDED or cfg["batch_size"] <= most:
        return []
    requests = f"{most} request{'' if most == 1 else 's'}"
    return [f"batch_size={cfg['batch_size']}: the run has {requests}, so that no more are decoded together"]


def solved(metrics: Mapping[str, Any]) -> list[str]:
    """A line where the stack's overheads were solved: what they are, and of what."""
    found = metrics.get("stack_solved")
    if found is None:
        return []
    return [
        f"stack.resident_tpot_ms={found['resident_tpot_ms']:g} solved: stack.layer_overhead_ns="
        f"{found['layer_overhead_ns']} stack.head_overhead_ns={found['head_overhead_ns']}; kernels and host take "
        f"{found['kernels_and_host_ms']:.3f} ms of it (mean of {found['num_tokens']} decoded tokens, one request at a "
        "time)"
    ]


def _per_token(metrics: dict[str, Any], key: str) -> str:
    return f"{metrics[key] / max(metrics['num_tokens'], 1) / 1e6:.3f}"


def _host_cells(metrics: dict[str, Any]) -> list[str]:
    """Of the columns `_HOST`."""
    if "num_host" not in metrics:
        return ["–"] * len(_HOST)
    share = metrics["num_host"] / max(metrics["num_accesses"], 1)
    return [_per_token(metrics, "host_stall_ns"), f"{100 * share:.2f} %"]


def _storage_cells(metrics: dict[str, Any]) -> list[str]:
    """Of the columns `_STORAGE`."""
    storage = metrics["storage"]
    num_copies = storage["host_hits"] + storage["host_misses"]
    share = f"{100 * storage['host_hits'] / num_copies:.2f} %" if num_copies else "–"
    return [_per_token(metrics, "storage_stall_ns"), share]


def _row(name: str, metrics: dict[str, Any], on_demand_stall_ns: int | None, has_share: bool) -> list[str]:
    prefetch, accesses = metrics["prefetch"], max(metrics["num_accesses"], 1)
    issued = prefetch["issued"]
    left = f"{100 * metrics['stall_ns'] / on_demand_stall_ns:.2f} %" if on_demand_stall_ns else "–"
    mean = metrics["tpot_ms"]["mean"]
    return [
        name,
        "–" if mean is None else f"{mean:.3f}",
        _per_token(metrics, "elapsed_ns"),
        _per_token(metrics, "stall_ns"),
        _per_token(metrics, "late_stall_ns"),
        _per_token(metrics, "miss_stall_ns"),
        *([left] if has_share else []),
        f"{100 * metrics['num_hits'] / accesses:.2f} %",
        f"{100 * (prefetch['useful'] + prefetch['late']) / issued:.1f} %" if issued else "–",
        f"{100 * metrics['link']['utilisation']:.1f} %",
    ]


def named_runs(metrics: dict[str, Any], title: str) -> list[tuple[str, dict[str, Any]]]:
    """The run and those beside it, each with the name of its row. title: as in `print_report`."""
    compare, is_named = metrics["compare"] or {}, title == metrics["policy"]
    # Also where none ran beside: the reader knows what a run of that name gives.
    is_changed = not is_named and (metrics["policy"] in compare or metrics["policy"] in _BASELINES)
    own = f"{metrics['policy']} (changed)" if is_changed else metrics["policy"]
    return [(own, metrics), *((name, one) for name, one in compare.items() if not (is_named and name == own))]


def _below(metrics: dict[str, Any]) -> str:
    """What lies below the GPU's memory, where that is not host memory alone."""
    if "storage" not in metrics:
        return ""
    name = metrics["storage_preset"]["name"]
    return f", {metrics['capacity']['host_slots']} in host memory, all on {escape(name)}"


def print_report(
    console: Console,
    metrics: dict[str, Any],
    folder: str | None,
    title: str,
    cfg: Mapping[str, Any],
    more: Iterable[str] = (),
) -> None:
    """One table a person can read, from the metrics of a run and those beside it.

    title: of the policy (see `sim.job.title`); where it is the name alone, a run of that name beside is the same run.
    cfg: the run's configuration. more: what is said below it besides.
    """
    capacity, trace = metrics["capacity"], metrics["trace"]
    routing = f"; {metrics['assumed']['routing']}" if "assumed" in metrics else ""
    console.print(
        f"[bold]{escape(title)}[/bold]{_chosen(cfg, metrics)} on {hardware_title(metrics)}, {stack_title(metrics)} "
        f"stack, {metrics['model']} with {_room(capacity)} = {100 * capacity['residency']:.1f} % "
        f"of its experts{_below(metrics)}\n"
        f"trace {trace['name']}: {trace['num_tokens']} tokens, {trace['num_requests']} requests{routing}",
        highlight=False,
        soft_wrap=True,
    )
    compare = metrics["compare"] or {}
    base = compare.get("on_demand", {}).get("stall_ns")
    has_host, has_storage = "num_host" in metrics, "storage" in metrics
    columns = [one for one in _COLUMNS if compare or one != _SHARE] + list(_HOST if has_host else ())
    columns += list(_STORAGE if has_storage else ())
    rows = named_runs(metrics, title)
    cells = [_row(name, one, base, bool(compare)) + (_host_cells(one) if has_host else []) for name, one in rows]
    if has_storage:
        cells = [row + _storage_cells(one) for row, (_, one) in zip(cells, rows, strict=True)]
    styles = ["bold", *[""] * (len(rows) - 1)]
    bounds = metrics["bounds"]
    if bounds and bounds["floor_ns"] is not None:
        floor = bounds["floor_ns"] / max(metrics["num_tokens"], 1) / 1e6
        cells.append(["floor", "", f"{floor:.3f}", *[""] * (len(columns) - 2)])
        styles.append("dim")
    print_columns(console, ["policy", *columns], cells, styles)
    if "assumed" in metrics:
        console.print(range_line(metrics), highlight=False, soft_wrap=True)
    _print_notes(console, metrics, folder, [*solved(metrics), *_unfilled(cfg, metrics), *first_touches(metrics), *more])


def _room(capacity: Mapping[str, Any]) -> str:
    """Slots, or GB where experts have unlike sizes."""
    return f"{capacity['bytes'] / 1e9:.3g} GB" if "bytes" in capacity else f"{capacity['num_slots']} slots"


def remarks_of(cfg: Mapping[str, Any], work: Workload) -> list[str]:
    """What is said below a run's table of its memory and its start, and of a model that was read from a file."""
    note = start_note(cfg)
    return [
        *notes_of(work),
        *([] if note is None else [note]),
        *remarks(work.model, work.model_file),
        *size_remarks(cfg["model"], work.model, work.trace, work.model_file),
    ]


def notes_of(work: Workload) -> list[str]:
    """Those of them that a line of a sweep has, too."""
    return [
        *incomplete(work.model_file),
        *memory_note(work),
        *batch_notes(work.trace, work.batches.config),
        *decode_notes(work.batches),
    ]


def memory_note(work: Workload) -> list[str]:
    """That the slots that were asked for are more than an engine can count on, beside all other weights: no error,
    since what more memory would bring is a question of its own. Empty where they fit."""
    model = work.model
    experts = work.num_slots * model.mean_expert_bytes if work.room_bytes is None else work.room_bytes
    taken = (experts + model.non_expert_bytes) / 1e9
    most = work.hardware.memory_gb
    if taken <= most:
        return []
    return [
        f"these slots and all other weights take {taken:.1f} GB, and {work.hardware.name} has {most:g} to count on: "
        f"say gpu_memory_gb={most:g} for what fits"
    ]


def print_line(
    console: Console,
    metrics: dict[str, Any],
    folder: str,
    title: str,
    cfg: Mapping[str, Any],
    more: Iterable[str] = (),
) -> None:
    """One line a run, for sweeps. title, cfg, more: as in `print_report`."""
    mean = metrics["tpot_ms"]["mean"]
    place = f"{hardware_title(metrics)}/{stack_title(metrics)} at {100 * metrics['capacity']['residency']:.1f} %"
    tpot = f"TPOT {'–' if mean is None else f'{mean:.3f}'} ms{range_words(metrics)}"
    times = f"{tpot}, stall {_per_token(metrics, 'stall_ns')} ms/token"
    name = f"{escape(title)}{_chosen(cfg, metrics)}"
    routing = f" ({metrics['assumed']['routing']})" if "assumed" in metrics else ""
    console.print(f"{name} on {place}{routing}: {times} → {folder}", highlight=False, soft_wrap=True)
    for note in [*solved(metrics), *_unfilled(cfg, metrics), *first_touches(metrics), *more]:
        console.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)


def _print_notes(console: Console, metrics: dict[str, Any], folder: str | None, more: Iterable[str]) -> None:
    notes = []
    if metrics["uses_future"]:
        notes.append("policy or start state read ahead in the trace: a reference, not something that can be deployed")
    if metrics["num_streamed_layers"]:
        notes.append(
            f"{metrics['num_streamed_layers']} layer passes demanded more experts than there were slots: "
            "they streamed through"
        )
    if metrics["link"]["utilisation"] > 0.95:
        notes.append("the link is busy all the time: no prefetch can hide these copies, only fewer of them")
    share = f"; {_SHARE}: the share of its stall that is left" if metrics["compare"] else ""
    kinds = [
        "late",
        "miss",
        *(["host"] if "num_host" in metrics else []),
        *(["storage"] if "storage" in metrics else []),
    ]
    notes.append(f"stall, {', '.join(kinds[:-1])} and {kinds[-1]} are per token{share}")
    if f"lru{WITH_PLACE}" in (metrics["compare"] or {}):
        notes.append(f"…{WITH_PLACE}: with this run's place; the other runs beside compute on the GPU alone")
    if "num_host" in metrics:
        notes.append(f"the host's processor was busy for {100 * metrics['host']['utilisation']:.1f} % of the time")
    if "storage" in metrics:
        busy, read = metrics["storage"]["utilisation"], metrics["storage"]["bytes"]
        notes.append(f"storage was read for {100 * busy:.1f} % of the time, {read / 1e9:.2f} GB in all")
    if "clairvoyant" in (metrics["compare"] or {}):
        notes.append("clairvoyant: the best of five schedules that know the future")
    if metrics["bounds"] and metrics["bounds"]["floor_ns"] is not None:
        above = " and this host memory" if "storage" in metrics else ""
        notes.append(f"floor: no schedule with these slots{above} is faster")
    redundant = metrics["prefetch"]["redundant"]
    if redundant is not None and metrics["prefetch"]["issued"]:
        notes.append(
            f"{redundant} of {metrics['prefetch']['useful']} useful prefetches were redundant: the same "
            "policy without prefetch hit there too"
        )
    for note in [*notes, *more]:
        lines = textwrap.wrap(
            note, max(console.width, _LEAST), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
        console.print("\n".join(lines), style="dim", highlight=False, markup=False, soft_wrap=True)
    if folder is not None:
        console.print(f"written to {folder}", highlight=False, soft_wrap=True)
