"""What the rows of a trace must satisfy, checked block by block: memory does not grow with the file.

Knows nothing of how the file is mapped. Each message names file, array, first faulty row and remedy. Header and
shapes are checked by `traces.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.container import Array, TraceError, fault
from traces.layout import PER_TOKEN, check_layout
from traces.processes.progress import shown
from traces.trace import RowArray, Trace, blocks

Mask = npt.NDArray[np.bool_]
Fault = tuple[Mask, Callable[[tuple[int, ...]], str], str]
"""Where it is broken (first axis = rows), what to say of one place there, and the remedy."""


def validate_trace(trace: Trace) -> None:
    """TraceError on the first fault in any file of the trace; nothing otherwise."""
    for part in trace.parts:
        path = part.paths[0]
        present = {name: array for name in PER_TOKEN if (array := getattr(part, name)) is not None}
        check_layout(path, part.header, part.layout_arrays())
        _check_requests(path, part)
        _check_rows(path, part, present)
        if part.forward_id is not None:
            _check_forwards(path, part, part.forward_id)


def _check_rows(path: Path, part: Trace, present: Mapping[str, RowArray]) -> None:
    """TraceError on the first fault in the rows of the arrays."""
    done = 0
    with shown(f"checking {path.name}", lambda: done, part.num_tokens * len(present)):
        for name, array in present.items():
            for start, block in blocks(array):
                faults = _CHECKS[name](part, start, block)
                _raise_first(path, name, start, faults)
                done += len(block)


def _raise_first(path: Path, name: str, start: int, faults: Sequence[Fault]) -> None:
    """Raise for the fault with the lowest row, if any."""
    found = [
        (tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape)), say, remedy)
        for mask, say, remedy in faults
        if mask.any()
    ]
    if found:
        place, say, remedy = min(found, key=lambda item: item[0])
        row = f"row {start + place[0]}" + (f", layer {place[1]}" if len(place) > 1 and name in _LAYERED else "")
        raise fault(path, f"{name} {row}", say(place), remedy)


# -- requests ------------------------------------------------------------------------------------------------


def _check_requests(path: Path, part: Trace) -> None:
    starts = part.request_start
    if starts[0] != 0:
        raise fault(path, "request_start row 0", f"is {starts[0]}", "the first request must start at row 0")
    lengths = np.diff(starts)
    if (bad := lengths <= 0).any():
        row = int(np.argmax(bad)) + 1
        problem = f"is {starts[row]} after {starts[row - 1]}: request {row - 1} has no rows"
        raise fault(path, f"request_start row {row}", problem, "starts must rise; leave out empty requests")
    if starts[-1] != part.num_tokens:
        place = f"request_start row {part.num_requests}"
        problem = f"is {starts[-1]}, the trace has {part.num_tokens} rows"
        raise fault(path, place, problem, "the last entry must be num_tokens")
    outside = (part.prompt_len < 0) | (part.prompt_len > lengths)
    if outside.any():
        row = int(np.argmax(outside))
        problem = f"is {part.prompt_len[row]}, request {row} has {lengths[row]} rows"
        raise fault(path, f"prompt_len row {row}", problem, "give 0 to the number of rows of the request")
    if part.context_len is not None and (bad := part.context_len < 0).any():
        row = int(np.argmax(bad))
        problem = f"is {part.context_len[row]}"
        raise fault(path, f"context_len row {row}", problem, "give 0 or more tokens")


def _check_forwards(path: Path, part: Trace, forward_id: RowArray) -> None:
    """Within a request the forwards never go back; requests that ran side by side share forwards."""
    previous = -1
    for start, block in blocks(forward_id):
        before = np.concatenate(([previous], block[:-1]))
        rows = np.arange(start, start + len(block))
        starts = part.request_start
        is_first = starts[np.searchsorted(starts, rows, side="right") - 1] == rows
        bad = (block < before) & ~is_first
        if bad.any():
            index = int(np.argmax(bad))
            problem = f"is {block[index]} after {before[index]} in the same request"
            raise fault(path, f"forward_id row {start + index}", problem, "number forwards in the order they ran")
        previous = int(block[-1])


# -- rows ----------------------------------------------------------------------------------------------------


def _check_ids(block: Array, padding: int, num_experts: int) -> list[Fault]:
    """Ids [..., K]: in range, padding only at the end, nothing twice."""
    # With 256 experts in uint8 the all-ones value is an expert: such a trace has no padding.
    is_pad = (block == padding) if padding >= num_experts else np.zeros(block.shape, np.bool_)
    outside = (block >= num_experts) & ~is_pad
    gap = is_pad[..., :-1] & ~is_pad[..., 1:]
    twice = _duplicates(block, is_pad)
    return [
        (outside, lambda at: f"holds {block[at]}, outside 0 … {num_experts - 1}", "correct num_experts or the ids"),
        (gap, lambda at: f"has padding ({padding}) in column {at[-1]}, before an expert", "put padding last"),
        (twice, lambda at: f"holds an expert twice: {block[at].tolist()}", "list each chosen expert once"),
    ]


def _duplicates(block: Array, is_pad: Mask) -> Mask:
    """Where [...] a row of ids holds one value twice, padding aside."""
    twice = np.zeros(block.shape[:-1], np.bool_)
    if block.shape[-1] > 32:
        ordered = np.sort(block, axis=-1)
        repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != _pad_value(block, is_pad))
        np.any(repeated, axis=-1, out=twice)
        return twice
    # Columns first: comparing whole columns is many times faster than sorting many short rows.
    columns, pads = np.ascontiguousarray(np.moveaxis(block, -1, 0)), np.moveaxis(is_pad, -1, 0)
    for right in range(1, len(columns)):
        for left in range(right):
            twice |= (columns[left] == columns[right]) & ~pads[right]
    return twice


def _pad_value(block: Array, is_pad: Mask) -> int:
    return int(np.iinfo(block.dtype).max) if is_pad.any() else -1


def _experts(part: Trace, start: int, block: Array) -> list[Fault]:
    faults = _check_ids(block, part.padding, part.num_experts)
    if part.padding >= part.num_experts:
        empty = (block == part.padding).all(axis=-1)
        faults.append((empty, lambda at: "is nothing but padding", "each token must choose an expert in each layer"))
    return faults


def _weights(part: Trace, start: int, block: Array) -> list[Fault]:
    faults = _finite(part, start, block)
    with np.errstate(invalid="ignore"):
        faults.append((block < 0, lambda at: f"holds {block[at]}", "gate weights must be 0 or more"))
    if part.padding >= part.num_experts:
        stray = (part.experts[start : start + len(block)] == part.padding) & (block != 0)
        faults.append((stray, lambda at: f"holds {block[at]} where experts is padding", "write 0 there"))
    return faults


def _finite(part: Trace, start: int, block: Array) -> list[Fault]:
    return [(~np.isfinite(block), lambda at: f"holds {block[at]}", "values must be finite and fit float16")]


def _not_negative(part: Trace, start: int, block: Array) -> list[Fault]:
    return [(block < 0, lambda at: f"is {block[at]}", "give 0 or more")]


def _past_end(part: Trace, block: Array) -> Mask:
    """[L,D]: layer l looking d = 1 … D ahead leaves the model."""
    layers, distances = np.arange(block.shape[1]), np.arange(1, block.shape[2] + 1)
    return layers[:, None] + distances >= part.num_layers


def _lookahead(part: Trace, start: int, block: Array) -> list[Fault]:
    past = _past_end(part, block)[..., None]
    broken = ~np.isfinite(block) & ~past
    beyond = ~np.isnan(block) & past
    return [
        (broken, lambda at: f"holds {block[at]} at distance {at[2] + 1}", "values must be finite and fit float16"),
        (beyond, lambda at: f"distance {at[2] + 1} is past the last layer and not NaN", "write NaN there"),
    ]


def _lookahead_ids(part: Trace, start: int, block: Array) -> list[Fault]:
    padding = int(np.iinfo(block.dtype).max)
    beyond = (block != padding) & _past_end(part, block)[..., None]
    past: Fault = (
        beyond,
        lambda at: f"distance {at[2] + 1} is past the last layer and not padding ({padding})",
        "write padding there",
    )
    if padding < part.num_experts:
        raise TraceError(f"{part.paths[0]}: lookahead_ids: uint8 leaves no padding for 256 experts; store uint16")
    return [*_check_ids(block, padding, part.num_experts), past]


def _anything(part: Trace, start: int, block: Array) -> list[Fault]:
    return []


_LAYERED = ("experts", "weights", "logits", "lookahead", "lookahead_ids", "lookahead_scores")
_CHECKS: dict[str, Callable[[Any, int, Array], list[Fault]]] = {
    "experts": _experts,
    "weights": _weights,
    "forward_id": _not_negative,
    "token_ids": _not_negative,
    "embedding": _finite,
    "logits": _finite,
    "lookahead": _lookahead,
    "lookahead_ids": _lookahead_ids,
    "lookahead_scores": _anything,
}
