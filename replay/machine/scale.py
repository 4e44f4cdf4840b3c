"""The same model, smaller: what a machine without a GPU can carry while routing, layers and chunks stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expertflow.attention import FULL, GQA, MLA, WINDOWED
from expertflow.keys import shown
from expertflow.layers import MOE
from expertflow.model import ModelSpec

_WIDTHS = (
    "hidden_size",
    "expert_intermediate",
    "shared_intermediate",
    "dense_intermediate",
    "vocab_size",
    "head_dim",
    "kv_rank",
    "rope_dim",
    "nope_dim",
    "v_dim",
    "q_rank",
    "o_rank",
    "window_head_dim",
    "window_kv_rank",
    "window_nope_dim",
    "window_v_dim",
    "index_dim",
    "expert_hidden",
)
_PRODUCTS = ("extra_attention_params", "extra_params", "extra_bytes", "mtp_bytes", "linear_params", "linear_state")
"""What is a product of two widths."""
_UNKNOWN = (
    "index_top_k",
    "window_heads",
    "window_kv_heads",
    "window_head_dim",
    "window_kv_rank",
    "window_nope_dim",
    "window_v_dim",
    "shared_kv",
    "tied_kv",
    "expert_hidden",
)
"""Keys that no kernel of a replay knows."""


def check_replayable(model: ModelSpec) -> None:
    """ValueError, one line that names the key, for a model whose kernels a replay does not have."""
    if model.bytes_by_key is not None:
        raise ValueError(
            f"model.expert_bytes of {model.name}: experts of unlike sizes are only simulated, a replay has slots of "
            f"one size; give model.expert_bytes={model.mean_expert_bytes}, their mean, or run python -m sim"
        )
    other = sorted(set(model.attention_pattern) - {FULL, WINDOWED})
    is_first = all(layer.feed == MOE for layer in model.layers[model.num_dense_layers :])
    key = "attention_pattern" if other else next((key for key in _UNKNOWN if getattr(model, key)), None)
    if not is_first:
        key = "feed_pattern" if model.feed_pattern is not None else "num_bare_layers"
    if model.attention == GQA and model.v_dim:
        key = key or "v_dim"
    if model.attention == MLA and model.window:
        key = key or "window"
    if key is not None:
        value = shown(getattr(model, key))
        raise ValueError(
            f"model.{key}={value} of {model.name} is only simulated: a replay has kernels of full and windowed "
            "attention of one shape, and of dense layers before the others; run python -m sim"
        )


def scaled_model(model: ModelSpec, scale: int) -> ModelSpec:
    """`model` with every width divided by `scale`, at least 1 where it is not 0: an expert weighs scale² less."""
    if scale == 1:
        return model
    widths: dict[str, int] = {name: getattr(model, name) for name in _WIDTHS}
    smaller: dict[str, Any] = {name: max(1, round(width / scale)) if width else 0 for name, width in widths.items()}
    products: dict[str, int] = {name: getattr(model, name) for name in _PRODUCTS}
    smaller |= {name: max(1, round(count / scale**2)) if count else 0 for name, count in products.items()}
    if isinstance(model.expert_bytes, int):
        smaller["expert_bytes"] = max(1, round(model.expert_bytes / scale**2))
    return replace(model, name=f"{model.name}/{scale}", **smaller)
