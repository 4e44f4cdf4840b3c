"""The dimensions of a Mixture-of-Experts model: what an expert weighs, what the rest weighs, what KV takes.

Annotations are evaluated here, since they declare keys: as text each would be compiled when it is first asked for.
Knows no hardware and no time. Parameters are those of the matrices: biases, norms and quantisation tables not
in `*_bits` are left out. Bytes are whole numbers.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

from expertflow.attention import (
    FULL,
    GQA,
    INDEXED,
    KINDS,
    LINEAR,
    MLA,
    NONE,
    SPARSE,
    WINDOWED,
    Projections,
    entries_kept,
    index_keys,
)
from expertflow.expert_sizes import (
    ABOUT,
    BY_BITS,
    MOST_EXPERT_BYTES,
    ExpertBytes,
    check_expert_bytes,
    frozen,
    sizes_by_key,
)
from expertflow.keys import Rule, check_fields, check_range, from_mapping
from expertflow.layers import FEEDS, MOE, Layer, check_layers, layers_of, with_pattern

_MLA_FIELDS = ("kv_rank", "nope_dim", "v_dim")
_GQA_FIELDS = ("num_kv_heads", "head_dim")
_NOT_GQA = ("kv_rank", "rope_dim", "nope_dim", "window_kv_rank", "window_nope_dim")
_NOT_MLA = (*_GQA_FIELDS, "window_kv_heads", "window_head_dim", "o_rank", "o_groups", "shared_kv", "tied_kv")
_MOST_WIDTH = 1_000_000
"""Of any matrix of a model: no expert weighs more than 24 TB, so that the times of its copies fit into 64 bits."""

_MOST_WEIGHTS = 10**13
"""Of what is given as a count: more than a model has."""


def _width(about: str, low: int = 1) -> Rule:
    return Rule(low, _MOST_WIDTH, about=about)


def _weights(about: str) -> Rule:
    return Rule(0, _MOST_WEIGHTS, unit="weights", about=about)


def _bits(about: str) -> Rule:
    return Rule(1, 64, unit="bits", about=about)


@dataclass(frozen=True)
class ModelSpec:
    """One model. `num_layers` counts MoE layers, `num_dense_layers` ordinary ones, `num_bare_layers` those that are
    attention alone.

    expert_matrices: 3 for gated experts (gate, up, down), 2 for Switch and NLLB; shared and dense ones alike.
    attention: `gqa` uses num_kv_heads and head_dim; `mla` (DeepSeek) uses kv_rank, rope_dim, nope_dim, v_dim
    and, if queries are low-rank too, q_rank. The fields of the other kind stay 0, but for gqa v_dim is the width of a
    value where it is not head_dim, and q_rank, o_rank, o_groups and shared_kv are those of DeepSeek-V4.
    attention_pattern: a letter a layer, repeated over all layers in their order. f: full. i: of the index_top_k
    tokens that an indexer chooses (DeepSeek-V3.2); s: the same on the choice of the last layer i. w: of the last
    `window` tokens. c: of the own chunk of `chunk` tokens. x: window and index_top_k of the entries that stand for
    sparse_ratio tokens each; h: window and all entries that stand for heavy_ratio tokens each (DeepSeek-V4). l: linear
    attention, a state-space layer or a convolution, with linear_params weights and a state of linear_state values that
    does not grow. n: none.
    feed_pattern: likewise, m: routed experts, d: dense, n: no feed-forward block. null: dense layers first.
    window_…: those of layers w where they differ from the others; 0: they do not.
    weight_bits: per weight of attention, shared and dense layers. expert_bits: of routed experts, scales
    included (mxfp4: 4 + 8/32); expert_bytes goes before them. embedding_bits: of embeddings, head and router, which
    quantisers leave alone.
    tied_embeddings: whether the head is the embedding matrix, stored once.
    """

    name: Annotated[str, Rule(about="of the model, as a trace names it")]
    num_layers: Annotated[int, Rule(1, 10_000, about="MoE layers")]
    # Traces store expert numbers in 16 bits, all ones meaning padding.
    num_experts: Annotated[int, Rule(1, 65_535, about="routed experts of a layer")]
    top_k: Annotated[int, Rule(1, 65_535, about="experts that a token takes, at most num_experts")]
    hidden_size: Annotated[int, _width("width of the residual stream")]
    expert_intermediate: Annotated[int, _width("inner width of a routed expert")]
    num_heads: Annotated[int, _width("query heads")]
    vocab_size: Annotated[int, _width("rows of the embedding matrix")]
    source: Annotated[str, Rule(about="where the figures are from")]
    num_kv_heads: Annotated[int, _width("gqa: key and value heads", 0)] = 0
    head_dim: Annotated[int, _width("gqa: width of a head", 0)] = 0
    attention: Annotated[str, Rule(choices=(GQA, MLA), about="kind of attention")] = GQA
    kv_rank: Annotated[int, _width("mla: rank of the compressed KV", 0)] = 0
    rope_dim: Annotated[int, _width("mla: width with positions", 0)] = 0
    nope_dim: Annotated[int, _width("mla: width without positions", 0)] = 0
    v_dim: Annotated[int, _width("mla: width of a value", 0)] = 0
    q_rank: Annotated[int, _width("mla: rank of the queries, 0 = full", 0)] = 0
    window: Annotated[int, Rule(0, 10_000_000, unit="tokens", about="of windowed layers, 0 = none")] = 0
    attention_pattern: Annotated[str, Rule(letters=KINDS, about="kind of each layer's attention, repeated")] = FULL
    feed_pattern: Annotated[
        str | None, Rule(letters=FEEDS, null="dense layers first", about="experts (m), dense (d) or none (n), repeated")
    ] = None
    num_bare_layers: Annotated[int, Rule(0, 10_000, about="layers without feed-forward block")] = 0
    chunk: Annotated[int, Rule(0, 10_000_000, unit="tokens", about="of layers c, 0 = none")] = 0
    window_heads: Annotated[int, _width("query heads of layers w, 0 = num_heads", 0)] = 0
    window_kv_heads: Annotated[int, _width("gqa: KV heads of layers w, 0 = num_kv_heads", 0)] = 0
    window_head_dim: Annotated[int, _width("gqa: width of a head of layers w, 0 = head_dim", 0)] = 0
    window_kv_rank: Annotated[int, _width("mla: kv_rank of layers w, 0 = kv_rank", 0)] = 0
    window_nope_dim: Annotated[int, _width("mla: nope_dim of layers w, 0 = nope_dim", 0)] = 0
    window_v_dim: Annotated[int, _width("width of a value of layers w, 0 = that of the others", 0)] = 0
    o_rank: Annotated[int, _width("gqa: rank of the output of each group of heads, 0 = full", 0)] = 0
    o_groups: Annotated[int, _width("gqa: groups of heads with an output of rank o_rank", 0)] = 0
    shared_kv: Annotated[bool, Rule(about="gqa: keys serve as values, cached once")] = False
    tied_kv: Annotated[bool, Rule(about="gqa: one matrix gives keys and values, but in layers w")] = False
    extra_attention_params: Annotated[int, _weights("of a layer's attention beyond the formulas, such as gates")] = 0
    index_top_k: Annotated[int, Rule(0, 10_000_000, unit="tokens", about="that layers i, s and x choose")] = 0
    index_heads: Annotated[int, _width("query heads of the indexer", 0)] = 0
    index_dim: Annotated[int, _width("width of an index key", 0)] = 0
    index_block: Annotated[int, Rule(1, 1_000_000, unit="tokens", about="that share an index key")] = 1
    index_bits: Annotated[float, _bits("per value of an index key")] = 16.0
    sparse_ratio: Annotated[int, Rule(0, 1_000_000, unit="tokens", about="in an entry of layers x")] = 0
    heavy_ratio: Annotated[int, Rule(0, 1_000_000, unit="tokens", about="in an entry of layers h")] = 0
    linear_params: Annotated[int, _weights("of one layer l")] = 0
    linear_state: Annotated[int, Rule(0, _MOST_WEIGHTS, unit="values", about="of a request's state in one layer l")] = 0
    state_bits: Annotated[float, _bits("per value of that state")] = 32.0
    expert_matrices: Annotated[int, Rule(2, 3, about="3 = gated, 2 = Switch and NLLB")] = 3
    expert_hidden: Annotated[int, _width("width that routed experts work in, 0 = hidden_size", 0)] = 0
    shared_gate: Annotated[bool, Rule(about="a gate of hidden_size weights on the shared experts")] = False
    shared_intermediate: Annotated[int, _width("inner width of all shared experts together, 0 = none", 0)] = 0
    num_dense_layers: Annotated[int, Rule(0, 10_000, about="layers with a dense feed-forward block")] = 0
    dense_intermediate: Annotated[int, _width("inner width of a dense layer", 0)] = 0
    extra_params: Annotated[int, _weights("in GPU memory beyond the layers', at weight_bits, that no pass reads")] = 0
    extra_bytes: Annotated[int, Rule(0, _MOST_WEIGHTS, unit="bytes", about="in GPU memory beside")] = 0
    mtp_bytes: Annotated[
        int, Rule(0, _MOST_WEIGHTS, unit="bytes", about="of the heads of multi-token prediction, which mtp loads")
    ] = 0
    mtp: Annotated[
        bool, Rule(about="heads of multi-token prediction are in GPU memory, as for speculative decoding")
    ] = False
    tied_embeddings: Annotated[bool, Rule(about="the head is the embedding matrix")] = False
    weight_bits: Annotated[float, _bits("per weight of attention, shared and dense layers")] = 16.0
    expert_bits: Annotated[float, _bits("per weight of routed experts, scales included")] = 16.0
    expert_bytes: Annotated[
        ExpertBytes | None,
        Rule(
            1,
            MOST_EXPERT_BYTES,
            unit="bytes",
            null="as the trace says, else by expert_bits",
            word=BY_BITS,
            extra=ABOUT,
            about="of a routed expert, or of each layer's, where a quantiser treats them differently; by_bits: "
            "expert_bits and the widths say it, as where one of these is given beside a file or trace with sizes",
        ),
    ] = None
    embedding_bits: Annotated[float, _bits("per weight of embeddings, head and router")] = 16.0
    kv_bits: Annotated[float, _bits("per cached value")] = 16.0

    def __post_init__(self) -> None:
        # A frozen dataclass takes no assignment; a list of a file becomes what can be hashed.
        object.__setattr__(self, "expert_bytes", frozen(self.expert_bytes))
        check_fields(self, "model")
        check_expert_bytes(self.expert_bytes, "model.expert_bytes", self.num_layers, self.num_experts)
        check_range("model.top_k", self.top_k, 1, self.num_experts, remedy="the upper end is num_experts")
        self._check_attention()
        self._check_pair("num_dense_layers", "dense_intermediate")
        self._check_pair("o_rank", "o_groups")
        self._check_pair("index_top_k", "index_heads")
        self._check_pair("index_top_k", "index_dim")
        if self.shared_gate and not self.shared_intermediate:
            raise ValueError("model.shared_gate=true is of shared experts, and model.shared_intermediate=0; give both")
        if self.mtp and not self.mtp_bytes:
            raise ValueError(
                "model.mtp=true loads heads of multi-token prediction, and the model has none (model.mtp_bytes=0); "
                "leave it out, or give their bytes"
            )
        check_layers(self)

    def _check_attention(self) -> None:
        own, other = (_GQA_FIELDS, _NOT_GQA) if self.attention == GQA else (_MLA_FIELDS, _NOT_MLA)
        for key in own:
            check_range(f"model.{key}", getattr(self, key), 1, _MOST_WIDTH, remedy=f"{self.attention} needs it")
        for key in other:
            check_range(f"model.{key}", getattr(self, key), 0, 0, remedy=f"{self.attention} does not use it")
        if self.attention == GQA:
            self._check_heads("num_kv_heads", self.num_heads, self.num_kv_heads)
            self._check_heads("window_kv_heads", self._of_window.heads, self._of_window.kv_heads)

    def _check_heads(self, key: str, heads: int, kv_heads: int) -> None:
        if heads % kv_heads:
            raise ValueError(
                f"model.{key}={kv_heads} does not divide {'num' if key[0] == 'n' else 'window'}_heads={heads}; "
                "every KV head serves the same number of query heads"
            )

    def _check_pair(self, first: str, second: str) -> None:
        values = [getattr(self, key) for key in (first, second)]
        if (values[0] == 0) != (values[1] == 0):
            raise ValueError(f"model.{first}={values[0]} and model.{second}={values[1]}: give both above 0, or neither")

    # -- layers ---------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in the order in which a token passes them."""
        return layers_of(self)

    @cached_property
    def moe_attention(self) -> str:
        """The letter of each MoE layer's attention [num_layers]."""
        return "".join(layer.attention for layer in self.layers if layer.feed == MOE)

    @cached_property
    def num_of(self) -> Mapping[str, int]:
        """Layers of each kind of attention that there is, whatever follows it."""
        return Counter(layer.attention for layer in self.layers)

    @cached_property
    def _of_others(self) -> Projections:
        return Projections(
            self.attention,
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.v_dim or self.head_dim,
            self.kv_rank,
            self.rope_dim,
            self.nope_dim,
            self.q_rank,
            self.o_rank,
            self.o_groups,
            self.shared_kv,
            self.tied_kv,
        )

    @cached_property
    def _of_window(self) -> Projections:
        return replace(
            self._of_others,
            heads=self.window_heads or self.num_heads,
            kv_heads=self.window_kv_heads or self.num_kv_heads,
            head_dim=self.window_head_dim or self.head_dim,
            v_dim=self.window_v_dim or self.v_dim or self.window_head_dim or self.head_dim,
            kv_rank=self.window_kv_rank or self.kv_rank,
            nope_dim=self.window_nope_dim or self.nope_dim,
            tied_kv=False,
        )

    def projections(self, kind: str) -> Projections | None:
        """The matrices of attention of that kind; None where it caches no keys and values."""
        if kind in (LINEAR, NONE):
            return None
        return self._of_window if kind == WINDOWED else self._of_others

    # -- parameters, of one layer where layers have them ----------------------------------------------------

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert."""
        return self.expert_matrices * (self.expert_hidden or self.hidden_size) * self.expert_intermediate

    @property
    def attention_params(self) -> int:
        """Weights of one full layer's attention (Q, K, V, output; for MLA the low-rank pairs), without indexer."""
        return self._of_others.params + self.extra_attention_params

    @property
    def index_params(self) -> int:
        """Weights of one layer's indexer: its queries, its keys and the weights of its heads (DeepSeek-V3.2)."""
        queries = (self.q_rank or self.hidden_size) * self.index_heads * self.index_dim
        return queries + self.hidden_size * (self.index_dim + self.index_heads)

    def mixer_params(self, kind: str) -> int:
        """Weights of one layer's attention of that kind, or of what stands in its place, indexer included."""
        found = self.projections(kind)
        if found is None:
            return self.linear_params if kind == LINEAR else 0
        index = self.index_params if self.has_indexer(kind) else 0
        return found.params + self.extra_attention_params + index

    def has_indexer(self, kind: str) -> bool:
        """Whether layers of that kind choose tokens by index keys of their own."""
        return kind in (INDEXED, SPARSE)

    @property
    def kv_up_params(self) -> int:
        """Weights that expand one layer's compressed KV to keys and values (MLA); 0 for GQA."""
        return self._of_others.kv_up_params

    @property
    def router_params(self) -> int:
        """Weights of one MoE layer's router, and of the two matrices into and out of expert_hidden."""
        return self.hidden_size * (self.num_experts + 2 * self.expert_hidden)

    @property
    def shared_params(self) -> int:
        """Weights of one MoE layer's shared experts together, with their gate; 0 if there are none."""
        gate = self.hidden_size if self.shared_gate else 0
        return self.expert_matrices * self.hidden_size * self.shared_intermediate + gate

    @property
    def dense_params(self) -> int:
        """Feed-forward weights of one dense layer; 0 if there are none."""
        return self.expert_matrices * self.hidden_size * self.dense_intermediate

    @property
    def head_params(self) -> int:
        """Weights of the head; the embeddings have as many."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights but those of extra_bytes and mtp_bytes, a tied head counted once."""
        experts = self.num_layers * self.num_experts * self.expert_params
        return experts + self._plain_params + self._wide_params

    @property
    def _plain_params(self) -> int:
        """Non-expert weights stored at weight_bits."""
        attention = sum(count * self.mixer_params(kind) for kind, count in self.num_of.items())
        feeds = self.num_layers * self.shared_params + self.num_dense_layers * self.dense_params
        return attention + feeds + self.extra_params

    @property
    def _wide_params(self) -> int:
        """Weights stored at embedding_bits."""
        return self.head_params * (1 if self.tied_embeddings else 2) + self.num_layers * self.router_params

    # -- bytes ----------------------------------------------------------------------------------------------

    @cached_property
    def bytes_by_key(self) -> tuple[int, ...] | None:
        """Bytes of each routed expert by its key [num_layers * num_experts]; None where all are alike."""
        return sizes_by_key(self.expert_bytes, self.num_layers, self.num_experts)

    @cached_property
    def mean_expert_bytes(self) -> int:
        """Bytes of one routed expert, what one load copies; the mean, rounded up, where they are not all alike."""
        sizes, given = self.bytes_by_key, self.expert_bytes
        if sizes is not None:
            return -(-sum(sizes) // len(sizes))
        if given is None:
            return math.ceil(self.expert_params * self.expert_bits / 8)
        while not isinstance(given, int):
            given = given[0]
        return given

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of all routed experts: host memory that must be pinned."""
        sizes = self.bytes_by_key
        return self.num_layers * self.num_experts * self.mean_expert_bytes if sizes is None else sum(sizes)

    @property
    def non_expert_bytes(self) -> int:
        """Bytes that stay in GPU memory: embeddings, head, attention, shared and dense layers, routers, extra, and
        heads of multi-token prediction where they are loaded."""
        num_bits = self._plain_params * self.weight_bits + self._wide_params * self.embedding_bits
        return math.ceil(num_bits / 8) + self.extra_bytes + (self.mtp_bytes if self.mtp else 0)

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        """KV cache of one token in one full layer, index keys left out."""
        return self.entry_bytes(FULL)

    def entry_bytes(self, kind: str) -> int:
        """KV cache of one entry of a layer of that kind: of a token, or of what stands for several."""
        found = self.projections(kind)
        return 0 if found is None else math.ceil(found.cached_values * self.kv_bits / 8)

    @property
    def index_key_bytes(self) -> int:
        """Bytes of one index key."""
        return math.ceil(self.index_dim * self.index_bits / 8)

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's state in one linear layer."""
        return math.ceil(self.linear_state * self.state_bits / 8)

    def is_windowed(self, layer: int) -> bool:
        """Whether MoE layer `layer` attends to the last `window` tokens only."""
        return self.moe_attention[layer] == WINDOWED

    def kv_bytes(self, context_tokens: int) -> int:
        """What a request of `context_tokens` tokens keeps beside the weights, all layers: KV cache, of windowed layers
        a window and of chunked ones a chunk, index keys, and the states of linear layers."""
        total = 0
        for kind, count in self.num_of.items():
            entries = entries_kept(self, kind, context_tokens) * self.entry_bytes(kind)
            index = index_keys(self, kind, context_tokens) * self.index_key_bytes
            total += count * (entries + index + (self.state_bytes if kind == LINEAR else 0))
        return total


def model_from_dict(values: Mapping[str, object]) -> ModelSpec:
    """A model from the keys of a `conf/model` file; ValueError names an unknown, missing or wrong key.

    A file of the past may say window_every=N: MoE layers 0, N, 2N … have the window, dense layers none.
    """
    return from_mapping(ModelSpec, with_pattern(values), "model")
