"""What the replay's tests share: `python -m replay` in this process, and single replays of a tiny model on a CPU."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from expertflow.keys import declared
from expertflow.observer import Observer
from expertflow.policy import Policy
from replay.command import cli
from replay.host_figures import figures_for
from replay.keys import ReplayKeys
from replay.lockstep.log import LogWriter
from replay.lockstep.log_format import LogHeader
from replay.machine.cpu import CpuDevice
from replay.machine.rig import Rig
from replay.run import Integrity, needs_of, replay_policy, scaled_workload
from replay.settings import Settings, as_found
from sim.job.configure import configure
from sim.job.setup import Transfer, Workload, load_chunks, make_policy, make_workload, run_config
from tests.support.commands import TINY_MODEL_WORDS, Outcome, composed_once, folder_words

TINY = ("+hardware=local", *TINY_MODEL_WORDS, "machine=cpu", "scale=8", "stack=found", "compare=none")
"""A model of 4 layers and 8 experts, of 24 KiB each at this scale; it needs a `tiny_trace`."""
SMALL = ("+hardware=local", "machine=cpu", "stack=found", "compare=none")
"""The default trace's model, an expert of 50 KB."""


def uncollected() -> AbstractContextManager[object]:
    """Within it, no run collects garbage first: that would take longer than the hundreds of tiny runs of the tests."""
    return patch("replay.run.gc_paused", nullcontext)


def replay_here(words: Sequence[str], folder: Path) -> Outcome:
    """`python -m replay WORDS hydra.run.dir=FOLDER` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["replay", *words, *folder_words(words, folder)]
    GlobalHydra.instance().clear()
    try:
        with (
            uncollected(),
            composed_once(),
            patch.object(sys, "argv", argv),
            patch.dict(os.environ),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = cli()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return Outcome(code, out.getvalue(), err.getvalue(), folder)


@dataclass
class Case:
    """A configuration of `python -m replay`, and what it makes. work: at the scale of the replay; full: unscaled."""

    words: list[str]
    cfg: dict[str, Any]
    settings: Settings
    full: Workload
    work: Workload

    @classmethod
    def of(cls, *words: str) -> Case:
        """Of the words of a command line."""
        cfg = configure(list(words), "replay", declared(ReplayKeys))
        settings = Settings.of(cfg)
        with on_cpu() as device:
            cfg = as_found(cfg, device)
        full = make_workload(cfg)
        return cls(list(words), cfg, settings, full, scaled_workload(full, settings.scale))

    def policy(self) -> tuple[Policy, Transfer]:
        """A fresh policy, as the application makes it."""
        return make_policy(self.cfg["policy"], self.full, self.cfg["seed"])

    @contextmanager
    def rig(self) -> Iterator[Rig]:
        """A device with everything allocated; given back at the end."""
        policy, transfer = self.policy()
        pace = self.settings.throttle_gb_per_s if policy.places else None
        with on_cpu(pace) as device:
            yield Rig(device, self.work.model, needs_of(self.work, policy, transfer), self.settings.host_memory_gb)

    def replay(
        self,
        rig: Rig,
        observers: Sequence[Observer] = (),
        *,
        verify: bool = False,
        log: Path | None = None,
        fault: tuple[str, int] | None = None,
    ) -> tuple[dict[str, Any], Integrity | None]:
        """One run of a fresh policy; with `log` the log is written there, also of a run that breaks off."""
        policy, transfer = self.policy()
        if log is None:
            return self._replay(rig, policy, transfer, observers, verify, None, fault)
        config = run_config(self.work, transfer, load_chunks(self.work))
        writer = LogWriter(log, LogHeader("cpu", self.cfg, self.words, config, self.work.trace_sha256))
        try:
            return self._replay(rig, policy, transfer, observers, verify, writer, fault)
        finally:
            writer.close()

    def _replay(
        self,
        rig: Rig,
        policy: Policy,
        transfer: Transfer,
        observers: Sequence[Observer],
        verify: bool,
        log: LogWriter | None,
        fault: tuple[str, int] | None,
    ) -> tuple[dict[str, Any], Integrity | None]:
        figures = figures_for(self.full, policy, transfer, rig.device, self.settings.scale)
        more = {"verify": verify, "log": log, "fault": fault, "figures": figures}
        return replay_policy(rig, self.work, policy, transfer, observers, **more)

    def stamps(self, fault: tuple[str, int] | None = None) -> Integrity:
        """What the stamps say of one run on a rig of its own."""
        with self.rig() as rig:
            _, found = self.replay(rig, verify=True, fault=fault)
        assert found is not None
        return found


@contextmanager
def on_cpu(throttle_gb_per_s: float | None = None, latency_ns: int = 0) -> Iterator[CpuDevice]:
    """A CPU machine, closed at the end whatever happens."""
    device = CpuDevice(throttle_gb_per_s, latency_ns)
    try:
        yield device
    finally:
        device.close()
