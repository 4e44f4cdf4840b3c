"""The header of a GGUF file: its keys and what it says of each tensor; no weight is read.

The package `gguf` has the names, types and block sizes. Its reader is not used: it maps every tensor's data, so that
a file that ends after its header cannot be opened, and believes each count of the file before it holds it against
the size. What must hold of a header is what ggml/src/gguf.cpp of llama.cpp asks for when it opens one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from traces.container import check_file
from traces.jsontext import shown
from traces.limits import Budget
from traces.messages import TraceError, cut, fault
from traces.reading import unreadable

Value = int | float | bool | str | list[int | float | bool]

REWRITE = "fetch or convert the file again"
VERSIONS = (2, 3)
MAX_KEYS = 65_536
MAX_TENSORS = 262_144
MAX_TEXTS = 1 << 22
"""Texts in all arrays of a file, which are stepped over one by one."""
MAX_NAME = 127
"""Bytes of a tensor's name: twice what llama.cpp takes."""
MAX_DIMS = 4
LONGEST_KEY = 4096
LONGEST_KEPT = 4096
"""Bytes of a text, and values of an array, that are kept; what is longer (chat templates, vocabularies) is counted."""
MOST_KEPT = 1 << 20
"""Values in all arrays that are kept."""
MOST_WEIGHTS = 2**63 - 1
_OLD_MAGIC = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}
_NUMBERS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<B", None, None, "<Q", "<q", "<d")
"""How the value of each type of key is packed, in the order of `gguf.GGUFValueType`."""
_BOOL, _STRING, _ARRAY = 7, 8, 9
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """shape: as the file has it, the contiguous dimension first. kind: its GGML type, such as Q4_K."""

    name: str
    shape: tuple[int, ...]
    kind: str
    num_bytes: int

    @property
    def weights(self) -> int:
        """How many values it holds."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(frozen=True)
class Header:
    """keys: those that are kept; counts: how many values the arrays have that are not. data_start, data_bytes: where
    the weights are, or would be."""

    path: Path
    keys: Mapping[str, Value]
    counts: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    data_start: int
    data_bytes: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """The header of the file at `path`, which may end behind it; TraceError on whatever is not one."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file, size).header()
    except OSError as error:
        raise unreadable(path, error) from None


