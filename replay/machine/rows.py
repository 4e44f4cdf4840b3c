"""How one launch of experts is described: a row of 64-bit words that the host writes and the kernels read.

Where a launch may wait for its row on a GPU, the words that change with each launch (how many experts, the shared
block, its rows, slots) carry the launch's number in their upper half: the GPU reads them at once, over PCIe, and knows
of each whether it is the one it waits for. On the device, and where kernels read the host's memory, words are plain.
Knows neither torch nor Triton: kernels, host and tests share the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_EXPERTS = 0
"""Word: routed experts of this launch. With MORE, all other words have changed as well."""
SHARED_BLOCK = 1
"""Word: which block of shared experts runs with them; -1 = none."""
SHARED_ROWS = 2
"""Word: rows that the shared experts compute over."""
NUMBER = 3
"""Word: number of the launch, for what a check finds."""
TOLD = 4
"""Word: launches that the host has told to begin; on the device, those that have begun."""
GAVE_UP = 5
"""Word: the launch that has waited for the host in vain, the number of its begin; 0: none has."""
MORE = 1 << 31
TAG_SHIFT, TAG_MASK = 32, (1 << 31) - 1
FIRST_SLOT = 6
"""Word: the first of as many slots as the row has room for."""


def tag_of(launch: int) -> int:
    """What the words of the `launch`-th launch carry in their upper half."""
    return (launch & TAG_MASK) << TAG_SHIFT


@dataclass(frozen=True)
class RowLayout:
    """Where what stands in the row of a program for up to `capacity` routed experts.

    For expert e: its slot, the first of its rows in the buffers of intermediate and output values, how many rows it
    computes over, and `words_per_expert` words that its slot must hold (0: nothing is checked).
    """

    capacity: int
    words_per_expert: int = 0

    @property
    def slots(self) -> int:
        """First of `capacity` words."""
        return FIRST_SLOT

    @property
    def first(self) -> int:
        """First of `capacity` words."""
        return FIRST_SLOT + self.capacity

    @property
    def counts(self) -> int:
        """First of `capacity` words."""
        return FIRST_SLOT + 2 * self.capacity

    @property
    def expected(self) -> int:
        """First of `capacity * words_per_expert` words, expert by expert."""
        return FIRST_SLOT + 3 * self.capacity

    @property
    def num_words(self) -> int:
        """Words of the whole row."""
        return self.expected + self.capacity * self.words_per_expert


def size_class(count: int, least: int = 1) -> int:
    """The power of two, at least `least`, that `count` is rounded up to."""
    return max(least, 1 << (count - 1).bit_length()) if count > 0 else least


FEW_ROWS = 4
"""An expert over no more rows is computed on ordinary cores, see `replay.machine.few_row_programs`."""
_TENSOR_ROWS = 16


def row_class(rows: int) -> int:
    """The rows of an expert for which kernels are prepared that compute over `rows`: 1, 4, then doublings of the 16
    that a tensor core multiplies at once."""
    if rows <= FEW_ROWS:
        return 1 if rows <= 1 else FEW_ROWS
    return size_class(rows, _TENSOR_ROWS)


def row_classes(first: int, last: int) -> list[int]:
    """The classes of all numbers of rows from `first` to `last`."""
    found = [row_class(first)]
    while found[-1] < last:
        found.append(row_class(found[-1] + 1))
    return found
