"""Does every kernel read what it should? Stamps that travel with each chunk, checked where they arrive.

The first 16 bytes of every chunk (at an 8-byte boundary) hold a tag, which names the host buffer and the chunk, and
the number of the load that copied it. A host buffer that several experts share carries the buffer's number and
no load. Checked on the device, in the compute stream, before and after each kernel that reads a slot: a copy that
is late, lost, misplaced, or that overwrites a slot too early, shows. Checking costs time: such a run is no measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from replay.pools import HostPool, SlotPool

_TAG_STEP = 1 << 20
LEAST_CHUNK = 32
"""Bytes a chunk must have to carry a stamp."""


@dataclass(frozen=True)
class WrongStamp:
    """The first launch that read something else than it should."""

    forward: int
    layer: int
    keys: tuple[int, ...]
    num_wrong: int


class Stamps:
    """Writes stamps into the host pool, keeps what each slot must hold, and counts what the device found wrong."""

    def __init__(self, host: HostPool, slots: SlotPool, offsets: Sequence[int]) -> None:
        if min(end - start for start, end in pairwise(offsets)) < LEAST_CHUNK:
            raise ValueError(f"verify=true needs chunks of {LEAST_CHUNK} bytes at least; raise chunk_mib")
        self._host = host
        self._words = slots.words
        self._first_word = [-(-offset // 8) for offset in offsets[:-1]]
        self._words_per_slot = slots.stride // 8
        device = slots.bytes.device
        within = [word for first in self._first_word for word in (first, first + 1)]
        self._within = torch.tensor(within, dtype=torch.int64, device=device)
        self._expected = [[0] * len(within) for _ in range(slots.num_slots)]
        self._wrong = torch.zeros(1, dtype=torch.int64, device=device)
        self._first_bad = torch.full((1,), 1 << 62, dtype=torch.int64, device=device)
        self._launches: list[tuple[int, int, tuple[int, ...]]] = []
        self._base = 0
        self._shared = host.plan.shared
        self._host_words = [host.buffer(number)[: offsets[-1] // 8 * 8].view(torch.int64).numpy()
                            for number in range(host.plan.num_buffers)]  # fmt: skip
        for number, words in enumerate(self._host_words):
            for chunk, first in enumerate(self._first_word):
                words[first] = self._tag(number, chunk)
                words[first + 1] = 0
        self.num_executions = 0
        self.num_checks = 0
        self.num_wrong = 0
        self.first: WrongStamp | None = None

    @staticmethod
    def _tag(buffer: int, chunk: int) -> int:
        return (buffer + 1) * _TAG_STEP + chunk

    def sent(self, key: int, slot: int, chunk: int, load: int) -> None:
        """A chunk of `key` is about to be copied into `slot` by `load`."""
        number = self._host.buffer_number(key)
        sequence = 0 if self._shared else load
        if sequence:
            # Nobody reads this buffer now: one load of an expert is under way at a time.
            self._host_words[number][self._first_word[chunk] + 1] = sequence
        expected = self._expected[slot]
        expected[2 * chunk] = self._tag(number, chunk)
        expected[2 * chunk + 1] = sequence

    def guard(self, forward: int, layer: int, keys: Sequence[int], slots: Sequence[int],
              work: Callable[[], None]) -> Callable[[], None]:  # fmt: skip
        """`work` with a check of all stamps in `slots` before and after it."""
        device = self._words.device
        expected = torch.tensor([self._expected[slot] for slot in slots], dtype=torch.int64)
        starts = torch.tensor([slot * self._words_per_slot for slot in slots], dtype=torch.int64)
        number = self._base + len(self._launches)
        self._launches.append((forward, layer, tuple(keys)))
        self.num_executions += len(slots)
        self.num_checks += expected.numel()

        def guarded() -> None:
            places = starts.to(device)[:, None] + self._within[None, :]
            wanted = expected.to(device)
            self._check(places, wanted, number)
            work()
            self._check(places, wanted, number)

        return guarded

    def _check(self, places: torch.Tensor, wanted: torch.Tensor, number: int) -> None:
        wrong = (self._words[places] != wanted).sum()
        self._wrong.add_(wrong)
        self._first_bad.copy_(torch.where(wrong > 0, torch.clamp(self._first_bad, max=number), self._first_bad))

    def collect(self) -> None:
        """Between forwards, the device idle: take over what it has found."""
        self.num_wrong = int(self._wrong.item())
        if self.num_wrong and self.first is None:
            forward, layer, keys = self._launches[int(self._first_bad.item()) - self._base]
            self.first = WrongStamp(forward, layer, keys, self.num_wrong)
        self._base += len(self._launches)
        self._launches.clear()
