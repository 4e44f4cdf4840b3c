"""The dimensions of a Mixture-of-Experts model: what an expert weighs, what the rest weighs, what KV takes.

Knows no hardware and no time. Parameters are those of the matrices: biases, norms and quantisation tables not
in `*_bits` are left out. Bytes are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Spec = TypeVar("Spec", bound=DataclassInstance)

GQA = "gqa"
MLA = "mla"
_MLA_FIELDS = ("kv_rank", "rope_dim", "nope_dim", "v_dim")
_GQA_FIELDS = ("num_kv_heads", "head_dim")


def check_range(key: str, value: float, low: float, high: float, *, remedy: str = "", above: bool = False) -> None:
    """ValueError naming key, value, range and remedy unless low <= value <= high (`above`: low < value)."""
    if (low < value if above else low <= value) and value <= high:
        return
    bracket = "(" if above else "["
    hint = f"; {remedy}" if remedy else ""
    raise ValueError(f"{key}={value} is outside {bracket}{low:g}, {high:g}]{hint}")


def from_mapping(cls: type[Spec], values: Mapping[str, object], group: str) -> Spec:
    """Build the dataclass `cls` from plain configuration values; errors name them `group`.key.

    ValueError on an unknown key, a missing one, or a value of the wrong type. Nothing is converted.
    """
    known = {field.name: field for field in fields(cls)}
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {group}.{near[0]}? " if near else ""
            raise ValueError(f"{group}.{key} is not a key; {hint}Valid keys: {', '.join(sorted(known))}")
    required = {k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(required - values.keys())
    if missing:
        raise ValueError(f"{group} lacks {', '.join(missing)}; choose a file of conf/{group} or add them")
    hints = get_type_hints(cls)
    for key, value in values.items():
        wanted = _misfit(value, hints[key])
        if wanted:
            raise ValueError(f"{group}.{key}={value!r} is a {type(value).__name__}; it must be {wanted}")
    return cls(**values)


def _misfit(value: object, hint: object) -> str:
    """What `value` should have been, or nothing if it fits. A bool is no number, whatever Python says."""
    if hint is bool:
        return "" if isinstance(value, bool) else "true or false"
    if hint is str:
        return "" if isinstance(value, str) else "text"
    if hint is int:
        return "" if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if hint is float:
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    return ""  # a composite: the class checks it


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

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_intermediate: int
    num_heads: int
    vocab_size: int
    source: str
    num_kv_heads: int = 0
    head_dim: int = 0
    attention: str = GQA
    kv_rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    v_dim: int = 0
    q_rank: int = 0
    window: int = 0
    window_every: int = 0
    expert_matrices: int = 3
    shared_intermediate: int = 0
    num_dense_layers: int = 0
    dense_intermediate: int = 0
    tied_embeddings: bool = False
    weight_bits: float = 16.0
    expert_bits: float = 16.0
    embedding_bits: float = 16.0
    kv_bits: float = 16.0

    def __post_init__(self) -> None:
        for key in ("name", "source"):
            if not getattr(self, key):
                raise ValueError(f"model.{key} is empty; name the model and where its figures are from")
        check_range("model.num_layers", self.num_layers, 1, 10_000)
        # Traces store expert numbers in 16 bits, all ones meaning padding.
        check_range("model.num_experts", self.num_experts, 1, 65_535)
        check_range("model.top_k", self.top_k, 1, self.num_experts, remedy="the upper end is num_experts")
        for key in ("hidden_size", "expert_intermediate", "num_heads", "vocab_size"):
            check_range(f"model.{key}", getattr(self, key), 1, 10_000_000)
        check_range("model.expert_matrices", self.expert_matrices, 2, 3)
        for key in ("shared_intermediate", "num_dense_layers", "dense_intermediate", "q_rank"):
            check_range(f"model.{key}", getattr(self, key), 0, 10_000_000)
        for key in ("weight_bits", "expert_bits", "embedding_bits", "kv_bits"):
            check_range(f"model.{key}", getattr(self, key), 1, 64, remedy="bits per weight or cached value")
        self._check_attention()
        self._check_pair("window", "window_every")
        self._check_pair("num_dense_layers", "dense_intermediate")

    def _check_attention(self) -> None:
        if self.attention not in (GQA, MLA):
            raise ValueError(f"model.attention={self.attention!r} is unknown; choose {GQA} or {MLA}")
        own, other = (_GQA_FIELDS, _MLA_FIELDS) if self.attention == GQA else (_MLA_FIELDS, _GQA_FIELDS)
        for key in own:
            check_range(f"model.{key}", getattr(self, key), 1, 1_000_000, remedy=f"{self.attention} needs it")
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
        for key, value in zip((first, second), values, strict=True):
            check_range(f"model.{key}", value, 0, 10_000_000)
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
