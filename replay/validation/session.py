"""One validation: calibrate, then measure and predict case after case, as far as the time goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replay.calibration.hostspeed import python_loop_ns
from replay.calibration.profile import profiles
from replay.calibration.record import calibrate, load_record, named_model, write_profile
from replay.lockstep.compare import check_log
from replay.lockstep.log_reader import LogReader
from replay.machine.device import Device
from replay.run import scaled_workload
from replay.validation.beside import Beside
from replay.validation.fidelity import measure, predict, row_of
from replay.validation.findings import Findings
from replay.validation.overlay import write_overlay
from replay.validation.plan import Asked, Case, blocks_of, breadth_by_s, breadth_of, share_of_time
from replay.validation.takes import TAKES_A_REPLAY, Take, counted
from replay.validation.workbench import Workbench
from sim.job.configure import configure
from sim.job.setup import make_policy
from sim.specs.hardware import hardware_from_dict, stack_from_dict
from sim.views.timeline import Timeline

TIMELINE_FORWARDS = 8
_LAST_PAGE_S = 8.0
"""Seconds of the given minutes that are kept for drawing the tables and the picture at the end."""


class Validation:
    """One run of the tool; `args` as parsed and filled in, `device` open."""

    def __init__(self, args: argparse.Namespace, asked: Asked, device: Device, out: Path) -> None:
        self.args, self.asked, self.device, self.out = args, asked, device, out
        self.scale: int = args.scale
        self.raw: dict[str, Any] = {}
        self._found = Findings(args, device, out)
        self._lasted_s: dict[str, float] = {}
        self._planned = self._num_planned = 0
        self._overlaid: str = "adaptive" if "adaptive" in asked.policies else asked.policies[0]
        """The policy whose first comparison becomes the timelines; empty when they are written."""
        self._bench = Workbench(args, device)
        self._beside: Beside | None = None

    def say(self, text: str) -> None:
        """Progress, with the time since the start."""
        print(f"[{self._found.elapsed_s():6.1f} s] {text}", flush=True)

    def seconds_left(self) -> float:
        """Of the minutes that were given, before the pages are written."""
        return 60 * float(self.args.minutes) - self._found.elapsed_s() - _LAST_PAGE_S

    def run(self) -> dict[str, Any]:
        """All of it; the summary, which is also written."""
        args, asked, models = self.args, self.asked, self.args.models
        # Every mistake in the words shows before minutes are spent.
        for case in [case for model in models for case in asked.cases(model)]:
            named_model(case.model)
            configure(self._bench.overrides(case, case.batch_size))
        if args.calibration is not None:
            self.raw = load_record(args.calibration, self.scale)
        try:
            self._prepare()
        except BaseException as error:
            if not self._found.broke_off_before(f"before anything was measured: {_line(error)}"):
                self.say(f"broke off before anything was measured; what {self.out} held before stays")
            raise
        self._found.begin()
        self._beside = Beside(self.device, self.raw, self.scale) if args.beside else None
        self._found.raw, self._found.beside = self.raw, self._beside
        try:
            write_profile(self.raw, args.name, self.out / "profile")
            self._found.unlogged = list(asked.policies)
            breadth = len(breadth_of(asked.cases(models[0])))
            self._check_decisions(models[0], breadth_by_s(float(args.minutes)), breadth)
            for number, model in enumerate(models):
                share = share_of_time(self.seconds_left(), len(models) - number)
                self._compare_all(asked.cases(model), self._found.elapsed_s() + share, number == 0)
            self._check_decisions(models[0], self._found.elapsed_s() + self.seconds_left())
        except BaseException as error:
            self._found.broke_off = _line(error)
            raise
        finally:
            summary = self._found.write_all()
        return summary

    def _prepare(self) -> None:
        """What measuring needs: the calibration, and the first model's memory."""
        args, models = self.args, self.args.models
        if self.raw:
            self.say(f"calibrated before: {args.calibration}")
        else:
            self.say("calibrating")
            self.raw = calibrate(
                self.device,
                models,
                self.asked.policies,
                self.scale,
                stacks=self._calibrated_stacks(),
                quick=args.quick,
                say=self.say,
            )
        hardware, stack = profiles(self.raw, args.name)
        # What no simulation would take shows before anything takes the place of what is there.
        hardware_from_dict(hardware)
        stack_from_dict(stack)
        self._make_rig(models[0], self._wants_stamps())

    def _calibrated_stacks(self) -> list[str]:
        """Stacks under which the host is measured.

        A pad does not change what a GPU's host does, but a CPU's threads take longer to wake from it.
        """
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
                self._found.report()
                self._check_stamps(cases[0].model)
        self._found.skipped += [case for case in cases if case not in self._found.rows]
        if in_time:
            # All that was planned is done: what time is left goes to stamps, and to rows of too few replays that count.
            if stamps_too:
                self._check_stamps(cases[0].model)
            self._take_again(cases, self.args.repeat, until_s)
        if self._found.rows:
            self._found.report()

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
                self._found.breadth_s = round(self._found.elapsed_s(), 1)
        self._take_again(block, min(2, self.args.repeat), until_s)
        return True

    def _take_again(self, cases: Sequence[Case], wanted: int, until_s: float) -> None:
        """Replay those of `cases` again of which fewer than `wanted` replays count, the fewest first.

        Stop when the time is up, or when a case has been replayed too often.
        """
        while True:
            takes = {case: self._found.takes[case] for case in cases if case in self._found.takes}
            short = {
                case: len(counted(found))
                for case, found in takes.items()
                if len(found) < TAKES_A_REPLAY * self.args.repeat
            }
            case = min((case for case, count in short.items() if count < wanted), key=short.__getitem__, default=None)
            if case is None or not self._has_time_for(case, until_s):
                return
            self._take(case, "again")

    def _has_time_for(self, case: Case, until_s: float) -> bool:
        return self._found.elapsed_s() + self._lasted_s.get(case.policy, 0.0) <= until_s

    def _take(self, case: Case, place: str) -> None:
        """Measure `case` once more, predict it with what is known of the host by now, and keep both."""
        began = self._found.elapsed_s()
        cfg, full = self._bench.workload(case, self._bench.tokens(case))
        work = scaled_workload(full, self.scale)
        rig = self._bench.rig_for(work, *make_policy(cfg["policy"], full, cfg["seed"]))
        loops_ns, host = [python_loop_ns()], None
        if self._beside is not None:
            host = self._beside.measure(case, self._bench.start(case))
            loops_ns.append(python_loop_ns())
        ran = measure(rig, self.raw, self.args.name, cfg, full, work, case)
        loops_ns.append(python_loop_ns())
        self._found.loops_ns += loops_ns
        takes = self._found.takes.setdefault(case, [])
        takes.append(Take(ran, tuple(loops_ns), host))
        kept = counted(takes)
        if self._beside is not None:
            self._beside.use(case, [take.host for take in kept if take.host is not None])
        predicted = predict(self.raw, self.args.name, self.device, cfg, full, work, case)
        row = self._found.rows[case] = row_of(case, [take.ran for take in kept], predicted)
        row["num_set_aside"] = len(takes) - len(kept)
        self._found.keep(case, began)
        stall = "–" if row["stall_error"] is None else f"{100 * row['stall_error']:+.1f} %"
        self.say(
            f"{place} {case}: TPOT {ran.metrics['tpot_ms']['mean']:.3f} ms, predicted "
            f"{row['tpot_ms_predicted']:.3f} ({100 * row['tpot_error']:+.1f} % off the median), stall {stall}"
        )
        if case.policy == self._overlaid:
            self._overlaid = ""
            self._timeline(cfg, case)
        self._lasted_s[case.policy] = self._found.elapsed_s() - began

    def _timeline(self, cfg: dict[str, Any], case: Case) -> None:
        """Write the first forwards of the replay and of the simulation, one above the other."""
        _, full = self._bench.workload(case, TIMELINE_FORWARDS * case.batch_size)
        work = scaled_workload(full, self.scale)
        pair = (
            Timeline(f"measured: {case}", work.model.num_experts),
            Timeline(f"predicted: {case}", work.model.num_experts),
        )
        rig = self._bench.rig_for(work, *make_policy(cfg["policy"], full, cfg["seed"]))
        measure(rig, self.raw, self.args.name, cfg, full, work, case, [pair[0]])
        predict(self.raw, self.args.name, self.device, cfg, full, work, case, [pair[1]])
        write_overlay(self.out / "timeline.json", *pair)

    # -- stamps and decisions ----------------------------------------------------------------------------------

    def _check_decisions(self, model: str, until_s: float, num_rows: int = 0) -> None:
        """Stamps around every kernel, and a log of each policy fed to a fresh one, as far as the time goes: until
        `until_s`, with `num_rows` replays still to come, each as long as a log."""
        lasted_s = 0.0
        for name in list(self._found.unlogged):
            began = self._found.elapsed_s()
            if began + (1 + num_rows) * lasted_s > until_s:
                left = ", ".join(self._found.unlogged)
                self.say(f"no time now for the lockstep of {left}: raise --minutes, or give a --calibration")
                return
            (self.out / "logs").mkdir(exist_ok=True)
            path = self.out / "logs" / f"{self.device.world}-{name}.parquet"
            case = Case(model, "found", 0.5, 1, name)
            self._stamp(case, self.args.log_tokens, path)
            cfg, full = self._bench.workload(case, self.args.log_tokens)
            with LogReader(path) as reader:
                found = check_log(reader, full, make_policy(cfg["policy"], full, cfg["seed"])[0])
            self._found.lockstep.append(
                {
                    "policy": name,
                    "decisions": found.num_decisions,
                    "forwards": found.num_forwards,
                    "difference": found.difference,
                }
            )
            self._found.unlogged.remove(name)
            equal = "equal" if found.difference is None else "DIFFER"
            self.say(f"{name}: lockstep {found.num_decisions} decisions {equal}")
            lasted_s = max(lasted_s, self._found.elapsed_s() - began)

    def _make_rig(self, model: str, stamps_too: bool) -> None:
        """Make one rig for all runs of `model` that are to come."""
        runs = [(case, self._bench.tokens(case)) for case in self.asked.cases(model)]
        self._bench.make_rig([*runs, *([(_stamped(model), self.args.verify_tokens)] if stamps_too else [])])

    def _wants_stamps(self) -> bool:
        return self._found.num_executions() < float(self.args.verify_executions)

    def _check_stamps(self, model: str) -> None:
        """As many executions as are asked for, in a sixth of the time at most."""
        until_s = self._found.elapsed_s() + min(10 * float(self.args.minutes), self.seconds_left())
        while self._wants_stamps() and self._found.elapsed_s() < until_s:
            self._stamp(_stamped(model), self.args.verify_tokens, None)

    def _stamp(self, case: Case, num_tokens: int, log_path: Path | None) -> None:
        found = self._bench.stamped(case, num_tokens, log_path)
        self._found.integrity.append(
            {
                "case": str(case),
                "executions": found.num_executions,
                "checks": found.num_checks,
                "wrong": found.num_wrong + found.num_mislaunched,
            }
        )
        wrong = f"{found.num_wrong} wrong stamps"
        if found.num_mislaunched:
            wrong += f" and {found.num_mislaunched} wrong launches"
        self.say(f"{case}: {wrong} in {found.num_executions} executions")


def _line(error: BaseException) -> str:
    """What is wrong, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _stamped(model: str) -> Case:
    """The case that is run to check many executions: with it a launch holds as many experts as possible."""
    return Case(model, "found", 0.75, 8, "lru")
