"""One model from its config.json and from its tensors: two readers that share nothing but the spec must agree.

The config.json has widths, of which formulas make weights; a GGUF header has the tensors themselves, named and shaped
here as llama.cpp's converter does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sim.specs.model_file import read_model_file
from tests.support import gguf_models
from tests.support.gguf_models import Info, dense, ends, experts, gqa, mla

QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
}
NEMOTRON = {
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": gguf_models.NEMOTRON_BLOCKS,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_shared_experts": 1,
    "intermediate_size": 1856,
    "vocab_size": 131_072,
    "tie_word_embeddings": False,
    "mlp_hidden_act": "relu2",
}


class Case(NamedTuple):
    """The same model as the two files tell of it."""

    config: dict[str, Any]
    model: Callable[[], tuple[str, dict[str, Any], list[Info]]]


def named(layer: int, shapes: dict[str, tuple[int, ...]], kind: str = "F16") -> list[Info]:
    return [Info(f"blk.{layer}.{name}.weight", shape, kind) for name, shape in shapes.items()]


# -- Kimi-Linear-48B-A3B -------------------------------------------------------------------------------------

KIMI_FULL = (4, 8, 12, 16, 20, 24, 27)
KIMI = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 72,
    "linear_attn_config": {
        "full_attn_layers": list(KIMI_FULL),
        "kda_layers": [layer for layer in range(1, 28) if layer not in KIMI_FULL],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
    "num_experts": 256,
    "num_experts_per_token": 8,
    "moe_intermediate_size": 1024,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 9216,
    "vocab_size": 163_840,
    "tie_word_embeddings": False,
}


def kimi() -> tuple[str, dict[str, Any], list[Info]]:
    hidden = 2304
    keys = {
        ".block_count": 27,
        ".embedding_length": hidden,
        ".attention.head_count": 32,
        ".attention.head_count_kv": [1 if layer + 1 in KIMI_FULL else 0 for layer in range(27)],
        ".attention.kv_lora_rank": 512,
        ".attention.key_length": 576,
        ".attention.value_length": 512,
        ".attention.key_length_mla": 192,
        ".attention.value_length_mla": 128,
        ".rope.dimension_count": 64,
        ".kda.head_dim": 128,
        ".ssm.conv_kernel": 4,
        ".expert_count": 256,
        ".expert_used_count": 8,
    }
    tensors = ends(hidden, 163_840)
    gates = {"ssm_f_a": (hidden, 128), "ssm_f_b": (128, 4096), "ssm_g_a": (hidden, 128), "ssm_g_b": (128, 4096)}
    shapes: dict[str, tuple[int, ...]] = {**gates, "ssm_beta": (hidden, 32)}
    shapes |= {f"ssm_conv1d_{name}": (4, 1, 4096) for name in "qkv"}
    for layer in range(27):
        if layer + 1 in KIMI_FULL:
            tensors += mla(layer, hidden, 32, 0, 512, 64, 128, 128, split_kv=True)
        else:
            tensors += gqa(layer, hidden, 32, 32, 128) + named(layer, shapes)
        feed = experts(layer, hidden, 1024, 256) + dense(layer, hidden, 1024, "_shexp")
        tensors += feed if layer else dense(layer, hidden, 9216)
    return "kimi-linear", keys, tensors


# -- DeepSeek-V3.2 -------------------------------------------------------------------------------------------

DEEPSEEK = {
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "intermediate_size": 18_432,
    "vocab_size": 129_280,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}


def deepseek() -> tuple[str, dict[str, Any], list[Info]]:
    hidden = 7168
    keys = {
        ".block_count": 62,
        ".nextn_predict_layers": 1,
        ".embedding_length": hidden,
        ".attention.head_count": 128,
        ".attention.head_count_kv": 1,
        ".attention.q_lora_rank": 1536,
        ".attention.kv_lora_rank": 512,
        ".attention.key_length": 576,
        ".attention.value_length": 512,
        ".attention.key_length_mla": 192,
        ".attention.value_length_mla": 128,
        ".rope.dimension_count": 64,
        ".attention.indexer.head_count": 64,
        ".attention.indexer.key_length": 128,
        ".attention.indexer.top_k": 2048,
        ".expert_count": 256,
        ".expert_used_count": 8,
    }
    indexer = {"indexer.attn_q_b": (1536, 64 * 128), "indexer.attn_k": (hidden, 128), "indexer.proj": (hidden, 64)}
    tensors = [*ends(hidden, 129_280), Info("blk.61.nextn.eh_proj.weight", (2 * hidden, hidden), "F16")]
    for layer in range(62):
        tensors += mla(layer, hidden, 128, 1536, 512, 64, 128, 128, split_kv=True) + named(layer, {**indexer})
        feed = experts(layer, hidden, 2048, 256) + dense(layer, hidden, 2048, "_shexp")
        tensors += feed if layer >= 3 else dense(layer, hidden, 18_432)
    return "deepseek32", keys, tensors


# -- LFM2-8B-A1B ---------------------------------------------------------------------------------------------

LFM2_FULL = (2, 6, 10, 14, 18, 21)
LFM2 = {
    "model_type": "lfm2_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "layer_types": ["full_attention" if layer in LFM2_FULL else "conv" for layer in range(24)],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "intermediate_size": 7168,
    "vocab_size": 65_536,
    "tie_word_embeddings": True,
}


def lfm2() -> tuple[str, dict[str, Any], list[Info]]:
    hidden = 2048
    keys = {
        ".block_count": 24,
        ".embedding_length": hidden,
        ".attention.head_count": 32,
        ".attention.head_count_kv": [8 if layer in LFM2_FULL else 0 for layer in range(24)],
        ".shortconv.l_cache": 3,
        ".expert_count": 32,
        ".expert_used_count": 4,
    }
    shapes = {
        "shortconv.in_proj": (hidden, 3 * hidden),
        "shortconv.conv": (3, hidden),
        "shortconv.out_proj": (hidden, hidden),
    }
    tensors = ends(hidden, 65_536, tied=True)
    for layer in range(24):
        tensors += gqa(layer, hidden, 32, 8, 64) if layer in LFM2_FULL else named(layer, {**shapes})
        tensors += experts(layer, hidden, 1792, 32) if layer >= 2 else dense(layer, hidden, 7168)
    return "lfm2moe", keys, tensors


# -- Jamba-Mini ----------------------------------------------------------------------------------------------

JAMBA = {
    "model_type": "jamba",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "vocab_size": 65_536,
    "tie_word_embeddings": False,
}


def jamba() -> tuple[str, dict[str, Any], list[Info]]:
    hidden, inner = 4096, 8192
    keys = {
        ".block_count": 32,
        ".embedding_length": hidden,
        ".attention.head_count": 32,
        ".attention.head_count_kv": [8 if layer % 8 == 4 else 0 for layer in range(32)],
        ".ssm.conv_kernel": 4,
        ".ssm.inner_size": inner,
        ".ssm.state_size": 16,
        ".ssm.time_step_rank": 256,
        ".expert_count": 16,
        ".expert_used_count": 2,
    }
    shapes = {
        "ssm_in": (hidden, 2 * inner),
        "ssm_conv1d": (4, inner),
        "ssm_x": (inner, 256 + 2 * 16),
        "ssm_dt": (256, inner),
        "ssm_out": (inner, hidden),
    }
    tensors = ends(hidden, 65_536)
    for layer in range(32):
        if layer % 8 == 4:
            tensors += gqa(layer, hidden, 32, 8, 128)
        else:
            tensors += [*named(layer, {**shapes}), Info(f"blk.{layer}.ssm_a", (16, inner), "F32")]
        tensors += experts(layer, hidden, 14_336, 16) if layer % 2 else dense(layer, hidden, 14_336)
    return "jamba", keys, tensors


# -- Gemma 4 26B-A4B -----------------------------------------------------------------------------------------

GEMMA_TYPES = (["sliding_attention"] * 5 + ["full_attention"]) * 5
GEMMA = {
    "model_type": "gemma4_text",
    "hidden_size": 2816,
    "num_hidden_layers": 30,
    "layer_types": GEMMA_TYPES,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "intermediate_size": 2112,
    "enable_moe_block": True,
    "attention_k_eq_v": True,
    "vocab_size": 262_144,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
}


def gemma() -> tuple[str, dict[str, Any], list[Info]]:
    hidden = 2816
    windowed = [kind == "sliding_attention" for kind in GEMMA_TYPES]
    keys = {
        ".block_count": 30,
        ".embedding_length": hidden,
        ".attention.head_count": 16,
        ".attention.head_count_kv": [8 if one else 2 for one in windowed],
        ".attention.key_length": 512,
        ".attention.value_length": 512,
        ".attention.key_length_swa": 256,
        ".attention.value_length_swa": 256,
        ".attention.sliding_window": 1024,
        ".attention.sliding_window_pattern": windowed,
        ".expert_count": 128,
        ".expert_used_count": 8,
    }
    tensors = ends(hidden, 262_144, tied=True)
    for layer, one in enumerate(windowed):
        if one:
            tensors += gqa(layer, hidden, 16, 8, 256)
        else:  # values are the keys'
            tensors += [info for info in gqa(layer, hidden, 16, 2, 512) if "attn_v" not in info.name]
        router, _, _, down = experts(layer, hidden, 704, 128)
        tensors += [router, down, *named(layer, {"ffn_gate_up_exps": (hidden, 2 * 704, 128)})]
        tensors += dense(layer, hidden, 2112)
    return "gemma4", keys, tensors


CASES = {
    "qwen3-next": Case(QWEN3_NEXT, gguf_models.qwen3_next_80b),
    "nemotron-3-nano": Case(NEMOTRON, gguf_models.nemotron_3_nano),
    "kimi-linear": Case(KIMI, kimi),
    "deepseek-v3.2": Case(DEEPSEEK, deepseek),
    "lfm2-8b-a1b": Case(LFM2, lfm2),
    "jamba-mini": Case(JAMBA, jamba),
    "gemma-4-26b": Case(GEMMA, gemma),
}


@pytest.mark.parametrize("name", CASES)
def test_both_readers_tell_of_the_same_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
    by_config = read_model_file(tmp_path / "config.json").spec
    by_tensors = read_model_file(gguf_models.write(tmp_path / "m.gguf", *case.model())).spec
    stored = {"name", "source", "weight_bits", "expert_bits", "embedding_bits", "extra_bytes", "mtp_bytes"}
    for key in {field.name for field in fields(by_config)} - stored:
        assert getattr(by_tensors, key) == getattr(by_config, key), key
    assert by_tensors.num_params == by_config.num_params
