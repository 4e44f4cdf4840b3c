"""What a trace is in memory: per-token arrays that are mapped or chained, and the `Trace` that holds them.

Opens no file and checks nothing: `traces.reader` opens, `traces.validate` checks. Shape letters: T tokens, L MoE
layers, K top-k, E experts, R requests, D distances ahead, M listed candidates, d width of the embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from expertflow.expert_sizes import ExpertBytes
from traces.container import Array
from traces.expert_sizes import sizes_of
from traces.layout import ARRAYS, json_list, padding_of

BLOCK_BYTES = 4 << 20


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


def blocks(array: RowArray) -> Iterator[tuple[int, Array]]:
    """Consecutive rows of `array` with the index of the first, about BLOCK_BYTES at a time."""
    num_rows = array.shape[0]
    row_bytes = max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield start, array[start : start + step]


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

    @cached_property
    def expert_bytes(self) -> ExpertBytes | None:
        """Bytes of the experts that were recorded: of all, or of each layer; None where the trace does not say."""
        return sizes_of(self.paths[0], self.header, self.num_layers, self.num_experts)

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
