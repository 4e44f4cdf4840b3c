"""What a device can do: copies, kernels, memory, matrices. Device times by events, medians of repeated runs.

Each function returns plain lists and numbers, as they go into the raw record of a calibration. Times in ns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from expertflow.forward import DECODE, Forward
from replay.device import Device, Span
from replay.kernels import Work
from replay.rig import Rig

_HIDE_NS = 600_000
"""Nothing runs on the stream for this long while the host enqueues: kernel times without the host's."""


def span_ns(device: Device, span: Span) -> int:
    """Wait for `span` and say how long it took."""
    device.wait([span[1]])
    start, end = span
    return device.time_ns(end) - device.time_ns(start)


def kernel_ns(device: Device, works: Sequence[Work], repeat: int) -> float:
    """Median device time of one work; `works` are rotated, so that no cache holds the next one's weights."""
    times = []
    for number in range(repeat + 2):
        taken = span_ns(device, device.launch(works[number % len(works)], _HIDE_NS))
        if number >= 2:
            times.append(taken)
    return statistics.median(times)


def copy_ns(device: Device, target: torch.Tensor, source: torch.Tensor, in_a_row: int, repeat: int) -> float:
    """Median time of one copy of a series: what a chunk takes when the next one waits behind it."""
    times = []
    for _ in range(repeat + 1):
        spans = [device.copy(target, source, None) for _ in range(in_a_row)]
        device.wait([spans[-1][1]])
        times.append((device.time_ns(spans[-1][1]) - device.time_ns(spans[0][0])) / in_a_row)
    return statistics.median(times[1:])


