"""The attention of one layer: its weights, what it caches, and how much of that a token reads.

Knows no hardware and no time. Weights are those of the matrices; biases and norms are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

GQA = "gqa"
MLA = "mla"

FULL = "f"
INDEXED = "i"
SHARED_INDEX = "s"
WINDOWED = "w"
CHUNKED = "c"
SPARSE = "x"
HEAVY = "h"
LINEAR = "l"
NONE = "n"
KINDS = FULL + INDEXED + SHARED_INDEX + WINDOWED + CHUNKED + SPARSE + HEAVY + LINEAR + NONE
"""Letters of `ModelSpec.attention_pattern`."""


class Reach(Protocol):
    """How far the layers of a model look back: keys of `expertflow.model.ModelSpec`."""

    @property
    def window(self) -> int: ...

    @property
    def chunk(self) -> int: ...

    @property
    def index_top_k(self) -> int: ...

    @property
    def index_block(self) -> int: ...

    @property
    def sparse_ratio(self) -> int: ...

    @property
    def heavy_ratio(self) -> int: ...


@dataclass(frozen=True)
class Projections:
    """The matrices of one layer's attention over cached keys and values, by their widths.

    gqa: queries of `heads`, keys of `kv_heads`, each `head_dim` wide; values `v_dim` wide. mla: the low-rank pairs of
    DeepSeek-V2 (arXiv 2405.04434, section 2.1). q_rank, o_rank: 0 = a full matrix; the output of DeepSeek-V4 is cut
    into `o_groups` groups of heads of rank `o_rank` each. shared_kv: a cached key serves as the value, too. tied_kv:
    one matrix gives keys and values, which differ by norm and position and are cached each (Gemma 4, attention_k_eq_v).
    """

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    q_rank: int
    o_rank: int
    o_groups: int
    shared_kv: bool
    tied_kv: bool

    @property
    def params(self) -> int:
        """Weights of queries, keys, values and output."""
        hidden, heads = self.hidden, self.heads
        query_dim = heads * (self.head_dim if self.kind == GQA else self.nope_dim + self.rope_dim)
        query = self.q_rank * (hidden + query_dim) if self.q_rank else hidden * query_dim
        out_dim = heads * self.v_dim
        output = self.o_rank * (out_dim + self.o_groups * hidden) if self.o_rank else out_dim * hidden
        if self.kind == MLA:
            return query + hidden * (self.kv_rank + self.rope_dim) + self.kv_up_params + output
        keys = self.kv_heads * self.head_dim if self.tied_kv else self.cached_values
        return query + hidden * keys + output

    @property
    def kv_up_params(self) -> int:
        """Weights that expand compressed KV to keys and values (mla); 0 for gqa."""
        return self.kv_rank * self.heads * (self.nope_dim + self.v_dim) if self.kind == MLA else 0

    @property
    def cached_values(self) -> int:
        """Values that one token leaves in the KV cache. MLA keeps the compressed form, as fused engines do."""
        if self.kind == MLA:
            return self.kv_rank + self.rope_dim
        return self.kv_heads * (self.head_dim if self.shared_kv else self.head_dim + self.v_dim)

    def pair_flops(self, prefill: bool) -> int:
        """Operations per (query, key) pair, all heads: scores and weighted values.

        MLA decodes on the compressed KV with the expansion folded into the projections (DeepSeek-V2, arXiv
        2405.04434, section 2.1); prefill: on expanded keys and values, as many rows of a prompt run.
        """
        if self.kind == GQA:
            return 2 * self.heads * (self.head_dim + self.v_dim)
        if prefill:
            return 2 * self.heads * (self.nope_dim + self.rope_dim + self.v_dim)
        return 2 * self.heads * (2 * self.kv_rank + self.rope_dim)


def entries_kept(model: Reach, kind: str, context_tokens: int) -> int:
    """Entries that one request of `context_tokens` tokens leaves in the KV cache of a layer of that kind: tokens, and
    what stands for several."""
    if kind in (FULL, INDEXED, SHARED_INDEX):
        return context_tokens
    if kind == CHUNKED:
        return min(context_tokens, model.chunk)
    if kind in (LINEAR, NONE):
        return 0
    return min(context_tokens, model.window) + _compressed(model, kind, context_tokens)


def entries_read(model: Reach, kind: str, kv_len: int) -> int:
    """Cached tokens that the query of token number `kv_len` (from 1) reads, its own among them."""
    if kind in (FULL, INDEXED, SHARED_INDEX):
        return kv_len if kind == FULL else min(kv_len, model.index_top_k)
    if kind == CHUNKED:
        return (kv_len - 1) % model.chunk + 1
    if kind in (LINEAR, NONE):
        return 0
    compressed = _compressed(model, kind, kv_len)
    return min(kv_len, model.window) + (min(compressed, model.index_top_k) if kind == SPARSE else compressed)


def entries_at_most(model: Reach, kind: str) -> int | None:
    """What `entries_read` never exceeds, however long the context; None where it grows with it."""
    bounds = {
        INDEXED: model.index_top_k,
        SHARED_INDEX: model.index_top_k,
        WINDOWED: model.window,
        CHUNKED: model.chunk,
        SPARSE: model.window + model.index_top_k,
        LINEAR: 0,
        NONE: 0,
    }
    return bounds.get(kind)


def entries_read_together(model: Reach, kind: str, first: int, last: int) -> int:
    """Cached tokens that any of the queries of tokens `first` to `last` of one request reads: a prefill reads each
    once. Of an indexer's choices it is the most there can be."""
    if kind in (FULL, INDEXED, SHARED_INDEX):
        return last if kind == FULL else min(last, (last - first + 1) * model.index_top_k)
    if kind == CHUNKED:
        return last - (first - 1) // model.chunk * model.chunk
    if kind in (LINEAR, NONE):
        return 0
    compressed = _compressed(model, kind, last)
    if kind == SPARSE:
        compressed = min(compressed, (last - first + 1) * model.index_top_k)
    return last - max(0, first - model.window) + compressed


def index_keys(model: Reach, kind: str, kv_len: int) -> int:
    """Keys that the indexer of a layer of that kind scores for the query of token number `kv_len`, and keeps."""
    if kind == SPARSE:
        return _compressed(model, kind, kv_len)
    return -(-kv_len // model.index_block) if kind == INDEXED else 0


def _compressed(model: Reach, kind: str, tokens: int) -> int:
    """Entries that stand for all of `tokens` together, of the layers that have such."""
    ratio = {SPARSE: model.sparse_ratio, HEAVY: model.heavy_ratio}.get(kind, 0)
    return tokens // ratio if ratio else 0
