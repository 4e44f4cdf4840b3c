"""What instructions act on: global memory, the shared memory of a block, a warp's registers and copies."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Landing = Literal["early", "late", "mixed"]
"""When asynchronous copies land: when they are issued, when they are waited for, or either by chance."""
LANES = 32
ALL = np.arange(LANES)
_GAP = 1 << 20
_CELL = 2
"""Bytes of shared memory that are watched together: no access is narrower."""
_SEVERAL = 63
"""In place of a lane: several of a warp."""
_NOBODY, _SEVERAL_WARPS = -64, 1 << 30
_MOST_HAZARDS = 20


class Fault(Exception):
    """What a GPU would refuse, or what has no defined result."""


@dataclass(eq=False)
class Region:
    """Bytes of global memory from `base` on. before_read: called before each value that is read, as the host writes."""

    name: str
    base: int
    data: Array
    writable: bool
    before_read: Callable[[], None] | None


class Memory:
    """Global memory: arrays with gaps between them, so that what leaves one does not enter another."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._end = 1 << 32

    def add(
        self, name: str, array: Array, *, writable: bool = True, before_read: Callable[[], None] | None = None
    ) -> int:
        """Give the bytes of a contiguous array, which are shared with it, and return their address.

        It is a multiple of 512, as torch's are.
        """
        base, data = self._end, array.reshape(-1).view(np.uint8)
        self._regions.append(Region(name, base, data, writable, before_read))
        self._end += -(-data.size // _GAP) * _GAP + _GAP
        return base

    def _places(self, addresses: Array, size: int, what: str) -> list[tuple[Region, Array, Array]]:
        """(region, which of the addresses, offsets of their bytes there); most often there is one region."""
        if (off := addresses & np.uint64(size - 1)).any():
            raise Fault(f"{what} of {size} bytes at {self._place(int(addresses[off.argmax()]))}: not aligned")
        found, left = [], np.ones(addresses.size, bool)
        for region in self._regions:
            # Unsigned: what lies before it is far behind its end.
            offsets = addresses - np.uint64(region.base)
            here = offsets < np.uint64(max(region.data.size - size + 1, 0))
            if here.any():
                found.append((region, here, offsets[here].astype(np.int64)[:, None] + np.arange(size)))
                left &= ~here
                if not left.any():
                    break
        if left.any():
            raise Fault(f"{what} of {size} bytes at {self._place(int(addresses[left.argmax()]))}: out of bounds")
        return found

    def _place(self, address: int) -> str:
        """An address by the array before it."""
        before = [region for region in self._regions if region.base <= address]
        if not before:
            return f"{address:#x}"
        return f"{before[-1].name}+{address - before[-1].base}, which has {before[-1].data.size}"

    def load(self, addresses: Array, size: int, parts: int, volatile: bool, order: random.Random) -> Array:
        """Bytes [addresses, size], of `parts` values each. What the host writes meanwhile is read value by value."""
        values = np.empty((addresses.size, size), np.uint8)
        for region, here, offsets in self._places(addresses, size, "a read"):
            if region.before_read is None:
                values[here] = region.data[offsets]
                continue
            if not volatile:
                raise Fault(f"a read of {region.name} that a cache may answer, while the host writes there")
            width = size // parts
            rows = np.flatnonzero(here)
            pieces = [(at, part * width) for at in range(rows.size) for part in range(parts)]
            order.shuffle(pieces)
            for at, first in pieces:
                region.before_read()
                values[rows[at], first : first + width] = region.data[offsets[at, first : first + width]]
        return values

    def store(self, addresses: Array, values: Array, order: random.Random) -> None:
        """values: bytes [addresses, size]. Of several to one place any is left."""
        any_order = order.sample(range(addresses.size), addresses.size)
        addresses, values = addresses[any_order], values[any_order]
        for region, here, offsets in self._places(addresses, values.shape[1], "a store"):
            if not region.writable:
                raise Fault(f"a store to {region.name}, which may only be read")
            region.data[offsets] = values[here]


class Shared:
    """The shared memory of a block. Of each cell: who wrote it last and when, who read it, copies under way to it.

    A thread is warp * 64 + lane; threads are given one an address, or one a cell [addresses, cells or 1]. Time is the
    number of barriers so far, of the block or of any warp.
    """

    def __init__(self, num_bytes: int) -> None:
        cells = -(-num_bytes // _CELL)
        self.data = np.full(cells * _CELL, 0xFF, np.uint8)
        self.time = self.barrier = 0
        self.hazards: list[str] = []
        self._writer, self._written = np.full(cells, _NOBODY), np.full(cells, -1)
        self._reader, self._read = np.full(cells, _NOBODY), np.full(cells, -1)
        self._copies = np.zeros(cells, np.int64)

    def _cells(self, addresses: Array, size: int, what: str) -> Array:
        if (off := addresses & np.uint32(size - 1)).any():
            raise Fault(f"{what} of {size} shared bytes at {int(addresses[off.argmax()])}: not aligned")
        if int(addresses.max()) + size > self.data.size:
            raise Fault(f"{what} of {size} shared bytes at {int(addresses.max())}, of {self.data.size}: out of bounds")
        cells: Array = (addresses.astype(np.int64) // _CELL)[:, None] + np.arange(size // _CELL)
        return cells

    def _bytes(self, cells: Array) -> Array:
        """What is in them: bytes [addresses, size]."""
        found: Array = self.data.reshape(-1, _CELL)[cells]
        return found.reshape(cells.shape[0], -1)

    def _unordered(self, others: Array, times: Array, threads: Array, warp: Warp) -> Array:
        """Where what others did then has no barrier before what `threads` of `warp` do now."""
        since = np.where(others >> 6 == warp.index, warp.synced, self.barrier)
        found: Array = (others != threads) & (times >= since)
        return found

    def _tell(self, wrong: Array, cells: Array, what: str, warp: Warp) -> None:
        if wrong.any() and len(self.hazards) < _MOST_HAZARDS:
            byte = int(cells[wrong][0]) * _CELL
            self.hazards.append(f"byte {byte}: {what}; {warp}")

    def load(self, warp: Warp, addresses: Array, size: int, threads: Array) -> Array:
        """Bytes [addresses, size]."""
        cells = self._cells(addresses, size, "a read")
        self._tell(self._copies[cells] > 0, cells, "read before a copy to it was waited for", warp)
        unordered = self._unordered(self._writer[cells], self._written[cells], threads, warp)
        self._tell(unordered, cells, "read with no barrier after another thread's write", warp)
        # Who has read since the last barrier: one thread, several of a warp, or of several warps.
        others = self._reader[cells]
        unordered = self._unordered(others, self._read[cells], threads, warp)
        several = warp.index << 6 | _SEVERAL
        readers = np.where(unordered, np.where(others >> 6 == warp.index, several, _SEVERAL_WARPS), threads)
        self._reader[cells] = readers
        shared = (self._reader[cells] != readers) & (readers != _SEVERAL_WARPS)
        self._reader[cells[shared]] = several
        self._read[cells] = self.time
        return self._bytes(cells)

    def _write(self, warp: Warp, cells: Array, values: Array | None, threads: Array) -> None:
        """values: bytes [addresses, size]; None: of a copy, whatever they are."""
        unordered = self._unordered(self._writer[cells], self._written[cells], threads, warp)
        if values is not None:
            # Threads of several warps that all hold a value write it to one place.
            there = values.reshape(*cells.shape, _CELL) != self.data.reshape(-1, _CELL)[cells]
            unordered &= there.any(axis=2)
        self._tell(unordered, cells, "written with no barrier after another thread's write", warp)
        unordered = self._unordered(self._reader[cells], self._read[cells], threads, warp)
        self._tell(unordered, cells, "written with no barrier after another thread's read", warp)
        self._writer[cells] = np.broadcast_to(threads, cells.shape)
        self._written[cells] = self.time

    def store(self, warp: Warp, addresses: Array, values: Array, threads: Array) -> None:
        """values: bytes [addresses, size]. Of several to one place any is left."""
        any_order = warp.random.sample(range(addresses.size), addresses.size)
        values, threads = values[any_order], threads[any_order]
        cells = self._cells(addresses, values.shape[1], "a store")[any_order]
        self._tell(self._copies[cells] > 0, cells, "written while a copy to it is under way", warp)
        self._write(warp, cells, values, threads)
        self._put(cells, values)

    def _put(self, cells: Array, values: Array) -> None:
        self.data.reshape(-1, _CELL)[cells] = values.reshape(*cells.shape, _CELL)

    def begin_copy(self, warp: Warp, addresses: Array, size: int, threads: Array) -> None:
        """An asynchronous copy may write from now on."""
        cells = self._cells(addresses, size, "a copy")
        self._tell(self._copies[cells] > 0, cells, "two copies to it under way", warp)
        self._write(warp, cells, None, threads)
        np.add.at(self._copies, cells, 1)
        self.data.reshape(-1, _CELL)[cells] = 0xFF

    def land(self, addresses: Array, values: Array) -> None:
        """A copy's bytes are there; whether it was waited for is another question."""
        self._put(self._cells(addresses, values.shape[1], "a copy"), values)

    def end_copy(self, warp: Warp, addresses: Array, size: int, threads: Array) -> None:
        """A copy was waited for, by the threads that began it."""
        cells = self._cells(addresses, size, "a copy")
        np.subtract.at(self._copies, cells, 1)
        self._write(warp, cells, None, threads)


def width_of(register: str) -> np.dtype[Any] | None:
    """How a register is declared, by its name: LLVM gives each width one. None: it is another name."""
    found = re.fullmatch(r"%(rd|rs|r|p)\d+", register)
    return np.dtype({"rd": np.uint64, "r": np.uint32, "rs": np.uint16, "p": bool}[found[1]]) if found else None


class Registers(dict[str, Array]):
    """By name, [32] each: bool, or unsigned numbers of the register's width, whatever they stand for.

    What nobody wrote is NaN: a warp may read it, as long as its lanes make nothing of it.
    """

    def __missing__(self, name: str) -> Array:
        dtype = width_of(name)
        assert dtype is not None
        self[name] = np.full(LANES * dtype.itemsize, 1 if dtype.kind == "b" else 0xFF, np.uint8).view(dtype)
        return self[name]


@dataclass(eq=False)
class Warp:
    """32 threads that take every instruction together. mask: the lanes that a guard has left, None for all of them."""

    index: int
    shared: Shared
    memory: Memory
    parameters: Array
    """Of the kernel, as uint64."""
    landing: Landing
    random: random.Random
    registers: Registers
    mask: Array | None = None
    synced: int = 0
    """When its lanes have last met at a barrier, of the warp or of the block."""
    copies: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)
    """Committed copies, the oldest group first: what is done when they are waited for."""
    text: str = ""
    """The instruction that it is at."""

    def __str__(self) -> str:
        return f"warp {self.index} at: {self.text}"

    @property
    def lanes(self) -> Array:
        """Those that take part."""
        return ALL if self.mask is None else np.flatnonzero(self.mask)

    def threads(self, lanes: Array) -> Array:
        """Numbers of `lanes`, one a row."""
        return (lanes | self.index << 6)[:, None]

    def sync(self) -> None:
        """Its lanes have met."""
        self.shared.time += 1
        self.synced = self.shared.time

    def put(self, name: str, values: Array) -> None:
        """Write a register, in the lanes that take part."""
        if self.mask is not None:
            values = np.where(self.mask, values, self.registers[name])
        self.registers[name] = values
