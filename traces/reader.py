"""A recorded trace, mapped: opening files, and several files as one.

Knows the container and the layout; what the rows must satisfy is in `traces.validate`. Shape letters: T tokens,
L MoE layers, K top-k, E experts, R requests, D distances ahead, M listed candidates, d width of the embedding.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from traces.container import Array, TraceError, fault, map_file
from traces.layout import ARRAYS, PER_TOKEN, check_layout, json_list, padding_of
from traces.validate import blocks, validate_trace

__all__ = ["ChainedArray", "RowArray", "Trace", "TraceError", "open_trace"]

Paths = str | Path | Sequence[str | Path]


class RowArray(Protocol):
    """What per-token arrays offer, mapped or chained: shape, type, and rows read when indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> npt.NDArray[Any]: ...


class ChainedArray:
    """Arrays of several files, one after the other; rows are read when indexed, never before.

    Index with an int, a slice, a list of rows or a tuple that begins with one of these. `offsets` are added to
    the values of each part (forward ids of different files must not meet).
    """

    def __init__(self, parts: Sequence[RowArray], offsets: Sequence[int] | None = None) -> None:
        self._parts = tuple(parts)
        self._offsets = tuple(offsets) if offsets is not None else (0,) * len(self._parts)
        self._starts = np.concatenate(([0], np.cumsum([part.shape[0] for part in self._parts])))
        self.dtype = self._parts[0].dtype
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *self._parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a chain of files has no single buffer to share; allow a copy")
        return self._rows(0, len(self)).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any, /) -> Any:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) and key else (key, ())
        if isinstance(first, slice):
            rows = self._slice(first)
        elif isinstance(first, int | np.integer):
            index = range(len(self))[int(first)]
            return self._rows(index, index + 1)[(0, *rest)]
        else:
            rows = self._gather(np.asarray(first))
        return rows[(slice(None), *rest)] if rest else rows

    def _slice(self, key: slice) -> Array:
        start, stop, step = key.indices(len(self))
        if step > 0:
            return self._rows(start, stop)[::step]
        wanted = range(start, stop, step)
        return self._rows(wanted[-1], wanted[0] + 1)[::-1][::-step] if wanted else self._rows(0, 0)

    def _rows(self, start: int, stop: int) -> Array:
        pieces = []
        for part, offset, low, high in zip(
            self._parts, self._offsets, self._starts[:-1], self._starts[1:], strict=True
        ):
            begin, end = max(start, int(low)), min(stop, int(high))
            if begin < end:
                piece = part[begin - int(low) : end - int(low)]
                pieces.append(piece + offset if offset else piece)
        if len(pieces) == 1:
            return np.asarray(pieces[0])
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)

    def _gather(self, rows: Array) -> Array:
        if rows.dtype == np.bool_ and rows.shape == (len(self),):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise IndexError("index rows of a chained trace with an int, a slice, or one list of ints or bools")
        found = [self[int(row)] for row in rows]
        return np.stack(found) if found else self._rows(0, 0)


class Trace:
    """A recorded routing trace, read-only. Arrays that were not recorded are None.

    experts [T,L,K], weights [T,L,K], forward_id [T], token_ids [T], embedding [T,d], logits [T,L,E],
    lookahead [T,L,D,E], lookahead_ids and lookahead_scores [T,L,D,M] are mapped: slices `[a:b]` are ndarrays.
    request_start int64 [R+1], prompt_len int32 [R] and context_len int32 [R] are in memory.
    padding: the all-ones value of experts' type; where it is below num_experts, it is an expert, and no row is
    padded. parts: one trace per file. Make one with `open_trace`.
    """

    experts: RowArray
    weights: RowArray | None
    request_start: npt.NDArray[np.int64]
    prompt_len: npt.NDArray[np.int32]
    context_len: npt.NDArray[np.int32] | None
    forward_id: RowArray | None
    token_ids: RowArray | None
    embedding: RowArray | None
    logits: RowArray | None
    lookahead: RowArray | None
    lookahead_ids: RowArray | None
    lookahead_scores: RowArray | None

    def __init__(
        self, paths: Sequence[Path], header: dict[str, str], arrays: dict[str, Any], parts: Sequence[Trace] = ()
    ) -> None:
        self.paths = tuple(paths)
        self.header = header
        self.parts: tuple[Trace, ...] = tuple(parts) or (self,)
        self.model = header["model"]
        self.num_layers, self.num_experts = int(header["num_layers"]), int(header["num_experts"])
        self.top_k = int(header["top_k"])
        self.num_requests, self.num_tokens = int(header["num_requests"]), int(header["num_tokens"])
        for name in ARRAYS:
            setattr(self, name, arrays.get(name))
        self.padding = padding_of(self.experts.dtype)
        self._sha256 = ""

    def __repr__(self) -> str:
        return f"Trace({self.name!r}, {self.num_requests} requests, {self.num_tokens} tokens, {self.model})"

    @property
    def name(self) -> str:
        """The file's stem; of several files the first one's, and how many more."""
        first = self.paths[0].stem
        return first if len(self.paths) == 1 else f"{first}+{len(self.paths) - 1} more"

    @property
    def request_labels(self) -> list[str] | None:
        """One label per request, if the trace has them."""
        return json_list(self.header["request_labels"]) if "request_labels" in self.header else None

    def layout_arrays(self) -> dict[str, Any]:
        """The arrays that are present, by name."""
        return {name: array for name in ARRAYS if (array := getattr(self, name)) is not None}

    def sha256(self) -> str:
        """SHA-256 of the file's bytes, in hex; of several files, of their bytes one after the other."""
        if not self._sha256:
            digest = hashlib.sha256()
            for path in self.paths:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            self._sha256 = digest.hexdigest()
        return self._sha256


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
        return [Path(text)]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise fault(text, "glob", "matches no file", "check the pattern, quoted so that the shell leaves it")
    return [Path(item) for item in found]


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
            arrays[name] = ChainedArray(pieces, _forward_offsets(pieces) if name == "forward_id" else None)
        else:
            arrays[name] = np.concatenate(pieces)
    return Trace(paths, _merge_headers(parts), arrays, parts)


def _forward_offsets(pieces: Sequence[RowArray]) -> list[int]:
    offsets = [0]
    for piece in pieces[:-1]:
        offsets.append(offsets[-1] + 1 + max(int(block.max()) for _, block in blocks(piece)))
    return offsets


def _check_agreement(first: Trace, other: Trace) -> None:
    path, base = other.paths[0], first.paths[0]
    for key in ("model", "num_layers", "num_experts", "top_k"):
        if (mine := getattr(other, key)) != (theirs := getattr(first, key)):
            raise fault(path, "header", f"{key} is {mine}, in {base} it is {theirs}", "chain traces of one kind")
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
    for key in ("num_requests", "num_tokens"):
        merged[key] = str(sum(int(h[key]) for h in headers))
    for key in ("source", "license"):
        merged[key] = "; ".join(dict.fromkeys(h[key] for h in headers))
    merged.pop("request_labels", None)
    labels = [part.request_labels for part in parts]
    if all(item is not None for item in labels):
        merged["request_labels"] = json.dumps([label for item in labels if item for label in item], ensure_ascii=False)
    return merged
