"""The run that a configuration asks for and the runs beside it, wired once for both worlds.

`Run` is one of them on whatever machine: the simulated one, or a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from expertflow.evictions.keep_nothing import KeepNothing
from expertflow.evictions.lru import LRU
from expertflow.horizons.fixed import FixedHorizon
from expertflow.metrics import SCHEMA
from expertflow.observer import Observer
from expertflow.orders.resident_first import ResidentFirst
from expertflow.parts import Place
from expertflow.policy import Policy
from expertflow.predictors.none import NoPredictor
from expertflow.selections.top_k import TopK
from sim.job import assumed
from sim.job.link import chosen_link
from sim.job.predictor import predictor_name
from sim.job.redundancy import HitRecord, RedundancyCounter, without_prefetch
from sim.job.setup import Transfer, Workload, load_chunks, make_policy
from traces.processes.progress import shown

WITH_PLACE = "_placed"
"""Behind the name of a run beside one whose policy may place experts on the host: it places them alike."""
Run = Callable[[Policy, Transfer, Sequence[Observer]], dict[str, Any]]
"""Runs a policy over the job's workload, told to the observers; its metrics."""


def describe(work: Workload, policy: Policy, cfg: Mapping[str, Any], world: str = "sim") -> dict[str, Any]:
    """What was run, as the head of the metrics; world: sim, cuda or cpu. cfg: the configuration of the run.

    A start that was chosen from the whole trace uses the future.
    """
    link = chosen_link(cfg)
    by_bytes = {} if work.room_bytes is None else {"bytes": work.room_bytes}
    return {
        "schema": SCHEMA,
        "world": world,
        "policy": cfg["policy"]["name"],
        "predictor": predictor_name(cfg["policy"], work.trace),
        "hardware": work.hardware.name,
        **({} if link is None else {"link_preset": link.metrics()}),
        "model": work.model.name,
        "stack": work.stack.name,
        "trace": {
            "name": work.trace.name,
            "sha256": work.trace_sha256,
            "num_tokens": work.batches.num_tokens,
            "num_requests": work.batches.num_requests,
        },
        **_unfilled(work),
        "uses_future": policy.uses_future or work.start_reads_ahead,
        **storage_preset(work),
        "capacity": {
            "num_slots": work.num_slots,
            "residency": work.residency,
            **({} if work.storage is None else {"host_slots": work.host_slots}),
            **by_bytes,
        },
        **assumed.head(work.trace),
    }


def _unfilled(work: Workload) -> dict[str, Any]:
    """How many requests decode together at most, where the run has fewer than batch_size."""
    config, most = work.batches.config, work.batches.num_requests
    return {"max_together": most} if not config.as_recorded and most < config.batch_size else {}


def storage_preset(work: Workload) -> dict[str, Any]:
    """What a result says of the storage below host memory; nothing where there is none."""
    storage = work.storage
    if storage is None:
        return {}
    return {"storage_preset": {"name": storage.name, "eviction": storage.eviction, "queue_depth": storage.queue_depth}}


def baselines() -> dict[str, tuple[Policy, Transfer]]:
    """The runs beside a single run: no reuse at all, and a cache without prefetch."""
    return {
        "on_demand": (_without_prefetch(KeepNothing()), Transfer()),
        "lru": (_without_prefetch(LRU()), Transfer()),
    }


def _without_prefetch(eviction: LRU, place: Place | None = None) -> Policy:
    return Policy(NoPredictor(), FixedHorizon(1), TopK(), eviction, ResidentFirst(), place=place)


def baselines_with_place(place: Callable[[], Place], transfer: Transfer) -> dict[str, tuple[Policy, Transfer]]:
    """The same two with the place of the run that they are beside, and its staging slots."""
    staging = Transfer(staging_slots=transfer.staging_slots)
    return {
        f"on_demand{WITH_PLACE}": (_without_prefetch(KeepNothing(), place()), staging),
        f"lru{WITH_PLACE}": (_without_prefetch(LRU(), place()), staging),
    }


def run_asked(
    cfg: Mapping[str, Any],
    work: Workload,
    policy: Policy,
    transfer: Transfer,
    run: Run,
    observers: Sequence[Observer] = (),
    main: Run | None = None,
    full: Workload | None = None,
) -> dict[str, Any]:
    """The metrics of `policy`, made of `cfg`; where that asks for it, with the prefetches that were redundant: the same
    policy without prefetch, which runs first, would have hit as well.

    work: what is run. full: what policies are made for, where that differs: a replay may run a smaller model. main: how
    `policy` itself is run, where that differs from `run`.
    """
    name = cfg["policy"]["name"]
    if not cfg["count_redundant"]:
        with shown(f"running {name}"):
            return (main or run)(policy, transfer, observers)
    hits = HitRecord()
    with shown(f"running {name} without prefetch"):
        run(*make_policy(without_prefetch(cfg["policy"]), full or work, cfg["seed"]), [hits])
    redundancy = RedundancyCounter(hits, len(load_chunks(work)), work.warmup_forwards)
    with shown(f"running {name}"):
        metrics = (main or run)(policy, transfer, [redundancy, *observers])
    metrics["prefetch"]["redundant"] = redundancy.num_redundant
    return metrics


@contextmanager
def answerable(policy: Policy) -> Iterator[None]:
    """Around runs beside that of `policy`: where parts of a user's own have run, an identity that is broken may be
    theirs (PartError)."""
    try:
        yield
    except AssertionError as error:
        if not policy.guarded:
            raise
        raise policy.unsound(error) from error


def run_baselines(run: Run, beside: Mapping[str, tuple[Policy, Transfer]] | None = None) -> dict[str, dict[str, Any]]:
    """The metrics of each of `beside`; None: of `baselines`."""
    found = {}
    for name, (policy, transfer) in (baselines() if beside is None else beside).items():
        with shown(f"running {name} beside"):
            found[name] = run(policy, transfer, ())
    return found
