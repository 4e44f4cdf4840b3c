"""Room for experts of unlike sizes: so many bytes, in place of slots of one size.

What was given up and not taken again is kept as pieces, each with the mark of who may still read it, the last one
given up on top. Where in memory they lie makes no difference here: an expert may lie in several of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from expertflow.slots import Slots
from expertflow.view import ABSENT, RESIDENT


@dataclass(frozen=True)
class ByteRoom:
    """room_bytes: for experts in GPU memory, staging left out. chunk_bytes: of each chunk of an expert, by key."""

    room_bytes: int
    chunk_bytes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each expert, by key."""
        return [sum(own) for own in self.chunk_bytes]


def split_by_layer(room_bytes: int, sizes: Sequence[int], num_layers: int) -> list[int]:
    """Bytes of each layer's own cache: its share by what its experts weigh, of alike ones as many as are whole; of what
    is left the first layers get one more each, where that fits."""
    num_experts, total = len(sizes) // num_layers, sum(sizes)
    layers = [sizes[first : first + num_experts] for first in range(0, len(sizes), num_experts)]
    rooms = []
    for own in layers:
        share = room_bytes * sum(own) // total
        rooms.append(share // own[0] * own[0] if min(own) == max(own) else share)
    left = room_bytes - sum(rooms)
    for layer, own in enumerate(layers):
        if max(own) <= left and rooms[layer] + max(own) <= sum(own):
            rooms[layer] += max(own)
            left -= max(own)
    return rooms


class ByteSlots(Slots):
    """`Slots` by bytes: an expert has a slot, numbered as there, as long as it has room.

    sizes: bytes by expert key. free_bytes: of each pool, staging included. staging_bytes: of those, for demand alone.
    """

    def __init__(
        self, num_layers: int, num_experts: int, scope: str, num_staging: int, sizes: Sequence[int], room_bytes: int
    ) -> None:
        # As many numbers as there are experts: it is the bytes that run out.
        super().__init__(num_layers, num_experts, num_layers * num_experts, scope, num_staging)
        self.sizes = list(sizes)
        self.room_bytes = room_bytes
        pools = [self.sizes[first : first + self.span] for first in range(0, len(self.sizes), self.span)]
        rooms = split_by_layer(room_bytes, self.sizes, num_layers) if self.by_layer else [room_bytes]
        for own, room in zip(pools, rooms, strict=True):
            if room < max(own):
                where = " in a layer's own cache" if self.by_layer else ""
                raise ValueError(
                    f"{room} bytes{where} hold no expert of {max(own)} bytes; raise residency or gpu_memory_gb"
                )
        self.capacities = [max(room * len(own) // sum(own), 1) for own, room in zip(pools, rooms, strict=True)]
        self.staging_bytes = [num_staging * max(own) for own in pools]
        self.free_bytes = [room + more for room, more in zip(rooms, self.staging_bytes, strict=True)]
        self.pieces: list[list[tuple[int, int]]] = [[(free, 0)] for free in self.free_bytes]
        """(bytes, mark that must end before they may be rewritten) of each pool, the last given up last."""

    @property
    def all_room(self) -> str:
        return f"{self.room_bytes} bytes of room"

    def fill(self, keys: Sequence[int]) -> list[int]:
        """Make `keys` resident, in order, each that their pool has room for beside staging; returns those placed."""
        placed = []
        for key in keys:
            pool = key // self.span
            room = self.free_bytes[pool] - self.staging_bytes[pool]
            if self.state[key] == ABSENT and self.sizes[key] <= room:
                self.take(key)
                self.slot_of[key] = self.free[pool].pop()
                self.state[key] = RESIDENT
                placed.append(key)
        if self.shown is not None:
            self.shown[:] = self.state
        return placed

    def take(self, key: int) -> int:
        """Bytes for `key`, which must be free: those given up last come first. The last mark of who may still read
        them; 0 = none."""
        pool, size = key // self.span, self.sizes[key]
        pieces, after = self.pieces[pool], 0
        self.free_bytes[pool] -= size
        while size > 0:
            num_bytes, mark = pieces.pop()
            after = max(after, mark)
            if num_bytes > size:
                pieces.append((num_bytes - size, mark))
            size -= num_bytes
        return after

    def give(self, key: int, mark: int) -> None:
        """`key` has given up its bytes, which `mark` may still read."""
        pool = key // self.span
        self.free_bytes[pool] += self.sizes[key]
        self.pieces[pool].append((self.sizes[key], mark))

    def lacks_staging(self, key: int) -> bool:
        pool = key // self.span
        return self.free_bytes[pool] < self.staging_bytes[pool]

    def is_blocked(self, pool: int, stays: Collection[int], fixed: Collection[int]) -> bool:
        first, room, need = pool * self.span, self.free_bytes[pool], 0
        for key in range(first, min(first + self.span, len(self.state))):
            if not self.state[key]:
                need = max(need, 0 if key in stays else self.sizes[key])
            elif key not in fixed:
                room += self.sizes[key]
        return need > room
