"""A row that a host writes while the compiled kernel brings it to the device: words arrive one by one."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Sequence

import numpy as np

from replay.machine.rows import GAVE_UP, NUM_EXPERTS, NUMBER, SHARED_BLOCK, SHARED_ROWS, TOLD, RowLayout
from tests.gpu.ptx.program import Program, run_block
from tests.gpu.ptx.state import Memory
from tests.gpu.slot_cases import make_row


class Host:
    """Words that it writes are on their way, and arrive in their order; `reads` of the device let some of them in."""

    def __init__(self, num_words: int, draws: random.Random) -> None:
        self.written = [0] * num_words
        self.arrived = np.zeros(num_words, np.int64)
        self.on_the_way: deque[tuple[int, int]] = deque()
        self.chance, self.reads, self._draws = 0.0, 0, draws

    def __getitem__(self, word: int) -> int:
        return self.written[word]

    def __setitem__(self, word: int, value: int) -> None:
        assert -(2**63) <= value < 2**63
        self.written[word] = value
        self.on_the_way.append((word, value))

    def arrive(self, most: int = sys.maxsize) -> None:
        while self.on_the_way and most > 0:
            word, value = self.on_the_way.popleft()
            self.arrived[word] = value
            most -= 1

    def before_read(self) -> None:
        self.reads += 1
        if self._draws.random() < self.chance:
            self.arrive(self._draws.randint(1, 3))

    def reorder(self, words: set[int]) -> None:
        """Of what is on the way these words arrive last, in any order."""
        last = [store for store in self.on_the_way if store[0] in words]
        self._draws.shuffle(last)
        self.on_the_way = deque([store for store in self.on_the_way if store[0] not in words] + last)


class Staged:
    """A row, its host, and launches of the program that brings it to the device."""

    def __init__(self, program: Program, layout: RowLayout, seed: int, most_polls: int = 600) -> None:
        self.draws = random.Random(seed)
        self.layout, self.row = layout, make_row(layout, "cpu")
        self.host = Host(layout.num_words, self.draws)
        self.row.words = self.host  # type: ignore[assignment]
        self.device = np.full(layout.num_words, 1 << 40 | 1 << 30)
        self.device[TOLD] = 0
        self._memory = Memory()
        source = self._memory.add("host", self.host.arrived, before_read=self.host.before_read)
        self._arguments = source, self._memory.add("device", self.device), layout.num_words, layout.capacity, most_polls
        self._program = program

    def launch(self) -> None:
        assert run_block(self._program, self._memory, self._arguments, seed=self.draws.getrandbits(32)) == []

    def wrong(self, launch: int, slots: Sequence[int], block: int, shared_rows: int) -> list[str]:
        """What the device has otherwise than the host wrote it, and whether it gave up."""
        layout, found = self.layout, self.device.tolist()
        wanted = dict(enumerate(self.host.written[layout.first :], layout.first))
        wanted |= {NUM_EXPERTS: len(slots), SHARED_BLOCK: block, SHARED_ROWS: shared_rows, TOLD: launch}
        wanted |= {NUMBER: self.host[NUMBER]} | dict(enumerate(slots, layout.slots))
        mistakes = [
            f"launch {launch}: word {word} is {found[word]}, not {value}"
            for word, value in wanted.items()
            if found[word] != value
        ]
        return mistakes + ["it gave up"] * bool(self.host.arrived[GAVE_UP])


def mistakes(program: Program, layout: RowLayout, num_launches: int, seed: int, ordered: bool = True) -> list[str]:
    """Launches whose rows arrive before them or while they look, some of them changed altogether, or told twice.

    ordered: whether words without the number of a launch arrive before those with it.
    """
    staged = Staged(program, layout, seed)
    draws, host, row, found = staged.draws, staged.host, staged.row, []
    launch = 0
    while launch < num_launches:
        slots = [draws.randrange(1 << 30) for _ in range(draws.randint(0, layout.capacity))]
        block, shared_rows = draws.choice([-1, 0, 7, 1 << 30]), draws.randrange(9)
        changed = launch == 0 or draws.random() < 0.3
        if changed:
            row.spread([draws.randrange(1, 9) for _ in range(layout.capacity)])
            for word in range(layout.expected, layout.num_words):
                host[word] = draws.randrange(-(2**62), 2**62)
            host[NUMBER] = launch
            row.changed()
        row.describe(slots, block, shared_rows)
        row.tell()
        numbered = {NUM_EXPERTS, SHARED_BLOCK, SHARED_ROWS, TOLD, *range(layout.slots, layout.first)}
        host.reorder(numbered if ordered else set(range(layout.num_words)))
        # Not of a row that has changed: the first of the two launches would not be told so.
        times = 2 if not changed and draws.random() < 0.2 else 1
        if times == 2:
            row.tell()
        host.chance = draws.choice([0.02, 0.1, 0.5, 1.0])
        if draws.random() < 0.2:
            host.arrive()
        for _ in range(times):
            staged.launch()
            launch += 1
            found += [f"{mistake}; seed {seed}" for mistake in staged.wrong(launch, slots, block, shared_rows)]
        host.arrive()
    return found
