"""One launch of expert kernels, as a row of 64-bit words: what the host writes and the device reads.

The host writes a row into pinned memory; the first kernel of the graph copies it to the device; all others read it
there. So one captured graph serves any experts in any slots. Words, in this order, for at most C experts:

    0  n, the number of routed experts          1  the block of the shared experts, or -1 for none
    2  rows of the shared experts               3  number of the launch, which a check reports
    C slots, C first rows (where each expert's rows begin in the buffers), C numbers of rows,
    and, where stamps are checked, C · W words that the slots must hold, expert after expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class RowLayout:
    """Where the words lie in a row of `capacity` experts (C) with `words_per_expert` expected words each (W)."""

    capacity: int
    words_per_expert: int = 0

    COUNT: ClassVar[int] = 0
    SHARED_BLOCK: ClassVar[int] = 1
    SHARED_ROWS: ClassVar[int] = 2
    LAUNCH: ClassVar[int] = 3
    SLOTS: ClassVar[int] = 4
    """The first of C slots; the others follow from C."""
    NO_BLOCK: ClassVar[int] = -1

    def __post_init__(self) -> None:
        if self.capacity < 1 or self.words_per_expert < 0:
            raise ValueError(f"capacity={self.capacity}, words_per_expert={self.words_per_expert}: a row holds 1 expert "
                             "at least and no negative number of words; raise them")  # fmt: skip

    @property
    def first_rows(self) -> int:
        """Where the experts' first rows begin."""
        return self.SLOTS + self.capacity

    @property
    def row_counts(self) -> int:
        """Where the experts' numbers of rows begin."""
        return self.SLOTS + 2 * self.capacity

    @property
    def expected(self) -> int:
        """Where the expected words begin."""
        return self.SLOTS + 3 * self.capacity

    @property
    def num_words(self) -> int:
        """All words of a row."""
        return self.expected + self.capacity * self.words_per_expert

    def fill(self, row: Any, slots: Sequence[int], rows: Sequence[int], launch: int = 0, *,
             shared_block: int = NO_BLOCK, shared_rows: int = 0, expected: Sequence[int] = ()) -> None:  # fmt: skip
        """Write a launch into `row` [num_words] int64 (numpy). The experts' rows lie one after the other.

        rows: of each expert, as many as slots. expected: W words of each expert, expert after expert, or none.
        Words beyond the last expert keep what they held: no kernel reads them. ValueError for too many experts.
        """
        count = len(slots)
        if count > self.capacity:
            raise ValueError(f"{count} experts in a row of capacity {self.capacity}; choose a larger bucket")
        if len(rows) != count or len(expected) != count * self.words_per_expert:
            raise ValueError(f"{count} slots need as many numbers of rows, not {len(rows)}, and "
                             f"{count * self.words_per_expert} expected words, not {len(expected)}; "
                             "give them for every slot")  # fmt: skip
        row[: self.SLOTS] = (count, shared_block, shared_rows, launch)
        if not count:
            return
        firsts, end = [], 0
        for number in rows:
            firsts.append(end)
            end += number
        row[self.SLOTS : self.SLOTS + count] = slots
        row[self.first_rows : self.first_rows + count] = firsts
        row[self.row_counts : self.row_counts + count] = rows
        if expected:
            row[self.expected : self.expected + len(expected)] = expected
