"""Opening a recorded trace: one file, or several as one.

Knows the container and the layout; what the rows must satisfy is in `traces.validate`, what a trace is in memory in
`traces.trace`.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertflow.keys import near_to
from traces.container import TraceError, fault, map_file
from traces.expert_sizes import merged as merged_sizes
from traces.layout import ARRAYS, PER_TOKEN, check_layout
from traces.shipped import RECORDINGS, offered, recording
from traces.trace import ChainedArray, RowArray, Trace, blocks
from traces.validate import validate_trace

__all__ = ["ChainedArray", "RowArray", "Trace", "TraceError", "open_trace"]

Paths = str | Path | Sequence[str | Path]

_MAX_FORWARDS = 1 << 62
"""Of several files together: their numbers stay far from the end of int64."""


def open_trace(path: Paths, validate: bool = True) -> Trace:
    """Open a file, a list of files, or a glob as one trace.

    A glob is taken in sorted order, a list in its own. Several files must agree in model, layers, experts, top-k
    and in which arrays they hold. `validate=False` checks header and shapes only. TraceError on any fault.
    """
    paths = _expand(path)
    parts = [_open_file(item) for item in paths]
    trace = parts[0] if len(parts) == 1 else _chain(paths, parts)
    if validate:
        validate_trace(trace)
    return trace


def _open_file(path: Path) -> Trace:
    container = map_file(path)
    check_layout(path, container.metadata, container.arrays)
    small = {name: np.array(a) for name, a in container.arrays.items() if name not in PER_TOKEN}
    for array in small.values():
        array.flags.writeable = False
    return Trace((path,), container.metadata, container.arrays | small)


def _expand(path: Paths) -> list[Path]:
    if not isinstance(path, str | Path):
        paths = [found for item in path for found in _expand(item)]
        if not paths:
            raise TraceError("trace.path: is an empty list; name at least one file")
        return paths
    text = str(path)
    if not glob.has_magic(text) or Path(text).exists():
        return [_named(text)]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise fault(text, "glob", "matches no file", "check the pattern, quoted so that the shell leaves it")
    return [Path(item) for item in found]


def _named(text: str) -> Path:
    """The file of that path, else the shipped recording of that short name."""
    path = Path(text)
    # A text too long for a name is no recording's: opening it says what is wrong.
    if "/" in text or os.sep in text or path.suffix == ".safetensors" or len(text) > 255 or path.exists():
        return path
    found = recording(text)
    if found is None:
        problem = f"does not exist, and is no recording that is shipped{near_to(text, RECORDINGS)}"
        names = offered()
        raise fault(text, "file", problem, f"give a file, or one of: {names}")
    return found


def _chain(paths: Sequence[Path], parts: Sequence[Trace]) -> Trace:
    first = parts[0]
    for other in parts[1:]:
        _check_agreement(first, other)
    arrays: dict[str, Any] = {}
    for name in first.layout_arrays():
        pieces = [getattr(part, name) for part in parts]
        if name == "request_start":
            ends = np.cumsum([0, *(part.num_tokens for part in parts)])
            starts = [piece[:-1] + end for piece, end in zip(pieces, ends[:-1], strict=True)]
            arrays[name] = np.concatenate([*starts, ends[-1:]]).astype(np.int64)
        elif name in PER_TOKEN:
            arrays[name] = ChainedArray(pieces, _forward_offsets(paths, pieces) if name == "forward_id" else None)
        else:
            arrays[name] = np.concatenate(pieces)
    return Trace(paths, _merge_headers(parts), arrays, parts)


def _forward_offsets(paths: Sequence[Path], pieces: Sequence[RowArray]) -> list[int]:
    offsets, reached = [], 0
    for path, piece in zip(paths, pieces, strict=True):
        highest = max(int(block.max()) for _, block in blocks(piece))
        offsets.append(reached)
        reached += highest + 1
        if reached > _MAX_FORWARDS:
            problem = f"goes up to {highest}, which leaves no numbers for the other files"
            raise fault(path, "forward_id", problem, "number forwards from 0")
    return offsets


def _check_agreement(first: Trace, other: Trace) -> None:
    path, base = other.paths[0], first.paths[0]
    for key in ("model", "num_layers", "num_experts", "top_k"):
        if (mine := getattr(other, key)) != (theirs := getattr(first, key)):
            raise fault(path, "header", f"{key} is {mine}, in {base} it is {theirs}", "chain traces of one kind")
    if first.expert_bytes != other.expert_bytes and None not in (first.expert_bytes, other.expert_bytes):
        raise fault(path, "header", f"expert_bytes are not those of {base}", "chain traces of one model file")
    ours, others = other.layout_arrays(), first.layout_arrays()
    for name in ARRAYS:
        if (name in ours) != (name in others):
            state = "has" if name in ours else "lacks"
            raise fault(path, name, f"this file {state} it, {base} does not agree", "record all files alike")
        if name in ours and (ours[name].dtype != others[name].dtype or ours[name].shape[1:] != others[name].shape[1:]):
            problem = f"is {ours[name].dtype} {list(ours[name].shape)}, in {base} {others[name].dtype} "
            raise fault(path, name, problem + f"{list(others[name].shape)}", "record all files alike")


def _merge_headers(parts: Sequence[Trace]) -> dict[str, str]:
    """What all files say alike; totals summed, labels joined, sources and licences listed."""
    headers = [part.header for part in parts]
    merged = {k: v for k, v in headers[0].items() if all(h.get(k) == v for h in headers)}
    # They agree as numbers, though one file may write 08 where another writes 8.
    merged |= {key: headers[0][key] for key in ("num_layers", "num_experts", "top_k")}
    for key in ("num_requests", "num_tokens"):
        merged[key] = str(sum(int(h[key]) for h in headers))
    for key in ("source", "license"):
        merged[key] = "; ".join(dict.fromkeys(h[key] for h in headers))
    merged |= merged_sizes(headers)
    merged.pop("request_labels", None)
    labels = [part.request_labels for part in parts]
    if all(item is not None for item in labels):
        merged["request_labels"] = json.dumps([label for item in labels if item for label in item], ensure_ascii=False)
    return merged
