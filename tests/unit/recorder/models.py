"""Tiny models with random weights, one of each architecture, and the routing each one is meant to do.

`CHOOSERS` restate each architecture's routing on its own, from the router's input and its weights: logits in float32
to (ids [n,K] as a set, weights [n,K] in their order). They share no code with the recorder or with transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

Floats = npt.NDArray[np.float64]
Chosen = tuple[npt.NDArray[np.int64], Floats]

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"num_hidden_layers": 3, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 16,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 10,
            "num_experts_per_tok": 4,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 6,
            "intermediate_size": 16,
            "moe_intermediate_size": 16,
            "head_dim": 6,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "deepseek_v2": ("DeepseekV2", MLA | {"topk_method": "group_limited_greedy"}),
    "deepseek_v2_greedy": ("DeepseekV2", MLA | {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "deepseek_v3": ("DeepseekV3", MLA | {"norm_topk_prob": True}),
    "olmoe": (
        "Olmoe",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 16,
            "num_experts": 16,
            "num_experts_per_tok": 5,
            "norm_topk_prob": False,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 16,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 4,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "residual_multiplier": 0.5,
        },
    ),
    "phimoe": (
        "Phimoe",
        {"num_hidden_layers": 3, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model with random weights, in eval mode, its routers spread out enough to differ by token."""
    stem, options = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**COMMON | options | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    # Many biases begin as zero and weights as almost zero: routing would then be the same for all tokens.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim:
                scale = 0.3 if tensor.ndim > 1 else 0.1
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return model


# -- what each architecture means to do ----------------------------------------------------------------------


def mlp(layer: Any) -> Any:
    """The MoE block of a layer."""
    return getattr(layer, "block_sparse_moe", None) or layer.mlp


def router(layer: Any) -> Any:
    """The router of a layer, None in a dense one."""
    return getattr(mlp(layer), "gate", None) or getattr(mlp(layer), "router", None)


def moe_layers(model: Any) -> list[int]:
    return [index for index, layer in enumerate(model.model.layers) if router(layer) is not None]


def norm(layer: Any, states: Floats, config: Any) -> Floats:
    """The norm before the MoE block, of states [n,d]."""
    module = layer.post_attention_layernorm
    if getattr(module, "bias", None) is not None:
        states = states - states.mean(axis=1, keepdims=True)
    scaled = states / np.sqrt((states**2).mean(axis=1, keepdims=True) + config.rms_norm_eps)
    return scaled * array(module.weight) + (array(module.bias) if getattr(module, "bias", None) is not None else 0.0)


def array(tensor: torch.Tensor) -> Floats:
    return tensor.detach().double().numpy()


def softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def logits_of(layer: Any, states: Floats) -> Floats:
    module = router(layer)
    bias = getattr(module, "bias", None)
    return states @ array(module.weight).T + (array(bias) if bias is not None else 0.0)


def top(scores: Floats, count: int) -> npt.NDArray[np.int64]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def at(scores: Floats, ids: npt.NDArray[np.int64]) -> Floats:
    return np.take_along_axis(scores, ids, axis=1)


def open_groups(group_scores: Floats, config: Any, num_experts: int) -> npt.NDArray[np.bool_]:
    """Which experts lie in one of the best groups."""
    is_open = np.zeros(group_scores.shape, np.bool_)
    np.put_along_axis(is_open, top(group_scores, config.topk_group), True, axis=1)
    return np.repeat(is_open, num_experts // config.n_group, axis=1)


def softmax_then_top(logits: Floats, layer: Any, config: Any) -> Chosen:
    ids = top(logits, config.num_experts_per_tok)
    weights = at(softmax(logits), ids)
    return ids, weights / weights.sum(axis=1, keepdims=True) if getattr(config, "norm_topk_prob", True) else weights


def top_then_softmax(logits: Floats, layer: Any, config: Any) -> Chosen:
    ids = top(logits, config.num_experts_per_tok)
    return ids, softmax(at(logits, ids))


def deepseek_v2(logits: Floats, layer: Any, config: Any) -> Chosen:
    scores = softmax(logits)
    if config.topk_method == "group_limited_greedy":
        best = scores.reshape(len(scores), config.n_group, -1).max(axis=2)
        scores = np.where(open_groups(best, config, scores.shape[1]), scores, 0.0)
    ids = top(scores, config.num_experts_per_tok)
    return ids, at(scores, ids) * config.routed_scaling_factor


def deepseek_v3(logits: Floats, layer: Any, config: Any) -> Chosen:
    scores = 1 / (1 + np.exp(-logits))
    biased = scores + array(router(layer).e_score_correction_bias)
    pairs = np.sort(biased.reshape(len(scores), config.n_group, -1), axis=2)[:, :, -2:].sum(axis=2)
    ids = top(np.where(open_groups(pairs, config, scores.shape[1]), biased, -np.inf), config.num_experts_per_tok)
    weights = at(scores, ids)
    return ids, weights / weights.sum(axis=1, keepdims=True) * config.routed_scaling_factor


def phimoe(logits: Floats, layer: Any, config: Any) -> Chosen:
    """The best, weighed among those near it; then the best of the rest, likewise."""
    left, picked = logits.copy(), []
    for _ in range(2):
        ids = top(left, 1)
        best = at(left, ids)
        is_far = (best - logits) / np.maximum(np.abs(logits), best) > 2 * config.router_jitter_noise
        picked.append((ids, at(softmax(np.where(is_far, -np.inf, left)), ids)))
        np.put_along_axis(left, ids, -np.inf, axis=1)
    ids, weights = (np.concatenate(parts, axis=1) for parts in zip(*picked, strict=True))
    return ids, weights


CHOOSERS: dict[str, Any] = {
    "mixtral": softmax_then_top,
    "qwen2_moe": softmax_then_top,
    "qwen3_moe": softmax_then_top,
    "olmoe": softmax_then_top,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2_greedy": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": top_then_softmax,
    "granitemoe": top_then_softmax,
    "phimoe": phimoe,
}
