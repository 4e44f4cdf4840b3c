"""A device with everything allocated that replays of one model need: buffers, slots, kernels. Runs share it."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertflow.model import ModelSpec
from replay.keys import MACHINES
from replay.machine.cpu import CpuDevice
from replay.machine.cuda import CudaDevice
from replay.machine.cuda_errors import explaining
from replay.machine.device import Device
from replay.machine.figures import Figures
from replay.machine.hosted import hosted
from replay.machine.kernels import Kernels, kernel_bytes
from replay.machine.memory import HostPlan, align, check_gpu, plan_host
from replay.machine.pools import HostPool, SlotPool, chunk_offsets
from replay.machine.programs import PROGRAM_BYTES
from replay.machine.real import RealMachine
from replay.machine.stamps import Stamps
from replay.machine.stored import StoredMachine
from sim.specs.disk import Disk
from sim.specs.hardware import Stack

_GRAPH_BYTES = 512 * PROGRAM_BYTES
"""GPU memory for the captured programs of decode, of which there are hundreds; prompts take of what is left."""


@dataclass(frozen=True)
class Needs:
    """The largest sizes that the runs on a rig ask for.

    max_context: KV tokens of all requests of a forward together.
    """

    num_slots: int
    max_tokens: int
    max_context: int


def choose_machine(name: str) -> str:
    """`cuda` or `cpu`; `auto` takes the GPU if torch sees one."""
    if name not in MACHINES:
        raise ValueError(f"machine={name!r} is unknown; choose one of: {', '.join(MACHINES)}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def make_device(name: str, throttle_gb_per_s: float | None = None) -> Device:
    """The device that `name` (cuda or cpu) stands for."""
    if throttle_gb_per_s is not None and not 0 < throttle_gb_per_s < math.inf:
        raise ValueError(f"throttle_gb_per_s={throttle_gb_per_s} must be GB/s above 0")
    if name == "cpu":
        return CpuDevice(throttle_gb_per_s)
    if throttle_gb_per_s is not None:
        raise ValueError(f"throttle_gb_per_s={throttle_gb_per_s} is for machine=cpu; a GPU's link is as fast as it is")
    return CudaDevice()


def _nothing() -> None:
    """Do nothing where this version of torch lacks the function."""


class Rig:
    """Allocated once; `machine` makes a fresh machine on it for each run.

    rooms: experts that host memory holds at once, above storage; None = all. ValueError, before anything is allocated,
    if host or GPU memory does not suffice.
    """

    def __init__(
        self,
        device: Device,
        model: ModelSpec,
        needs: Needs,
        host_memory_gb: float | None = None,
        pinned: bool = True,
        rooms: int | None = None,
    ) -> None:
        self.device = device
        self.model = model
        self.needs = needs
        self._host_memory_gb = host_memory_gb
        self._num_buffers = rooms or model.num_layers * model.num_experts
        pinned = pinned and device.world == "cuda"
        plan = self._plan(pinned)
        free = device.free_bytes()
        stride = align(model.mean_expert_bytes)
        parts = dict(kernel_bytes(model, device.dtype, needs.max_tokens, needs.max_context))
        if device.captures:
            parts["graphs"] = _GRAPH_BYTES
        if free is not None:
            check_gpu([("slots", stride * needs.num_slots), *parts.items()], free, stride, needs.num_slots)
        else:
            room = plan.available_bytes - plan.num_buffers * plan.stride
            check_gpu(
                [("slots", stride * needs.num_slots), *parts.items()],
                max(room, 0),
                stride,
                needs.num_slots,
                "host memory beside the experts",
            )
        with explaining():
            self._hosts = {pinned: HostPool(plan, model.mean_expert_bytes, device.dtype, pinned)}
            self.slots = SlotPool(needs.num_slots, model.mean_expert_bytes, device.torch_device)
            self.kernels = Kernels(model, self.slots, device.dtype, needs.max_tokens, needs.max_context)
        device.synchronize()

    def suffices(self, needs: Needs) -> bool:
        """Whether runs that ask for `needs` fit."""
        have = self.needs
        return (
            have.num_slots >= needs.num_slots
            and have.max_tokens >= needs.max_tokens
            and have.max_context >= needs.max_context
        )

    def _plan(self, pinned: bool) -> HostPlan:
        return plan_host(self._num_buffers, self.model.mean_expert_bytes, self._host_memory_gb, pinned)

    def host(self, pinned: bool) -> HostPool:
        """Host buffers of the kind asked for, made on first use."""
        pinned = pinned and self.device.world == "cuda"
        if pinned not in self._hosts:
            with explaining():
                self._hosts[pinned] = HostPool(
                    self._plan(pinned), self.model.mean_expert_bytes, self.device.dtype, pinned
                )
        return self._hosts[pinned]

    def machine(
        self,
        chunk_bytes: Sequence[int],
        stack: Stack,
        memory: str = "pinned",
        verify: bool = False,
        device: Device | None = None,
        figures: Figures | None = None,
        pace: Disk | None = None,
    ) -> RealMachine:
        """A machine for one run, to be closed after it. device: this rig's, wrapped (to inject faults). figures: what
        its host takes for experts; None: it computes none. pace: of reads from storage."""
        device = device or self.device
        host = self.host(memory == "pinned")
        if pace is not None:
            assert isinstance(self.device, CpuDevice)
            return StoredMachine(self.device, self.kernels, host, self.slots, chunk_bytes, stack, pace)
        stamps = Stamps(host, self.slots, chunk_offsets(chunk_bytes)) if verify else None
        parts = device, self.kernels, host, self.slots, chunk_bytes, stack, stamps
        return RealMachine(*parts) if figures is None else hosted(parts, figures, self.needs.max_tokens)

    def describe(self, memory: str = "pinned") -> dict[str, Any]:
        """What was measured, for a result: the device, and how the experts were held."""
        host = self.host(memory == "pinned")
        found: Mapping[str, Any] = self.device.describe()
        return {
            **found,
            "host_memory": "pinned" if host.pinned else "pageable",
            "host_buffers": host.plan.num_buffers,
            "host_buffers_shared": host.plan.shared,
            "host_arena_bytes": host.num_bytes,
            "warnings": list(host.plan.warnings),
        }

    def release(self) -> None:
        """Give the memory back; the device stays open."""
        self._hosts.clear()
        del self.kernels, self.slots
        # Runs leave circles behind, which hold programs, which hold what their kernels read.
        gc.collect()
        if self.device.world == "cuda":
            torch.cuda.empty_cache()
            # Pinned memory stays in torch's own cache, and would count as taken; older versions cannot empty it.
            getattr(torch._C, "_host_emptyCache", _nothing)()
