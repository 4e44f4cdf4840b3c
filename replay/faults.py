"""Faults on purpose: does the integrity check see what can go wrong with asynchronous copies?

Wraps a device. Each fault strikes once, at the `at`-th copy (or the first occasion after it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from replay.device import Device, DeviceLostError, Event, Span

FAULTS = ("delayed", "failed", "reordered", "duplicated", "early_reuse", "lost")


class FaultyDevice:
    """`device` with one fault.

    delayed: a copy is reported as done, its bytes arrive sixteen copies later. failed: they never do. reordered: two
    copies in a row change places. duplicated: a copy is done again after its slot has been given to another expert.
    early_reuse: what a copy has brought is overwritten by another while a kernel runs. lost: the device stops
    answering.
    What was copied for nothing (a prefetch that nobody uses) is never read: such a strike is harmless, and unseen.
    """

    def __init__(self, device: Device, fault: str, at: int) -> None:
        if fault not in FAULTS:
            raise ValueError(f"fault={fault!r} is unknown; choose one of: {', '.join(FAULTS)}")
        self._device = device
        self.fault = fault
        self.at = at
        self.struck = False
        self._count = 0
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        self._due = 0
        self._before: torch.Tensor | None = None
        self._sources: dict[int, torch.Tensor] = {}
        self._overwrite: Callable[[], object] | None = None
        self._landed: Event = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Span:
        """As the device's, but for the fault."""
        self._count += 1
        span = self._faulty(target, source, after)
        self._before = source
        self._sources[target.data_ptr()] = source
        return span

    def _faulty(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Span:
        device, due = self._device, self._count >= self.at
        if self._held is not None:
            return self._release(target, source, after)
        if not due or self.struck:
            return device.copy(target, source, after)
        if self.fault == "lost":
            self.struck = True
            raise DeviceLostError("fault=lost: the device stopped answering, as asked")
        if self.fault in ("delayed", "failed", "reordered"):
            self.struck = True
            if self.fault != "failed":
                self._held, self._due = (target, source), self._count + (16 if self.fault == "delayed" else 1)
            return device.copy(target[:0], source[:0], after)
        if self.fault == "duplicated":
            return self._duplicate(target, source, after)
        span = device.copy(target, source, after)
        if self._overwrite is None and self._before is not None:
            self._landed, self._overwrite = span[1], _overwriter(target, self._before)
        return span

    def _release(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Span:
        assert self._held is not None
        if self._count < self._due:
            return self._device.copy(target, source, after)
        held_target, held_source = self._held
        self._held = None
        if self.fault == "reordered" and held_target.numel() == target.numel():
            self._device.copy(target, held_source, after)
            return self._device.copy(held_target, source, None)
        # Chunks of different sizes cannot change places: try the next pair.
        self.struck = self.fault != "reordered"
        self._device.copy(held_target, held_source, after)
        return self._device.copy(target, source, None)

    def _duplicate(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Span:
        earlier = self._sources.get(target.data_ptr())
        span = self._device.copy(target, source, after)
        if earlier is not None and earlier.data_ptr() != source.data_ptr():
            self.struck = True
            self._device.copy(target, earlier, None)
        return span

    def launch(self, work: Callable[[], None], pad_ns: int) -> Span:
        """As the device's; with early_reuse a slot is overwritten while its kernels are under way."""
        overwrite = self._overwrite
        if overwrite is None or self.struck or self._landed is not None:
            return self._device.launch(work, pad_ns)
        self.struck = True

        def raced() -> None:
            overwrite()
            work()

        return self._device.launch(raced, pad_ns)

    def recycle(self, event: Event) -> None:
        """As the device's; what is given back has been reported as done."""
        if event is self._landed:
            self._landed = None
        self._device.recycle(event)

    def wait(self, events: Sequence[Event]) -> None:
        """As the device's."""
        self._device.wait(events)


def _overwriter(target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    size = min(target.numel(), source.numel())
    return lambda: target[:size].copy_(source[:size])
