"""What the places of a replay are told of costs, and the pace of a host that is none: by the figures of a profile."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from expertflow.policy import Policy
from replay.machine.device import Device
from sim.job.setup import Transfer, Workload, load_chunks
from sim.machine.host_compute import CpuTimes, HostFigures
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.specs.hardware import HOST_COMPUTE, PINNED, Hardware


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
    pace = getattr(device, "throttle_gb_per_s", None)
    if device.world == "cpu" and pace is not None and not math.isinf(pace):
        hardware, memory = replace(hardware, link_gb_per_s=pace * scale**2, link_latency_ns=0), PINNED
    times = CpuTimes(work.model, hardware)
    kernels = KernelTimes(work.model, hardware, work.stack)
    return HostFigures(kernels, Link(hardware, memory=memory), load_chunks(work), times)


def with_host(hardware: Hardware, device: Device, full: Workload, work: Workload) -> Hardware:
    """`hardware` with the host of `full`, which has the model as it is, for `work`, whose model may be scaled.

    Where there is no GPU the host keeps a pace that stands to the pace of the link as it does in the hardware of
    `full`. Its link and its host do not slow each other there: its memory has room for both.
    """
    times: dict[str, Any] = {key: getattr(full.hardware, key) for key in HOST_COMPUTE}
    pace, unpacks = getattr(device, "throttle_gb_per_s", None), full.hardware.host_unpack_gweights_per_s
    if device.world != "cpu" or pace is None or None in times.values():
        return replace(hardware, **times, host_unpack_gweights_per_s=unpacks)
    link = full.hardware.link_gb_per_s
    slower = (link if isinstance(link, int | float) else max(rate for _, rate in link)) / pace
    # A copy of one expert takes `stretched` times as long as in `full`, and so do its products on the host.
    stretched = slower * work.model.mean_expert_bytes / full.model.mean_expert_bytes
    rate = times["host_memory_gb_per_s"] * times["host_memory_efficiency"] / slower
    products = full.model.expert_params / work.model.expert_params * stretched
    return replace(
        hardware,
        host_memory_gb_per_s=rate + pace,
        host_memory_efficiency=rate / (rate + pace),
        host_unpack_gweights_per_s=None if unpacks is None else unpacks / products,
        host_tflops=times["host_tflops"] / products,
        host_round_trip_ns=times["host_round_trip_ns"],
    )
