"""What one configuration asks for, run: its policy, the runs beside it and the bounds; and kept in a folder.

The command line (`sim.app`), the Python interface (`sim.api`) and pinned runs (`sim.regress`) all go through here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertflow.observer import Observer
from expertflow.parts import Place
from expertflow.policy import Policy
from sim.job import assumed
from sim.job.assumed import at_locality, ends_beside
from sim.job.beside import WITH_PLACE, answerable, baselines_with_place, describe, run_asked, run_baselines
from sim.job.decided import Decided, asked, stands
from sim.job.keys import PINS
from sim.job.limit import limited
from sim.job.model import recorded
from sim.job.output import IGNORED, of_one_job, provenance, results_of, to_json, write_text
from sim.job.place import make_place
from sim.job.setup import Transfer, Workload, make_policy, make_workload
from sim.machine.run import best_clairvoyant, run_floor, run_policy

if TYPE_CHECKING:
    from sim.views.events import EventTable
    from sim.views.timeline import Timeline


def slug(overrides: str) -> str:
    """A folder name from Hydra's override string: short, safe, and different for different overrides."""
    plain = "".join(c if c.isalnum() or c in "=,._-" else "-" for c in overrides.replace("+", "")) or "defaults"
    if len(plain) <= 120:
        return plain
    return f"{plain[:100]}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"


def run_job(
    cfg: dict[str, Any],
    work: Workload,
    folder: Path | None,
    made: tuple[Policy, Transfer] | None = None,
    observers: Sequence[Observer] = (),
    workers: bool = False,
) -> dict[str, Any]:
    """The metrics of one configuration, with the runs beside it; timeline and events go to `folder`.

    made: the policy of `cfg`, where it has been made already. observers: are told of its run as well.
    workers: what a range needs besides may run in processes of its own (see `sim.job.assumed`).
    """
    policy, transfer = made or make_policy(cfg["policy"], work, cfg["seed"])
    run = partial(run_policy, work)
    with ends_beside(cfg, work.trace, run_end, workers) as put_range:
        with Recorders(cfg, work, folder) as recorders:
            asked_for = run_asked(cfg, work, policy, transfer, run, [*recorders.observers, *observers])
        metrics = describe(work, policy, cfg) | asked_for
        with answerable(policy):
            place = partial(make_place, cfg["policy"]["place"], work.trace) if policy.places else None
            metrics["compare"], metrics["bounds"] = compare_runs(work, cfg["compare"], place, transfer)
            put_range(metrics)
    return metrics


def run_end(cfg: Mapping[str, Any], locality: str) -> dict[str, Any]:
    """The metrics of the policy alone at another locality of assumed routing."""
    at_end = at_locality(cfg, locality)
    work = make_workload(at_end)
    return run_policy(work, *make_policy(at_end["policy"], work, at_end["seed"]))


@dataclass(frozen=True)
class Kept:
    """A folder that a run's result is kept in.

    job: the module that runs it. begin: called once the folder is the run's own, so that nothing in it counts. words:
    the overrides, for the record. started: of the job, by `time.perf_counter`. object_given: a part is a class or an
    object of Python, so that nothing tells whether the next one is the same.
    """

    folder: Path
    job: str
    begin: Callable[[], None]
    words: Sequence[str]
    started: float
    object_given: bool = False


def run_kept(
    kept: Kept, cfg: dict[str, Any], work: Workload, run: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """The metrics that `run` gives, written into the folder, `DONE` last; None if this very run's were there before and
    `skip_done` says to leave them."""
    folder = kept.folder
    more = ("with an object",) if kept.object_given else ()
    mark = asked({key: value for key, value in cfg.items() if key not in IGNORED}, work.trace_sha256, work.model, *more)
    with of_one_job(folder):
        if cfg["skip_done"] and stands(folder / "DONE", mark, results_of(folder, cfg)):
            return None
        kept.begin()
        with Decided(mark, kept.job, cfg) as decided, limited(cfg["timeout_s"]):
            metrics = run()
        write_text(folder / "metrics.json", to_json(metrics))
        wall_s = time.perf_counter() - kept.started
        origin = provenance(list(kept.words), work.trace_sha256, wall_s) | recorded(work.model, work.model_file)
        origin |= assumed.head(work.trace)
        write_text(folder / "provenance.json", to_json(origin))
        write_text(folder / "DONE", decided.to_json())
    return metrics


def compare_runs(
    work: Workload, how: str, place: Callable[[], Place] | None, transfer: Transfer
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Metrics of the runs beside this one, and the bounds, over the same workload: all, the floor alone, or none.

    place: makes that of the run, if it may answer anything but the GPU; then the same runs are made with it as well.
    transfer: the run's.
    """
    if how == "none":
        return None, None
    floor = run_floor(work, with_host=place is not None)
    whole_run = work.warmup_forwards == 0
    bounds: dict[str, Any] = {
        # The floor is of the whole run: with a warm-up left out there is nothing to hold it against.
        "floor_ns": floor.floor_ns if whole_run else None,
        "serial_ns": floor.serial_ns if whole_run else None,
        "min_loads": floor.num_loads,
        "clairvoyant_ns": None,
        "clairvoyant": None,
    }
    if work.storage is not None:
        bounds["min_reads"] = floor.num_reads
    if how == "floor":
        return None, bounds
    # Nothing pinned: a run on the GPU alone may have no other room for what is not.
    free = replace(work, pins=False) if work.start in PINS else work
    compare = run_baselines(partial(run_policy, free))
    name, compare["clairvoyant"] = best_clairvoyant(free)
    bounds |= {"clairvoyant_ns": compare["clairvoyant"]["elapsed_ns"], "clairvoyant": name}
    if place is not None:
        beside = baselines_with_place(place, transfer)
        compare |= {one: run_policy(work, *policy) for one, policy in beside.items()}
        staging = Transfer(staging_slots=transfer.staging_slots)
        name, compare[f"clairvoyant{WITH_PLACE}"] = best_clairvoyant(work, place, staging)
        bounds |= {
            "clairvoyant_placed_ns": compare[f"clairvoyant{WITH_PLACE}"]["elapsed_ns"],
            "clairvoyant_placed": name,
        }
    return compare, bounds


class Recorders:
    """Timeline and event table, if asked for; written at the end, or not at all."""

    def __init__(self, cfg: dict[str, Any], work: Workload, folder: Path | None) -> None:
        # Imported where asked for: the tables' libraries take as long to load as a short run takes.
        self.folder = folder
        num_experts = work.model.num_experts
        self.timeline: Timeline | None = None
        if cfg["timeline"] and folder:
            from sim.views.timeline import Timeline

            self.timeline = Timeline(cfg["policy"]["name"], num_experts)
        self.events: EventTable | None = None
        if cfg["events"] and folder:
            from sim.views.events import EventTable

            has_reads = work.storage is not None
            self.events = EventTable(folder / "events.parquet", num_experts, has_reads=has_reads)
        self.observers: list[Observer] = [one for one in (self.timeline, self.events) if one is not None]

    def __enter__(self) -> Recorders:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            if self.events is not None:
                self.events.abort()
            return
        if self.events is not None:
            self.events.close()
        if self.timeline is not None and self.folder is not None:
            self.timeline.write(self.folder / "timeline.json")
