"""`python -m replay.validation.goals`: the times per token that gpt-oss-20b is to reach on an H200, and how alike ten
replays are.

Batch 1, LRU, the first 64 tokens of a trace, of which 8 forwards are not measured; the rows take turns. As in a
validation only those replays count during which the host kept one speed, and as many are made as it takes, within the
minutes. Writes goals.csv, every replay, and goals.json into --out, anew after each, and prints a verdict a row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from expertflow.policy import Policy
from replay.calibration.hostspeed import python_loop_ns
from replay.calibration.record import scale_of
from replay.gc_pause import keep_loaded
from replay.keys import MACHINES
from replay.machine.device import Device
from replay.machine.rig import Rig, choose_machine, make_device
from replay.run import memory_of, needs_of, scaled_workload
from replay.validation.beside import replay_on_tape
from replay.validation.fidelity import ForwardTimes, Ran
from replay.validation.takes import TAKES_A_REPLAY, Take, counted
from replay.validation.verdict import percent
from replay.validation.workbench import most_needs, pace_gb_per_s
from sim.job.configure import configure
from sim.job.output import provenance, to_json, write_text
from sim.job.run_cli import run_cli
from sim.job.setup import Transfer, make_policy, make_workload
from sim.paths import resolved
from traces.flags import Parser, number, whole
from traces.processes.locks import locked_folder

HARDWARE = "a100"
"""Paces the link of a CPU machine; a GPU's is as fast as it is."""
TOKENS, WARMUP = 64, 8
SPREAD = 0.01
"""What the repeats may differ by, (most - least) / median."""


@dataclass(frozen=True)
class Goal:
    """A row: how it is configured, and the ms a token that it is to take at most."""

    name: str
    words: tuple[str, ...]
    most_ms: float


GOALS = (
    Goal("everything resident", ("residency=1.0", "start=resident"), 2.4),
    Goal("LRU at 50 %", ("residency=0.5",), 6.2),
)


def judge(goal: Goal, takes: Sequence[Take], wanted: int) -> dict[str, Any]:
    """What `takes` say of `goal`, if so many of them count as are wanted."""
    times = [float(take.ran.metrics["tpot_ms"]["mean"]) for take in counted(takes)] if takes else []
    found: dict[str, Any] = {"name": goal.name, "most_ms": goal.most_ms, "replays": len(takes), "count": len(times)}
    if not times:
        return found | {"reached": False}
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    alike = len(times) >= wanted and spread <= SPREAD
    found |= {"tpot_ms": median, "spread": spread, "fast": median <= goal.most_ms, "alike": alike}
    return found | {"reached": bool(found["fast"] and alike)}


def verdict(found: Mapping[str, Any], wanted: int) -> str:
    """The line of one row."""
    if not found["count"]:
        return f"{found['name']}: MISSED, no replay in the time that was given"
    fast, alike = ("reached" if found[name] else "MISSED" for name in ("fast", "alike"))
    return (
        f"{found['name']}: {found['tpot_ms']:.3f} ms a token, at most {found['most_ms']:g} asked: {fast}; "
        f"{found['count']} replays of {wanted} wanted count ({found['replays']} made) and differ by "
        f"{percent(found['spread'])}, at most {percent(SPREAD)} asked: {alike}"
    )


