"""What a validation has found by now, and the files that say so, written anew after every replay."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from replay.calibration.hostspeed import drift, python_loop_ns
from replay.calibration.record import named_model
from replay.machine.device import Device
from replay.machine.scale import scaled_model
from replay.validation.beside import Beside, chunk_gb_per_s
from replay.validation.folder import COMMAND, SUMMARY, clear_beside, num_rows
from replay.validation.plan import Case, breadth_by_s
from replay.validation.report import write_report
from replay.validation.takes import Take, counted
from replay.validation.verdict import BARS, judge, link_rates, slow_links
from sim.job.output import provenance, to_json, write_text


class Findings:
    """Replays, stamps and decisions of one validation, in the order of time. args: as of `Validation`.

    raw, beside: the calibration's record, and what is measured beside each case; the validation sets them when they
    are there. rows: what `table.csv` says of each case. skipped: cases that the time did not reach; unlogged: policies
    whose decisions it did not reach.
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
        self.unlogged: list[str] = []
        self.integrity: list[dict[str, Any]] = []
        self.lockstep: list[dict[str, Any]] = []
        self.breadth_s: float | None = None
        """When every policy and capacity of the first model had been measured once."""
        self.broke_off: str | None = None
        self.finished = False

    def elapsed_s(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def begin(self) -> None:
        """Take the place of what an earlier run has left: there is something to measure with."""
        self._args.begun = True
        # The summary first, and never gone: by it the folder is known as a validation's, whenever this is killed.
        write_text(self._out / SUMMARY, to_json(self._summary()))
        self.report()
        clear_beside(self._out)

    def broke_off_before(self, why: str) -> bool:
        """Say on a page that it broke off before anything could be measured, unless the rows of an earlier run stand
        there: these stay. Whether the page was written."""
        if num_rows(self._out):
            return False
        self.broke_off = why
        self.begin()
        self.write_all()
        return True

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
        write_text(self._out / SUMMARY, to_json(self._summary()))

    def _runs(self) -> pd.DataFrame:
        """Every single replay; which of them count may change with each new one."""
        kept = {id(take) for takes in self.takes.values() for take in counted(takes)}
        return pd.DataFrame([said | {"counts": id(take) in kept} for _, take, said in self.singles])

    def _table(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.rows.values()))

    def _summary(self) -> dict[str, Any]:
        rows = list(self.rows.values())
        judged = judge(rows, BARS[self.world])
        chunk_rates = {
            name: chunk_gb_per_s(self.raw, scaled_model(named_model(name), self.scale).name)
            for name in self._args.models
        }
        links = link_rates(rows, chunk_rates)
        wrong = sum(one["wrong"] for one in self.integrity)
        differ = [one["policy"] for one in self.lockstep if one["difference"] is not None]
        return {
            "quote": judged["quote"],
            "not_shown": [
                *self._unfinished(),
                *judged["not_shown"],
                *slow_links(links, BARS[self.world]),
                *(self._left_undone() if self.finished else []),
                *([f"{wrong} stamps were wrong"] if wrong else []),
                *([f"decisions differ in lockstep: {', '.join(differ)}"] if differ else []),
            ],
            "machine": self.machine,
            "world": self.world,
            "scale": self.scale,
            "command": " ".join([COMMAND, *self._args.words]),
            "wall_s": round(self.elapsed_s(), 1),
            "tokens": self._args.tokens,
            "repeat": self._args.repeat,
            "beside": self.beside is not None,
            "judged": judged,
            "breadth_s": self.breadth_s,
            "minutes": self._args.minutes,
            "left_out": [str(case) for case in self.skipped],
            "host_loop": drift(self.loops_ns),
            "unlogged": self.unlogged,
            "stamps": {
                "executions": self.num_executions(),
                "asked": self._args.verify_executions,
                "checks": sum(one["checks"] for one in self.integrity),
                "wrong": wrong,
                "runs": self.integrity,
            },
            "lockstep": self.lockstep,
            "set_aside": sum(int(row["num_set_aside"]) for row in rows),
            "replays": len(self.singles),
            "chunk_gb_per_s": chunk_rates,
            "links": links,
        }

    def _unfinished(self) -> list[str]:
        """Why what is written now is not the end of it: a process that is killed leaves its last page behind."""
        if self.broke_off:
            return [f"it broke off: {self.broke_off}"]
        return [] if self.finished else [f"it was still running, after {len(self.singles)} replays"]

    def _left_undone(self) -> Iterator[str]:
        """What was asked for and the time did not suffice for, beside rows."""
        minutes, stamped = float(self._args.minutes), self.num_executions()
        if self.breadth_s is None:
            yield f"the {minutes:g} minutes did not reach every policy and capacity once"
        elif self.breadth_s > breadth_by_s(minutes):
            yield (
                f"every policy and capacity had been measured once only after {self.breadth_s:.0f} s, not in half of "
                f"the {minutes:g} minutes"
            )
        if stamped < float(self._args.verify_executions):
            yield f"stamps were checked in {stamped:,} expert executions of {self._args.verify_executions:,.0f}"
        if self.unlogged:
            yield f"the time did not suffice for the lockstep of {', '.join(self.unlogged)}"

    def report(self) -> None:
        """Page and picture of what is there by now."""
        write_report(self._out, self._table(), self._summary())

    def write_all(self) -> dict[str, Any]:
        self.finished = self.broke_off is None
        self.loops_ns.append(python_loop_ns())
        summary = self._summary()
        write_text(self._out / SUMMARY, to_json(summary))
        if self.beside is not None:
            write_text(self._out / "beside.json", to_json(self.beside.samples))
        found = provenance(self._args.words, "", summary["wall_s"], "replay")
        write_text(self._out / "provenance.json", to_json(found))
        write_report(self._out, self._table(), summary)
        return summary
