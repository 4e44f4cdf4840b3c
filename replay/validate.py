"""`python -m replay.validate NAME`: is the simulator right about this machine?

Calibrates (or takes a record that is there), then simulates and replays the same trace for every policy, capacity and
batch size, checks stamps and lockstep on the side, and writes everything to results/validation-NAME: a table, errors,
rank agreement, a plot of predicted against measured, and both timelines in one Perfetto file. Each finished row is kept
at once; what the time does not suffice for is left out and said.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from replay.calibrate import InPlace, calibrate, check_name, median_run, named_model, scale_of, write_profile
from replay.device import Device
from replay.fidelity import Case, compare, judge
from replay.fidelity_report import write_report
from replay.lockstep import check_log
from replay.log import LogWriter
from replay.log_format import LogHeader
from replay.log_reader import LogReader
from replay.overlay import write_overlay
from replay.rig import MACHINES, Needs, Rig, choose_machine, make_device
from replay.run import needs_of, replay_policy, scaled_workload
from replay.scale import scaled_model
from replay.standin import standin_trace
from sim.configure import configure
from sim.entry import as_command
from sim.output import provenance, to_json, write_text
from sim.setup import Workload, load_chunks, make_policy, make_trace, make_workload, run_config
from sim.timeline import Timeline

POLICIES = "on_demand,lru,two_level,fixed_1,adaptive,oracle"
BARS = {"cuda": (0.05, 0.10), "cpu": (0.10, 0.15)}
"""Of TPOT and of stall, by machine."""
TIMELINE_FORWARDS = 8
IN_PLACE_TOKENS = 24
_RECORD_REMEDY = "write one with python -m replay.calibrate: NAME.calibration.json"


class Validation:
    """One run of the tool; `args` as parsed, `device` open."""

    def __init__(self, args: argparse.Namespace, device: Device, out: Path) -> None:
        self.args, self.device, self.out = args, device, out
        self.started = time.perf_counter()
        self.scale: int = args.scale
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.integrity: list[dict[str, Any]] = []
        self.lockstep: list[dict[str, Any]] = []
        self.raw: dict[str, Any] = {}
        policies = args.policies.split(",")
        self._overlaid: str = "adaptive" if "adaptive" in policies else policies[0]
        """The policy whose first comparison becomes the timelines; empty when they are written."""
        self._rig: Rig | None = None
        self._in_place: InPlace | None = None
        self._workloads: dict[tuple[Any, ...], Workload] = {}
        self.beside: dict[str, Any] = {}
        """With --beside: the samples that each comparison was predicted with."""

    def say(self, text: str) -> None:
        """Progress, with the time since the start."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def seconds_left(self) -> float:
        """Of the minutes that were given."""
        return 60 * float(self.args.minutes) - (time.perf_counter() - self.started)

    def run(self) -> dict[str, Any]:
        """All of it; the summary, which is also written."""
        args = self.args
        policies = args.policies.split(",")
        models = args.models.split(",")
        # Every mistake in the words shows before minutes are spent.
        for case in [case for model in models for case in self._cases(model, policies)]:
            named_model(case.model)
            configure(self._overrides(case, case.batch_size))
        if args.calibration is not None:
            self.raw = load_record(args.calibration, self.scale)
        else:
            self.say("calibrating")
            self.raw = calibrate(self.device, models, policies, self.scale, stacks=self._calibrated_stacks(),
                                 quick=args.quick, say=self.say)  # fmt: skip
        write_profile(self.raw, args.name, self.out / "profile")
        try:
            self._verify(models[0])
            for number, model in enumerate(models):
                # What is left is shared out: no model is left out because another took long.
                share = self.seconds_left() / (len(models) - number)
                self._compare_all(list(self._cases(model, policies)), time.perf_counter() + share)
        finally:
            summary = self._summary()
        return summary

    def _calibrated_stacks(self) -> list[str]:
        """A pad does not change what a GPU's host does; a CPU's threads take longer to wake from it."""
        return self.args.stacks.split(",") if self.device.world == "cpu" else ["found"]

    def _compare_all(self, cases: list[Case], until: float) -> None:
        self.say(f"{len(cases)} comparisons of {cases[0].model}")
        for number, case in enumerate(cases):
            if time.perf_counter() > until:
                self.skipped += [str(left) for left in cases[number:]]
                self.say(f"time is up: {len(cases) - number} comparisons left out")
                return
            self._compare(number, len(cases), case)

    def _cases(self, model: str, policies: list[str]) -> Iterator[Case]:
        args = self.args
        residencies = numbers("--residency", args.residency, float)
        batches = numbers("--batch-sizes", args.batch_sizes, int)
        for batch, stack, residency in product(batches, args.stacks.split(","), residencies):
            for policy in policies:
                yield Case(model, stack, residency, batch, policy)

    def _overrides(self, case: Case, num_tokens: int) -> list[str]:
        if self.args.trace is None:
            # As many requests as a batch holds: of a trace that is cut, the first requests alone are left.
            trace = [f"trace.num_tokens={num_tokens}", f"trace.num_requests={case.batch_size}"]
        else:
            trace = [f"trace.path={self.args.trace.resolve()}", f"max_tokens={num_tokens}"]
        return [f"+hardware={self.args.hardware}", f"+policy={case.policy}", f"stack={case.stack}", "compare=none",
                f"residency={case.residency}", f"batch_size={case.batch_size}", *trace]  # fmt: skip

    def _workload(self, case: Case, num_tokens: int) -> tuple[dict[str, Any], Workload]:
        cfg = configure(self._overrides(case, num_tokens))
        key = (case.model, case.stack, case.residency, case.batch_size, num_tokens)
        if key not in self._workloads:
            trace = standin_trace(make_trace(cfg["trace"]), named_model(case.model))
            self._workloads[key] = make_workload(cfg, trace)
        return cfg, self._workloads[key]

    def _rig_for(self, work: Workload, needs: Needs) -> Rig:
        """The rig that is there, if it is of the right model and large enough."""
        rig = self._rig
        if rig is not None and rig.model == work.model:
            if rig.suffices(needs):
                return rig
            have = rig.needs
            needs = Needs(max(have.num_slots, needs.num_slots), max(have.max_tokens, needs.max_tokens),
                          max(have.max_context, needs.max_context))  # fmt: skip
        if rig is not None:
            rig.release()
        self._rig = None
        self._rig = Rig(self.device, work.model, needs, self.args.host_memory_gb)
        return self._rig

    def _compare(self, number: int, total: int, case: Case) -> None:
        # A batch counts several tokens a forward: half as many forwards do.
        cfg, full = self._workload(case, max(self.args.tokens * case.batch_size // (1 if case.batch_size == 1 else 2),
                                             case.batch_size))  # fmt: skip
        widest = max(len(forward.requests) for forward in full.batches)
        if widest < case.batch_size:
            raise ValueError(f"--batch-sizes: {case.batch_size} is never reached: the first tokens of the trace belong "
                             f"to {widest} requests at most at a time; raise --tokens")  # fmt: skip
        work = scaled_workload(full, self.scale)
        policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
        rig = self._rig_for(work, needs_of(work, policy, transfer))
        row = compare(rig, self.raw, self.args.name, cfg, full, work, case, self.args.repeat, self._beside(case))
        self.rows.append(row)
        write_text(self.out / "table.csv", pd.DataFrame(self.rows).to_csv(index=False))
        stall = "–" if row["stall_error"] is None else f"{100 * row['stall_error']:+.1f} %"
        self.say(f"{number + 1}/{total} {case}: TPOT {row['tpot_ms_measured']:.3f} ms measured, "
                 f"{row['tpot_ms_predicted']:.3f} predicted ({100 * row['tpot_error']:+.1f} %), "
                 f"stall {stall}")  # fmt: skip
        if case.policy == self._overlaid:
            self._overlaid = ""
            self._timeline(cfg, case)

    def _beside(self, case: Case) -> Callable[[], None] | None:
        """With --beside: the host's costs are measured anew, on the calibration's trace, before each replay."""
        if not self.args.beside:
            return None
        if self._in_place is None or self._in_place.model.name != case.model:
            if self._in_place is not None:
                self._in_place.release()
            self._in_place = InPlace(self.device, named_model(case.model), self.scale, IN_PLACE_TOKENS)
        in_place, runs = self._in_place, []
        host = self.raw["host"][scaled_model(named_model(case.model), self.scale).name].setdefault(case.stack, {})

        def measure() -> None:
            runs.append(in_place.run(case.policy, case.stack, case.batch_size))
            host[case.policy] = self.beside[str(case)] = median_run(runs)[1]

        return measure

    def _timeline(self, cfg: dict[str, Any], case: Case) -> None:
        """The first forwards of both worlds, one above the other."""
        _, full = self._workload(case, TIMELINE_FORWARDS * case.batch_size)
        work = scaled_workload(full, self.scale)
        pair = (Timeline(f"measured: {case}", work.model.num_experts),
                Timeline(f"predicted: {case}", work.model.num_experts))  # fmt: skip
        rig = self._rig_for(work, needs_of(work, *make_policy(cfg["policy"], full, cfg["seed"])))
        compare(rig, self.raw, self.args.name, cfg, full, work, case, timelines=pair)
        write_overlay(self.out / "timeline.json", *pair)

    def _verify(self, model: str) -> None:
        """Stamps around every kernel, and a log of each policy fed to a fresh one."""
        (self.out / "logs").mkdir(exist_ok=True)
        for name in self.args.policies.split(","):
            path = self.out / "logs" / f"{self.device.world}-{name}.parquet"
            cfg, full = self._checked(Case(model, "found", 0.5, 1, name), self.args.log_tokens, path)
            with LogReader(path) as reader:
                found = check_log(reader, full, make_policy(cfg["policy"], full, cfg["seed"])[0])
            self.lockstep.append({"policy": name, "decisions": found.num_decisions, "forwards": found.num_forwards,
                                  "difference": found.difference})  # fmt: skip
            equal = "equal" if found.difference is None else "DIFFER"
            self.say(f"{name}: lockstep {found.num_decisions} decisions {equal}")
        while self._executions() < self.args.verify_executions and self.seconds_left() > 0:
            self._checked(Case(model, "found", 0.75, 8, "lru"), self.args.verify_tokens, None)
            self.say(f"stamps: {self._executions()} executions checked")

    def _executions(self) -> int:
        return sum(int(one["executions"]) for one in self.integrity)

    def _checked(self, case: Case, num_tokens: int, log_path: Path | None) -> tuple[dict[str, Any], Workload]:
        """Replay `case` with every stamp checked, logged to `log_path`."""
        cfg, full = self._workload(case, num_tokens)
        work = scaled_workload(full, self.scale)
        policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
        rig = self._rig_for(work, needs_of(work, policy, transfer))
        with ExitStack() as stack:
            log = None
            if log_path is not None:
                config = run_config(work, transfer, load_chunks(work))
                header = LogHeader(self.device.world, cfg, [], config, work.trace_sha256)
                log = stack.enter_context(LogWriter(log_path, header))
            _, integrity = replay_policy(rig, work, policy, transfer, verify=True, log=log)
        assert integrity is not None
        self.integrity.append({"case": str(case), "executions": integrity.num_executions,
                               "checks": integrity.num_checks, "wrong": integrity.num_wrong})  # fmt: skip
        self.say(f"{case}: {integrity.num_wrong} wrong stamps in {integrity.num_executions} executions")
        return cfg, full

    def _summary(self) -> dict[str, Any]:
        tpot_bar, stall_bar = BARS[self.device.world]
        summary = {
            "machine": dict(self.device.describe()),
            "world": self.device.world,
            "scale": self.scale,
            "command": "python -m replay.validate " + " ".join(self.args.words),
            "wall_s": round(time.perf_counter() - self.started, 1),
            "tokens": self.args.tokens,
            "repeat": self.args.repeat,
            "judged": judge(self.rows, tpot_bar, stall_bar),
            "left_out": self.skipped,
            "stamps": {"executions": self._executions(),
                       "checks": sum(one["checks"] for one in self.integrity),
                       "wrong": sum(one["wrong"] for one in self.integrity), "runs": self.integrity},
            "lockstep": self.lockstep,
            "link_peak_gb_per_s": max((row["bytes"] / row["in_a_row_ns"] for row in self.raw.get("link", [])),
                                      default=None),
        }  # fmt: skip
        write_text(self.out / "summary.json", to_json(summary))
        found = provenance(self.args.words, "", summary["wall_s"], "replay")
        if self.beside:
            write_text(self.out / "beside.json", to_json(self.beside))
        write_text(self.out / "provenance.json", to_json(found))
        if self.rows:
            write_report(self.out, pd.DataFrame(self.rows), summary)
        return summary


