"""A file of torch.save as data: tensors become NumPy arrays, and nothing in the file is called or looked up by name.

Such a file is a zip archive of raw tensors and of a pickle that says how they hang together. A pickle is a program; of
its instructions those are understood here that build plain values (tables, lists, text, numbers) and tensors of them,
as `torch.load(weights_only=True)` allows, and any other ends the reading. No torch is needed. Beyond that loader, every
tensor is held against the bytes that the archive has for it before it is looked at: torch before 2.9 believes it.

Formats: the zip layout of `torch.serialization` (`<name>/data.pkl`, `<name>/data/<key>`, `<name>/byteorder`), and the
pickle protocols 2 to 5 as Python's `pickletools` describes them.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.container import Array, check_file
from traces.limits import check_bytes
from traces.messages import TraceError, fault
from traces.reading import MAX_MEMBERS, open_archive, unzipping

MOST_INSTRUCTIONS = 20_000_000
"""Of a pickle: about a hundred bytes of memory each at the most."""
MOST_AXES = 8
_DTYPES = {
    "BoolStorage": "?",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "BFloat16Storage": "<u2",
}
"""NumPy's type of each storage; the words of bfloat16, which it has not, are left as they are and never read here."""
_NOT_PLAIN = "holds more than tensors and plain values, or is damaged"


class _NotPlain(Exception):
    """An instruction that is not understood, or that does not fit what stands before it."""


class Unread:
    """A tensor whose values NumPy has no type for."""


class _Global:
    """What a pickle names and would call: known by its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage:
    """The values of one member of the archive, one after the other."""

    def __init__(self, values: Array, readable: bool) -> None:
        self.values = values
        self.readable = readable


def read_torch(path: Path, remedy: str) -> Any:
    """The object that `torch.save` wrote to `path`, its tensors as NumPy arrays (read-only).

    TraceError for a damaged archive, for packed or encrypted members, for objects other than tensors, tables, lists,
    text and numbers, for a tensor that is not within its bytes, and beyond the bounds of `traces.limits`.
    """
    size = check_file(path)
    check_bytes(path, "file", size)
    with unzipping(path, "file of torch.save", remedy):
        archive = open_archive(path)
    with archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) > MAX_MEMBERS or len(members) != len(archive.infolist()):
            raise fault(path, "file", f"has {len(archive.infolist())} members, or two of one name", remedy)
        for member in members.values():
            # Written so, and then no member is larger than the file.
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                raise fault(path, f"member {member.filename[:60]!r}", "is packed, or larger than the file", remedy)

        def content(name: str) -> bytes:
            if name not in members:
                raise fault(path, "file", f"has no member {name[:60]!r}", remedy)
            with unzipping(path, "file of torch.save", remedy):
                return archive.read(members[name])

        first = next((name for name in members if name.endswith("/data.pkl") and name.count("/") == 1), None)
        if first is None:
            raise fault(path, "file", "is no file of torch.save (no data.pkl)", remedy)
        folder = first.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and content(f"{folder}byteorder") != b"little":
            raise fault(path, "file", "was written on a big-endian machine", "write it on another")
        try:
            return _Reader(lambda key: content(f"{folder}data/{key}")).read(content(first))
        except (_NotPlain, RecursionError):
            raise fault(path, "file", _NOT_PLAIN, remedy) from None


class _Reader:
    """Builds the value that a pickle describes. content: the bytes of a storage by its key."""

    def __init__(self, content: Callable[[str], bytes]) -> None:
        self._content = content
        self._storages: dict[tuple[str, str], _Storage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        """The stacks that lie under marks."""
        self._memo: dict[int, Any] = {}

    def read(self, program: bytes) -> Any:
        """Follow the instructions to their end; _NotPlain for any that is not understood."""
        number = 0
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
                number += 1
                if opcode.name == "STOP":
                    break
                if number > MOST_INSTRUCTIONS:
                    raise _NotPlain
                self._follow(opcode.name, argument)
            (value,) = self._stack
        except TraceError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, MemoryError):
            raise _NotPlain from None
        if self._below or isinstance(value, _Global | _Storage):
            raise _NotPlain
        return value

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name in _TUPLES:
            size = _TUPLES[name]
            if len(stack) < size:
                raise _NotPlain
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "STACK_GLOBAL":
            words = stack[-2:]
            stack[-2:] = [_Global(" ".join(words))]
        elif name == "REDUCE":
            arguments = stack.pop()
            stack[-1] = self._called(stack[-1], arguments)
        elif name == "BINPERSID":
            stack[-1] = self._storage(stack[-1])
        elif name in _GATHER:
            items, self._stack = stack, self._below.pop()
            _GATHER[name](self._stack, items)
        elif name == "APPEND":
            item = stack.pop()
            _append(stack, [item])
        elif name == "SETITEM":
            items = stack[-2:]
            del stack[-2:]
            _set_items(stack, items)
        elif name not in ("PROTO", "FRAME"):
            raise _NotPlain

    def _called(self, what: Any, arguments: Any) -> Any:
        """What the few names that stand in such files give when they are called."""
        name = what.name if isinstance(what, _Global) else ""
        if not isinstance(arguments, tuple):
            raise _NotPlain
        if name == "collections OrderedDict" and not arguments:
            return {}
        if name == "torch Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if name == "torch._utils _rebuild_tensor_v2" and 4 <= len(arguments) <= 7:
            storage, offset, shape, strides = arguments[:4]
            if isinstance(storage, _Storage):
                return _tensor(storage, offset, shape, strides)
        raise _NotPlain

    def _storage(self, named: Any) -> _Storage:
        """`("storage", its type, key, device, number of values)`: the bytes are those that the archive has, all."""
        word, kind, key, _, count = named
        if word != "storage" or not isinstance(kind, _Global) or type(key) is not str or type(count) is not int:
            raise _NotPlain
        module, _, name = kind.name.partition(" ")
        if module != "torch" or name not in _DTYPES:
            raise _NotPlain
        if (key, name) not in self._storages:
            values = np.frombuffer(self._content(key), _DTYPES[name])
            self._storages[key, name] = _Storage(values, name != "BFloat16Storage")
        storage = self._storages[key, name]
        if len(storage.values) != count:
            raise _NotPlain
        return storage


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> Any:
    """A view of a storage: within it, and of no more values than it has."""
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in numbers):
        raise _NotPlain
    size, there = math.prod(shape), len(storage.values)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if size > there or (size and last >= there) or offset > there:
        raise _NotPlain
    if not storage.readable:
        return Unread()
    if not size:
        return np.empty(shape, storage.values.dtype) if max(shape) <= there else Unread()
    width = storage.values.itemsize
    view: Array = np.lib.stride_tricks.as_strided(
        storage.values[offset:], shape, [stride * width for stride in strides], writeable=False
    )
    return view


def _append(stack: list[Any], items: Sequence[Any]) -> None:
    if type(stack[-1]) is not list:
        raise _NotPlain
    stack[-1].extend(items)


def _set_items(stack: list[Any], items: Sequence[Any]) -> None:
    if type(stack[-1]) is not dict or len(items) % 2:
        raise _NotPlain
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _new_table(stack: list[Any], items: Sequence[Any]) -> None:
    stack.append({})
    _set_items(stack, items)


_VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
    }
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GATHER: dict[str, Callable[[list[Any], list[Any]], None]] = {
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "LIST": lambda stack, items: stack.append(items),
    "DICT": _new_table,
    "APPENDS": _append,
    "SETITEMS": _set_items,
}
