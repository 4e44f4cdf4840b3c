"""Writing a trace, and one place to import the format from: constants, `Trace`, `open_trace`, `validate_trace`.

The layout is described in `traces.layout`, what rows must satisfy in `traces.validate`. Knows nothing of where the
routing came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from traces.container import DTYPE_NAMES, DTYPES, TraceError, fault
from traces.files import whole_file
from traces.layout import ARRAYS, COUNTS, FORMAT, FORMAT_VERSION, check_layout
from traces.reader import open_trace
from traces.trace import ChainedArray, RowArray, Trace, blocks
from traces.validate import validate_trace

__all__ = [
    "ARRAYS",
    "FORMAT",
    "FORMAT_VERSION",
    "About",
    "ChainedArray",
    "RowArray",
    "Trace",
    "TraceError",
    "checked_trace",
    "file_sha256",
    "open_trace",
    "validate_trace",
    "write_trace",
]

_FIELDS = ("model", "num_experts", "source", "license", "request_labels", "moe_layer_ids")
"""Those of `About`: no keys of its further header."""
_RESERVED = {"format", "format_version", "__metadata__", *COUNTS}
_MAX_UINT8_EXPERTS = 255


@dataclass(frozen=True)
class About:
    """What a trace says of itself beside its arrays.

    model: its name in conf/model. num_experts: E, of a layer. source: where the routing comes from. request_labels:
    one a request. moe_layer_ids: the index of each MoE layer among all layers of the model. header: further strings.
    """

    model: str
    num_experts: int
    source: str
    license: str
    request_labels: Sequence[str] | None = None
    moe_layer_ids: Sequence[int] | None = None
    header: Mapping[str, str] = field(default_factory=dict)


def write_trace(path: str | Path, arrays: Mapping[str, Any], about: About) -> Path:
    """Check and write a trace; the path written. TraceError, and no file, where the content is faulty.

    arrays: by their names in `traces.layout.ARRAYS`, None for absent ones. experts [T,L,K], best first: uint8 and
    uint16 are stored as they are, other integers in the smaller of the two that fits, with −1 as padding. Floats are
    stored as float16. The same content gives the same bytes; a reader never sees half a file.
    """
    path = Path(path)
    return write_checked(path, checked_trace(path, arrays, about))


def write_checked(path: str | Path, trace: Trace) -> Path:
    """Write what `checked_trace` gave; the path written."""
    _write_atomically(Path(path), trace.header, trace.layout_arrays())
    return Path(path)


def file_sha256(trace: Trace) -> str:
    """SHA-256, in hex, of the file that `write_checked` would write."""
    digest = _Digest()
    _write(digest, trace.header, trace.layout_arrays())
    return digest.sha256.hexdigest()


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class _Digest:
    """Takes what is written for its hash alone."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes, /) -> int:
        self.sha256.update(data)
        return len(data)


def checked_trace(path: Path, arrays: Mapping[str, Any], about: About) -> Trace:
    """The trace that `write_trace` would write, in memory, its arrays in the types they are stored in.

    arrays: by name, None for absent ones. TraceError, with `path` as the place, where the content is faulty.
    """
    stored = {n: _stored(path, n, a, about.num_experts) for n, a in arrays.items() if a is not None}
    header = _header(path, about)
    header |= _counts(path, stored, about.num_experts)
    check_layout(path, header, stored)
    trace = Trace((path,), header, stored)
    validate_trace(trace)
    return trace


def _header(path: Path, about: About) -> dict[str, str]:
    """The strings of the header but for the counts, which the arrays give."""
    own = {"model": about.model, "source": about.source, "license": about.license}
    if about.request_labels is not None:
        own["request_labels"] = json.dumps(list(about.request_labels), ensure_ascii=False)
    if about.moe_layer_ids is not None:
        own["moe_layer_ids"] = json.dumps([int(layer) for layer in about.moe_layer_ids])
    for key in about.header:
        if key in _FIELDS:
            raise fault(path, "header", f"{key} is a field of its own", "give it there")
    header = {**own, **about.header}
    _check_header(path, header)
    return header


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    for key, value in header.items():
        if key in _RESERVED:
            raise fault(path, "header", f"{key} is derived from the arrays", "leave the keyword out")
        if not isinstance(value, str):
            raise fault(path, "header", f"{key} is a {type(value).__name__}", "header values are strings")
        if not value.isascii() and value.encode(errors="replace").decode() != value:
            raise fault(path, "header", f"{key} holds a broken character", "give valid Unicode")


def _counts(path: Path, arrays: Mapping[str, Any], num_experts: int) -> dict[str, str]:
    experts, starts = arrays["experts"], arrays["request_start"]
    if len(experts.shape) != 3:
        raise fault(path, "experts", f"has the shape {list(experts.shape)}", "it must be [T, L, K]")
    num_tokens, num_layers, top_k = experts.shape
    values = (num_layers, num_experts, top_k, max(starts.size - 1, 0), num_tokens)
    counts = {key: str(int(value)) for key, value in zip(COUNTS, values, strict=True)}
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **counts}


def _stored(path: Path, name: str, array: Any, num_experts: int) -> Any:
    """The array in the type it is stored in; TraceError where values would change."""
    if isinstance(array, ChainedArray):
        return array
    array = np.asarray(array)
    wanted = [DTYPES[dtype] for dtype in ARRAYS[name].dtypes]
    if array.dtype in wanted:
        return array
    if wanted[0].kind == "f":
        if array.dtype.kind != "f":
            raise fault(path, name, f"is {array.dtype}", "give floating-point values")
        # What does not fit becomes infinite, and the validator names the row.
        with np.errstate(over="ignore"):
            return array.astype(wanted[0])
    if array.dtype.kind not in "iu":
        raise fault(path, name, f"is {array.dtype}", "give whole numbers")
    target = wanted[0] if len(wanted) == 1 or num_experts <= _MAX_UINT8_EXPERTS else wanted[1]
    limits = np.iinfo(target)
    if name in ("experts", "lookahead_ids"):
        array = np.where(array == -1, limits.max, array)
    outside = (array < limits.min) | (array > limits.max)
    if outside.any():
        index = np.unravel_index(int(np.argmax(outside)), array.shape)
        raise fault(path, f"{name} row {int(index[0])}", f"holds {array[index]}", f"it must fit {target}")
    return array.astype(target)


def _write_atomically(path: Path, header: Mapping[str, str], arrays: Mapping[str, Any]) -> None:
    if not path.parent.is_dir():
        raise fault(path, "file", f"the folder {path.parent} does not exist", "create it first")
    if path.is_dir():
        raise fault(path, "file", "is a folder", "name a file in it")
    with whole_file(path) as file:
        _write(file, header, arrays)


def _write(file: _Writable, header: Mapping[str, str], arrays: Mapping[str, Any]) -> None:
    """The safetensors bytes: widest types first, so that every array is aligned; all else in sorted order."""
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))}
    offset = 0
    for name in names:
        array = arrays[name]
        end = offset + int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        dtype = DTYPE_NAMES[array.dtype]
        table[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        for _, block in blocks(arrays[name]):
            file.write(np.ascontiguousarray(block).tobytes())
