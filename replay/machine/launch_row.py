"""The row of words that describes one launch of experts, in the host's memory and on the device."""

from __future__ import annotations

from typing import Any

import torch

from replay.machine.rows import TOLD, RowLayout


def words_of(tensor: torch.Tensor) -> memoryview[int]:
    """The 64-bit words of `tensor` on the host: reading or writing one is cheap, and no call of torch."""
    array: Any = tensor.view(-1).numpy()
    return memoryview(array).cast("B").cast("q")


class Row:
    """The words that describe one launch of experts: `host` [num_words] int64, where the device reads them.

    device: where its first kernel copies them to; None where kernels read the host's memory. words: the same memory as
    `host`, cheap to write one by one.
    """

    __slots__ = ("device", "host", "layout", "plain", "words")

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.layout = layout
        self.host = torch.zeros(layout.num_words, dtype=torch.int64, pin_memory=on_gpu)
        self.device = torch.zeros_like(self.host, device=device) if on_gpu else None
        self.words = words_of(self.host)
        self.plain = False
        """Whether its counts and first rows are those of one token for each expert."""

    def tell(self) -> None:
        """What is written here is complete: one launch more may read it. The last of the host's stores, which another
        processor sees in this order on x86."""
        self.words[TOLD] += 1
