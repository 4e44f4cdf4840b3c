"""One validation: calibrate, then measure and predict case after case, and keep what is finished at once."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from replay.calibration.hostspeed import drift, python_loop_ns
from replay.calibration.profile import profiles
from replay.calibration.record import RECORD_VERSION, calibrate, named_model, write_profile
from replay.lockstep.compare import check_log
from replay.lockstep.log_reader import LogReader
from replay.machine.device import Device
from replay.machine.scale import scaled_model
from replay.run import scaled_workload
from replay.validation.beside import Beside, chunk_gb_per_s
from replay.validation.fidelity import measure, predict, row_of
from replay.validation.overlay import write_overlay
from replay.validation.plan import Asked, Case, blocks_of, share_of_time
from replay.validation.report import write_report
from replay.validation.takes import Take, counted
from replay.validation.verdict import BARS, judge
from replay.validation.workbench import Workbench
from sim.job.configure import configure
from sim.job.output import provenance, to_json, write_text
from sim.job.setup import make_policy
from sim.specs.hardware import hardware_from_dict, stack_from_dict
from sim.views.timeline import Timeline

TIMELINE_FORWARDS = 8
_LAST_PAGE_S = 8.0
"""Kept back of the minutes: the tables and the picture are drawn at the end."""
_WRITTEN = ("README.md", "summary.json", "table.csv", "runs.csv", "beside.json", "provenance.json", "fidelity.png",
            "timeline.json")  # fmt: skip
_TAKES_A_REPLAY = 3
"""Of a row whose host keeps changing its speed: so many replays are made at most for each one that is to count."""
_RECORD_REMEDY = "write one with python -m replay.calibrate: NAME.calibration.json"


class Validation:
    """One run of the tool; `args` as parsed and filled in, `device` open."""

    def __init__(self, args: argparse.Namespace, asked: Asked, device: Device, out: Path) -> None:
        self.args, self.asked, self.device, self.out = args, asked, device, out
        self.started = time.perf_counter()
        self.machine = dict(device.describe())
        self.scale: int = args.scale
        self.raw: dict[str, Any] = {}
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
        self._lasted_s: dict[str, float] = {}
        self._planned = self._num_planned = 0
        self._overlaid: str = "adaptive" if "adaptive" in asked.policies else asked.policies[0]
        """The policy whose first comparison becomes the timelines; empty when they are written."""
        self._bench = Workbench(args, device)
        self._beside: Beside | None = None

    def say(self, text: str) -> None:
        """Progress, with the time since the start."""
        print(f"[{self._elapsed_s():6.1f} s] {text}", flush=True)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def seconds_left(self) -> float:
        """Of the minutes that were given, before the pages are written."""
        return 60 * float(self.args.minutes) - self._elapsed_s() - _LAST_PAGE_S

    def run(self) -> dict[str, Any]:
        """All of it; the summary, which is also written."""
        args, asked, models = self.args, self.asked, self.args.models
        # Every mistake in the words shows before minutes are spent.
        for case in [case for model in models for case in asked.cases(model)]:
            named_model(case.model)
            configure(self._bench.overrides(case, case.batch_size))
        if args.calibration is not None:
            self.raw = load_record(args.calibration, self.scale)
        for stale in (*(self.out / name for name in _WRITTEN), *(self.out / "logs").glob("*.parquet")):
            # What an earlier run has left is not to be taken for this one's.
            stale.unlink(missing_ok=True)
        if self.raw:
            self.say(f"calibrated before: {args.calibration}")
        else:
            self.say("calibrating")
            self.raw = calibrate(self.device, models, asked.policies, self.scale, stacks=self._calibrated_stacks(),
                                 quick=args.quick, say=self.say)  # fmt: skip
        write_profile(self.raw, args.name, self.out / "profile")
        self._beside = Beside(self.device, self.raw, self.scale) if args.beside else None
        try:
            self._make_rig(models[0], self._wants_stamps())
            self._check_decisions(models[0])
            for number, model in enumerate(models):
                share = share_of_time(self.seconds_left(), len(models) - number)
                self._compare_all(asked.cases(model), self._elapsed_s() + share, number == 0)
        except BaseException as error:
            self.broke_off = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise
        finally:
            summary = self._write_all()
        return summary

    def _calibrated_stacks(self) -> list[str]:
        """A pad does not change what a GPU's host does; a CPU's threads take longer to wake from it."""
        return list(self.asked.stacks) if self.device.world == "cpu" else ["found"]

    # -- cases -----------------------------------------------------------------------------------------------

    def _compare_all(self, cases: list[Case], until_s: float, stamps_too: bool) -> None:
        """The cases of one model, in the plan's order, as far as the time goes."""
        if not cases:
            return
        blocks = [list(block) for block in blocks_of(cases)]
        planned = self.args.repeat * len(cases)
        self.say(f"{len(cases)} comparisons of {cases[0].model}, {planned} replays")
        if not stamps_too:
            self._make_rig(cases[0].model, False)
        self._planned = planned
        in_time = True
        for number, block in enumerate(blocks):
            in_time = in_time and self._take_block(block, until_s, breadth=stamps_too and not number)
            if not in_time:
                break
            if stamps_too and not number:
                self._report()
                self._check_stamps(cases[0].model)
        self.skipped += [case for case in cases if case not in self.rows]
        if in_time:
            # All that was planned is done: what time is left goes to stamps, and to rows of too few replays that count.
            if stamps_too:
                self._check_stamps(cases[0].model)
            self._take_again(cases, self.args.repeat, until_s)
        if self.rows:
            self._report()

    def _take_block(self, block: Sequence[Case], until_s: float, breadth: bool) -> bool:
        """Each of `block` in turn, as often as is asked for, then those again of which fewer than two replays count.
        False if the time was up before all was done that is planned."""
        for repeat in range(self.args.repeat):
            for case in block:
                if not self._has_time_for(case, until_s):
                    self.say(f"time is up: {self._planned - self._num_planned} planned replays left out")
                    return False
                self._num_planned += 1
                self._take(case, f"{self._num_planned}/{self._planned}")
            if breadth and not repeat:
                self.breadth_s = round(self._elapsed_s(), 1)
        self._take_again(block, min(2, self.args.repeat), until_s)
        return True

    def _take_again(self, cases: Sequence[Case], wanted: int, until_s: float) -> None:
        """Those of `cases` of which fewer than `wanted` replays count, the fewest first, while time and hope last."""
        while True:
            takes = {case: self.takes[case] for case in cases if case in self.takes}
            short = {case: len(counted(found)) for case, found in takes.items()
                     if len(found) < _TAKES_A_REPLAY * self.args.repeat}  # fmt: skip
            case = min((case for case, count in short.items() if count < wanted), key=short.__getitem__, default=None)
            if case is None or not self._has_time_for(case, until_s):
                return
            self._take(case, "again")

    def _has_time_for(self, case: Case, until_s: float) -> bool:
        return self._elapsed_s() + self._lasted_s.get(case.policy, 0.0) <= until_s

    def _take(self, case: Case, place: str) -> None:
        """Measure `case` once more, predict it with what is known of the host by now, and keep both."""
        began = self._elapsed_s()
        cfg, full = self._bench.workload(case, self._bench.tokens(case))
        work = scaled_workload(full, self.scale)
        rig = self._bench.rig_for(work, *make_policy(cfg["policy"], full, cfg["seed"]))
        loops_ns, host = [python_loop_ns()], None
        if self._beside is not None:
            host = self._beside.measure(case, self._bench.start(case))
            loops_ns.append(python_loop_ns())
        ran = measure(rig, self.raw, cfg, full, work)
        loops_ns.append(python_loop_ns())
        self.loops_ns += loops_ns
        takes = self.takes.setdefault(case, [])
        takes.append(Take(ran, tuple(loops_ns), host))
        kept = counted(takes)
        if self._beside is not None:
            self._beside.use(case, [take.host for take in kept if take.host is not None])
        predicted = predict(self.raw, self.args.name, cfg, full, work, case)
        row = self.rows[case] = row_of(case, [take.ran for take in kept], predicted)
        row["num_set_aside"] = len(takes) - len(kept)
        self._keep(case, began)
        stall = "–" if row["stall_error"] is None else f"{100 * row['stall_error']:+.1f} %"
        self.say(f"{place} {case}: TPOT {ran.metrics['tpot_ms']['mean']:.3f} ms, predicted "
                 f"{row['tpot_ms_predicted']:.3f} ({100 * row['tpot_error']:+.1f} % off the median), stall {stall}")
        if case.policy == self._overlaid:
            self._overlaid = ""
            self._timeline(cfg, case)
        self._lasted_s[case.policy] = self._elapsed_s() - began

    def _keep(self, case: Case, began_s: float) -> None:
        """What is there by now, each file whole."""
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
        write_text(self.out / "table.csv", self._table().to_csv(index=False))
        write_text(self.out / "runs.csv", self._runs().to_csv(index=False))
        write_text(self.out / "summary.json", to_json(self._summary()))

    def _runs(self) -> pd.DataFrame:
        """Every single replay; which of them count may change with each new one."""
        kept = {id(take) for takes in self.takes.values() for take in counted(takes)}
        return pd.DataFrame([said | {"counts": id(take) in kept} for _, take, said in self.singles])

    def _table(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.rows.values()))

    def _timeline(self, cfg: dict[str, Any], case: Case) -> None:
        """The first forwards of both worlds, one above the other."""
        _, full = self._bench.workload(case, TIMELINE_FORWARDS * case.batch_size)
        work = scaled_workload(full, self.scale)
        pair = (Timeline(f"measured: {case}", work.model.num_experts),
                Timeline(f"predicted: {case}", work.model.num_experts))  # fmt: skip
        rig = self._bench.rig_for(work, *make_policy(cfg["policy"], full, cfg["seed"]))
        measure(rig, self.raw, cfg, full, work, [pair[0]])
        predict(self.raw, self.args.name, cfg, full, work, case, [pair[1]])
        write_overlay(self.out / "timeline.json", *pair)

    # -- stamps and decisions ----------------------------------------------------------------------------------

    def _check_decisions(self, model: str) -> None:
        """Stamps around every kernel, and a log of each policy fed to a fresh one."""
        (self.out / "logs").mkdir(exist_ok=True)
        for name in self.asked.policies:
            path = self.out / "logs" / f"{self.device.world}-{name}.parquet"
            case = Case(model, "found", 0.5, 1, name)
            self._stamp(case, self.args.log_tokens, path)
            cfg, full = self._bench.workload(case, self.args.log_tokens)
            with LogReader(path) as reader:
                found = check_log(reader, full, make_policy(cfg["policy"], full, cfg["seed"])[0])
            self.lockstep.append({"policy": name, "decisions": found.num_decisions, "forwards": found.num_forwards,
                                  "difference": found.difference})  # fmt: skip
            equal = "equal" if found.difference is None else "DIFFER"
            self.say(f"{name}: lockstep {found.num_decisions} decisions {equal}")

    def _make_rig(self, model: str, stamps_too: bool) -> None:
        """One for all that is to come of `model`."""
        runs = [(case, self._bench.tokens(case)) for case in self.asked.cases(model)]
        self._bench.make_rig([*runs, *([(_stamped(model), self.args.verify_tokens)] if stamps_too else [])])

    def _wants_stamps(self) -> bool:
        return self._executions() < float(self.args.verify_executions)

    def _check_stamps(self, model: str) -> None:
        """As many executions as are asked for, in a sixth of the time at most."""
        until_s = min(self._elapsed_s() + 10 * float(self.args.minutes), self._elapsed_s() + self.seconds_left())
        while self._wants_stamps() and self._elapsed_s() < until_s:
            self._stamp(_stamped(model), self.args.verify_tokens, None)

    def _executions(self) -> int:
        return sum(int(one["executions"]) for one in self.integrity)

    def _stamp(self, case: Case, num_tokens: int, log_path: Path | None) -> None:
        found = self._bench.stamped(case, num_tokens, log_path)
        self.integrity.append({"case": str(case), "executions": found.num_executions, "checks": found.num_checks,
                               "wrong": found.num_wrong})  # fmt: skip
        self.say(f"{case}: {found.num_wrong} wrong stamps in {found.num_executions} executions")

    # -- what is written -------------------------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        rows = list(self.rows.values())
        judged = judge(rows, BARS[self.device.world])
        wrong = sum(one["wrong"] for one in self.integrity)
        differ = [one["policy"] for one in self.lockstep if one["difference"] is not None]
        return {
            "quote": judged["quote"],
            "not_shown": [*self._unfinished(), *judged["not_shown"],
                          *([f"{wrong} stamps were wrong"] if wrong else []),
                          *([f"decisions differ in lockstep: {', '.join(differ)}"] if differ else [])],
            "machine": self.machine,
            "world": self.device.world,
            "scale": self.scale,
            "command": "python -m replay.validate " + " ".join(self.args.words),
            "wall_s": round(self._elapsed_s(), 1),
            "tokens": self.args.tokens,
            "repeat": self.args.repeat,
            "beside": self._beside is not None,
            "judged": judged,
            "breadth_s": self.breadth_s,
            "minutes": self.args.minutes,
            "left_out": [str(case) for case in self.skipped],
            "host_loop": drift(self.loops_ns),
            "stamps": {"executions": self._executions(),
                       "checks": sum(one["checks"] for one in self.integrity),
                       "wrong": wrong, "runs": self.integrity},
            "lockstep": self.lockstep,
            "set_aside": sum(int(row["num_set_aside"]) for row in rows),
            "replays": len(self.singles),
            "chunk_gb_per_s": {name: chunk_gb_per_s(self.raw, scaled_model(named_model(name), self.scale).name)
                               for name in self.args.models},
        }  # fmt: skip

    def _unfinished(self) -> list[str]:
        """Why what is written now is not the end of it: a process that is killed leaves its last page behind."""
        if self.broke_off:
            return [f"it broke off: {self.broke_off}"]
        return [] if self.finished else [f"it was still running, after {len(self.singles)} replays"]

    def _report(self) -> None:
        """Page and picture of what is there by now."""
        write_report(self.out, self._table(), self._summary())

    def _write_all(self) -> dict[str, Any]:
        self.finished = self.broke_off is None
        self.loops_ns.append(python_loop_ns())
        summary = self._summary()
        write_text(self.out / "summary.json", to_json(summary))
        if self._beside is not None:
            write_text(self.out / "beside.json", to_json(self._beside.samples))
        found = provenance(self.args.words, "", summary["wall_s"], "replay")
        write_text(self.out / "provenance.json", to_json(found))
        write_report(self.out, self._table(), summary)
        return summary