class Goals:
    """The rows of `args` on one rig, measured in turns."""

    def __init__(self, args: argparse.Namespace, device: Device, scale: int) -> None:
        self._args, self._device = args, device
        self._started = time.perf_counter()
        trace = [f"trace.num_tokens={TOKENS}", "trace.num_requests=1"]
        if args.trace is not None:
            trace = [f"trace.path={resolved(args.trace)}", f"max_tokens={TOKENS}"]
        head = [f"+hardware={HARDWARE}", "+policy=lru", "stack=found", "compare=none", "model=gpt-oss-20b"]
        head.append(f"warmup_forwards={WARMUP}")
        self._cfgs = {goal: configure([*head, *trace, *goal.words]) for goal in GOALS}
        self._full = {goal: make_workload(cfg) for goal, cfg in self._cfgs.items()}
        self._work = {goal: scaled_workload(full, scale) for goal, full in self._full.items()}
        work = self._work[GOALS[0]]
        needs = most_needs([needs_of(self._work[goal], *self._policy(goal)) for goal in GOALS])
        self._rig = Rig(device, work.model, needs, **memory_of(work, args.host_memory_gb))
        self.takes: dict[Goal, list[Take]] = {goal: [] for goal in GOALS}
        self._rows: list[dict[str, Any]] = []

    def _policy(self, goal: Goal) -> tuple[Policy, Transfer]:
        return make_policy(self._cfgs[goal]["policy"], self._full[goal], self._cfgs[goal]["seed"])

    def run(self) -> dict[str, Any]:
        """Replay until enough replays count or the time is up; what is written."""
        lasted_s, finished = 0.0, False
        while not finished:
            for goal in self._short():
                began_s = self._elapsed_s()
                if began_s + lasted_s > 60 * float(self._args.minutes):
                    return self._write(finished=True)
                self._take(goal)
                lasted_s = max(lasted_s, self._elapsed_s() - began_s)
                self._write(finished=False)
            finished = not self._short()
        return self._write(finished=True)

    def _short(self) -> list[Goal]:
        """Goals of which too few replays count so far."""
        wanted = int(self._args.repeat)
        return [
            goal
            for goal, takes in self.takes.items()
            if len(takes) < wanted or (len(counted(takes)) < wanted and len(takes) < TAKES_A_REPLAY * wanted)
        ]

    def _take(self, goal: Goal) -> None:
        policy, transfer = self._policy(goal)
        at_s, before_ns = self._elapsed_s(), python_loop_ns()
        metrics, taped = replay_on_tape(self._rig, self._work[goal], policy, transfer, [])
        take = Take(Ran(metrics, ForwardTimes(), 0, taped.ticks_ns), (before_ns, python_loop_ns()))
        self.takes[goal].append(take)
        said = {"at_s": round(at_s, 3), "goal": goal.name, "repeat": len(self.takes[goal])}
        times = {name: metrics[name] for name in ("elapsed_ns", "compute_ns", "stall_ns", "overhead_ns")}
        speed = {"tick_ns": round(take.speed_ns), "drift": round(take.drift, 4)}
        self._rows.append({**said, "tpot_ms": metrics["tpot_ms"]["mean"], **times, **speed})
        print(f"[{self._elapsed_s():6.1f} s] {goal.name}: {metrics['tpot_ms']['mean']:.3f} ms a token", flush=True)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def _write(self, finished: bool) -> dict[str, Any]:
        wanted, work = int(self._args.repeat), self._work[GOALS[0]]
        found = [judge(goal, takes, wanted) for goal, takes in self.takes.items()]
        summary = {
            "finished": finished,
            "reached": finished and all(one["reached"] for one in found),
            "verdicts": [verdict(one, wanted) for one in found],
            "goals": found,
            "tokens": TOKENS,
            "warmup_forwards": WARMUP,
            "trace": None if self._args.trace is None else self._args.trace.name,
            "scale": self._args.scale,
            "machine": dict(self._device.describe()),
            **provenance(self._args.words, work.trace_sha256, self._elapsed_s(), "replay"),
        }
        write_text(self._args.out / "goals.csv", pd.DataFrame(self._rows).to_csv(index=False))
        write_text(self._args.out / "goals.json", to_json(summary))
        return summary


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="python -m replay.validation.goals", description=__doc__)
    made.add_argument("--out", type=Path, required=True, help="folder for goals.csv and goals.json")
    made.add_argument("--machine", default="auto", choices=MACHINES)
    made.add_argument("--trace", type=Path, help="the eval recording of gpt-oss-20b (default: a generated trace)")
    made.add_argument("--repeat", type=whole(2, 1000), default=10, help="replays that are to count (default: 10)")
    made.add_argument("--minutes", type=number(0, 1e6), default=3.0, help="no replay ends later (default: 3)")
    made.add_argument(
        "--scale", type=whole(1, 1024), help="divide the model's widths (default: 1 on a GPU, 16 on a CPU)"
    )
    made.add_argument("--host-memory-gb", type=number(0, 1e6, above=True))
    return made


def main(words: list[str] | None = None) -> int:
    """Command line; 1 if a goal is missed, 2 on a user's error, 3 if the device is lost."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    args.words = words
    return run_cli(lambda: _goals(args), "replays that ended are in goals.csv; the same command begins anew")


def _goals(args: argparse.Namespace) -> int:
    machine = choose_machine(args.machine)
    args.scale = scale_of(args.scale, machine)
    args.out.mkdir(parents=True, exist_ok=True)
    with locked_folder(args.out):
        device = make_device(machine, None if machine == "cuda" else pace_gb_per_s(HARDWARE, args.scale))
        keep_loaded()
        try:
            summary = Goals(args, device, args.scale).run()
        finally:
            device.close()
    for line in summary["verdicts"]:
        print(line)
    if args.trace is None:
        print("measured on a generated trace; what is asked is of the eval recording: give --trace FILE")
    return 0 if summary["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
