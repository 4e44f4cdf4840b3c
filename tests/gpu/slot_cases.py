"""Launches of expert kernels with known answers: weights between garbage, the mathematics in float64, its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from replay.machine.launch_row import Row
from replay.machine.pools import SlotPool
from replay.machine.rows import NUMBER, TOLD, RowLayout
from replay.machine.slot_kernels import SlotKernels, stage

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a step of the number format: what rounding once changes at most, relatively."""
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
UNTOUCHED = 7.0
NO_BLOCK = -1


class Widths(NamedTuple):
    """A feed-forward block."""

    hidden: int
    up: int
    middle: int

    @property
    def num_values(self) -> int:
        """Its weights."""
        return self.hidden * (self.up + self.middle)


@dataclass(frozen=True)
class Case:
    """Routed experts in `slots` with `rows` each, and rows of a shared block, in a row of `capacity`."""

    widths: Widths
    capacity: int
    slots: Sequence[int]
    rows: Sequence[int]
    shared: Widths | None = None
    shared_block: int = NO_BLOCK
    shared_rows: int = 0
    num_slots: int = 6
    max_rows: int = 16


def make_row(layout: RowLayout, device: str) -> Row:
    """A row with a copy on the device, which the interpreter has on the CPU."""
    return Row(layout, torch.device(device), staged=True)


def fill(
    row: Row,
    slots: Sequence[int],
    rows: Sequence[int],
    block: int = NO_BLOCK,
    shared_rows: int = 0,
    number: int = 0,
    expected: Sequence[int] = (),
) -> None:
    """Write and tell a launch, rows one after the other. Slots, rows and words of experts that it does not have: far
    outside, in either half of a word."""
    told = row.words[TOLD]
    row.host.fill_(1 << 40 | 1 << 30)
    row.words[TOLD], row.words[NUMBER] = told, number
    for place, word in enumerate(expected):
        row.words[row.layout.expected + place] = word
    row.spread(rows)
    row.describe(slots, block, shared_rows)
    row.tell()


def weights(widths: Widths, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random weights [count, num_values] that keep the size of what they multiply."""
    made = torch.randn(count, widths.num_values, generator=torch.Generator().manual_seed(seed))
    cut = widths.up * widths.hidden
    made[:, :cut] /= widths.hidden**0.5
    made[:, cut:] /= widths.middle**0.5
    return made.to(dtype)


class Bench:
    """Kernels over a pool whose slots end in garbage, inputs that end in garbage, and outputs that show a write."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.weights = weights(case.widths, case.num_slots, dtype, 1)
        num_bytes = case.widths.num_values * dtype.itemsize
        self.slots = SlotPool(case.num_slots, num_bytes + 512, torch.device(device))
        self.slots.bytes.fill_(0xFF)
        self.slots.bytes[:, :num_bytes] = self.weights.view(torch.uint8).to(device)
        most = max([case.shared_rows, *case.rows])
        self.inputs = torch.full((most + 3, case.widths.hidden), float("nan"), dtype=dtype)
        self.inputs[:most] = torch.randn(most, case.widths.hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
        self.shared_weights = None if case.shared is None else weights(case.shared, 3, dtype, 3)
        shared = None
        if case.shared is not None and self.shared_weights is not None:
            shared = case.shared, self.shared_weights.to(device)
        self.kernels = SlotKernels(case.widths, self.slots, self.inputs.to(device), sum(case.rows) + 2, dtype, shared)
        self.row = make_row(RowLayout(case.capacity), device)
        self.work = self.kernels.experts(self.row, case.max_rows, shared is not None)

    def run(self, slots: Sequence[int], rows: Sequence[int], block: int, shared_rows: int) -> None:
        """One launch of the same body, all outputs first set to UNTOUCHED."""
        self.kernels.out.fill_(UNTOUCHED)
        self.kernels.shared_out.fill_(UNTOUCHED)
        fill(self.row, slots, rows, block, shared_rows)
        stage(self.row)()
        self.work()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def check(self, slots: Sequence[int], rows: Sequence[int], block: int, shared_rows: int) -> None:
        """Run, and compare every output with float64; what nobody computed is untouched."""
        self.run(slots, rows, block, shared_rows)
        out, first = self.kernels.out.cpu(), 0
        for slot, count in zip(slots, rows, strict=True):
            compare(out[first : first + count], self.inputs[:count], self.weights[slot], self.case.widths)
            first += count
        assert bool((out[first:] == UNTOUCHED).all())
        if self.case.shared is not None and self.shared_weights is not None:
            out, count = self.kernels.shared_out.cpu(), shared_rows if block >= 0 else 0
            if count:
                compare(out[:count], self.inputs[:count], self.shared_weights[block], self.case.shared)
            assert bool((out[count:] == UNTOUCHED).all())


def compare(found: torch.Tensor, inputs: torch.Tensor, values: torch.Tensor, widths: Widths) -> None:
    """`found` against float64, value by value within what rounding can change; in float32 1e-5 altogether.

    Rounded are: the intermediate values, the activation, the output, and each addition in float32.
    """
    dtype = found.dtype
    unit, smallest, step = UNIT[dtype], SMALLEST[dtype], 2.0**-23
    x, flat = inputs.double(), values.double()
    cut = widths.up * widths.hidden
    first = flat[:cut].view(widths.up, widths.hidden)
    second = flat[cut : widths.num_values].view(widths.middle, widths.hidden)
    middle = x @ first.T
    off = unit * middle.abs() + smallest + widths.hidden * step * (x.abs() @ first.abs().T)
    if widths.up > widths.middle:
        gate, up = middle[:, : widths.middle], middle[:, widths.middle :]
        odds = torch.sigmoid(gate)
        value = gate * odds * up
        slope = (odds * (1 + gate * (1 - odds))).abs()
        # The curvature of silu is below 1/2 everywhere.
        bent = slope * off[:, : widths.middle] + off[:, : widths.middle] ** 2 / 4
        off = bent * up.abs() + ((gate * odds).abs() + bent) * off[:, widths.middle :]
        off = off + (unit + 8 * step) * (value.abs() + off) + smallest
    else:
        value = middle.clamp(min=0.0)
    wanted = value @ second
    off = off @ second.abs() + widths.middle * step * ((value.abs() + off) @ second.abs())
    off = off + unit * (wanted.abs() + off) + smallest
    assert bool(((found.double() - wanted).abs() <= off).all())
    if dtype == torch.float32:
        assert float((found.double() - wanted).norm() / wanted.norm()) <= 1e-5
