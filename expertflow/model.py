"""The dimensions of a Mixture-of-Experts model: what an expert weighs, what the rest weighs, what KV takes.

Annotations are evaluated here, since they declare keys: as text each would be compiled when it is first asked for.
Knows no hardware and no time. Parameters are those of the matrices: biases, norms and quantisation tables not
in `*_bits` are left out. Bytes are whole numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from expertflow.keys import Rule, check_fields, check_range, from_mapping

GQA = "gqa"
MLA = "mla"
_MLA_FIELDS = ("kv_rank", "rope_dim", "nope_dim", "v_dim")
_GQA_FIELDS = ("num_kv_heads", "head_dim")
_MOST_WIDTH = 1_000_000
"""Of any matrix of a model: no expert weighs more than 24 TB, so that the times of its copies fit into 64 bits."""


def _width(about: str, low: int = 1) -> Rule:
    return Rule(low, _MOST_WIDTH, about=about)


def _bits(about: str) -> Rule:
    return Rule(1, 64, unit="bits", about=about)


@dataclass(frozen=True)
class ModelSpec:
    """One model. `num_layers` counts MoE layers; `num_dense_layers` ordinary layers stand before them.

    expert_matrices: 3 for gated experts (gate, up, down), 2 for Switch and NLLB; shared and dense ones alike.
    attention: `gqa` uses num_kv_heads and head_dim; `mla` (DeepSeek) uses kv_rank, rope_dim, nope_dim, v_dim
    and, if queries are low-rank too, q_rank. The fields of the other kind stay 0.
    window, window_every: MoE layers 0, window_every, 2·window_every … attend to the last `window` tokens.
    weight_bits: per weight of attention, shared and dense layers. expert_bits: of routed experts, scales
    included (mxfp4: 4 + 8/32). embedding_bits: of embeddings, head and router, which quantisers leave alone.
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
    window_every: Annotated[int, Rule(0, 10_000, about="a windowed MoE layer every so many layers, from the first")] = 0
    expert_matrices: Annotated[int, Rule(2, 3, about="3 = gated, 2 = Switch and NLLB")] = 3
    shared_intermediate: Annotated[int, _width("inner width of all shared experts together, 0 = none", 0)] = 0
    num_dense_layers: Annotated[int, Rule(0, 10_000, about="ordinary layers before the MoE layers")] = 0
    dense_intermediate: Annotated[int, _width("inner width of a dense layer", 0)] = 0
    tied_embeddings: Annotated[bool, Rule(about="the head is the embedding matrix")] = False
    weight_bits: Annotated[float, _bits("per weight of attention, shared and dense layers")] = 16.0
    expert_bits: Annotated[float, _bits("per weight of routed experts, scales included")] = 16.0
    embedding_bits: Annotated[float, _bits("per weight of embeddings, head and router")] = 16.0
    kv_bits: Annotated[float, _bits("per cached value")] = 16.0

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_range("model.top_k", self.top_k, 1, self.num_experts, remedy="the upper end is num_experts")
        self._check_attention()
        self._check_pair("window", "window_every")
        self._check_pair("num_dense_layers", "dense_intermediate")

    def _check_attention(self) -> None:
        own, other = (_GQA_FIELDS, _MLA_FIELDS) if self.attention == GQA else (_MLA_FIELDS, _GQA_FIELDS)
        for key in own:
            check_range(f"model.{key}", getattr(self, key), 1, _MOST_WIDTH, remedy=f"{self.attention} needs it")
        for key in other if self.attention == MLA else (*other, "q_rank"):
            check_range(f"model.{key}", getattr(self, key), 0, 0, remedy=f"{self.attention} does not use it")
        if self.attention == MLA:
            check_range("model.window", self.window, 0, 0, remedy="windowed mla is not modelled")
        elif self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "every KV head serves the same number of query heads"
            )

    def _check_pair(self, first: str, second: str) -> None:
        values = [getattr(self, key) for key in (first, second)]
        if (values[0] == 0) != (values[1] == 0):
            raise ValueError(f"model.{first}={values[0]} and model.{second}={values[1]}: give both above 0, or neither")

    # -- parameters, of one layer where layers have them ----------------------------------------------------

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert."""
        return self.expert_matrices * self.hidden_size * self.expert_intermediate

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention (Q, K, V, output; for MLA the low-rank pairs)."""
        hidden, heads = self.hidden_size, self.num_heads
        if self.attention == GQA:
            return hidden * self.head_dim * (2 * heads + 2 * self.num_kv_heads)
        query_dim = heads * (self.nope_dim + self.rope_dim)
        query = self.q_rank * (hidden + query_dim) if self.q_rank else hidden * query_dim
        keys_values = hidden * (self.kv_rank + self.rope_dim) + self.kv_up_params
        return query + keys_values + heads * self.v_dim * hidden

    @property
    def kv_up_params(self) -> int:
        """Weights that expand one layer's compressed KV to keys and values (MLA); 0 for GQA."""
        return self.kv_rank * self.num_heads * (self.nope_dim + self.v_dim)

    @property
    def router_params(self) -> int:
        """Weights of one MoE layer's router."""
        return self.hidden_size * self.num_experts

    @property
    def shared_params(self) -> int:
        """Weights of one MoE layer's shared experts together; 0 if there are none."""
        return self.expert_matrices * self.hidden_size * self.shared_intermediate

    @property
    def dense_params(self) -> int:
        """Feed-forward weights of one leading dense layer; 0 if there are none."""
        return self.expert_matrices * self.hidden_size * self.dense_intermediate

    @property
    def head_params(self) -> int:
        """Weights of the head; the embeddings have as many."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights, a tied head counted once."""
        experts = self.num_layers * self.num_experts * self.expert_params
        return experts + self._plain_params + self._wide_params

    @property
    def _plain_params(self) -> int:
        """Non-expert weights stored at weight_bits."""
        moe = self.num_layers * (self.attention_params + self.shared_params)
        return moe + self.num_dense_layers * (self.attention_params + self.dense_params)

    @property
    def _wide_params(self) -> int:
        """Weights stored at embedding_bits."""
        return self.head_params * (1 if self.tied_embeddings else 2) + self.num_layers * self.router_params

    # -- bytes ----------------------------------------------------------------------------------------------

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert: what one load copies."""
        return math.ceil(self.expert_params * self.expert_bits / 8)

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of all routed experts: host memory that must be pinned."""
        return self.num_layers * self.num_experts * self.expert_bytes

    @property
    def non_expert_bytes(self) -> int:
        """Bytes that stay in GPU memory: embeddings, head, attention, shared and dense layers, routers."""
        num_bits = self._plain_params * self.weight_bits + self._wide_params * self.embedding_bits
        return math.ceil(num_bits / 8)

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        """KV cache of one token in one layer. MLA keeps the compressed form, as fused engines do."""
        values = 2 * self.num_kv_heads * self.head_dim if self.attention == GQA else self.kv_rank + self.rope_dim
        return math.ceil(values * self.kv_bits / 8)

    def is_windowed(self, layer: int) -> bool:
        """Whether MoE layer `layer` attends to the last `window` tokens only."""
        return self.window > 0 and layer % self.window_every == 0

    def kv_bytes(self, context_tokens: int) -> int:
        """KV cache of a request of `context_tokens` tokens, all layers; windowed ones keep a window."""
        num_windowed = sum(self.is_windowed(layer) for layer in range(self.num_layers))
        num_full = self.num_layers - num_windowed + self.num_dense_layers
        tokens = num_full * context_tokens + num_windowed * min(context_tokens, self.window)
        return tokens * self.kv_bytes_per_token_per_layer


def model_from_dict(values: Mapping[str, object]) -> ModelSpec:
    """A model from the keys of a `conf/model` file; ValueError names an unknown, missing or wrong key."""
    return from_mapping(ModelSpec, values, "model")