def numbers(flag: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """The numbers of a comma list; ValueError naming the flag."""
    try:
        return [kind(one) for one in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}={text!r} must be {'whole ' if kind is int else ''}numbers, with commas between "
                         "them") from None  # fmt: skip


def load_record(path: Path, scale: int) -> dict[str, Any]:
    """The raw record of a calibration; ValueError if it is something else, or of another scale."""
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {_RECORD_REMEDY}") from None
    if not isinstance(raw, dict) or raw.get("format") != "expertflow-calibration":
        raise ValueError(f"{path} is no calibration record; {_RECORD_REMEDY}")
    if raw["scale"] != scale:
        raise ValueError(f"{path} was measured at scale {raw['scale']}, this run has {scale}; calibrate at that scale")
    return raw


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m replay.validate", description=__doc__)
    made.add_argument("name", help="what to call this machine: results/validation-NAME")
    made.add_argument("--machine", default="auto", choices=MACHINES)
    made.add_argument("--models", default="gpt-oss-20b")
    made.add_argument("--policies", default=POLICIES)
    made.add_argument("--residency", default="0.25,0.5")
    made.add_argument("--batch-sizes", default="1,8")
    made.add_argument("--stacks", default="eager,found")
    made.add_argument("--tokens", type=int, default=256, help="of each run (default: %(default)s)")
    made.add_argument("--repeat", type=int, default=1, help="replays of each case; the median counts (default: 1)")
    made.add_argument("--beside", action="store_true",
                      help="measure the host's costs anew beside each replay, as its speed drifts")  # fmt: skip
    made.add_argument("--trace", type=Path, help="a recorded trace (default: the generated one)")
    made.add_argument("--minutes", type=float, default=8.0, help="no new comparison is begun after (default: 8)")
    made.add_argument("--calibration", type=Path, help="a record that is there, in place of a new calibration")
    made.add_argument("--hardware", default="a100", help="profile whose link a CPU machine keeps pace with")
    made.add_argument("--throttle", type=float, metavar="GB/s", help="another pace for it, at the experts' scale")
    made.add_argument("--scale", type=int, help="divide the models' widths (default: 1 on a GPU, 16 on a CPU)")
    made.add_argument("--host-memory-gb", type=float)
    made.add_argument("--verify-executions", type=float, default=0, help="expert executions to check at least")
    made.add_argument("--verify-tokens", type=int, default=1024)
    made.add_argument("--log-tokens", type=int, default=32, help="of each policy's lockstep log")
    made.add_argument("--quick", action="store_true", help="a short calibration")
    made.add_argument("--out", type=Path, help="default: results/validation-NAME")
    return made