class _Reader:
    """One pass over the header; nothing is taken that the rest of the file, and the bound on memory, do not cover."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0
        self.where = "header"
        self.budget = Budget(path)
        self.num_texts = self.num_kept = 0

    def header(self) -> Header:
        num_tensors, num_keys = self._counts()
        keys, counts = self._keys(num_keys)
        alignment = self._alignment(keys)
        tensors, data_bytes = self._tensors(num_tensors, alignment)
        data_start = -(-self.at // alignment) * alignment
        return Header(self.path, keys, counts, tensors, data_start, data_bytes, self.size)

    # -- bytes -----------------------------------------------------------------------------------------------

    def fault(self, problem: str, remedy: str = REWRITE) -> TraceError:
        return fault(self.path, self.where, problem, remedy)

    def _truncated(self, needed: int) -> TraceError:
        problem = f"ends at byte {self.size}, in its header, which needs {needed} more at byte {self.at}"
        return self.fault(problem, "fetch more of its beginning")

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.size - self.at:
            raise self._truncated(num_bytes)
        content = self.file.read(num_bytes)
        if len(content) != num_bytes:
            raise self.fault("changes its size while it is read", "wait until it is written")
        self.at += num_bytes
        return content

    def skip(self, num_bytes: int) -> None:
        if num_bytes > self.size - self.at:
            raise self._truncated(num_bytes)
        self.at += num_bytes
        self.file.seek(self.at)

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def text(self, most: int, what: str) -> str:
        length = self.number("<Q")
        if length > most:
            raise self.fault(f"has a {what} of {shown(length)} bytes, at most {most} are allowed")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"has a {what} that is not UTF-8 text") from None

    # -- head ------------------------------------------------------------------------------------------------

    def _counts(self) -> tuple[int, int]:
        """Numbers of tensors and keys, behind magic and version."""
        start = self.file.read(8)
        if start[:4] != b"GGUF":
            if other := _OLD_MAGIC.get(start[:4]):
                raise self.fault(f"is a {other} file, the form before GGUF", "convert the model anew")
            raise self.fault("is not a GGUF file (it does not begin with GGUF)", "give a GGUF file")
        if len(start) < 8:
            raise self._truncated(8)
        self.at = 8
        version = int.from_bytes(start[4:], "little")
        if version not in VERSIONS:
            if version & 0xFFFF == 0 and version:
                raise self.fault("is big-endian", "convert it: gguf-convert-endian FILE little")
            raise self.fault(f"has version {version} of GGUF, known are 2 and 3", "convert the model anew")
        num_tensors, num_keys = self.number("<Q"), self.number("<Q")
        for count, most, what in ((num_tensors, MAX_TENSORS, "tensors"), (num_keys, MAX_KEYS, "keys")):
            if count > most:
                raise self.fault(f"says that it has {shown(count)} {what}, at most {most} are allowed")
        return num_tensors, num_keys

    # -- keys ------------------------------------------------------------------------------------------------

    def _keys(self, count: int) -> tuple[dict[str, Value], dict[str, int]]:
        keys: dict[str, Value] = {}
        counts: dict[str, int] = {}
        for index in range(count):
            self.where = f"key {index} of {count}"
            name = self.text(LONGEST_KEY, "name")
            if not name:
                raise self.fault("has no name")
            self.where = f"key {cut(name, 60)!r}"
            if name in keys or name in counts:
                raise self.fault("comes twice")
            kind = self.number("<I")
            self.budget.take(self.where, 200 + len(name))
            value: Value | None
            if kind == _ARRAY:
                value, length = self._array()
            elif kind == _STRING:
                value, length = self._string()
            else:
                value, length = self._scalar(kind), 1
            if value is None:
                counts[name] = length
            else:
                keys[name] = value
        return keys, counts

    def _scalar(self, kind: int) -> int | float | bool:
        code = _NUMBERS[kind] if kind < len(_NUMBERS) else None
        if code is None:
            raise self.fault(f"has the type {kind}, known are 0 to {len(_NUMBERS) - 1}, and no arrays of arrays")
        value: int | float = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        if kind != _BOOL:
            return value
        if value > 1:
            raise self.fault(f"is a truth value of {value}, neither 0 nor 1")
        return bool(value)

    def _string(self) -> tuple[str | None, int]:
        length = self.number("<Q")
        if length > LONGEST_KEPT:
            self.skip(length)
            return None, length
        self.budget.take(self.where, length)
        try:
            return self.take(length).decode("utf-8"), length
        except UnicodeDecodeError:
            raise self.fault("is not UTF-8 text") from None

    def _array(self) -> tuple[list[int | float | bool] | None, int]:
        """Its values, None where they are texts or many, and how many they are."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self._skip_texts(count)
            return None, count
        code = _NUMBERS[kind] if kind < len(_NUMBERS) else None
        if code is None:
            self._scalar(kind)
        width = struct.calcsize(str(code))
        if count > min(LONGEST_KEPT, MOST_KEPT - self.num_kept):
            self.skip(count * width)
            return None, count
        self.num_kept += count
        self.budget.take(self.where, 40 * count)
        return [self._scalar(kind) for _ in range(count)], count

    def _skip_texts(self, count: int) -> None:
        """Step over so many texts, each of which takes eight bytes at least."""
        if 8 * count > self.size - self.at:
            raise self._truncated(8 * count)
        self.num_texts += count
        if self.num_texts > MAX_TEXTS:
            raise self.fault(f"brings the texts of the header to {self.num_texts}, at most {MAX_TEXTS} are allowed")
        length_at = struct.Struct("<Q").unpack_from
        while count:
            block = self.file.read(_BLOCK)
            at, last = 0, len(block) - 8
            left = count
            while left and at <= last:
                at += 8 + length_at(block, at)[0]
                left -= 1
            if left == count:
                raise self._truncated(8)
            self.skip(at)
            count = left

    def _alignment(self, keys: Mapping[str, Value]) -> int:
        from gguf.constants import GGUF_DEFAULT_ALIGNMENT, Keys

        value = keys.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        self.where = f"key {Keys.General.ALIGNMENT!r}"
        if type(value) is not int or not 0 < value < 2**31 or value & (value - 1):
            raise self.fault(f"is {shown(value)}, no power of two")
        return value

    # -- tensors ---------------------------------------------------------------------------------------------

    def _tensors(self, count: int, alignment: int) -> tuple[tuple[Tensor, ...], int]:
        """What the file says of each tensor, and the bytes of all with what fills them up to `alignment`."""
        tensors: list[Tensor] = []
        seen: set[str] = set()
        reached = 0
        for index in range(count):
            self.where = f"tensor {index} of {count}"
            name = self.text(MAX_NAME, "name")
            self.where = f"tensor {name!r}"
            if name in seen:
                raise self.fault("comes twice")
            seen.add(name)
            self.budget.take(self.where, 400 + len(name))
            tensor, offset = self._tensor(name)
            if offset != reached:
                problem = f"begins at byte {offset} of the data, the tensors before it end at byte {reached}"
                raise self.fault(problem)
            reached += -(-tensor.num_bytes // alignment) * alignment
            if reached > MOST_WEIGHTS:
                raise self.fault("brings the weights to more bytes than 63 bits hold")
            tensors.append(tensor)
        return tuple(tensors), reached

    def _tensor(self, name: str) -> tuple[Tensor, int]:
        """Shape, type and place of one tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        num_dims = self.number("<I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fault(f"has {num_dims} dimensions, 1 to {MAX_DIMS} are allowed")
        shape = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims))
        weights = 1
        for size in shape:
            weights *= size
        if not 0 < weights <= MOST_WEIGHTS:
            raise self.fault(f"has the shape {cut(str(list(shape)), 90)}")
        number, offset = self.number("<I"), self.number("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            problem = f"has the type {number}, which the installed package gguf does not know"
            raise self.fault(problem, "update it (pip install -U gguf), or fetch the file again") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[0] % block:
            raise self.fault(f"has rows of {shape[0]}, no multiple of the {block} that a block of {kind.name} holds")
        return Tensor(name, shape, kind.name, weights // block * block_bytes), offset
