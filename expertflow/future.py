"""What a trace will demand, indexed by event (forward * num_layers + layer), after batching. For references only."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from expertflow.forward import Forward

NEVER = 1 << 62
BLOCK = 1024


_Block = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]


class Future:
    """Demand and next uses of every event. Memory grows with the trace: 13 bytes per access.

    keys [A] int32: all accesses, event by event, in touch order. starts [V + 1] int64: event v's accesses.
    next_event [A] int64: the next event that demands the same key, NEVER if none.
    """

    def __init__(self, forwards: Iterable[Forward], num_keys: int) -> None:
        blocks: list[npt.NDArray[np.int32]] = []
        lengths: list[npt.NDArray[np.int64]] = []
        for forward in forwards:
            flat = [key for keys in forward.demands for key in keys]
            blocks.append(np.array(flat, dtype=np.int32))
            lengths.append(np.array([len(keys) for keys in forward.demands], dtype=np.int64))
        self.num_keys = num_keys
        self.keys = np.concatenate(blocks) if blocks else np.zeros(0, np.int32)
        sizes = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        self.num_events = len(sizes)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        events = np.repeat(np.arange(self.num_events, dtype=np.int64), sizes)
        order = np.lexsort((events, self.keys))
        self.next_event = np.full(len(self.keys), NEVER, dtype=np.int64)
        same = self.keys[order[1:]] == self.keys[order[:-1]]
        self.next_event[order[:-1][same]] = events[order[1:][same]]
        self._first = np.full(num_keys, NEVER, dtype=np.int64)
        head = np.ones(len(order), dtype=bool)
        head[1:] = ~same
        self._first[self.keys[order[head]]] = events[order[head]]
        # It is shared by all runs over the trace: nobody writes to it.
        for array in (self.keys, self.starts, self.next_event, self._first):
            array.setflags(write=False)
        self._blocks: dict[int, _Block] = {}

    def first_uses(self) -> list[int]:
        """First event that demands each key [num_keys]; NEVER if none does."""
        return list(map(int, self._first))

    def _block(self, index: int) -> _Block:
        """(keys, next uses) of BLOCK events: indexing nested lists is what numpy is slow at."""
        block = self._blocks.get(index)
        if block is None:
            first, last = index * BLOCK, min(index * BLOCK + BLOCK, self.num_events)
            bounds = self.starts[first : last + 1].tolist()
            keys = self.keys[bounds[0] : bounds[-1]].tolist()
            uses = self.next_event[bounds[0] : bounds[-1]].tolist()
            spans = [(a - bounds[0], b - bounds[0]) for a, b in pairwise(bounds)]
            block = ([tuple(keys[a:b]) for a, b in spans], [tuple(uses[a:b]) for a, b in spans])
            while len(self._blocks) >= 4:
                # A reader goes forward, with a look ahead: the block read longest ago is the one it has left.
                del self._blocks[next(iter(self._blocks))]
            self._blocks[index] = block
        return block

    def next_uses(self, event: int) -> tuple[int, ...]:
        """Next event for each key of `event`, in touch order."""
        return self._block(event // BLOCK)[1][event % BLOCK]

    def demand(self, event: int) -> tuple[int, ...]:
        """Keys that `event` demands, in touch order; empty past the end."""
        if event >= self.num_events:
            return ()
        return self._block(event // BLOCK)[0][event % BLOCK]
