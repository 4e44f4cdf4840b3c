"""Kernel times of a model as its runs launch them, in the form of `hardware.kernel_ns` (see
`sim.specs.kernel_table`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from expertflow.forward import DECODE, PREFILL, Forward
from replay.calibration.measure import beside_copies_ns
from replay.calibration.undisturbed import undisturbed
from replay.machine.device import Program
from replay.machine.launch_row import Row
from replay.machine.programs import capacity_for, launch_rows
from replay.machine.rig import Rig
from replay.machine.rows import RowLayout
from replay.machine.timing import alone_ns, programs_ns, works_ns

GROUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Experts launched at once; as many as the model can choose in one layer."""
_LAYERS = 6
"""Each kernel is measured in so many layers in turn, whose weights together do not fit into a cache."""


def decode_forward(num_tokens: int, kv_len: int) -> Forward:
    """A forward of the shape asked for; its routing is not read by the kernels measured with it."""
    return Forward(0, DECODE, range(num_tokens), tuple(range(num_tokens)), (kv_len,) * num_tokens, [], [], None)


class KernelBench:
    """Times of the kernels of one rig. repeat: how often each is run."""

    def __init__(self, rig: Rig, repeat: int) -> None:
        self.rig, self.repeat = rig, repeat
        self.device, self.kernels = rig.device, rig.kernels

    def experts(self, num_experts: int, tokens: int, shared_tokens: int = 0) -> list[Program]:
        """Programs of routed experts in other slots each, over `tokens` each, and of shared ones over theirs."""
        most = launch_rows(self.kernels.rows(tokens), self._shared_rows(shared_tokens))
        self.kernels.tune(lambda work: works_ns(self.device, [work], 5), [(self._capacity(num_experts), most)])
        count = max(2, min(_LAYERS, self.rig.slots.num_slots // max(num_experts, 1)))
        rows = [self._row(num_experts, tokens, shared_tokens, number) for number in range(count)]
        return [self.device.program(self.kernels.experts(row, most, shared_tokens > 0), row=row) for row in rows]

    def prompt_experts(self, num_experts: int, tokens: int, captured: bool) -> Program:
        """A program of routed experts over `tokens` each as a prompt's: captured, or launched kernel by kernel."""
        most = launch_rows(self.kernels.rows(tokens), 0)
        row = self._row(num_experts, tokens, 0, 0)
        return self.device.program(self.kernels.experts(row, most, shared=False), captured=captured, row=row)

    def _capacity(self, num_experts: int) -> int:
        return capacity_for(num_experts, self.kernels.model.top_k)

    def _row(self, num_experts: int, tokens: int, shared_tokens: int, number: int) -> Row:
        """The description of a launch: group `number` of `num_experts` slots, each with the rows of `tokens` tokens."""
        num_slots, rows = self.rig.slots.num_slots, self.kernels.rows(tokens)
        row = Row(RowLayout(self._capacity(num_experts)), self.device.torch_device)
        row.spread([rows] * num_experts)
        row.describe(
            [(number * num_experts + place) % num_slots for place in range(num_experts)],
            number % self.kernels.model.num_layers if shared_tokens else -1,
            self._shared_rows(shared_tokens),
        )
        return row

    def _shared_rows(self, tokens: int) -> int:
        return self.kernels.shared_rows(tokens) if tokens else 0

    def attention(self, num_tokens: int, kv_len: int, layers: Sequence[int]) -> list[Program]:
        """Programs of attention and router of `layers`."""
        given = decode_forward(num_tokens, kv_len)
        return [self.device.program(self.kernels.attention(at, self.kernels.shape(at, given))) for at in layers]

    def head(self, num_rows: int) -> list[Program]:
        """Programs of the head."""
        return [self.device.program(self.kernels.head(num_rows))]

    def ns(self, programs: Sequence[Program]) -> float:
        """Median time of one of `programs`."""
        return programs_ns(self.device, programs, self.repeat)

    def alone_ns(self, programs: Sequence[Program]) -> float:
        """Median time of one of `programs` on a device that was idle before it."""
        return alone_ns(self.device, programs, self.repeat)

    def beside_ns(self, programs: Sequence[Program], chunk_bytes: int) -> float:
        """Median time of one of `programs` beside a busy link."""
        return beside_copies_ns(self.device, programs, chunk_bytes, self.repeat)


def prompt_launches(rig: Rig, num_tokens: int, repeat: int) -> dict[str, dict[str, float]]:
    """One layer of a prompt: ns that the host takes to launch, and the device to run. By kind: attention and experts,
    where programs are captured as such, and "by kernel" as they are launched kernel by kernel.

    Kernel by kernel the device's time holds its waits for the host, that of captured programs does not: what lies
    between the two is what such launches cost a prompt.
    """
    bench, model = KernelBench(rig, repeat), rig.model
    prompt = Forward(0, PREFILL, range(num_tokens), (0,), tuple(range(1, num_tokens + 1)), [], [], None)
    at = min(1, model.num_layers - 1)
    each = max(1, num_tokens * model.top_k // model.num_experts)
    attention = bench.kernels.attention(at, bench.kernels.shape(at, prompt))
    num_experts = min(model.num_experts, rig.slots.num_slots)
    programs = {}
    for ending, captured in (("", True), (" by kernel", False)) if rig.device.captures else (("", False),):
        programs[f"attention{ending}"] = rig.device.program(attention, captured=captured)
        programs[f"experts{ending}"] = bench.prompt_experts(num_experts, each, captured)
    found = {}
    for name, program in programs.items():
        launches, spans = [], []
        for _ in range(repeat + 2):
            started = time.perf_counter_ns()
            rig.device.launch(program)
            launches.append(time.perf_counter_ns() - started)
            rig.device.wait(0, program.end)
            spans.append(rig.device.time_ns(program.end) - rig.device.time_ns(program.start))
        found[name] = {"host_ns": statistics.median(launches[2:]), "device_ns": statistics.median(spans[2:])}
    return found


def expert_ns(bench: KernelBench, tokens: int) -> tuple[float, float]:
    """(what one more expert takes, what its launch takes by itself): from groups of one and of several. For devices
    that compute one expert after the other."""
    size = min(8, bench.rig.slots.num_slots)
    one = bench.ns(bench.experts(1, tokens))
    if size == 1:
        return one, 0.0
    several = bench.ns(bench.experts(size, tokens))
    more = max((several - one) / (size - 1), 1.0)
    return more, max(one - more, 0.0)


def group_table(bench: KernelBench, tokens: Sequence[int]) -> list[list[int]]:
    """Points [experts, tokens each, ns] of experts launched at once: a full grid, as far as the buffers hold it."""
    model, needs = bench.kernels.model, bench.rig.needs
    sizes = [count for count in GROUPS if count <= min(model.num_experts, bench.rig.slots.num_slots)]
    each = [count for count in tokens if count * sizes[-1] <= needs.max_tokens * model.top_k] or [1]
    return [[num, count, round(bench.alone_ns(bench.experts(num, count)))] for num in sizes for count in each]


def kernel_tables(
    rig: Rig,
    tokens: Sequence[int],
    kv_len: int,
    repeat: int,
    chunk_bytes: int,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], float]:
    """Kernel times of the rig's model by number of tokens, in the form of `hardware.kernel_ns`, and what a launch takes
    by itself on the stream: the tables are without it. Captured programs have no such launch: theirs is in the table.

    chunk_bytes: of the copies beside which kernels are measured once more. say: told what is measured again.
    MeasurementError where no kernel ran wholly beside copies.
    """
    bench, model = KernelBench(rig, repeat), rig.model
    # An idle GPU runs at a fraction of its clock; this brings it up.
    rig.device.restart_clock()
    # Layer 0 would count leading dense layers in.
    later = [at for at in range(model.num_layers) if at][:_LAYERS] or [0]
    found: dict[str, Any] = {}
    launch = 0.0
    if rig.device.captures:
        found["groups"] = group_table(bench, tokens)
        found["expert"] = [[count, ns] for num, count, ns in found["groups"] if num == 1]
    else:
        times = [expert_ns(bench, count) for count in tokens]
        launch = statistics.median([alone for _, alone in times[:4]])
        found["expert"] = [[count, round(more)] for count, (more, _) in zip(tokens, times, strict=True)]

    def table(make: Callable[[int], list[Program]]) -> list[list[int]]:
        return [[count, max(1, round(bench.ns(make(count)) - launch))] for count in tokens]

    found["head"] = table(bench.head)
    found["attention"] = table(lambda count: bench.attention(count, 1, later))
    if model.shared_params:
        found["shared"] = _shared(bench, tokens, launch)
    if model.num_dense_layers:
        with_dense = table(lambda count: bench.attention(count, 1, [0]))
        found["dense"] = [
            [count, max(1, (taken - plain) // model.num_dense_layers)]
            for (count, taken), (_, plain) in zip(with_dense, found["attention"], strict=True)
        ]
    full = [at for at in later if not model.is_windowed(at)] or later
    short, long = (bench.ns(bench.attention(1, length, full)) for length in (1, kv_len))
    found["kv"] = max(0.0, (long - short) / max(kv_len - 1, 1))
    if rig.device.captures:
        found |= _slowdowns(bench, later, chunk_bytes, say)
    return found, launch


def _shared(bench: KernelBench, tokens: Sequence[int], launch: float) -> list[list[int]]:
    """What the shared experts add to a launch of routed ones; on devices that compute in turn, by themselves."""
    if not bench.rig.device.captures:
        return [[count, max(1, round(bench.ns(bench.experts(0, 1, count)) - launch))] for count in tokens]
    beside = min(bench.kernels.model.top_k, bench.rig.slots.num_slots)
    points = []
    for count in tokens:
        each = 1 if count < beside else 2
        plain, both = (bench.alone_ns(bench.experts(beside, each, shared)) for shared in (0, count))
        points.append([count, max(1, round(both - plain))])
    return points


def _slowdowns(
    bench: KernelBench, layers: Sequence[int], chunk_bytes: int, say: Callable[[str], None]
) -> dict[str, float]:
    """How much longer the kernels of one token run beside a busy link, as factors."""
    kinds = {
        "attention_slowdown": bench.attention(1, 1, layers),
        "experts_slowdown": bench.experts(min(bench.kernels.model.top_k, bench.rig.slots.num_slots), 1),
        "head_slowdown": bench.head(1),
    }
    return {
        name: round(max(1.0, undisturbed(partial(bench.beside_ns, programs, chunk_bytes), say) / bench.ns(programs)), 4)
        for name, programs in kinds.items()
    }
