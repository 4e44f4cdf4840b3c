"""`python -m sim`: one configuration, one run, one folder; or with -m a sweep of them."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from expertflow.observer import Observer
from expertflow.parts import Place
from expertflow.policy import Policy
from sim.console import version_line
from sim.job.beside import WITH_PLACE, answerable, baselines_with_place, describe, run_asked, run_baselines
from sim.job.configure import checked
from sim.job.decided import Decided, asked, stands
from sim.job.help import register
from sim.job.keys import PINS
from sim.job.limit import limited
from sim.job.output import IGNORED, begin_folder, of_one_job, provenance, results_of, to_json, write_text
from sim.job.place import make_place
from sim.job.report import print_line, print_report
from sim.job.run_cli import as_job, is_sweep, run_hydra
from sim.job.setup import Transfer, Workload, make_policy, make_workload, start_note
from sim.job.title import policy_title
from sim.machine.run import best_clairvoyant, run_floor, run_policy
from sim.paths import CONF


def slug(overrides: str) -> str:
    """A folder name from Hydra's override string: short, safe, and different for different overrides."""
    plain = "".join(c if c.isalnum() or c in "=,._-" else "-" for c in overrides.replace("+", "")) or "defaults"
    if len(plain) <= 120:
        return plain
    return f"{plain[:100]}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"


OmegaConf.register_new_resolver("slug", slug, replace=True)
register()


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Run what `cfg` says; returns TPOT in ms, so that Hydra's optimisers can use it."""
    return as_job(run_configured, cfg)


def run_configured(cfg: DictConfig) -> float | None:
    """One job: check, run, write, print."""
    started = time.perf_counter()
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    plain = checked(cfg)
    work = make_workload(plain)
    mark = asked({k: v for k, v in plain.items() if k not in IGNORED}, work.trace_sha256, work.model)
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 120)
    with of_one_job(folder):
        if plain["skip_done"] and stands(folder / "DONE", mark, results_of(folder, plain)):
            console.print(f"done before: {folder}", highlight=False, soft_wrap=True)
            return None
        begin_folder(folder, cfg)
        with Decided(mark, __name__, plain) as decided, limited(plain["timeout_s"]):
            metrics = run_job(plain, work, folder)
        write_text(folder / "metrics.json", to_json(metrics))
        wall_s = time.perf_counter() - started
        write_text(folder / "provenance.json", to_json(provenance(overrides, work.trace_sha256, wall_s)))
        write_text(folder / "DONE", decided.to_json())
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print_line(console, metrics, relative(folder), policy_title(plain["policy"]))
    else:
        print_report(console, metrics, relative(folder), policy_title(plain["policy"]), start_note(plain))
    mean = metrics["tpot_ms"]["mean"]
    return None if mean is None else float(mean)


def run_job(cfg: dict[str, Any], work: Workload, folder: Path | None) -> dict[str, Any]:
    """The metrics of one configuration, with the runs beside it; timeline and events go to `folder`."""
    policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    run = partial(run_policy, work)
    with Recorders(cfg, work, folder) as recorders:
        asked_for = run_asked(cfg, work, policy, transfer, run, recorders.observers)
    metrics = describe(work, policy, cfg["policy"]["name"]) | asked_for
    with answerable(policy):
        place = partial(make_place, cfg["policy"]["place"], work.trace) if policy.places else None
        metrics["compare"], metrics["bounds"] = compare_runs(work, cfg["compare"], place, transfer)
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
        from sim.views.events import EventTable
        from sim.views.timeline import Timeline

        self.folder = folder
        num_experts = work.model.num_experts
        self.timeline = Timeline(cfg["policy"]["name"], num_experts) if cfg["timeline"] and folder else None
        self.events = EventTable(folder / "events.parquet", num_experts) if cfg["events"] and folder else None
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


def kept(words: Sequence[str]) -> str:
    """What is said when the command of these words is told to stop."""
    if not is_sweep(words):
        return "the run has no result; give the same command again"
    key = "hydra.sweep.dir="
    folder = next(
        (word.removeprefix(key) for word in words if word.startswith(key)), "FOLDER, the last one in multirun,"
    )
    return f"finished runs are kept: the same command with {key}{folder} skip_done=true goes on"


def relative(folder: Path) -> str:
    """`folder` as seen from here, if it lies below."""
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def cli() -> int:
    """Entry point. Of `--version`, Hydra would tell its own."""
    words = sys.argv[1:]
    if words == ["--version"]:
        print(version_line())
        return 0
    if is_sweep(words):
        # A sweep; only now, since it loads joblib.
        from sim.job.pool import use_workers

        use_workers()
    return run_hydra(main, kept(words))


__all__ = ["Policy", "Transfer", "cli", "main", "run_job", "slug"]
