"""What a validation has found by now, and the files that say so, written anew after every replay."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd

from replay.calibration.hostspeed import drift, python_loop_ns
from replay.calibration.record import named_model
from replay.machine.device import Device
from replay.machine.scale import scaled_model
from replay.validation.beside import Beside, chunk_gb_per_s
from replay.validation.plan import Case
from replay.validation.report import write_report
from replay.validation.takes import Take, counted
from replay.validation.verdict import BARS, judge
from sim.job.output import provenance, to_json, write_text

_WRITTEN = (
    "README.md",
    "summary.json",
    "table.csv",
    "runs.csv",
    "beside.json",
    "provenance.json",
    "fidelity.png",
    "timeline.json",
)


class Findings:
    """Replays, stamps and decisions of one validation, in the order of time. args: as of `Validation`.

    raw, beside: the calibration's record, and what is measured beside each case; the validation sets them when they
    are there. rows: what `table.csv` says of each case. skipped: cases that the time did not reach.
    """

    def __init__(self, args: argparse.Namespace, device: Device, out: Path) -> None:
        self._args, self._out = args, out
        self._started = time.perf_counter()
        self.world = device.world
        self.machine = dict(device.describe())
        self.scale: int = args.scale
        self.raw: dict[str, Any] = {}
        self.beside: Beside | None = None
        self.rows: dict[Case, dict[str, Any]] = {}
        self.takes: dict[Case, list[Take]] = {}
        self.singles: list[tuple[Case, Take, dict[str, Any]]] = []
        """Every single replay, in the order of time, with what `runs.csv` says of it."""
        self.loops_ns: list[int] = []
        self.skipped: list[Case] = []
        self.integrity: list[dict[str, Any]] = []
        self.lockstep: list[dict[str, Any]] = []
        self.breadth_s: float | None = None
        """When every policy and capacity of the first model had been measured once."""
        self.broke_off: str | None = None
        self.finished = False

    def elapsed_s(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def clear(self) -> None:
        """Remove what an earlier run has left: it is not to be taken for this one's."""
        for stale in (*(self._out / name for name in _WRITTEN), *(self._out / "logs").glob("*.parquet")):
            stale.unlink(missing_ok=True)

    def num_executions(self) -> int:
        """How many experts have been computed with stamps around them."""
        return sum(int(one["executions"]) for one in self.integrity)

    def keep(self, case: Case, began_s: float) -> None:
        """Keep the last take of `case`, which began `began_s` after the start; write the files anew, each whole."""
        take = self.takes[case][-1]
        metrics = take.ran.metrics
        said = {
            "at_s": round(began_s, 3),
            "case": str(case),
            "repeat": len(self.takes[case]),
            "tpot_ms": metrics["tpot_ms"]["mean"],
            **{name: metrics[name] for name in ("elapsed_ns", "compute_ns", "stall_ns", "overhead_ns")},
            "late_ns": take.ran.late_ns,
            "python_loop_ns": round(statistics.median(take.loops_ns)),
            "tick_ns": round(take.speed_ns),
            "drift": round(take.drift, 4),
        }
        self.singles.append((case, take, said))
        write_text(self._out / "table.csv", self._table().to_csv(index=False))
        write_text(self._out / "runs.csv", self._runs().to_csv(index=False))
        write_text(self._out / "summary.json", to_json(self._summary()))

    def _runs(self) -> pd.DataFrame:
        """Every single replay; which of them count may change with each new one."""
        kept = {id(take) for takes in self.takes.values() for take in counted(takes)}
        return pd.DataFrame([said | {"counts": id(take) in kept} for _, take, said in self.singles])

    def _table(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.rows.values()))

    def _summary(self) -> dict[str, Any]:
        rows = list(self.rows.values())
        judged = judge(rows, BARS[self.world])
        wrong = sum(one["wrong"] for one in self.integrity)
        differ = [one["policy"] for one in self.lockstep if one["difference"] is not None]
        return {
            "quote": judged["quote"],
            "not_shown": [
                *self._unfinished(),
                *judged["not_shown"],
                *([f"{wrong} stamps were wrong"] if wrong else []),
                *([f"decisions differ in lockstep: {', '.join(differ)}"] if differ else []),
            ],
            "machine": self.machine,
            "world": self.world,
            "scale": self.scale,
            "command": "python -m replay.validate " + " ".join(self._args.words),
            "wall_s": round(self.elapsed_s(), 1),
            "tokens": self._args.tokens,
            "repeat": self._args.repeat,
            "beside": self.beside is not None,
            "judged": judged,
            "breadth_s": self.breadth_s,
            "minutes": self._args.minutes,
            "left_out": [str(case) for case in self.skipped],
            "host_loop": drift(self.loops_ns),
            "stamps": {
                "executions": self.num_executions(),
                "checks": sum(one["checks"] for one in self.integrity),
                "wrong": wrong,
                "runs": self.integrity,
            },
            "lockstep": self.lockstep,
            "set_aside": sum(int(row["num_set_aside"]) for row in rows),
            "replays": len(self.singles),
            "chunk_gb_per_s": {
                name: chunk_gb_per_s(self.raw, scaled_model(named_model(name), self.scale).name)
                for name in self._args.models
            },
        }

    def _unfinished(self) -> list[str]:
        """Why what is written now is not the end of it: a process that is killed leaves its last page behind."""
        if self.broke_off:
            return [f"it broke off: {self.broke_off}"]
        return [] if self.finished else [f"it was still running, after {len(self.singles)} replays"]

    def report(self) -> None:
        """Page and picture of what is there by now."""
        write_report(self._out, self._table(), self._summary())

    def write_all(self) -> dict[str, Any]:
        self.finished = self.broke_off is None
        self.loops_ns.append(python_loop_ns())
        summary = self._summary()
        write_text(self._out / "summary.json", to_json(summary))
        if self.beside is not None:
            write_text(self._out / "beside.json", to_json(self.beside.samples))
        found = provenance(self._args.words, "", summary["wall_s"], "replay")
        write_text(self._out / "provenance.json", to_json(found))
        write_report(self._out, self._table(), summary)
        return summary
