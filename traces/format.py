"""Writing a trace, and one place to import the format from: constants, `Trace`, `open_trace`, `validate_trace`.

The layout is described in `traces.layout`, what rows must satisfy in `traces.validate`. Knows nothing of where the
routing came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from traces.container import DTYPE_NAMES, DTYPES, TraceError, fault
from traces.layout import ARRAYS, COUNTS, FORMAT, FORMAT_VERSION, check_layout
from traces.reader import open_trace
from traces.trace import ChainedArray, RowArray, Trace, blocks
from traces.validate import validate_trace

__all__ = [
    "ARRAYS",
    "FORMAT",
    "FORMAT_VERSION",
    "ChainedArray",
    "RowArray",
    "Trace",
    "TraceError",
    "checked_trace",
    "open_trace",
    "validate_trace",
    "write_trace",
]

_RESERVED = {"format", "format_version", "__metadata__", *COUNTS}
_MAX_UINT8_EXPERTS = 255


def write_trace(
    path: str | Path,
    *,
    experts: RowArray,
    request_start: npt.ArrayLike,
    prompt_len: npt.ArrayLike,
    model: str,
    num_experts: int,
    source: str,
    license: str,
    weights: RowArray | None = None,
    context_len: npt.ArrayLike | None = None,
    forward_id: npt.ArrayLike | None = None,
    token_ids: npt.ArrayLike | None = None,
    embedding: RowArray | None = None,
    logits: RowArray | None = None,
    lookahead: RowArray | None = None,
    lookahead_ids: RowArray | None = None,
    lookahead_scores: RowArray | None = None,
    request_labels: Sequence[str] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
    **extra_header: str,
) -> Path:
    """Check and write a trace; the path written. TraceError, and no file, where the content is faulty.

    experts [T,L,K], best first: uint8 and uint16 are stored as they are, other integers in the smaller of the two
    that fits, with −1 as padding. Floats are stored as float16. Further keywords become header strings. The same
    content gives the same bytes; a reader never sees half a file.
    """
    path = Path(path)
    given = dict(experts=experts, weights=weights, request_start=request_start, prompt_len=prompt_len,
                 context_len=context_len, forward_id=forward_id, token_ids=token_ids, embedding=embedding,
                 logits=logits, lookahead=lookahead, lookahead_ids=lookahead_ids,
                 lookahead_scores=lookahead_scores)  # fmt: skip
    trace = checked_trace(
        path, given, model=model, num_experts=num_experts, source=source, license=license,
        request_labels=request_labels, moe_layer_ids=moe_layer_ids, **extra_header,
    )  # fmt: skip
    _write_atomically(path, trace.header, trace.layout_arrays())
    return path


def checked_trace(
    path: Path,
    arrays: Mapping[str, Any],
    *,
    model: str,
    num_experts: int,
    source: str,
    license: str,
    request_labels: Sequence[str] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
    **extra_header: str,
) -> Trace:
    """The trace that `write_trace` would write, in memory, its arrays in the types they are stored in.

    arrays: by name, None for absent ones. TraceError, with `path` as the place, where the content is faulty.
    """
    stored = {n: _stored(path, n, a, num_experts) for n, a in arrays.items() if a is not None}
    header = {"model": model, "source": source, "license": license, **extra_header}
    if request_labels is not None:
        header["request_labels"] = json.dumps(list(request_labels), ensure_ascii=False)
    if moe_layer_ids is not None:
        header["moe_layer_ids"] = json.dumps([int(layer) for layer in moe_layer_ids])
    _check_header(path, header)
    header |= _counts(path, stored, num_experts)
    check_layout(path, header, stored)
    trace = Trace((path,), header, stored)
    validate_trace(trace)
    return trace


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
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            _write(file, header, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise fault(path, "file", f"cannot be written ({error.strerror})", "check folder, rights and space") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _write(file: BinaryIO, header: Mapping[str, str], arrays: Mapping[str, Any]) -> None:
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
