"""The job of `python -m replay`: one configuration on a real machine, one folder, the same `metrics.json` as a
simulation's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from expertflow.keys import declared
from expertflow.observer import Observer
from expertflow.policy import Policy
from replay.host_figures import figures_for
from replay.keys import HOST_FAULTS, ReplayKeys
from replay.lockstep.log import LogWriter
from replay.lockstep.log_format import LOG_NAME, LogHeader
from replay.lost import DeviceLostError, end
from replay.machine.figures import Figures
from replay.machine.rig import Needs, Rig
from replay.packages import copies_note
from replay.run import Integrity, PartialRunError, memory_of, needs_of, replay_policy, scaled_workload
from replay.settings import Settings, as_found
from sim.app import relative
from sim.execute import Recorders
from sim.job.beside import answerable, baselines, baselines_with_place, describe, run_asked, run_baselines
from sim.job.configure import checked
from sim.job.decided import Decided, asked, stands
from sim.job.limit import limited
from sim.job.model import recorded
from sim.job.output import IGNORED, begin_folder, of_one_job, provenance, results_of, to_json, write_text
from sim.job.place import make_place
from sim.job.report import print_line, print_report, remarks_of
from sim.job.run_cli import Ended
from sim.job.setup import Transfer, Workload, load_chunks, make_policy, make_workload, run_config
from sim.job.title import policy_title
from traces.tables import console_for_tables

WRONG = 1
"""Exit code of a run whose stamps or launches were wrong."""


def replay_configured(cfg: DictConfig) -> float | None:
    """One job: check, run, write, print. Exits with 3 if the device is lost, with 1 if a stamp is wrong."""
    started = time.perf_counter()
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    plain = checked(cfg, declared(ReplayKeys), ("local",))
    _check(plain)
    settings = Settings.of(plain)
    # Before the device is opened: who waits for the folder takes nothing from the run that has it.
    with of_one_job(folder):
        return _replay(cfg, plain, settings, folder, overrides, started)


def _replay(
    cfg: DictConfig, plain: dict[str, Any], settings: Settings, folder: Path, overrides: list[str], started: float
) -> float | None:
    """The job, with its folder held."""
    device = settings.device()
    console = console_for_tables()
    with ExitStack() as stack:
        stack.callback(device.close)
        # Before the machine's memory stands in it: what is left of that differs from run to run.
        told = {key: value for key, value in plain.items() if key not in IGNORED}
        told["machine"] = [settings.machine, device.describe()["name"]]
        plain = as_found(plain, device)
        work = make_workload(plain)
        mark = asked(told, work.trace_sha256, work.model, "replay")
        wrote = results_of(folder, plain, *([LOG_NAME] if settings.log else []))
        if plain["skip_done"] and stands(folder / "DONE", mark, wrote):
            console.print(f"done before: {folder}", highlight=False, soft_wrap=True)
            return None
        begin_folder(folder, cfg, "partial.json", LOG_NAME)
        decided = Decided(mark, __name__, plain)
        try:
            with decided, limited(plain["timeout_s"]):
                job = Job(plain, settings, work, folder, overrides)
                metrics = job.run(device)
        except (PartialRunError, DeviceLostError) as error:
            _write_partial(job, folder, error)
            raise Ended(end(error)) from error
    write_text(folder / "metrics.json", to_json(metrics))
    wall_s = time.perf_counter() - started
    origin = provenance(overrides, work.trace_sha256, wall_s, "replay") | recorded(work.model, work.model_file)
    write_text(folder / "provenance.json", to_json({**origin, "machine": metrics["machine"]}))
    _print(console, metrics, folder, policy_title(plain["policy"]), plain, remarks_of(plain, work))
    integrity = job.integrity
    if integrity is not None and not integrity.sound:
        raise Ended(WRONG)
    write_text(folder / "DONE", decided.to_json())
    mean = metrics["tpot_ms"]["mean"]
    return None if mean is None else float(mean)


def _write_partial(job: Job, folder: Path, error: PartialRunError | DeviceLostError) -> None:
    """Keep what was measured until the device was lost, and say where it is."""
    so_far = error.metrics if isinstance(error, PartialRunError) else {"partial": True, "num_forwards": 0}
    write_text(folder / "partial.json", to_json({**job.head, "reason": str(error), **so_far}))
    print(
        f"error: the device was lost: {error}; what was measured until then is in {relative(folder / 'partial.json')}",
        file=sys.stderr,
    )


def _check(cfg: dict[str, Any]) -> None:
    if cfg["compare"] == "floor":
        raise ValueError("compare=floor belongs to the simulator: a real machine proves no bound; choose full or none")


class Job:
    """One configured replay, and those that its configuration asks for beside it, on one rig."""

    def __init__(
        self,
        cfg: dict[str, Any],
        settings: Settings,
        work: Workload,
        folder: Path | None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.cfg, self.settings, self.folder = cfg, settings, folder
        self.full, self.work = work, scaled_workload(work, settings.scale)
        self.overrides = list(overrides)
        self.policy, self.transfer = make_policy(cfg["policy"], work, cfg["seed"])
        _check_fault(settings, self.policy)
        self.integrity: Integrity | None = None
        self.head = describe(self.work, self.policy, cfg, settings.machine)

    def run(self, device: Any) -> dict[str, Any]:
        """The metrics of all of it."""
        cfg, settings, work = self.cfg, self.settings, self.work
        beside = self._beside() if cfg["compare"] == "full" else {}
        needs = _most(
            [needs_of(work, policy, transfer) for policy, transfer in [(self.policy, self.transfer), *beside.values()]]
        )
        memory = memory_of(work, settings.host_memory_gb)
        rig = Rig(device, work.model, needs, pinned=self.transfer.memory == "pinned", **memory)

        def run(policy: Policy, transfer: Transfer, observers: Sequence[Observer]) -> dict[str, Any]:
            return replay_policy(rig, work, policy, transfer, observers, figures=self._figures(device, policy))[0]

        def main_run(policy: Policy, transfer: Transfer, observers: Sequence[Observer]) -> dict[str, Any]:
            return self._main_run(rig, observers)

        with Recorders(cfg, work, self.folder) as recorders:
            asked_for = run_asked(
                cfg, work, self.policy, self.transfer, run, recorders.observers, main=main_run, full=self.full
            )
        metrics = self.head | asked_for
        with answerable(self.policy):
            metrics["compare"] = run_baselines(run, beside) if beside else None
        metrics["bounds"] = None
        metrics["scale"] = settings.scale
        metrics["integrity"] = None if self.integrity is None else asdict(self.integrity)
        metrics["machine"] = rig.describe(self.transfer.memory)
        return metrics

    def _beside(self) -> dict[str, tuple[Policy, Transfer]]:
        """The runs beside this one; where it may place experts on the host, those with its place as well."""
        if not self.policy.places:
            return baselines()
        place = partial(make_place, self.cfg["policy"]["place"], self.full.trace)
        return baselines() | baselines_with_place(place, self.transfer)

    def _figures(self, device: Any, policy: Policy) -> Figures | None:
        """Of the model as it is: what is paced takes as long at any scale."""
        return figures_for(self.full, policy, self.transfer, device, self.settings.scale)

    def _main_run(self, rig: Rig, observers: Sequence[Observer]) -> dict[str, Any]:
        settings, work = self.settings, self.work
        log = None
        if settings.log and self.folder is not None:
            config = run_config(work, self.transfer, load_chunks(work))
            header = LogHeader(settings.machine, self.cfg, self.overrides, config, work.trace_sha256)
            log = LogWriter(self.folder / LOG_NAME, header)
        try:
            metrics, self.integrity = replay_policy(
                rig,
                work,
                self.policy,
                self.transfer,
                observers,
                verify=settings.verify,
                log=log,
                fault=settings.fault,
                figures=self._figures(rig.device, self.policy),
            )
        except PartialRunError:
            if log is not None:
                log.close()
            raise
        except BaseException:
            if log is not None:
                log.abort()
            raise
        if log is not None:
            log.close()
        return metrics


def _check_fault(settings: Settings, policy: Policy) -> None:
    """ValueError for a fault of the host's worker in a run without one."""
    if settings.fault is not None and settings.fault[0] in HOST_FAULTS and not policy.places:
        raise ValueError(
            f"fault={settings.fault[0]} is of experts on the host, where this policy places none; "
            "choose a place with +policy/place=NAME, or another fault"
        )