def main(words: list[str] | None = None) -> int:
    """Command line; 1 if a bar is missed, a stamp is wrong or a decision differs, 2 on a user's error."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    args.words = words
    return as_command(lambda: _validate(args), "finished rows are kept")


def _validate(args: argparse.Namespace) -> int:
    name = check_name(args.name)
    for key in ("tokens", "log_tokens", "verify_tokens", "repeat"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')}={getattr(args, key)} must be at least 1")
    out = args.out or Path("results") / f"validation-{name}"
    out.mkdir(parents=True, exist_ok=True)
    machine = choose_machine(args.machine)
    scale = args.scale = scale_of(args.scale, machine)
    pace = args.throttle if args.throttle or machine == "cuda" else _pace(args.hardware, scale)
    device = make_device(machine, pace)
    try:
        summary = Validation(args, device, out).run()
    finally:
        device.close()
    if summary["judged"]["num_rows"]:
        print((out / "README.md").read_text(encoding="utf-8"))
    else:
        print(f"no comparison was made in {args.minutes} minutes; give more with --minutes")
    good = not summary["judged"]["missed"] and not summary["stamps"]["wrong"]
    good = good and all(one["difference"] is None for one in summary["lockstep"])
    ranks = summary["judged"]["ranks"]
    return 0 if good and ranks["agreeing"] == ranks["pairs"] else 1


def _pace(hardware: str, scale: int) -> float:
    """GB/s of the profile's link at the experts' scale."""
    link = configure([f"+hardware={hardware}", "+policy=lru"])["hardware"]["link_gb_per_s"]
    peak = link if isinstance(link, int | float) else max(rate for _, rate in link)
    return float(peak) / scale**2


if __name__ == "__main__":
    sys.exit(main())
