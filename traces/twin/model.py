"""The network of a twin: a pre-norm transformer with rotary attention whose MLPs are mixtures of experts.

Knows no text and no files. Routing keeps no state: a router, asked twice, answers twice the same. Shape letters: B
sequences, S tokens of each, n = B·S tokens, E experts, K top-k, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from traces.twin.config import TwinConfig

_ROPE_BASE = 10_000.0

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values [B,heads,S,W/heads] of each layer for the tokens so far; an empty list begins one."""


class Router(nn.Module):
    """Which experts a token goes to, and with what weight."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.width))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """states [n,W] → logits float32 [n,E], ids [n,K] best first, gate weights float32 [n,K]."""
        # In float32 whatever surrounds it: two experts that are close must not swap with the precision.
        with torch.autocast(states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(states.float(), self.weight.float(), bias)
            if self.config.normalised:
                best, ids = logits.topk(self.config.top_k, dim=1)
                return logits, ids, best.softmax(dim=1)
            weights, ids = logits.softmax(dim=1).topk(self.config.top_k, dim=1)
            return logits, ids, weights * self.config.routed_scale


class Experts(nn.Module):
    """All routed experts of a layer, gated MLPs stacked in two parameters."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, config.width, 2 * config.expert_width))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.expert_width, config.width))

    def forward(self, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """states [n,W], ids [n,K], weights [n,K] → the weighted sum of what the chosen experts say, [n,W].

        Tokens are sorted by expert and cut into blocks of half the mean load, each with its expert's weights: two
        batched products do for all of them, and at most half a mean load an expert is padding, however uneven it is.
        """
        (num_tokens, top_k), width, num_experts = ids.shape, states.shape[1], len(self.gate_up)
        flat = ids.reshape(-1)
        size = -(-flat.numel() // (2 * num_experts))
        counts = torch.bincount(flat, minlength=num_experts)
        blocks = (counts + size - 1) // size
        owner = torch.arange(num_experts, device=flat.device).repeat_interleave(blocks)
        order = flat.argsort(stable=True)
        by_expert = flat[order]
        first_slot = (blocks.cumsum(0) - blocks) * size - (counts.cumsum(0) - counts)
        sorted_slots = first_slot[by_expert] + torch.arange(len(flat), device=flat.device)
        slots = torch.empty_like(flat).index_copy(0, order, sorted_slots)
        # Each pair of token and expert has a slot of its own: nothing is summed in an order that could change.
        pairs = states[:, None].expand(-1, top_k, -1).reshape(-1, width)
        rows = pairs.new_zeros(len(owner) * size, width).index_copy(0, slots, pairs).view(-1, size, width)
        gate, up = torch.bmm(rows, self.gate_up.index_select(0, owner)).chunk(2, dim=2)
        down = self.down.index_select(0, owner)
        made = torch.bmm(F.silu(gate) * up, down).reshape(-1, width).index_select(0, slots)
        return (made.view(num_tokens, top_k, width) * weights[:, :, None].to(made.dtype)).sum(dim=1)


class GatedMLP(nn.Module):
    """A dense MLP; with `weighed`, its output is scaled by a sigmoid of the token."""

    def __init__(self, width: int, inner: int, weighed: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.weigh = nn.Linear(width, 1, bias=False) if weighed else None

    def forward(self, states: Tensor) -> Tensor:
        """states [n,W] → [n,W]."""
        gate, up = self.gate_up(states).chunk(2, dim=-1)
        made: Tensor = self.down(F.silu(gate) * up)
        return made if self.weigh is None else made * torch.sigmoid(self.weigh(states))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, states: Tensor, rotation: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """states [B,S,W] at positions after `past` → [B,S,W], and keys and values with theirs added."""
        batch, length, width = states.shape
        heads = self.qkv(states).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(heads[0], rotation), rotate(heads[1], rotation), heads[2]
        mask = None
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
            before = key.shape[2] - length
            mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device).tril(before)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        made: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return made, (key, value)


def rotations(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, size/2] by position and pair of dimensions."""
    steps = _ROPE_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * steps
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """heads [B,h,S,size] turned by their positions."""
    cosine, sine = (part.to(heads.dtype) for part in rotation)
    left, right = heads.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)


class Block(nn.Module):
    """One layer: attention, then an MLP, which is dense or a mixture of experts."""

    def __init__(self, config: TwinConfig, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.shared: GatedMLP | None = None
        if dense:
            self.shared = GatedMLP(config.width, config.dense_width)
            return
        self.router = Router(config)
        self.experts = Experts(config)
        if config.shared_width:
            self.shared = GatedMLP(config.width, config.shared_width, config.shared_gate)

    def forward(
        self, states: Tensor, rotation: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """states [B,S,W] → [B,S,W], keys and values, and the routing as (logits [n,E], ids [n,K]), None if dense."""
        mixed, present = self.attention(self.attention_norm(states), rotation, past)
        states = states + mixed
        normed = self.mlp_norm(states).reshape(-1, states.shape[-1])
        made, routing = torch.zeros_like(normed), None
        if not self.dense:
            logits, ids, weights = self.router(normed)
            made, routing = self.experts(normed, ids, weights), (logits, ids)
        if self.shared is not None:
            made = made + self.shared(normed)
        return states + made.view_as(states), present, routing


class Twin(nn.Module):
    """The language model. Weights are drawn from `seed`; on the meta device they are left out."""

    def __init__(self, config: TwinConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        dense = [True] * config.num_dense_layers + [False] * config.num_layers
        self.layers = nn.ModuleList(Block(config, is_dense) for is_dense in dense)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:
            self._draw(seed)

    def _draw(self, seed: int) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                draw(name, parameter, len(self.layers), generator)

    @property
    def moe_blocks(self) -> list[tuple[int, Block]]:
        """The MoE layers with their indices among all layers."""
        return [
            (index, block) for index, block in enumerate(self.layers) if isinstance(block, Block) and not block.dense
        ]

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, routing: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """tokens [B,S] → the next token's logits [B,S,vocabulary].

        cache: keys and values of the tokens before, replaced by those with these. routing: gets each MoE layer's
        (logits [n,E], ids [n,K]). ValueError past the context.
        """
        before = cache[0][0].shape[2] if cache else 0
        length = before + tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens are more than the twin's context={self.config.context}; give fewer")
        size = self.config.width // self.config.num_heads
        cosine, sine = rotations(length, size, tokens.device)
        states, kept = self.embedding(tokens), []
        for index, block in enumerate(self.layers):
            past = cache[index] if cache else None
            states, present, routed = block(states, (cosine[before:], sine[before:]), past)
            kept.append(present)
            if routing is not None and routed is not None:
                routing.append(routed)
        if cache is not None:
            cache[:] = kept
        logits: Tensor = self.head(self.norm(states))
        return logits


def draw(name: str, parameter: Tensor, num_layers: int, generator: torch.Generator) -> None:
    """Fill a weight of that name with its first values.

    By fan-in, not a fixed 0.02, which is 1/√W at the width of the originals and would leave a narrow router blind.
    What writes to the residual stream is made smaller, by the number of writers.
    """
    stem = name.rpartition(".")[0]
    if stem.endswith(("embedding", "head")):
        scale = 0.02
    elif stem.endswith("experts"):
        scale = parameter.shape[1] ** -0.5
    else:
        scale = parameter.shape[-1] ** -0.5
    if name.endswith(("down", "down.weight", "out.weight")):
        scale /= math.sqrt(2 * num_layers)
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def balance(routing: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """The load-balancing loss summed over layers, and the largest share of any expert in units of the even one.

    Per layer E · Σ_e f_e·P_e, f the share of the choices and P the mean probability; 1 where both are even (Fedus et
    al., Switch Transformers, arXiv 2101.03961, section 2.2).
    """
    total, highest = torch.zeros((), device=routing[0][0].device), 0.0
    for logits, ids in routing:
        num_experts = logits.shape[1]
        share = torch.bincount(ids.reshape(-1), minlength=num_experts).float() / ids.numel()
        total = total + num_experts * (share * logits.softmax(dim=1).mean(dim=0)).sum()
        highest = max(highest, float(share.max()) * num_experts)
    return total, highest