def _stamped(model: str) -> Case:
    """What is run to check many executions: as many experts to a launch as there are."""
    return Case(model, "found", 0.75, 8, "lru")


def load_record(path: Path, scale: int) -> dict[str, Any]:
    """The raw record of a calibration; ValueError if it is something else, or of another scale."""
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {_RECORD_REMEDY}") from None
    if not isinstance(raw, dict) or raw.get("format") != "expertflow-calibration":
        raise ValueError(f"{path} is no calibration record; {_RECORD_REMEDY}")
    if raw.get("version") != RECORD_VERSION:
        raise ValueError(f"{path} is a record of version {raw.get('version', 1)}, this program writes "
                         f"{RECORD_VERSION}; {_RECORD_REMEDY}")  # fmt: skip
    if raw.get("scale") != scale:
        raise ValueError(f"{path} was measured at scale {raw.get('scale')}, this run has {scale}; calibrate at that "
                         "scale")  # fmt: skip
    try:
        hardware, stack = profiles(raw, "record")
        hardware_from_dict(hardware)
        stack_from_dict(stack)
        missing = [key for key in ("pad_share", "python_loop_ns", "decisions", "date") if key not in raw]
        if missing:
            raise KeyError(missing[0])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, StopIteration) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged, or of another version of this program: {what}; calibrate "
                         "again") from None  # fmt: skip
    return raw
