"""Does every kernel read what it should? Stamps that travel with each chunk, checked where they arrive.

The first 16 bytes of every chunk (at an 8-byte boundary) hold a tag, which names the host buffer and the chunk, and
the number of the load that copied it. A host buffer that several experts share carries the buffer's number and
no load. Checked on the device, within the program of each launch of experts, before and after the kernels that read
a slot: a copy that is late, lost, misplaced, or that overwrites a slot too early, shows. The host waits for no check,
and looks at what they found at the end. Checking takes device time: such a run is no measurement. An expert that the
host computes is never copied: its worker holds the tags of the bytes that it multiplies against those of the expert.

What is not launched reads nothing, and no stamp tells of it: so the launches of each layer are held against its demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from expertflow.forward import Forward
from expertflow.launches import Launches, Mislaunched
from replay.machine.device import Work
from replay.machine.launch_row import Row
from replay.machine.pools import HostPool, SlotPool
from replay.machine.rows import NUM_EXPERTS, NUMBER
from replay.machine.slot_kernels import check_work

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
        self.words_per_expert = len(within)
        self._within = torch.tensor(within, dtype=torch.int64, device=device)
        self._expected = [[0] * len(within) for _ in range(slots.num_slots)]
        self._wrong = torch.zeros(1, dtype=torch.int64, device=device)
        self._first_bad = torch.full((1,), 1 << 62, dtype=torch.int64, device=device)
        self._launches: list[tuple[int, int, tuple[int, ...]]] = []
        self._wrong_on_host: list[WrongStamp] = []
        self._layers = Launches()
        self.num_mislaunched = 0
        """Experts that their layer demanded and that were not launched in it, or launched more than once or in vain."""
        self.first_mislaunched: Mislaunched | None = None
        self._shared = host.plan.shared
        self._host_words = [
            host.buffer(number)[: offsets[-1] // 8 * 8].view(torch.int64).numpy()
            for number in range(host.plan.num_buffers)
        ]
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

    def expect(self, row: Row, forward: int, layer: int, keys: Sequence[int], slots: Sequence[int]) -> None:
        """Write into `row`, which is about to be launched, what the slots of `keys` must hold then."""
        words, at = row.words, row.layout.expected
        words[NUMBER] = len(self._launches)
        row.changed()
        for slot in slots:
            for word in self._expected[slot]:
                words[at] = word
                at += 1
        self._launches.append((forward, layer, tuple(keys)))
        self._layers.launched(keys)
        self.num_executions += len(slots)
        self.num_checks += len(slots) * self.words_per_expert

    def on_host(self, forward: int, layer: int, keys: Sequence[int]) -> Callable[[int, torch.Tensor], None]:
        """The host is about to compute `keys`. What its worker calls for each of them, before and after its products,
        with the key and the bytes that it reads: no load's number stands there for certain, so the tags alone count."""
        self._layers.launched(keys)
        self.num_executions += len(keys)
        self.num_checks += 2 * len(keys) * len(self._first_word)

        def check(key: int, read: torch.Tensor) -> None:
            words = read[: len(read) // 8 * 8].view(torch.int64)
            number = self._host.buffer_number(key)
            wrong = sum(int(words[first]) != self._tag(number, chunk) for chunk, first in enumerate(self._first_word))
            if wrong:
                self._wrong_on_host.append(WrongStamp(forward, layer, (key,), wrong))

        return check

    def begin_forward(self, forward: Forward) -> None:
        """What is launched from now on is of `forward`."""
        self._layers.begin_forward(forward)

    def end_layer(self, layer: int) -> None:
        """All experts of `layer` are launched: hold them against its demand."""
        wrong = self._layers.end_layer(layer)
        if wrong is not None:
            self.num_mislaunched += len(wrong.keys)
            self.first_mislaunched = self.first_mislaunched or wrong

    def check(self, row: Row) -> Work:
        """Compares the slots named in `row` with the words expected there, on the device."""
        if row.device is not None:
            return check_work(row, self._words, self._words_per_slot, self._within, self._wrong, self._first_bad)

        def work() -> None:
            found, layout = row.host.tolist(), row.layout
            num, size = found[NUM_EXPERTS], self.words_per_expert
            places = torch.tensor(found[layout.slots : layout.slots + num], dtype=torch.int64) * self._words_per_slot
            wanted = row.host[layout.expected : layout.expected + num * size].view(num, size)
            wrong = int((self._words[places[:, None] + self._within[None, :]] != wanted).sum())
            if wrong:
                self._wrong += wrong
                self._first_bad.clamp_(max=found[NUMBER])

        return work

    def restart(self) -> None:
        """Forget what was launched so far: it was no part of the run."""
        self._wrong.zero_()
        self._first_bad.fill_(1 << 62)

    def collect(self) -> None:
        """Read from the device what it has found wrong. The run must be over and the device idle."""
        self.num_wrong = int(self._wrong.item())
        if self.num_wrong:
            forward, layer, keys = self._launches[int(self._first_bad.item())]
            self.first = WrongStamp(forward, layer, keys, self.num_wrong)
        if self._wrong_on_host:
            self.num_wrong += sum(one.num_wrong for one in self._wrong_on_host)
            firsts = [self._wrong_on_host[0]] if self.first is None else [self.first, self._wrong_on_host[0]]
            first = min(firsts, key=lambda one: (one.forward, one.layer))
            self.first = replace(first, num_wrong=self.num_wrong)
