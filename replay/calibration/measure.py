"""What a device can do: copies, kernels, memory, matrices. Device times by events, the host far ahead of the device.

Each function returns plain lists and numbers, as they go into the raw record of a calibration. Times in ns, medians of
repeated runs. What cannot be is refused here, where it was measured, and not written into a profile.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from replay.calibration.undisturbed import MeasurementError
from replay.machine.device import Device, Program
from replay.machine.timing import nothing, programs_ns, works_ns

_HOLD_NS = 20_000_000
"""How long the first of a series of copies is held back: the host enqueues the others meanwhile."""
_SERIES = 16
_SOURCE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Bytes of host memory that copies read from, by kind of device: more than the cache of a host holds."""
_LINE = 64
"""Bytes: copies begin at such addresses."""
MOST_SLOWDOWN = 10.0
"""A copy beside kernels that takes longer than this many times its own time was disturbed by something else."""


@cache
def _pinned(num_bytes: int) -> torch.Tensor:
    """Pinned memory for all copiers: pinning a gigabyte takes a second."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)


class Copier:
    """Copies of one size from host to device memory, in a row. pinned: False = from pageable memory.

    Each is from another place: a run copies experts that no cache of the host holds, which takes 2 % longer on an H200.
    """

    def __init__(self, device: Device, num_bytes: int, pinned: bool = True) -> None:
        self._device, self.num_bytes = device, num_bytes
        self._slot = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
        least = _SOURCE_BYTES[device.world]
        if pinned and device.world == "cuda":
            self._host = _pinned(max(num_bytes, least))
        else:
            self._host = torch.zeros(max(num_bytes, _SOURCE_BYTES["cpu"]), dtype=torch.uint8)
        self._at = 0

    def enqueue(self, count: int, after: Any = None, size: int | None = None) -> list[Any]:
        """`count` copies of `size` bytes; the events at their ends."""
        copy, target, size = self._device.copy, self._slot.data_ptr(), size or self.num_bytes
        return [copy(target, self._source(size), size, None if number else after) for number in range(count)]

    def _source(self, size: int) -> int:
        """The address of the next `size` bytes."""
        if self._at + size > self._host.numel():
            self._at = 0
        at, self._at = self._at, self._at + -(-size // _LINE) * _LINE
        return self._host.data_ptr() + at

    def in_a_row_ns(self, size: int, count: int, repeat: int) -> float:
        """Time of one copy that follows another: the host has enqueued them all before the first begins."""
        device, held = self._device, self._device.program(nothing, _HOLD_NS)
        times = []
        for _ in range(repeat):
            device.launch(held)
            ends = self.enqueue(count + 1, held.end, size)
            device.wait(0, ends[-1])
            times.append((device.time_ns(ends[-1]) - device.time_ns(ends[0])) / count)
            for end in ends:
                device.recycle(end)
        return statistics.median(times)

    def alone_ns(self, size: int, repeat: int, with_call: bool = False) -> float:
        """From the moment at which the host has issued a copy on an idle link, or began to, to its end."""
        device, times = self._device, []
        for _ in range(repeat):
            called_ns = device.now_ns()
            (end,) = self.enqueue(1, None, size)
            issued_ns = called_ns if with_call else device.now_ns()
            device.wait(0, end)
            times.append(device.time_ns(end) - issued_ns)
            device.recycle(end)
        return statistics.median(times)


def sizes_of(scale: int) -> list[int]:
    """64 KiB to 64 MiB, at the scale of the experts; seven sizes of 256 bytes and more where that leaves fewer."""
    least = max(256, (1 << 16) // scale**2)
    last = max(least << 6, (1 << 26) // scale**2)
    return [least << power for power in range((last // least).bit_length())]


def link_curves(device: Device, scale: int, budget_s: float) -> list[dict[str, Any]]:
    """Copies by size: pinned (on a CPU: plain) in a row and alone, and pageable. Large sizes are left out when the time
    that they would take is above the budget."""
    sizes = sizes_of(scale)
    pinned, pageable = Copier(device, sizes[-1]), Copier(device, sizes[-1], pinned=False)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for size in sizes:
        if rows and (time.perf_counter() - started) + rows[-1]["in_a_row_ns"] * 2e-9 * 9 * _SERIES > budget_s:
            break
        rows.append(
            {
                "bytes": size,
                "in_a_row_ns": pinned.in_a_row_ns(size, _SERIES, 5),
                "alone_ns": pinned.alone_ns(size, 7),
                # The call itself copies, into pinned memory of the driver's.
                "pageable_ns": pageable.alone_ns(size, 3, with_call=True),
            }
        )
    return rows


def chunked(device: Device, expert_bytes: int, counts: Sequence[int] = (1, 2, 4, 8, 16)) -> list[dict[str, Any]]:
    """One expert in one and in several chunks, each series behind another copy."""
    copier, rows = Copier(device, expert_bytes), []
    for count in counts:
        step = expert_bytes // count
        if step < 64:
            break
        rows.append({"bytes": expert_bytes, "chunks": count, "ns": count * copier.in_a_row_ns(step, count, 5)})
    return rows


def copy_beside(device: Device, programs: Sequence[Program], num_bytes: int) -> dict[str, float]:
    """A copy that follows another, on an idle device and while the compute stream is kept busy with `programs`."""
    copier, count, held = Copier(device, num_bytes), 8, device.program(nothing, _HOLD_NS)
    idle_ns = copier.in_a_row_ns(num_bytes, count, 5)
    taken_ns = programs_ns(device, programs, 3)
    # They must outlast the copies, however much these are slowed: else the last ones run alone.
    rounds = int(MOST_SLOWDOWN * (count + 2) * idle_ns / (taken_ns * len(programs))) + 2
    busy = []
    for _ in range(5):
        # Both streams are held back until the host has enqueued everything.
        device.launch(held)
        ends = copier.enqueue(count + 1, held.end)
        for program in [*programs] * rounds:
            # Their times are not read: they may be launched again while they run.
            device.launch(program)
        device.wait(0, ends[-1])
        busy.append((device.time_ns(ends[-1]) - device.time_ns(ends[0])) / count)
        device.synchronize()
    found = {"bytes": num_bytes, "idle_ns": idle_ns, "busy_ns": statistics.median(busy)}
    if found["busy_ns"] > MOST_SLOWDOWN * idle_ns:
        raise MeasurementError(
            f"a copy of {num_bytes} bytes took {idle_ns:.0f} ns alone and {found['busy_ns']:.0f} "
            "beside kernels: something else uses this machine; calibrate again when it is "
            "idle"
        )
    return found


def beside_copies_ns(device: Device, programs: Sequence[Program], chunk_bytes: int, repeat: int) -> float:
    """Median device time of one of `programs` while copies of `chunk_bytes` follow one another on the link."""
    copier, held = Copier(device, chunk_bytes), device.program(nothing, _HOLD_NS)
    chunk_ns = copier.in_a_row_ns(chunk_bytes, 4, 3)
    alone_ns = programs_ns(device, programs, 1) * len(programs)
    # Of the link the end of its first copy is the first thing known: what counts begins later, in the last round.
    rounds = 1 + math.ceil(2 * chunk_ns / alone_ns)
    count = int(3 * rounds * alone_ns / chunk_ns) + 8
    times: list[int] = []
    for _ in range(repeat + 1):
        device.launch(held)
        ends = copier.enqueue(count, held.end)
        for program in [*programs] * rounds:
            device.launch(program)
        device.wait(0, ends[-1])
        device.wait(0, programs[-1].end)
        first_ns, last_ns = device.time_ns(ends[0]), device.time_ns(ends[-1])
        for program in programs:
            start_ns, end_ns = device.time_ns(program.start), device.time_ns(program.end)
            if first_ns <= start_ns and end_ns <= last_ns:
                times.append(end_ns - start_ns)
        for end in ends:
            device.recycle(end)
    if not times:
        raise MeasurementError("no kernel ran wholly beside copies: something else uses this machine")
    return statistics.median(times)


def memory_gb_per_s(device: Device) -> float:
    """Device memory bandwidth, bytes read plus bytes written, by one kernel over large arrays.

    Not by a copy: inside a CUDA graph that is no kernel, and is not made by what runs kernels.
    """
    num_bytes = 1 << 29 if device.world == "cuda" else 1 << 26
    source = torch.ones(num_bytes // 4, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * num_bytes / works_ns(device, [lambda: _ignore(torch.neg(source, out=target))], 9)


def matrix_tflops(device: Device) -> float:
    """Dense matrix rate in the dtype that the kernels use, on random numbers."""
    size = 8192 if device.world == "cuda" else 768
    left = torch.randn(size, size, device=device.torch_device).to(device.dtype)
    right = torch.randn(size, size, device=device.torch_device).to(device.dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / works_ns(device, [lambda: _ignore(torch.mm(left, right, out=out))], 9) / 1e3


def _ignore(value: object) -> None:
    """Drop the result of a call, since a work returns nothing."""


def launch_costs(device: Device) -> dict[str, float]:
    """ns of host time that a launch and a wait take, and ns that an idle stream takes to start a kernel."""
    program = device.program(nothing)
    launch, sync, start_after = [], [], []
    for _ in range(400):
        before, at = time.perf_counter_ns(), device.now_ns()
        device.launch(program)
        launched = time.perf_counter_ns()
        device.wait(0, program.end)
        launch.append(launched - before)
        sync.append(time.perf_counter_ns() - launched)
        start_after.append(device.time_ns(program.start) - at)
    return {
        "launch_host_ns": statistics.median(launch),
        "sync_ns": statistics.median(sync),
        "start_after_ns": statistics.median(start_after),
    }


def pad_share(device: Device) -> float:
    """How long a pad of 1 ms lasts, as a share of 1 ms, measured up to the start of the kernel that follows it."""
    first, second = device.program(nothing, 500_000), device.program(nothing, 1_000_000)
    lasting = []
    for _ in range(15):
        device.launch(first)
        device.launch(second)
        device.wait(0, second.end)
        lasting.append(device.time_ns(second.start) - device.time_ns(first.end))
    return statistics.median(lasting[2:]) / 1e6
