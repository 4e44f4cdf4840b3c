"""What replays of many cases share: their workloads, and one rig that is large enough for the next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertflow.policy import Policy
from replay.calibration.record import named_model
from replay.calibration.surrogate import surrogate_trace
from replay.calibration.words import policy_words
from replay.host_figures import figures_for, with_host
from replay.lockstep.log import LogWriter
from replay.lockstep.log_format import LogHeader
from replay.machine.device import Device
from replay.machine.rig import Needs, Rig
from replay.run import Integrity, memory_of, needs_of, replay_policy, scaled_workload
from replay.validation.plan import Case
from sim.job.configure import configure
from sim.job.setup import Transfer, Workload, load_chunks, make_policy, make_trace, make_workload, run_config
from sim.paths import resolved


class Workbench:
    """Makes what a replay of a case needs, and keeps it. args: as `replay.validate` parses and fills them in."""

    def __init__(self, args: argparse.Namespace, device: Device) -> None:
        self.args, self.device, self.scale = args, device, int(args.scale)
        self._rig: Rig | None = None
        self._workloads: dict[tuple[Any, ...], Workload] = {}
        self._configs: dict[tuple[str, ...], dict[str, Any]] = {}

    def overrides(self, case: Case, num_tokens: int) -> list[str]:
        """The configuration of `case`, cut to `num_tokens`."""
        if self.args.trace is None:
            # As many requests as a batch holds: of a trace that is cut, the first requests alone are left.
            trace = [f"trace.num_tokens={num_tokens}", f"trace.num_requests={case.batch_size}"]
        else:
            trace = [f"trace.path={resolved(self.args.trace)}", f"max_tokens={num_tokens}"]
        stored = self.args.storage
        below = [] if stored is None else [f"+storage={stored}", f"host_memory_gb={self.args.host_memory_gb}"]
        start = [] if self.start(case) is None else [f"start={self.start(case)}"]
        return [
            f"+hardware={self.args.hardware}",
            f"+host={self.args.host}",
            *policy_words(case.policy),
            f"stack={case.stack}",
            "compare=none",
            f"residency={case.residency}",
            f"batch_size={case.batch_size}",
            *trace,
            *start,
            *below,
        ]

    def start(self, case: Case) -> str | None:
        """What the cache holds at first; None = as configured. Stamps and decisions are checked with less than
        everything resident."""
        asked: str | None = self.args.start
        return None if asked == "resident" and case.residency < 1 else asked

    def tokens(self, case: Case) -> int:
        """Of a measured run of `case`."""
        # A batch counts several tokens a forward: half as many forwards do.
        tokens = int(self.args.tokens)
        return max(tokens * case.batch_size // (1 if case.batch_size == 1 else 2), case.batch_size)

    def workload(self, case: Case, num_tokens: int) -> tuple[dict[str, Any], Workload]:
        """(configuration, workload before it is scaled) of `case`. ValueError if its batch is never filled."""
        overrides = self.overrides(case, num_tokens)
        cfg = self._configs.get(tuple(overrides)) or self._configs.setdefault(tuple(overrides), configure(overrides))
        key = (case.model, case.stack, case.residency, case.batch_size, num_tokens)
        if key not in self._workloads:
            trace = surrogate_trace(make_trace(cfg["trace"]), named_model(case.model))
            work = self._workloads[key] = make_workload(cfg, trace)
            widest = max(len(forward.requests) for forward in work.batches)
            if widest < case.batch_size:
                raise ValueError(
                    f"--batch-sizes: {case.batch_size} is never reached: the first tokens of the trace "
                    f"belong to {widest} requests at most at a time; raise --tokens"
                )
        return cfg, self._workloads[key]

    def make_rig(self, runs: Sequence[tuple[Case, int]]) -> None:
        """One rig that suffices for all `runs` (case, tokens): pinning the experts anew takes seconds."""
        needs = []
        for case, num_tokens in runs:
            cfg, full = self.workload(case, num_tokens)
            work = scaled_workload(full, self.scale)
            needs.append(needs_of(work, *make_policy(cfg["policy"], full, cfg["seed"])))
        self._rig_of(work, most_needs(needs))

    def rig_for(self, work: Workload, policy: Policy, transfer: Transfer) -> Rig:
        """The rig that is there, if it is of the right model and large enough."""
        return self._rig_of(work, needs_of(work, policy, transfer))

    def _rig_of(self, work: Workload, needs: Needs) -> Rig:
        rig = self._rig
        if rig is not None and rig.model == work.model:
            if rig.suffices(needs):
                return rig
            needs = most_needs([rig.needs, needs])
        if rig is not None:
            rig.release()
        self._rig = None
        self._rig = Rig(self.device, work.model, needs, **memory_of(work, self.args.host_memory_gb))
        return self._rig

    def stamped(self, case: Case, num_tokens: int, log_path: Path | None) -> Integrity:
        """Replay `case` with every stamp checked, logged to `log_path`: what the stamps said. Over storage there are
        none: the machine looks at each read itself."""
        cfg, full = self.workload(case, num_tokens)
        work = scaled_workload(full, self.scale)
        policy, transfer = make_policy(cfg["policy"], full, cfg["seed"])
        rig = self.rig_for(work, policy, transfer)
        with ExitStack() as stack:
            log = None
            if log_path is not None:
                config = run_config(work, transfer, load_chunks(work))
                header = LogHeader(self.device.world, cfg, [], config, work.trace_sha256)
                log = stack.enter_context(LogWriter(log_path, header))
            figures = None
            if policy.places:
                beside = replace(work, hardware=with_host(work.hardware, self.device, full, work))
                figures = figures_for(beside, policy, transfer, self.device)
            verify = work.storage is None
            _, integrity = replay_policy(rig, work, policy, transfer, verify=verify, log=log, figures=figures)
        return integrity or Integrity(0, 0, 0, None)


def pace_gb_per_s(hardware: str, scale: int) -> float:
    """GB/s of the profile's link at the scale of the experts: the pace of a CPU machine."""
    link = configure([f"+hardware={hardware}", "+policy=lru"])["hardware"]["link_gb_per_s"]
    peak = link if isinstance(link, int | float) else max(rate for _, rate in link)
    return float(peak) / scale**2


def most_needs(needs: Sequence[Needs]) -> Needs:
    """The largest of each size in `needs`: a rig that has these suffices for every one of them."""
    return Needs(
        max(one.num_slots for one in needs), max(one.max_tokens for one in needs), max(one.max_context for one in needs)
    )
