"""The shape of a twin: what it shares with its original, and what was made narrow. Knows numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Far above any use; they keep a file that asks for absurd sizes from being followed.
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "num_layers": (1, 256),
    "num_experts": (2, 1024),
    "top_k": (1, 64),
    "num_dense_layers": (0, 64),
    "width": (8, 8192),
    "num_heads": (1, 128),
    "expert_width": (1, 65536),
    "shared_width": (0, 65536),
    "dense_width": (0, 65536),
    "vocab_size": (2, 1 << 20),
    "context": (2, 1 << 16),
}


@dataclass(frozen=True)
class TwinConfig:
    """A twin's architecture. ValueError on sizes that cannot be.

    num_layers: MoE layers; num_dense_layers come before them, with an MLP of dense_width. shared_width: the shared
    experts together, 0 = none; shared_gate: a sigmoid weighs them by token. normalised: the gate weights of a token
    sum to 1 (softmax over the chosen); otherwise they are the chosen ones' share of a softmax over all experts, times
    routed_scale. router_bias: routers add a learned bias. context: tokens a sequence may have.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    width: int
    num_heads: int
    expert_width: int
    shared_width: int = 0
    shared_gate: bool = False
    num_dense_layers: int = 0
    dense_width: int = 0
    normalised: bool = False
    router_bias: bool = False
    routed_scale: float = 1.0
    vocab_size: int = 4096
    context: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable() or len(self.name) > 80:
            raise ValueError("a twin's name must be 1 to 80 printable characters")
        for field, (low, high) in _BOUNDS.items():
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"twin {field}={value!r} must be a whole number in {low} … {high}")
        for field in ("shared_gate", "normalised", "router_bias"):
            if type(getattr(self, field)) is not bool:
                raise ValueError(f"twin {field}={getattr(self, field)!r} must be true or false")
        scale = self.routed_scale
        if type(scale) not in (int, float) or not 0 < scale <= 1000:
            raise ValueError(f"twin routed_scale={scale!r} must lie in 0 … 1000")
        if self.top_k >= self.num_experts:
            raise ValueError(f"twin top_k={self.top_k} must be below num_experts={self.num_experts}")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"twin width={self.width} must be a multiple of twice num_heads={self.num_heads}")
        if self.num_dense_layers and not self.dense_width:
            raise ValueError("twin num_dense_layers needs a dense_width of at least 1")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: object) -> TwinConfig:
        """The configuration that `to_json` gave; ValueError on anything else."""
        known = {field.name for field in dataclasses.fields(TwinConfig)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"the configuration of a twin is a table of {', '.join(sorted(known))}")
        return TwinConfig(**values)


# Layers, experts, top-k, leading dense layers and the form of router and shared experts: config.json of the originals
# (conf/model names the sources). Widths are ours. Gate weights that share one softmax among 60 are small until it is
# sharp, and a training of minutes has no time for that: routed_scale 4, about √(E/K), stands in for it.
_TOPOLOGIES: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v2-lite": {
        "num_layers": 26,
        "num_experts": 64,
        "top_k": 6,
        "num_dense_layers": 1,
        "routed_scale": 4.0,
        "expert": 0.375,
        "shared": 0.75,
        "dense": 3.0,
    },
    "qwen1.5-moe-a2.7b": {
        "num_layers": 24,
        "num_experts": 60,
        "top_k": 4,
        "shared_gate": True,
        "routed_scale": 4.0,
        "expert": 0.375,
        "shared": 0.75,
        "dense": 0.0,
    },
    "gpt-oss-20b": {
        "num_layers": 24,
        "num_experts": 32,
        "top_k": 4,
        "normalised": True,
        "router_bias": True,
        "expert": 0.75,
        "shared": 0.0,
        "dense": 0.0,
    },
}
TOPOLOGIES = tuple(_TOPOLOGIES)


def preset(topology: str, width: int = 128, vocab_size: int = 4096, context: int = 256) -> TwinConfig:
    """The twin of one of `TOPOLOGIES`, `width` wide; ValueError on an unknown one or a width that does not divide."""
    if topology not in _TOPOLOGIES:
        raise ValueError(f"topology {topology!r} is unknown; known are {', '.join(TOPOLOGIES)}")
    if width < 16 or width % 16:
        raise ValueError(f"width={width} must be a multiple of 16")
    values = dict(_TOPOLOGIES[topology])
    widths = {f"{part}_width": round(values.pop(part) * width) for part in ("expert", "shared", "dense")}
    heads = max(width // 32, 1)
    return TwinConfig(
        f"{topology}-twin", width=width, num_heads=heads, vocab_size=vocab_size, context=context, **widths, **values
    )
