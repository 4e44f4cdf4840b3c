"""Short replays of policies on another trace than results are published on: what the host spends on what."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from expertflow.model import ModelSpec
from expertflow.runtime import Runtime
from replay.calibration.probe import HostedProbe, HostProbe, HostRun, without_own_costs
from replay.calibration.profile import summary
from replay.calibration.surrogate import surrogate_trace
from replay.calibration.words import HOST, policy_words
from replay.drive import drive
from replay.gc_pause import gc_paused
from replay.host_figures import figures_for, with_host
from replay.machine.device import Device
from replay.machine.hosted import HostedMachine
from replay.machine.memory import available_bytes
from replay.machine.rig import Rig
from replay.run import needs_of, scaled_workload
from sim.job.configure import configure
from sim.job.setup import Workload, load_chunks, make_policy, make_trace, make_workload, run_config

SEED = 1
"""Seed of the generated trace that is replayed in place. Results are published on another trace."""


def in_place_workload(
    model: ModelSpec,
    hardware: str,
    policy: str,
    num_tokens: int,
    batch_size: int,
    stack: str = "found",
    residency: float = 0.5,
    start: str | None = None,
) -> tuple[dict[str, Any], Workload]:
    """A short generated trace of the model's shape. start: what the cache holds at first (None: as configured)."""
    overrides = [
        f"+hardware={hardware}",
        f"+host={HOST}",
        *policy_words(policy),
        f"trace.seed={SEED}",
        f"stack={stack}",
        "compare=none",
        f"batch_size={batch_size}",
        f"trace.num_tokens={num_tokens}",
        f"residency={residency}",
        f"trace.num_requests={batch_size}",
    ]
    cfg = configure(overrides if start is None else [*overrides, f"start={start}"])
    return cfg, make_workload(cfg, surrogate_trace(make_trace(cfg["trace"]), model))


class InPlace:
    """Short replays of policies that show what the host spends its time on.

    They run over another trace than the one that results are published on.
    """

    def __init__(self, device: Device, model: ModelSpec, scale: int, num_tokens: int) -> None:
        self.device, self.model, self.scale, self.num_tokens = device, model, scale, num_tokens
        self._rig: Rig | None = None
        self._workloads: dict[tuple[Any, ...], tuple[dict[str, Any], Workload]] = {}

    def run(
        self, policy_name: str, stack: str, batch_size: int = 1, residency: float = 0.5, start: str | None = None
    ) -> HostRun:
        """(ms a forward, samples by kind) of one replay."""
        num_tokens = self.num_tokens if batch_size == 1 else self.num_tokens * batch_size // 2
        key = policy_name, stack, batch_size, residency, start
        if key not in self._workloads:
            self._workloads[key] = in_place_workload(
                self.model, "a100", policy_name, num_tokens, batch_size, stack, residency, start
            )
        cfg, full = self._workloads[key]
        work = scaled_workload(full, self.scale)
        policy, transfer = make_policy(cfg["policy"], full, 0)
        needs = needs_of(work, policy, transfer)
        if self._rig is None or not self._rig.suffices(needs):
            self.release()
            pinned = transfer.memory == "pinned"
            self._rig = Rig(self.device, work.model, needs, _host_budget_gb(work.model), pinned)
        chunk_bytes = load_chunks(work)
        figures = None
        if policy.places:
            beside = replace(work, hardware=with_host(work.hardware, self.device, full, work))
            figures = figures_for(beside, policy, transfer, self.device)
        machine = self._rig.machine(chunk_bytes, work.stack, transfer.memory, figures=figures)
        probe = HostedProbe(machine) if isinstance(machine, HostedMachine) else HostProbe(machine)
        with closing(machine):
            runtime = Runtime(run_config(work, transfer, chunk_bytes), probe, policy, list(work.batches))
            machine.prepare(work.batches)
            # What is resident from the start has slots, and kernels read them.
            machine.preload(runtime.slots.slot_of)
            with gc_paused():
                self.device.restart_clock()
                drive(runtime, probe)
            machine.finish()
        probe.samples["rows"].append(batch_size)
        per_forward_ms = runtime.counters.elapsed_ns / runtime.counters.num_forwards / 1e6
        return per_forward_ms, summary(without_own_costs(probe.samples))

    def release(self) -> None:
        """Give the memory back."""
        if self._rig is not None:
            self._rig.release()
            self._rig = None


def median_run(runs: Sequence[HostRun]) -> HostRun:
    """Of replays in place the one of median length."""
    return sorted(runs, key=lambda run: run[0])[len(runs) // 2]


def middle_samples(runs: Sequence[HostRun]) -> dict[str, Any]:
    """The samples of the run of median length; of an even number of runs the means of the two middle ones."""
    ordered = sorted(runs, key=lambda run: run[0])
    first, second = ordered[(len(runs) - 1) // 2][1], ordered[len(runs) // 2][1]
    if first is second:
        return dict(first)
    return {
        name: {key: (value + second[name][key]) / 2 for key, value in sample.items()}
        for name, sample in first.items()
        if name in second
    }


def _host_budget_gb(model: ModelSpec) -> float | None:
    """Host memory in GB for the experts of a short replay.

    A few GB are enough: the time of a copy does not depend on its buffer, and pinning memory takes long.
    """
    enough = 4.0
    return enough if model.total_expert_bytes > enough * 1e9 and available_bytes() > 2 * enough * 1e9 else None
