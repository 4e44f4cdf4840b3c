"""What the footer of a Parquet file claims about sizes, read without Arrow.

Arrow builds a column's metadata in C++ and throws where Python cannot catch it when a footer contradicts itself, which
ends the process (pyarrow 26: "Repetition level histogram size mismatch"). Its reading of the data raises in order. So
the few numbers that bound memory before anything is read are taken from the footer here: Thrift's compact protocol,
as apache/parquet-format describes it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"PAR1"
_TAIL = struct.Struct("<I4s")
_DEEPEST = 32
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_WHOLE = (4, 5, 6)
_ROW_GROUPS, _COLUMNS, _COLUMN_DATA, _NUM_VALUES, _UNCOMPRESSED, _GROUP_BYTES, _GROUP_ROWS = 4, 1, 3, 5, 6, 2, 3


@dataclass(frozen=True)
class GroupSize:
    """What the footer claims of a row group: rows, the values of all columns, their bytes before compression."""

    num_rows: int
    num_values: int
    num_bytes: int


def group_sizes(path: Path, most_bytes: int) -> list[GroupSize]:
    """The claims of all row groups. ValueError where the footer is damaged, claims less than 0 or is over the bound."""
    about = _Compact(_footer(path, most_bytes)).struct(0)
    return [_group_size(group) for group in _items(about, _ROW_GROUPS)]


def _footer(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        end = file.seek(0, 2)
        if end < _TAIL.size + len(MAGIC):
            raise ValueError("the footer is missing")
        file.seek(end - _TAIL.size)
        size, magic = _TAIL.unpack(file.read(_TAIL.size))
        if magic != MAGIC or size > end - _TAIL.size - len(MAGIC):
            raise ValueError("the footer is cut off")
        if size > most_bytes:
            raise ValueError(f"the footer takes {size:,} B")
        file.seek(end - _TAIL.size - size)
        return file.read(size)


def _group_size(group: Any) -> GroupSize:
    columns = [_known(_known(column, dict).get(_COLUMN_DATA), dict) for column in _items(_known(group, dict), _COLUMNS)]
    values = [_known(column.get(_NUM_VALUES), int) for column in columns]
    num_bytes = [_known(column.get(_UNCOMPRESSED), int) for column in columns]
    rows, total = _known(group.get(_GROUP_ROWS), int), _known(group.get(_GROUP_BYTES), int)
    if min(rows, total, *values, *num_bytes) < 0:
        raise ValueError("sizes below 0")
    return GroupSize(rows, sum(values), max(total, sum(num_bytes)))


def _items(about: dict[int, Any], field: int) -> list[Any]:
    items: list[Any] = _known(about.get(field), list)
    return items


def _known(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError("the footer lacks a size")
    return value


class _Compact:
    """A cursor over Thrift's compact protocol; every value is checked against the bytes that are there."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        """The fields of a struct by number."""
        if depth > _DEEPEST:
            raise ValueError("the footer is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) & 15 != _STOP:
            number = number + (head >> 4) if head >> 4 else self._whole()
            if number in fields:
                raise ValueError("a field stands twice in the footer")
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _WHOLE:
            return self._whole()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind in (_BYTE, _TRUE, _FALSE):
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _MAP:
            return self._map(depth + 1)
        raise ValueError(f"the footer has a value of the unknown kind {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._varint()
        self._check_count(count)
        if depth > _DEEPEST:
            raise ValueError("the footer is nested too deep")
        return [self._value(head & 15, depth) for _ in range(count)]

    def _map(self, depth: int) -> list[Any]:
        count = self._varint()
        self._check_count(count)
        if not count:
            return []
        kinds = self._byte()
        return [(self._value(kinds >> 4, depth), self._value(kinds & 15, depth)) for _ in range(count)]

    def _check_count(self, count: int) -> None:
        """Each item takes a byte at least."""
        if count > len(self._data) - self._at:
            raise ValueError("the footer claims more items than it has bytes")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ValueError("the footer ends in a value")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            if (shift := shift + 7) > 63:
                raise ValueError("a number in the footer is too long")

    def _whole(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
