"""The safetensors container: a checked header, and arrays mapped from the file without reading it.

Knows nothing of traces beyond their error type. The bytes are untrusted: every length, offset and shape is checked
before anything is mapped, and nothing in the file can run. Shapes and offsets are in elements and bytes.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from traces.jsontext import parse_json
from traces.messages import TraceError as TraceError
from traces.messages import fault as fault
from traces.messages import why

Array = npt.NDArray[Any]

MAX_HEADER_BYTES = 100_000_000
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_SIGNATURES = (
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"PK\x03\x04", "a zip archive (.npz, or torch.save)"),
    (b"\x80", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PAR1", "a Parquet file"),
    (b"{", "JSON"),
)
_REWRITE = "fetch or write the file again"
_CONVERT = "convert it: python -m traces import --help"


@dataclass(frozen=True)
class Container:
    """A mapped file: its text header and its arrays, read-only, untouched until sliced."""

    path: Path
    metadata: dict[str, str]
    arrays: dict[str, Array]


def map_file(path: Path, convert: str = _CONVERT) -> Container:
    """Check the container at `path` and map its arrays. TraceError on whatever is not a whole, sound file.

    convert: what to do about a file of another kind.
    """
    header, data_start, data_size = _read_header(path, convert)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(path, "header", "__metadata__ is not a table of strings", _REWRITE)
    entries = {name: _entry(path, name, raw) for name, raw in header.items()}
    _check_offsets(path, entries, data_size)
    if data_size == 0:
        return Container(path, metadata, {n: np.empty(s, d) for n, (d, s, _, _) in entries.items()})
    # A plain ndarray over the mapping: slices of np.memmap pay for its subclass at every access.
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)[data_start:]
    arrays = {name: data[begin:end].view(d).reshape(s) for name, (d, s, begin, end) in entries.items()}
    return Container(path, metadata, arrays)


def _read_header(path: Path, convert: str) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the byte at which data starts, and the bytes of data there are."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            length = _header_length(path, file, size, convert)
            text = file.read(length)
    except OSError as error:
        problem, remedy = why(error)
        raise fault(path, "file", f"cannot be read ({problem})", remedy) from None
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(path, "header", f"is not UTF-8 text (byte {8 + error.start})", _REWRITE) from None
    header = parse_json(path, "header", decoded, _REWRITE)
    # JSON can spell half a character, which no file, terminal or other reader of the format takes.
    if "\\u" in decoded and "\\ud" in decoded.lower() and not _is_text(header):
        raise fault(path, "header", "holds a broken character", _REWRITE)
    if not isinstance(header, dict):
        raise fault(path, "header", "is not a JSON table", _REWRITE)
    return header, 8 + length, size - 8 - length


def _is_text(value: Any) -> bool:
    """Whether all strings of a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_file(path: Path) -> int:
    """Bytes of a regular file; TraceError where `path` is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        raise fault(path, "file", "does not exist", "check the path") from None
    except OSError as error:
        problem, remedy = why(error)
        raise fault(path, "file", f"cannot be read ({problem})", remedy) from None
    except ValueError:
        raise fault(path, "file", "has a name that cannot be", "check the path") from None
    if stat.S_ISDIR(state.st_mode):
        raise fault(path, "file", "is a folder", f"give one file, or a glob such as '{path}/*.safetensors'")
    if not stat.S_ISREG(state.st_mode):
        raise fault(path, "file", "is no regular file", "give a file on disk")
    return state.st_size


def _header_length(path: Path, file: BinaryIO, size: int, convert: str) -> int:
    start = file.read(16)
    if not start:
        raise fault(path, "file", "is empty (0 bytes)", _REWRITE)
    length = int.from_bytes(start[:8], "little")
    # 16 bytes is no limit of the format, but nothing shorter can hold an array.
    if len(start) < 16 or not start[8:].startswith(b"{"):
        other = "text" if all(9 <= byte < 127 for byte in start) else "something else"
        kind = next((text for mark, text in _SIGNATURES if start.lstrip().startswith(mark)), other)
        raise fault(path, "file", f"is not a safetensors file (it begins like {kind})", convert)
    if length > size - 8:
        raise fault(path, "header", f"needs {length} bytes and the file has {size}, truncated", _REWRITE)
    if length > MAX_HEADER_BYTES:
        raise fault(path, "header", f"takes {length} bytes, at most {MAX_HEADER_BYTES} are allowed", _REWRITE)
    file.seek(8)
    return length


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _entry(path: Path, name: str, raw: object) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Type, shape, first and one-past-last byte of one array."""
    if not isinstance(raw, dict) or not raw.keys() >= _FIELDS:
        raise fault(path, f"array {name!r}", "lacks dtype, shape or data_offsets", _REWRITE)
    if further := raw.keys() - _FIELDS:
        raise fault(path, f"array {name!r}", f"has the field {min(further)!r}, which is unknown", _REWRITE)
    dtype, shape, offsets = DTYPES.get(str(raw["dtype"])), raw["shape"], raw["data_offsets"]
    if dtype is None:
        known = ", ".join(DTYPES)
        raise fault(path, f"array {name!r}", f"has the type {raw['dtype']!r}", f"use one of {known}")
    if not _is_sizes(shape) or len(shape) > 8 or not _is_sizes(offsets) or len(offsets) != 2:
        raise fault(path, f"array {name!r}", "has a shape or data_offsets that are no list of sizes", _REWRITE)
    begin, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        problem = f"takes {end - begin} bytes by its offsets and {needed} by its shape {shape}"
        raise fault(path, f"array {name!r}", problem, _REWRITE)
    return dtype, tuple(shape), begin, end


def _check_offsets(
    path: Path, entries: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int, int]], data_size: int
) -> None:
    """Arrays must follow each other without hole or overlap and fill the file."""
    reached = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            problem = "overlaps the array before it" if begin < reached else "leaves a hole before it"
            raise fault(path, f"array {name!r}", f"{problem} (offsets {begin} to {end})", _REWRITE)
        if end > data_size:
            missing = end - data_size
            raise fault(path, f"array {name!r}", f"ends {missing} bytes past the end, truncated", _REWRITE)
        reached = end
    if reached < data_size:
        raise fault(path, "file", f"has {data_size - reached} bytes after the last array", _REWRITE)
