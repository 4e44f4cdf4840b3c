"""The same model, smaller: what a machine without a GPU can carry while routing, layers and chunks stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
)


def scaled_model(model: ModelSpec, scale: int) -> ModelSpec:
    """`model` with every width divided by `scale`, at least 1 where it is not 0: an expert weighs scale² less."""
    if scale == 1:
        return model
    widths: dict[str, int] = {name: getattr(model, name) for name in _WIDTHS}
    smaller: dict[str, Any] = {name: max(1, round(width / scale)) if width else 0 for name, width in widths.items()}
    return replace(model, name=f"{model.name}/{scale}", **smaller)
