"""How far the simulator is from the machine: the same policy over the same trace, simulated and replayed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.forward import Forward
from expertflow.observer import Observer
from expertflow.parts import Effort
from replay.profile import simulated_as
from replay.rig import Rig
from replay.run import replay_policy
from sim.run import run_policy
from sim.setup import Workload, make_policy
from sim.timeline import Timeline

STALL_COUNTS_FROM = 0.01
"""A stall below this share of the elapsed time is judged as a share of it: its own error would be noise over noise."""


@dataclass(frozen=True)
class Case:
    """One comparison: everything that differs between two rows of the table."""

    model: str
    stack: str
    residency: float
    batch_size: int
    policy: str

    def __str__(self) -> str:
        return (f"{self.model} {self.stack} {100 * self.residency:.0f} % batch {self.batch_size} {self.policy}")


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


def compare(rig: Rig, raw: Mapping[str, Any], name: str, cfg: Mapping[str, Any], full: Workload, work: Workload,
            case: Case, repeat: int = 1, before_each: Callable[[], None] | None = None,
            timelines: tuple[Timeline, Timeline] | None = None) -> dict[str, Any]:  # fmt: skip
    """Simulate `case` and replay it `repeat` times, of which the one of median TPOT counts; one row of the table.

    full: the workload before `work` was scaled. before_each: called before each replay; may bring `raw` up to date.
    timelines: (measured, predicted), filled by the last run of each.
    """
    replays = []
    for _ in range(repeat):
        if before_each is not None:
            before_each()
        policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
        real_times = ForwardTimes()
        seen: list[Observer] = [real_times] if timelines is None else [real_times, timelines[0]]
        replays.append((replay_policy(rig, work, policy, transfer, seen)[0], real_times))
    hardware, stack = simulated_as(raw, name, work.model.name, case.policy, work.stack)
    policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
    # What this policy's decisions take was measured: hardware.decide_ns is all of it.
    policy.effort = Effort()
    sim_times = ForwardTimes()
    seen = [sim_times] if timelines is None else [sim_times, timelines[1]]
    predicted = run_policy(replace(work, hardware=hardware, stack=stack), policy, transfer, seen)
    replays.sort(key=lambda run: run[0]["elapsed_ns"])
    measured, real_times = replays[len(replays) // 2]
    row = row_of(case, measured, predicted, real_times, sim_times)
    row["tpot_ms_least"], row["tpot_ms_most"] = (replays[place][0]["tpot_ms"]["mean"] for place in (0, -1))
    return row


def row_of(case: Case, measured: Mapping[str, Any], predicted: Mapping[str, Any], real: ForwardTimes,
           sim: ForwardTimes) -> dict[str, Any]:  # fmt: skip
    """Both worlds beside each other; times in ms per token, errors as shares of the measured."""
    row: dict[str, Any] = {"model": case.model, "stack": case.stack, "residency": case.residency,
                           "batch_size": case.batch_size, "policy": case.policy}  # fmt: skip
    for key in ("elapsed_ns", "compute_ns", "overhead_ns", "stall_ns", "late_stall_ns", "miss_stall_ns"):
        for world, metrics in (("measured", measured), ("predicted", predicted)):
            row[f"{key[:-3]}_ms_{world}"] = metrics[key] / max(metrics["num_tokens"], 1) / 1e6
    for world, metrics in (("measured", measured), ("predicted", predicted)):
        row[f"tpot_ms_{world}"] = metrics["tpot_ms"]["mean"]
        row[f"link_ms_{world}"] = metrics["link"]["busy_ns"] / max(metrics["num_tokens"], 1) / 1e6
        row[f"link_gb_per_s_{world}"] = sum(metrics["bytes"].values()) / max(metrics["link"]["busy_ns"], 1)
        for key in ("num_hits", "num_late", "num_misses"):
            row[f"{key}_{world}"] = metrics[key]
        row[f"prefetches_{world}"] = metrics["prefetch"]["issued"]
    row["tpot_error"] = row["tpot_ms_predicted"] / row["tpot_ms_measured"] - 1
    row["stall_error"] = _error(row["stall_ms_predicted"], row["stall_ms_measured"])
    row["stall_error_of_tpot"] = (row["stall_ms_predicted"] - row["stall_ms_measured"]) / row["elapsed_ms_measured"]
    row["stall_counts"] = row["stall_ms_measured"] >= STALL_COUNTS_FROM * row["elapsed_ms_measured"]
    row["link_error"] = _error(row["link_ms_predicted"], row["link_ms_measured"])
    shares = sim.lasting_ns() / np.maximum(real.lasting_ns(), 1) - 1
    for percent in (5, 50, 95):
        row[f"forward_error_p{percent}"] = float(np.percentile(shares, percent))
    return row


def _error(predicted: float, measured: float) -> float | None:
    return predicted / measured - 1 if measured > 0 else None


def rank_agreement(rows: Sequence[Mapping[str, Any]], differing: float) -> dict[str, Any]:
    """Pairs of policies under equal conditions that differ by more than `differing` in measured TPOT: how many the
    simulator orders the same way."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "stack", "residency", "batch_size"))
        groups.setdefault(key, []).append(row)
    pairs = agreeing = 0
    against: list[str] = []
    for key, members in groups.items():
        for one, other in combinations(members, 2):
            low, high = sorted((one, other), key=lambda row: row["tpot_ms_measured"])
            if high["tpot_ms_measured"] <= low["tpot_ms_measured"] * (1 + differing):
                continue
            pairs += 1
            if low["tpot_ms_predicted"] < high["tpot_ms_predicted"]:
                agreeing += 1
            else:
                against.append(f"{low['policy']} before {high['policy']} in {' '.join(map(str, key))}")
    return {"differing_by": differing, "pairs": pairs, "agreeing": agreeing, "against": against}


def judge(rows: Sequence[Mapping[str, Any]], tpot_bar: float, stall_bar: float) -> dict[str, Any]:
    """Worst errors and the rows that miss a bar. A small stall is held against the TPOT bar, as a share of TPOT."""
    missed = []
    for row in rows:
        label = str(Case(*(row[name] for name in ("model", "stack", "residency", "batch_size", "policy"))))
        if abs(row["tpot_error"]) > tpot_bar:
            missed.append(f"{label}: TPOT {100 * row['tpot_error']:+.1f} %")
        if row["stall_counts"] and abs(row["stall_error"]) > stall_bar:
            missed.append(f"{label}: stall {100 * row['stall_error']:+.1f} %")
        elif not row["stall_counts"] and abs(row["stall_error_of_tpot"]) > tpot_bar:
            missed.append(f"{label}: stall off by {100 * row['stall_error_of_tpot']:+.1f} % of TPOT")
    stalls = [abs(row["stall_error"]) for row in rows if row["stall_counts"]]
    return {
        "num_rows": len(rows),
        "tpot_bar": tpot_bar,
        "stall_bar": stall_bar,
        "worst_tpot_error": max((abs(row["tpot_error"]) for row in rows), default=None),
        "mean_tpot_error": float(np.mean([abs(row["tpot_error"]) for row in rows])) if rows else None,
        "worst_stall_error": max(stalls, default=None),
        "mean_stall_error": float(np.mean(stalls)) if stalls else None,
        "rows_with_stall": len(stalls),
        "missed": missed,
        "ranks": rank_agreement(rows, tpot_bar),
    }
