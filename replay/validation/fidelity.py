"""How far the simulator is from the machine: the same policy over the same trace, simulated and replayed."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.forward import Forward
from expertflow.observer import Observer
from expertflow.parts import Effort
from replay.calibration.profile import simulated_as
from replay.host_figures import figures_for, with_host
from replay.machine.device import Device
from replay.machine.rig import Rig
from replay.validation.beside import replay_on_tape, stack_pads_ns
from replay.validation.lateness import late_ns
from replay.validation.plan import Case
from sim.job.setup import Workload, make_policy
from sim.machine.run import run_policy
from sim.specs.hardware import Hardware, Stack

STALL_COUNTS_FROM = 0.01
"""A stall below this share of the elapsed time is judged as a share of that time: relative to itself, its error would
be noise."""
_TIMES = ("elapsed_ns", "compute_ns", "overhead_ns", "stall_ns", "late_stall_ns", "miss_stall_ns")
_COUNTS = ("num_hits", "num_late", "num_misses")


class ForwardTimes(Observer):
    """When each forward ended, ns."""

    def __init__(self) -> None:
        self.ends_ns = array("q")

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        self.ends_ns.append(now_ns)

    def lasting_ns(self) -> npt.NDArray[np.int64]:
        """[F] how long each forward took."""
        ends = np.asarray([0, *self.ends_ns], dtype=np.int64)
        return ends[1:] - ends[:-1]


@dataclass(frozen=True)
class Ran:
    """One run in either world. late_ns: how long the device waited for a late host (`replay.validation.lateness`).
    ticks_ns: how fast that was, forward by forward."""

    metrics: Mapping[str, Any]
    times: ForwardTimes
    late_ns: int = 0
    ticks_ns: Sequence[int] = ()


def measure(
    rig: Rig,
    raw: Mapping[str, Any],
    name: str,
    cfg: Mapping[str, Any],
    full: Workload,
    work: Workload,
    case: Case,
    observers: Sequence[Observer] = (),
) -> Ran:
    """Replay `case` on `rig` once; its place, if it has one, is told what `predict` tells it.

    full: the workload before `work` was scaled. PartialRunError if the device is lost.
    """
    policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
    times = ForwardTimes()
    figures = None
    if policy.places:
        hardware, stack = simulated_on(raw, name, rig.device, full, work, case)
        figures = figures_for(replace(work, hardware=hardware, stack=stack), policy, transfer, rig.device)
    metrics, taped = replay_on_tape(rig, work, policy, transfer, [times, *observers], figures)
    late = late_ns(taped.tape, *stack_pads_ns(raw, work.stack), taped.results)
    return Ran(metrics, times, late, taped.ticks_ns)


def simulated_on(
    raw: Mapping[str, Any], name: str, device: Device, full: Workload, work: Workload, case: Case
) -> tuple[Hardware, Stack]:
    """What simulates `case` on `device`; the host, if any expert is computed there, as `full` describes it."""
    hardware, stack = simulated_as(raw, name, work.model.name, case.policy, work.stack)
    return with_host(hardware, device, full, work), stack


def predict(
    raw: Mapping[str, Any],
    name: str,
    device: Device,
    cfg: Mapping[str, Any],
    full: Workload,
    work: Workload,
    case: Case,
    observers: Sequence[Observer] = (),
) -> Ran:
    """Simulate one case with what `raw` says of the machine called `name`."""
    hardware, stack = simulated_on(raw, name, device, full, work, case)
    policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
    # What this policy's decisions take was measured: hardware.decide_ns is all of it.
    policy.effort = Effort()
    times = ForwardTimes()
    metrics = run_policy(replace(work, hardware=hardware, stack=stack), policy, transfer, [times, *observers])
    return Ran(metrics, times)


def row_of(case: Case, measured: Sequence[Ran], predicted: Ran) -> dict[str, Any]:
    """Both worlds beside each other; times in ms per token, errors as shares of the measured. Of several measured runs
    the median of each figure counts, and their spread, (most - least) / median, is its noise."""
    row: dict[str, Any] = {
        "model": case.model,
        "stack": case.stack,
        "residency": case.residency,
        "batch_size": case.batch_size,
        "policy": case.policy,
    }
    runs, simulated = [_figures(run.metrics) for run in measured], _figures(predicted.metrics)
    for name, value in simulated.items():
        values = [run[name] for run in runs]
        # A count that occurred, not one between two.
        row[f"{name}_measured"] = (statistics.median_low if isinstance(value, int) else statistics.median)(values)
        row[f"{name}_predicted"] = value
    row["num_runs"] = len(measured)
    for name, choose in (("least", min), ("most", max)):
        row[f"tpot_ms_{name}"] = choose(run["tpot_ms"] for run in runs)
    row["tpot_noise"] = _spread([run["tpot_ms"] for run in runs], row["tpot_ms_measured"])
    row["stall_noise"] = _spread([run["stall_ms"] for run in runs], row["stall_ms_measured"])
    row["stall_noise_of_tpot"] = _spread([run["stall_ms"] for run in runs], row["elapsed_ms_measured"])
    row["late_share"] = statistics.median(run.late_ns / run.metrics["elapsed_ns"] for run in measured)
    row["tpot_error"] = row["tpot_ms_predicted"] / row["tpot_ms_measured"] - 1
    row["stall_error"] = _error(row["stall_ms_predicted"], row["stall_ms_measured"])
    row["stall_error_of_tpot"] = (row["stall_ms_predicted"] - row["stall_ms_measured"]) / row["elapsed_ms_measured"]
    row["stall_counts"] = row["stall_ms_measured"] >= STALL_COUNTS_FROM * row["elapsed_ms_measured"]
    row["link_error"] = _error(row["link_ms_predicted"], row["link_ms_measured"])
    real = np.median([run.times.lasting_ns() for run in measured], axis=0)
    shares = predicted.times.lasting_ns() / np.maximum(real, 1) - 1
    for percent in (5, 50, 95):
        row[f"forward_error_p{percent}"] = float(np.percentile(shares, percent))
    return row


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What of one run stands in the table, without the world's name."""
    tokens = max(metrics["num_tokens"], 1)
    found: dict[str, Any] = {f"{key[:-3]}_ms": metrics[key] / tokens / 1e6 for key in _TIMES}
    found["tpot_ms"] = metrics["tpot_ms"]["mean"]
    found["link_ms"] = metrics["link"]["busy_ns"] / tokens / 1e6
    found["link_gb_per_s"] = sum(metrics["bytes"].values()) / max(metrics["link"]["busy_ns"], 1)
    if "num_host" in metrics:
        # Only of a policy with a place.
        found |= {"host_stall_ms": metrics["host_stall_ns"] / tokens / 1e6, "num_host": metrics["num_host"]}
        found["host_ms"] = metrics["host"]["busy_ns"] / tokens / 1e6
    return found | {key: metrics[key] for key in _COUNTS} | {"prefetches": metrics["prefetch"]["issued"]}


def _spread(values: Sequence[float], middle: float) -> float:
    """(most - least) / middle, a share; 0 where `middle` is 0, as for a stall that does not occur."""
    return (max(values) - min(values)) / middle if middle > 0 else 0.0


def _error(predicted: float, measured: float) -> float | None:
    return predicted / measured - 1 if measured > 0 else None
