"""What the places of a replay are told of costs, and the pace of a host that is none: by the figures of a profile."""

from __future__ import annotations

import math
from dataclasses import replace

from expertflow.policy import Policy
from replay.machine.device import Device
from sim.job.setup import Transfer, Workload, load_chunks
from sim.machine.host_compute import CpuTimes, HostFigures
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.specs.hardware import PINNED


def figures_for(
    work: Workload, policy: Policy, transfer: Transfer, device: Device, scale: int = 1
) -> HostFigures | None:
    """Those of `work` as it is simulated; None for a policy that places nothing on the host. ValueError where the
    hardware says nothing of its host.

    scale: what a machine without a GPU divides the model's widths by, where `work` is not scaled: bytes are fewer there
    and its link slower by the same factor, so that a copy, and an expert on the host, take what they take unscaled.
    """
    if not policy.places:
        return None
    hardware, memory = work.hardware, transfer.memory
    if hardware.name == "local":
        raise ValueError(
            "hardware=local has no figures to weigh a place on the host by; give the profile of a machine, as "
            "+hardware=a100 +host=server (python -m replay.calibrate NAME measures one)"
        )
    pace = device.describe().get("throttle_gb_per_s")
    if device.world == "cpu" and pace is not None and not math.isinf(pace):
        hardware, memory = replace(hardware, link_gb_per_s=pace * scale**2, link_latency_ns=0), PINNED
    times = CpuTimes(work.model, hardware)
    kernels = KernelTimes(work.model, hardware, work.stack)
    return HostFigures(kernels, Link(hardware, memory=memory), load_chunks(work), times)
