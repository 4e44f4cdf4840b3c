"""Faults on purpose: does the integrity check see what can go wrong with asynchronous copies?

Wraps a device. Each fault strikes once, at the `at`-th copy (or the first occasion after it), or at the `at`-th expert
that the host computes.
"""

from __future__ import annotations

from typing import Any

from replay.keys import FAULTS, HOST_FAULTS
from replay.lost import DeviceLostError
from replay.machine.device import Device, Event, Program

_PATIENCE_NS = 1_000_000_000
"""How long a result is waited for that is known not to come."""


class FaultyHost:
    """Implements `replay.machine.host_worker.HostFault`.

    host_wrong: another expert's weights are read. host_lost: a result never comes. host_fails: the worker raises.
    """

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.at = fault, at
        self.struck = False
        self.patience_ns = _PATIENCE_NS
        self._count = 0

    def strikes(self, key: int) -> int | None:
        self._count += 1
        if self.struck or self._count < self.at:
            return key
        self.struck = True
        if self.fault == "host_fails":
            raise FloatingPointError("fault=host_fails: the worker raised, as asked")
        return None if self.fault == "host_lost" else key ^ 1


class FaultyDevice:
    """`device` with one fault.

    delayed: a copy is reported as done, its bytes arrive sixteen copies later. failed: they never do. reordered: two
    copies in a row change places. duplicated: a copy is done again after its slot has been given to another expert.
    early_reuse: what a copy has brought is overwritten by another while a kernel runs. lost: the device stops
    answering.
    What was copied for nothing (a prefetch that nobody uses) is never read: such a strike is harmless, and unseen.
    """

    def __init__(self, device: Device, fault: str, at: int) -> None:
        if fault not in FAULTS + HOST_FAULTS:
            raise ValueError(f"fault={fault!r} is unknown; choose one of: {', '.join(FAULTS + HOST_FAULTS)}")
        self._device = device
        self.fault = fault
        self.at = at
        self.host_fault = FaultyHost(fault, at) if fault in HOST_FAULTS else None
        self._struck = False
        self._count = 0
        self._held: tuple[int, int, int] | None = None
        self._due = 0
        self._before: tuple[int, int] | None = None
        self._sources: dict[int, int] = {}
        self._overwrite: tuple[int, int, int] | None = None
        self._landed: Event = None
        # Kernels that wait already would run before what is put in front of them.
        self.launches_ahead = device.launches_ahead and fault != "early_reuse"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    @property
    def struck(self) -> bool:
        """Whether the fault has been."""
        return self._struck if self.host_fault is None else self.host_fault.struck

    @struck.setter
    def struck(self, struck: bool) -> None:
        self._struck = struck

    def copy(self, target: int, source: int, num_bytes: int, after: Event | None) -> Event:
        """As the device's, but for the fault."""
        self._count += 1
        end = self._faulty(target, source, num_bytes, after)
        self._before = source, num_bytes
        self._sources[target] = source
        return end

    def _faulty(self, target: int, source: int, num_bytes: int, after: Event | None) -> Event:
        device, due = self._device, self._count >= self.at and self.host_fault is None
        if self._held is not None:
            return self._release(target, source, num_bytes, after)
        if not due or self.struck:
            return device.copy(target, source, num_bytes, after)
        if self.fault == "lost":
            self.struck = True
            raise DeviceLostError("fault=lost: the device stopped answering, as asked")
        if self.fault in ("delayed", "failed", "reordered"):
            self.struck = True
            if self.fault != "failed":
                self._held = target, source, num_bytes
                self._due = self._count + (16 if self.fault == "delayed" else 1)
            return device.copy(target, source, 0, after)
        if self.fault == "duplicated":
            return self._duplicate(target, source, num_bytes, after)
        end = device.copy(target, source, num_bytes, after)
        if self._overwrite is None and self._before is not None:
            other, size = self._before
            self._landed, self._overwrite = end, (target, other, min(num_bytes, size))
        return end

    def _release(self, target: int, source: int, num_bytes: int, after: Event | None) -> Event:
        assert self._held is not None
        if self._count < self._due:
            return self._device.copy(target, source, num_bytes, after)
        held_target, held_source, held_bytes = self._held
        self._held = None
        if self.fault == "reordered" and held_bytes == num_bytes:
            self._device.copy(target, held_source, num_bytes, after)
            return self._device.copy(held_target, source, num_bytes, None)
        # Chunks of different sizes cannot change places: try the next pair.
        self.struck = self.fault != "reordered"
        self._device.copy(held_target, held_source, held_bytes, after)
        return self._device.copy(target, source, num_bytes, None)

    def _duplicate(self, target: int, source: int, num_bytes: int, after: Event | None) -> Event:
        earlier = self._sources.get(target)
        end = self._device.copy(target, source, num_bytes, after)
        if earlier is not None and earlier != source:
            self.struck = True
            self._device.copy(target, earlier, num_bytes, None)
        return end

    def launch(self, program: Program) -> None:
        """As the device's; with early_reuse a slot is overwritten just before its kernels are under way."""
        if self._overwrite is not None and not self.struck and self._landed is None:
            self.struck = True
            self._device.disturb(*self._overwrite)
        self._device.launch(program)

    def recycle(self, event: Event) -> None:
        """As the device's; what is given back has been reported as done."""
        if event is self._landed:
            self._landed = None
        self._device.recycle(event)
