"""The row of words that describes one launch of experts, in the host's memory and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from replay.machine.rows import (
    FIRST_SLOT,
    MORE,
    NUM_EXPERTS,
    SHARED_BLOCK,
    SHARED_ROWS,
    TAG_MASK,
    TOLD,
    RowLayout,
    tag_of,
)


def words_of(tensor: torch.Tensor) -> memoryview[int]:
    """The 64-bit words of `tensor` on the host: reading or writing one is cheap, and no call of torch."""
    array: Any = tensor.view(-1).numpy()
    return memoryview(array).cast("B").cast("q")


_LOWER = (1 << 32) - 1


class Row:
    """The words that describe one launch of experts: `host` [num_words] int64, where the device reads them.

    device: where its first kernel copies them to; None where kernels read the host's memory (staged=False; by default
    they do but on a GPU). words: the same memory as `host`, cheap to write one by one.
    """

    __slots__ = ("_described", "_more", "_tag", "device", "host", "layout", "plain", "words")

    def __init__(self, layout: RowLayout, device: torch.device, staged: bool | None = None) -> None:
        on_gpu = device.type == "cuda"
        self.layout = layout
        self.host = torch.zeros(layout.num_words, dtype=torch.int64, pin_memory=on_gpu)
        self.device = torch.zeros_like(self.host, device=device) if (on_gpu if staged is None else staged) else None
        self.words = words_of(self.host)
        self.plain = False
        """Whether its counts and first rows are those of one token for each expert."""
        self._tag = 0 if self.device is None else tag_of(1)
        self._more = 0
        self._described = False
        self.changed()

    def describe(self, slots: Sequence[int], block: int, shared_rows: int) -> None:
        """The next launch: routed experts in `slots`, and a block of shared ones over `shared_rows`; block -1: none.

        Whatever else of the row it reads has been written before: a GPU that waits begins when the last word is there.
        Words without the launch's number are read after that one, so its host must make stores visible in their order.
        """
        words, tag, at = self.words, self._tag, FIRST_SLOT
        for slot in slots:
            words[at] = slot & _LOWER | tag
            at += 1
        words[SHARED_BLOCK] = block & _LOWER | tag if tag else block
        words[SHARED_ROWS] = shared_rows | tag
        words[NUM_EXPERTS] = len(slots) | self._more | tag
        self._described = True

    def spread(self, counts: Sequence[int]) -> None:
        """How many rows each expert computes over, one expert's behind the other's."""
        layout, words, first = self.layout, self.words, 0
        for place, num_rows in enumerate(counts):
            words[layout.first + place] = first
            words[layout.counts + place] = num_rows
            first += num_rows
        self.changed()

    def changed(self) -> None:
        """Other words than those of `describe` were written: the next launch reads them all."""
        if self._tag:
            self._more = MORE

    def tell(self) -> None:
        """What is written here is complete: one launch more may read it. Not described anew, it is as the last one.

        The launch before must have begun: of several that wait, the first would miss what `changed` told.
        """
        words, tag = self.words, self._tag
        if tag:
            if not self._described:
                num = words[NUM_EXPERTS] & TAG_MASK
                for at in (SHARED_BLOCK, SHARED_ROWS, *range(FIRST_SLOT, FIRST_SLOT + num)):
                    words[at] = words[at] & _LOWER | tag
                words[NUM_EXPERTS] = num | self._more | tag
            self._described = False
            self._more = 0
            self._tag = tag_of(words[TOLD] + 2)
        words[TOLD] += 1
