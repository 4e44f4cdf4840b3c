"""The memory that experts are copied from and to: host buffers carved from arenas, and GPU slots in one block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from replay.machine.memory import ALIGNMENT, HostPlan, align, plan_arenas

_FILL_SEED = 20_251_030
_WORD = 8


def chunk_offsets(chunk_bytes: Sequence[int]) -> list[int]:
    """Where each chunk of an expert begins, and the end: rounded down, so that no copy starts at an odd address.

    A chunk's real size differs from the stated one by less than the alignment; their sum is the same. Small chunks (of
    a model that was scaled down) are aligned to a word only.
    """
    alignment = ALIGNMENT if min(chunk_bytes) >= 4 * ALIGNMENT else _WORD
    offsets, end = [0], 0
    for num_bytes in chunk_bytes[:-1]:
        end += num_bytes
        offsets.append(end // alignment * alignment)
    return [*offsets, end + chunk_bytes[-1]]


class HostPool:
    """Host memory of all experts, filled with numbers of a trained layer's size: zeros compute faster than weights do.

    pinned: page-locked, which copies at the link's full speed and beside everything else.
    """

    def __init__(self, plan: HostPlan, expert_bytes: int, dtype: torch.dtype, pinned: bool) -> None:
        self.plan = plan
        self.pinned = pinned
        self._arenas: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(_FILL_SEED)
        width = torch.finfo(dtype).bits // 8
        fill = torch.randn(plan.stride // width, generator=generator).mul_(0.02).to(dtype).view(torch.uint8)
        for size, count in plan_arenas(plan.num_buffers, plan.stride):
            arena = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self._arenas.append(arena)
            for index in range(count):
                buffer = arena[index * plan.stride : index * plan.stride + expert_bytes]
                buffer.copy_(fill[:expert_bytes])
                self._buffers.append(buffer)

    def buffer_number(self, key: int) -> int:
        """The buffer that holds `key`."""
        return key % self.plan.num_buffers

    def buffer(self, key: int) -> torch.Tensor:
        """Bytes [expert_bytes] of `key`."""
        return self._buffers[key % self.plan.num_buffers]

    @property
    def num_bytes(self) -> int:
        """What the arenas take."""
        return sum(arena.numel() for arena in self._arenas)


class SlotPool:
    """GPU memory for `num_slots` experts, allocated once. `bytes`: [num_slots, stride] uint8."""

    def __init__(self, num_slots: int, expert_bytes: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.expert_bytes = expert_bytes
        self.stride = align(expert_bytes)
        self.bytes = torch.zeros((num_slots, self.stride), dtype=torch.uint8, device=device)
        self.words = self.bytes.view(torch.int64).view(-1)
        """The same memory as 8-byte words [num_slots * stride / 8]."""

    def slot(self, number: int) -> torch.Tensor:
        """Bytes [expert_bytes] of one slot."""
        return self.bytes[number, : self.expert_bytes]
