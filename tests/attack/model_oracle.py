"""A second reader of config.json: sizes of experts and the number of layers, by the words of the two sound files alone.

Takes the bytes of an accepted file and what was read of it, and says what is wrong, or "". It shares no code with
`sim.specs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_NAMES = {
    "hidden_size": ("hidden_size",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok",),
    "expert_intermediate": ("moe_intermediate_size",),
    "num_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
}


def _one(value: Any) -> Any:
    """A list that repeats one number says that number."""
    return value[0] if isinstance(value, list) and value else value


def config(content: bytes, found: tuple[Any, str]) -> str:
    """The sizes that stand in the file as they are; where it has none of their names, they are not looked at."""
    spec = found[0].spec
    table = json.loads(content.decode("utf-8-sig"))
    if not any(name in table for name in _NAMES["num_experts"]) or not any(
        table.get(name) is not None for name in _NAMES["num_experts"]
    ):
        table = table.get("text_config") or table
    for key, names in _NAMES.items():
        values = [_one(table[name]) for name in names if table.get(name) is not None]
        if values and getattr(spec, key) != values[0]:
            return f"{key} is {getattr(spec, key)}, the file says {values[0]!r}"
    layers = _one(table.get("num_hidden_layers"))
    total = spec.num_layers + spec.num_dense_layers + spec.num_bare_layers
    if type(layers) is int and table.get("layers_block_type") is None and total != layers:
        return f"{total} layers, the file says {layers}"
    if not 1 <= spec.expert_bits <= 64 or spec.kv_bytes(1) < 0:
        return f"{spec.expert_bits} bits an expert's weight"
    return ""


RECHECKS: dict[str, Callable[[bytes, Any], str]] = {"model-config": config, "model-config-hybrid": config}
"""By the name of the reader."""
