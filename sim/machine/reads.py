"""What the attention of one layer reads in a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from expertflow.attention import (
    FULL,
    HEAVY,
    INDEXED,
    SHARED_INDEX,
    entries_at_most,
    entries_read,
    entries_read_together,
    index_keys,
)
from expertflow.model import ModelSpec


class Reads(NamedTuple):
    """Of one layer, by some rows. entries: cached tokens, or what stands for several. pairs: (query, key). index_keys,
    index_pairs: the same of an indexer. requests: whose state a linear layer reads.

    Of a prefill on expanded keys and values (MLA), expanded: tokens of earlier chunks whose compressed KV it expands
    anew; expanded_pairs: the pairs that it computes, masked ones among them."""

    entries: int
    pairs: int
    expanded: int
    expanded_pairs: int
    index_keys: int
    index_pairs: int
    requests: int
    prefill: bool
    rows: int


def decode_reads(model: ModelSpec, kind: str, kv_lens: Sequence[int]) -> tuple[int, int]:
    """Entries and index keys that the rows of a decode forward need, each a request of its own."""
    if len(kv_lens) == 1:
        return entries_read(model, kind, kv_lens[0]), index_keys(model, kind, kv_lens[0])
    if kind == FULL:
        return sum(kv_lens), 0
    entries = sum(entries_read(model, kind, kv_len) for kv_len in kv_lens)
    return entries, sum(index_keys(model, kind, kv_len) for kv_len in kv_lens) if model.has_indexer(kind) else 0


def most_read(model: ModelSpec, kind: str, num_requests: int, kv_tokens: int) -> tuple[int, int]:
    """The same where the sum of the KV lengths alone is known: the most that so many requests can need."""
    if num_requests == 1:
        return decode_reads(model, kind, (kv_tokens,))
    most = entries_at_most(model, kind)
    # Each request reads no more than it has, nor more than a layer of the kind reads of any.
    entries = kv_tokens if most is None else min(kv_tokens, most * num_requests)
    if kind == HEAVY:
        entries = min(kv_tokens, model.window * num_requests) + kv_tokens // model.heavy_ratio
    return entries, index_keys(model, kind, kv_tokens)


def span_reads(model: ModelSpec, kind: str, kv_lens: Sequence[int], prompt: bool) -> Reads:
    """What consecutive rows of one request read: of its prompt as in `prefill_reads`; of decoded ones, a verify step,
    the keys once and the same pairs, by the kernels of decode, which run on the cache as it is."""
    if prompt or len(kv_lens) > 1:
        return prefill_reads(model, kind, kv_lens)._replace(prefill=prompt)
    entries, keys = decode_reads(model, kind, kv_lens)
    return Reads(entries, entries, 0, entries, keys, keys, 1, False, 1)


def together(reads: Sequence[Reads]) -> Reads:
    """What several requests read in decode."""
    entries, pairs, expanded, expanded_pairs, keys, index_pairs, requests = map(
        sum, zip(*(one[:7] for one in reads), strict=True)
    )
    rows = sum(one.rows for one in reads)
    return Reads(entries, pairs, expanded, expanded_pairs, keys, index_pairs, requests, False, rows)


def prefill_reads(model: ModelSpec, kind: str, kv_lens: Sequence[int]) -> Reads:
    """All rows read one request's keys, once; the pairs are a causal triangle, later a trapezoid.

    MLA on expanded keys and values expands the compressed KV of earlier chunks anew; that of its own rows is in the
    projections. What an indexer chose is there a mask on the whole context (DeepSeek-V3.2 on short prompts; SGLang,
    pull request 11892): all of it is expanded, and every causal pair computed."""
    first, last = kv_lens[0], kv_lens[-1]
    entries = entries_read_together(model, kind, first, last)
    pairs = sum(kv_lens) if kind == FULL else sum(entries_read(model, kind, kv_len) for kv_len in kv_lens)
    index_pairs = sum(index_keys(model, kind, kv_len) for kv_len in kv_lens) if model.has_indexer(kind) else 0
    expanded, expanded_pairs = max(0, entries - len(kv_lens)), pairs
    if kind in (INDEXED, SHARED_INDEX):
        expanded, expanded_pairs = last - len(kv_lens), (first + last) * len(kv_lens) // 2
    return Reads(
        entries, pairs, expanded, expanded_pairs, index_keys(model, kind, last), index_pairs, 1, True, len(kv_lens)
    )