def sizes_of(scale: int) -> list[int]:
    """64 KiB to 512 MiB, at the scale of the experts."""
    return [max(256, (1 << power) // scale**2) for power in range(16, 30)]


def link_curves(device: Device, scale: int, budget_s: float) -> list[dict[str, Any]]:
    """Copies by size: pinned (on a CPU: plain) in a row and alone, pageable, and back. Large sizes are left out when
    the time that they would take is above the budget."""
    sizes = sizes_of(scale)
    pin = device.world == "cuda"
    slot = torch.empty(sizes[-1], dtype=torch.uint8, device=device.torch_device)
    host = torch.empty(sizes[-1], dtype=torch.uint8, pin_memory=pin)
    plain = torch.empty(sizes[-1], dtype=torch.uint8).random_(0, 255)
    host.copy_(plain)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for size in sizes:
        in_a_row = 8 if size * scale**2 <= 64 << 20 else 1
        if rows and (time.perf_counter() - started) + rows[-1]["in_a_row_ns"] * 2e-9 * 60 > budget_s:
            break
        rows.append({
            "bytes": size,
            "in_a_row_ns": copy_ns(device, slot[:size], host[:size], in_a_row, 7),
            "alone_ns": copy_ns(device, slot[:size], host[:size], 1, 7),
            "pageable_ns": copy_ns(device, slot[:size], plain[:size], 1, 3),
            "to_host_ns": copy_ns(device, host[:size], slot[:size], 1, 5),
        })  # fmt: skip
    return rows


def chunked(device: Device, expert_bytes: int, counts: Sequence[int] = (1, 2, 4, 8, 16)) -> list[dict[str, Any]]:
    """One expert in one and in several chunks, from the first chunk's start to the last one's end."""
    pin = device.world == "cuda"
    slot = torch.empty(expert_bytes, dtype=torch.uint8, device=device.torch_device)
    host = torch.zeros(expert_bytes, dtype=torch.uint8, pin_memory=pin)
    rows = []
    for count in counts:
        step = expert_bytes // count
        if step < 64:
            break
        times = []
        for _ in range(9):
            spans = [
                device.copy(slot[at * step : (at + 1) * step], host[at * step : (at + 1) * step], None)
                for at in range(count)
            ]
            device.wait([spans[-1][1]])
            times.append(device.time_ns(spans[-1][1]) - device.time_ns(spans[0][0]))
        rows.append({"bytes": expert_bytes, "chunks": count, "ns": statistics.median(times[1:])})
    return rows


def copy_beside(device: Device, work: Work, num_bytes: int, work_ns: float) -> dict[str, float]:
    """One copy on an idle device, and while the compute stream runs `work` again and again."""
    pin = device.world == "cuda"
    slot = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pin)
    idle = copy_ns(device, slot, host, 1, 9)
    rounds = max(4, int(3 * idle / max(work_ns, 1.0)) + 1)
    busy = []
    for _ in range(9):
        device.launch(_repeated(work, rounds), 0)
        busy.append(span_ns(device, device.copy(slot, host, None)))
        device.synchronize()
    return {"bytes": num_bytes, "idle_ns": idle, "busy_ns": statistics.median(busy[1:])}


def _repeated(work: Work, rounds: int) -> Work:
    def again() -> None:
        for _ in range(rounds):
            work()

    return again


def memory_gb_per_s(device: Device) -> float:
    """Device memory bandwidth, bytes read plus bytes written, by one large copy inside the device."""
    num_bytes = 1 << 29 if device.world == "cuda" else 1 << 26
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * num_bytes / kernel_ns(device, [lambda: _ignore(target.copy_(source))], 9)


def matrix_tflops(device: Device) -> float:
    """Dense matrix rate in the dtype that the kernels use, on random numbers."""
    size = 8192 if device.world == "cuda" else 768
    left = torch.randn(size, size, device=device.torch_device).to(device.dtype)
    right = torch.randn(size, size, device=device.torch_device).to(device.dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / kernel_ns(device, [lambda: _ignore(torch.mm(left, right, out=out))], 9) / 1e3


def _ignore(value: object) -> None:
    """A work returns nothing."""


def launch_costs(device: Device) -> dict[str, float]:
    """Host time of a launch and of a wait, and how long an idle stream takes to start a kernel. ns."""
    tiny = torch.zeros(1, device=device.torch_device)
    launch, sync, start_after = [], [], []
    for _ in range(400):
        before, at = time.perf_counter_ns(), device.now_ns()
        span = device.launch(lambda: _ignore(tiny.add_(1)), 0)
        launched = time.perf_counter_ns()
        device.wait([span[1]])
        launch.append(launched - before)
        sync.append(time.perf_counter_ns() - launched)
        start_after.append(device.time_ns(span[0]) - at)
    return {
        "launch_host_ns": statistics.median(launch),
        "sync_ns": statistics.median(sync),
        "start_after_ns": statistics.median(start_after),
    }


def pad_share(device: Device) -> float:
    """How long a pad of 1 ms really lasts, as a share of 1 ms: by the start of the kernel behind it."""
    tiny = torch.zeros(1, device=device.torch_device)
    lasting = []
    for _ in range(15):
        first = device.launch(lambda: _ignore(tiny.add_(1)), 500_000)
        second = device.launch(lambda: _ignore(tiny.add_(1)), 1_000_000)
        device.wait([second[1]])
        lasting.append(device.time_ns(second[0]) - device.time_ns(first[1]))
    return statistics.median(lasting[2:]) / 1e6


def decode_forward(num_tokens: int, kv_len: int) -> Forward:
    """A forward of the shape asked for; its routing is not read by the kernels measured with it."""
    return Forward(0, DECODE, range(num_tokens), tuple(range(num_tokens)), (kv_len,) * num_tokens, [], [], None)


def expert_times(rig: Rig, num_tokens: int, repeat: int) -> tuple[float, float]:
    """(what one more expert takes, what its launch takes by itself): from groups of one and of several."""
    slots, kernels = rig.slots.num_slots, rig.kernels
    size = min(8, slots)

    def group(first: int, count: int) -> Work:
        chosen = [(first + place) % slots for place in range(count)]
        return kernels.experts(0, chosen, [num_tokens] * count, False, 1)

    starts = range(0, slots, size)
    one = kernel_ns(rig.device, [group(first, 1) for first in starts], repeat)
    if size == 1:
        return one, 0.0
    several = kernel_ns(rig.device, [group(first, size) for first in starts], repeat)
    more = max((several - one) / (size - 1), 1.0)
    return more, max(one - more, 0.0)


def kernel_tables(rig: Rig, tokens: Sequence[int], kv_len: int, repeat: int) -> tuple[dict[str, Any], float]:
    """Kernel times of the rig's model by number of tokens, in the form of `hardware.kernel_ns`, and what a launch takes
    by itself on the stream: the tables are without it."""
    device, kernels, model = rig.device, rig.kernels, rig.model
    layers = range(model.num_layers)
    experts = [expert_times(rig, count, repeat) for count in tokens]
    launch = statistics.median([alone for _, alone in experts[:4]])

    def table(make: Callable[[int], list[Work]]) -> list[list[int]]:
        return [[count, max(1, round(kernel_ns(device, make(count), repeat) - launch))] for count in tokens]

    one = decode_forward(1, 1)
    # Layer 0 would count leading dense layers in.
    later = [at for at in layers if at] or [0]
    found: dict[str, Any] = {
        "expert": [[count, round(more)] for count, (more, _) in zip(tokens, experts, strict=True)],
        "head": table(lambda n: [kernels.head(n)]),
        "attention": table(lambda n: [kernels.attention(at, decode_forward(n, 1)) for at in later]),
    }  # fmt: skip
    if model.shared_params:
        found["shared"] = table(lambda n: [kernels.experts(at, [], [], True, n) for at in layers])
    if model.num_dense_layers:
        with_dense = table(lambda n: [kernels.attention(0, decode_forward(n, 1))])
        dense = [
            [count, max(1, (taken - plain) // model.num_dense_layers)]
            for (count, taken), (_, plain) in zip(with_dense, found["attention"], strict=True)
        ]
        found["dense"] = dense
    full = [at for at in later if not model.is_windowed(at)] or later
    short = kernel_ns(device, [kernels.attention(at, one) for at in full], 2 * repeat)
    long = kernel_ns(device, [kernels.attention(at, decode_forward(1, kv_len)) for at in full], 2 * repeat)
    found["kv"] = max(0.0, (long - short) / max(kv_len - 1, 1))
    return found, launch
