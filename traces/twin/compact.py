"""Full traces into small ones: of the pre-gate's scores only the best candidates, with their chances in 1/255.

What a reader gets is what it would get from the full trace, within 1/255, for the candidates that are listed, and 0
for the others. Works on traces alone, without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.container import fault
from traces.format import About, write_trace
from traces.layout import COUNTS, padding_of
from traces.reader import Trace, open_trace

_BLOCK_ROWS = 256
_HEADER_BYTES = 4096
TRAIN_SHARE = 0.75
_OWN = {"format", "format_version", "model", "source", "license", "request_labels", "moe_layer_ids", *COUNTS}


def compact_lookahead(
    scores: npt.NDArray[np.floating[Any]], top_k: int, num_listed: int = 0
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Scores [n,L,D,E], NaN past the last layer → ids [n,L,D,M] best first and chances in 1/255, uint8 [n,L,D,M].

    A chance is min(1, K · softmax). M is num_listed, or 2K, at most E. Ids of NaN are padding. Ties: lower id first.
    """
    num_experts = scores.shape[-1]
    num_listed = min(num_listed or 2 * top_k, num_experts)
    # With 256 experts uint8 would leave no padding.
    dtype = np.dtype(np.uint8 if num_experts <= np.iinfo(np.uint8).max else np.uint16)
    missing = np.isnan(scores).any(axis=-1)
    known = np.where(missing[..., None], 0.0, scores.astype(np.float32))
    weights = np.exp(known - known.max(axis=-1, keepdims=True))
    chance = np.minimum(top_k * weights / weights.sum(axis=-1, keepdims=True), 1.0)
    order = np.argsort(-known, axis=-1, kind="stable")[..., :num_listed]
    listed = np.rint(255 * np.take_along_axis(chance, order, axis=-1)).astype(np.uint8)
    ids = order.astype(dtype)
    ids[missing], listed[missing] = padding_of(dtype), 0
    return ids, listed


def compact_trace(source: Path, target: Path, max_bytes: int) -> Trace:
    """Write the first requests of a full trace, as many as fit into max_bytes, in the small form; what was written.

    ValueError where not one request fits, or the trace has no full look-ahead.
    """
    trace = open_trace(source)
    if trace.lookahead is None:
        raise fault(source, "lookahead", "is missing", "record it in full: python -m traces.twin record")
    labels = trace.request_labels
    requests = _num_fitting(trace, max_bytes)
    if requests < 1:
        raise fault(source, "size", f"not one request fits into {max_bytes} bytes", "raise --max-mb")
    stop = int(trace.request_start[requests])
    parts = [
        compact_lookahead(np.asarray(trace.lookahead[row : min(row + _BLOCK_ROWS, stop)]), trace.top_k)
        for row in range(0, stop, _BLOCK_ROWS)
    ]
    ids, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    kept = ("experts", "weights", "forward_id", "token_ids", "embedding")
    arrays = {name: array[:stop] for name in kept if (array := getattr(trace, name)) is not None}
    arrays |= {
        "request_start": trace.request_start[: requests + 1],
        "prompt_len": trace.prompt_len[:requests],
        "context_len": None if trace.context_len is None else trace.context_len[:requests],
        "lookahead_ids": ids,
        "lookahead_scores": scores,
    }
    about = About(
        model=trace.model,
        num_experts=trace.num_experts,
        source=trace.header["source"],
        license=trace.header["license"],
        request_labels=None if labels is None else labels[:requests],
        moe_layer_ids=json.loads(trace.header["moe_layer_ids"]) if "moe_layer_ids" in trace.header else None,
        header={key: value for key, value in trace.header.items() if key not in _OWN},
    )
    write_trace(target, arrays, about)
    return open_trace(target)


def _num_fitting(trace: Trace, max_bytes: int) -> int:
    """How many requests, from the first, fit."""
    arrays = trace.layout_arrays()
    row = sum(
        int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
        for name, array in arrays.items()
        if name in ("experts", "weights", "forward_id", "token_ids", "embedding")
    )
    _, num_layers, distances, num_experts = arrays["lookahead"].shape
    id_bytes = 1 if num_experts <= np.iinfo(np.uint8).max else 2
    row += num_layers * distances * min(2 * trace.top_k, num_experts) * (1 + id_bytes)
    labels = trace.request_labels or [""] * trace.num_requests
    texts = sum(len(key) + len(value) for key, value in trace.header.items() if key != "request_labels")
    # A label in a header is JSON within JSON: quotes and what they escape may take several bytes a character.
    ends = np.cumsum([6 * len(label) + 40 for label in labels])
    sizes = trace.request_start[1:] * row + ends + 2 * texts + _HEADER_BYTES
    return int(np.searchsorted(sizes, max_bytes, side="right"))


def ship(
    sources: Sequence[tuple[Path, Path]],
    folder: Path,
    max_bytes: int,
    report: Callable[[str], None],
    train_share: float = TRAIN_SHARE,
) -> list[Path]:
    """Compact pairs of full traces (train, eval) into `folder`, all together within max_bytes; the paths written.

    Each pair gets an equal share, of which its train file takes `train_share`. ValueError on a fault in any.
    """
    if not folder.is_dir():
        raise fault(folder, "folder", "does not exist", "create it first")
    share = max_bytes / max(len(sources), 1)
    written, total = [], 0
    for train, evaluation in sources:
        for source, part in ((train, train_share), (evaluation, 1 - train_share)):
            target = folder / _short_name(source)
            trace = compact_trace(source, target, int(share * part))
            size = target.stat().st_size
            total += size
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            report(
                f"wrote {target}: {trace.num_requests} requests, {trace.num_tokens} tokens, {size / 1e6:.2f} MB, "
                f"sha256 {digest[:12]}"
            )
            written.append(target)
    report(f"{total / 1e6:.2f} MB of {max_bytes / 1e6:.2f}")
    return written


def _short_name(source: Path) -> str:
    """The name without the kind of pre-gate, of which a shipped trace has one."""
    stem, _, kind = source.stem.rpartition(".")
    return f"{stem or kind}{source.suffix}"
