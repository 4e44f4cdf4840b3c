"""Short replays through `replay.run.replay_policy`, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertflow.policy import Policy
from replay.host_figures import figures_for
from replay.lockstep.compare import LockstepResult, check_log
from replay.lockstep.log import LogWriter
from replay.lockstep.log_format import LogHeader
from replay.lockstep.log_reader import LogReader
from replay.machine.device import Device
from replay.machine.rig import Rig
from replay.run import Integrity, needs_of, replay_policy, scaled_workload
from sim.job.configure import configure
from sim.job.setup import Transfer, Workload, load_chunks, make_policy, make_workload, run_config


@dataclass
class Case:
    """A configuration, and what it makes. full: before scaling, which is what a policy is made for."""

    words: list[str]
    cfg: dict[str, Any]
    full: Workload
    work: Workload

    @classmethod
    def of(cls, *words: str, scale: int = 1) -> Case:
        """Of the words of a command line."""
        cfg = configure(["compare=none", "stack=found", *words])
        full = make_workload(cfg)
        return cls(list(words), cfg, full, scaled_workload(full, scale))

    def policy(self) -> tuple[Policy, Transfer]:
        """A fresh one."""
        return make_policy(self.cfg["policy"], self.full, self.cfg["seed"])

    def rig(self, device: Device, host_memory_gb: float | None = None) -> Rig:
        """With room for this."""
        policy, transfer = self.policy()
        needs = needs_of(self.work, policy, transfer)
        return Rig(device, self.work.model, needs, host_memory_gb, transfer.memory == "pinned")

    def replay(
        self, rig: Rig, *, verify: bool = False, log: Path | None = None, fault: tuple[str, int] | None = None
    ) -> tuple[dict[str, Any], Integrity | None]:
        """One run of a fresh policy."""
        policy, transfer = self.policy()
        figures = figures_for(self.full, policy, transfer, rig.device)
        if log is None:
            return replay_policy(rig, self.work, policy, transfer, verify=verify, fault=fault, figures=figures)
        config = run_config(self.work, transfer, load_chunks(self.work))
        with LogWriter(log, LogHeader("cuda", self.cfg, self.words, config, self.work.trace_sha256)) as writer:
            return replay_policy(
                rig, self.work, policy, transfer, verify=verify, log=writer, fault=fault, figures=figures
            )

    def lockstep(self, log: Path) -> LockstepResult:
        """The log against a fresh policy."""
        with LogReader(log) as reader:
            return check_log(reader, self.work, self.policy()[0])