def _most(needs: Sequence[Needs]) -> Needs:
    return Needs(
        max(one.num_slots for one in needs), max(one.max_tokens for one in needs), max(one.max_context for one in needs)
    )


def _print(
    console: Console, metrics: dict[str, Any], folder: Path, title: str, cfg: dict[str, Any], more: Iterable[str]
) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print_line(console, metrics, relative(folder), title, cfg)
        return
    print_report(console, metrics, None, title, cfg)
    for note in [*notes(metrics), *more]:
        console.print(f"  {note}", style="dim", highlight=False)
    console.print(f"written to {relative(folder)}", highlight=False, soft_wrap=True)


def notes(metrics: dict[str, Any]) -> list[str]:
    """What a reader of a replay's numbers must know."""
    machine, stack, integrity = metrics["machine"], metrics["stack"], metrics["integrity"]
    lines = [
        f"measured on {machine['name']} ({metrics['world']}), torch {machine['torch']}, computing in "
        f"{machine['dtype']}, experts in {machine['host_memory']} host memory"
    ]
    if note := copies_note(machine):
        lines.append(note)
    if metrics["scale"] > 1:
        lines.append(f"the model's widths are divided by {metrics['scale']}: times are this machine's, not the model's")
    launches = metrics["launches"]
    if launches["layer_pad_ns"]:
        lines.append(
            f"stack={stack}: its overhead, {launches['layer_pad_ns'] / 1e6:g} ms a layer, is spent doing "
            "nothing on the compute stream"
        )
    if launches["kv_grid"] and metrics["world"] == "cuda":
        lines.append(
            f"decode reads KV lengths rounded up to multiples of {launches['kv_grid']} tokens, for which its "
            "kernels are captured"
        )
    if launches["kv_grid"] and launches["num_unprepared"]:
        lines.append(
            f"{launches['num_unprepared']} forwards with a prompt launched attention kernel by kernel: prompts are "
            "captured, the shortest first, while there is room"
        )
    lines.extend(machine["warnings"])
    if integrity is not None:
        lines.append(
            f"{integrity['num_wrong']} wrong stamps in {integrity['num_executions']} expert executions "
            f"({integrity['num_checks']} checks); checking takes time: these times are no measurement"
        )
        if integrity["first"] is not None:
            first = integrity["first"]
            lines.append(
                f"first wrong stamp: forward {first['forward']}, layer {first['layer']}, one of expert keys "
                f"{', '.join(map(str, first['keys']))}"
            )
        if integrity["num_mislaunched"]:
            wrong = integrity["first_mislaunched"]
            lines.append(
                f"{integrity['num_mislaunched']} experts were not launched once, as their layer demands; first: "
                f"forward {wrong['forward']}, layer {wrong['layer']}, left out {list(wrong['left_out'])}, "
                f"launched too often {list(wrong['too_often'])}"
            )
    return lines
