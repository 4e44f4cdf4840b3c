"""How long the kernels of programs run, on the device's clock, the host far ahead."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from replay.machine.device import Device, Program, Work


def span_ns(device: Device, program: Program) -> int:
    """Launch `program`, wait for it and say how long its kernels ran."""
    device.launch(program)
    device.wait(0, program.end)
    return device.time_ns(program.end) - device.time_ns(program.start)


def programs_ns(device: Device, programs: Sequence[Program], repeat: int) -> float:
    """Median device time of one of `programs`, launched in a row: no cache holds the next one's weights."""
    times: list[int] = []
    for round_number in range(repeat + 1):
        for program in programs:
            device.launch(program)
        device.wait(0, programs[-1].end)
        if round_number:
            times += [device.time_ns(program.end) - device.time_ns(program.start) for program in programs]
    return statistics.median(times)


def alone_ns(device: Device, programs: Sequence[Program], repeat: int) -> float:
    """Median device time of one of `programs`, each launched when the device is idle and the one before has been seen
    to end: as a run launches experts, which wait for the routing."""
    times = [span_ns(device, program) for _ in range(repeat + 1) for program in programs]
    return statistics.median(times[len(programs) :])


def works_ns(device: Device, works: Sequence[Work], repeat: int) -> float:
    """`programs_ns` of works that are prepared here."""
    return programs_ns(device, [device.program(work) for work in works], repeat)


def nothing() -> None:
    """The work of a program that only passes time, or marks a point."""
