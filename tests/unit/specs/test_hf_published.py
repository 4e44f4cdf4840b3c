"""Models of our time from the keys of their published config.json: all weights are those of their model cards.

GLM's are compared with scripts/models of GitHub THUDM/slime; the others are from memory, held by the totals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertflow.model import ModelSpec
from sim.specs.model_file import read_model_file

_GLM = {
    "model_type": "glm4_moe",
    "head_dim": 128,
    "n_shared_experts": 1,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}
_LLAMA4 = {
    "model_type": "llama4_text",
    "attention_chunk_size": 8192,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 202048,
}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}

MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "kimi-k2": (
        {
            "model_type": "kimi_k2",
            "first_k_dense_replace": 1,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "num_attention_heads": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 64,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": _FP8,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 163840,
        },
        1026e9,
    ),
    "glm-4.5-air": (
        {
            **_GLM,
            "first_k_dense_replace": 1,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_hidden_layers": 46,
        },
        106e9,
    ),
    "glm-4.5": (
        {
            **_GLM,
            "first_k_dense_replace": 3,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_hidden_layers": 92,
        },
        355e9,
    ),
    "llama-4-scout": (
        {"model_type": "llama4", "text_config": {**_LLAMA4, "interleave_moe_layer_step": 1, "num_local_experts": 16}},
        108e9,
    ),
    "llama-4-maverick": (
        {"model_type": "llama4", "text_config": {**_LLAMA4, "interleave_moe_layer_step": 2, "num_local_experts": 128}},
        400e9,
    ),
    "qwen3-next-80b-a3b": (
        {
            "model_type": "qwen3_next",
            "decoder_sparse_step": 1,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "mlp_only_layers": [],
            "moe_intermediate_size": 512,
            "num_attention_heads": 16,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 151936,
        },
        80e9,
    ),
    "hunyuan-a13b": (
        {
            "model_type": "hunyuan_v1_moe",
            "attention_head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 3072,
            "moe_intermediate_size": [3072] * 32,
            "moe_topk": [8] * 32,
            "num_attention_heads": 32,
            "num_experts": 64,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_shared_expert": [1] * 32,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128167,
        },
        80e9,
    ),
    "dots.llm1": (
        {
            "model_type": "dots1",
            "first_k_dense_replace": 1,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "num_attention_heads": 32,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 62,
            "num_key_value_heads": 32,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 152064,
        },
        142e9,
    ),
    "minimax-m2": (
        {
            "model_type": "minimax_m2",
            "attn_type_list": [1] * 62,
            "head_dim": 128,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_attention_heads": 48,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 62,
            "num_key_value_heads": 8,
            "num_local_experts": 256,
            "quantization_config": _FP8,
            "tie_word_embeddings": False,
            "vocab_size": 200064,
        },
        230e9,
    ),
    # As GitHub stepfun-ai/Step-3.5-Flash names its keys, which transformers translates.
    "step-3.5-flash": (
        {
            "model_type": "step3p5",
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "head_dim": 128,
                "num_attention_groups": 8,
                "num_attention_heads": 96,
            },
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 11264,
            "layer_types": ["full_attention", *["sliding_attention"] * 3] * 12,
            "max_seq_len": 262144,
            "moe_intermediate_size": 1280,
            "moe_layers_enum": ",".join(map(str, range(3, 45))),
            "moe_num_experts": 288,
            "moe_top_k": 8,
            "num_attention_groups": 8,
            "num_attention_heads": 64,
            "num_hidden_layers": 45,
            "num_nextn_predict_layers": 3,
            "share_expert_dims": 1280,
            "sliding_window": 512,
            "torch_dtype": "bfloat16",
            "vocab_size": 128896,
        },
        196e9,
    ),
}
"""Keys, and the weights that the model card names."""


def spec(name: str, folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(MODELS[name][0]), encoding="utf-8")
    return read_model_file(folder).spec


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_are_as_many_as_the_model_card_says(name: str, tmp_path: Path) -> None:
    assert spec(name, tmp_path).num_params == pytest.approx(MODELS[name][1], rel=0.015)


@pytest.mark.parametrize(
    ("name", "layers", "experts", "each_mb", "all_gb"),
    [
        ("kimi-k2", 60, 384, 44.0, 1015),
        ("glm-4.5-air", 45, 128, 34.6, 199),
        ("glm-4.5", 89, 160, 47.2, 672),
        ("llama-4-scout", 48, 16, 251.7, 193),
        ("llama-4-maverick", 24, 128, 251.7, 773),
    ],
)
def test_experts(name: str, layers: int, experts: int, each_mb: float, all_gb: float, tmp_path: Path) -> None:
    found = spec(name, tmp_path)
    assert (found.num_layers, found.num_experts) == (layers, experts)
    assert found.mean_expert_bytes / 1e6 == pytest.approx(each_mb, rel=0.002)
    assert found.total_expert_bytes / 1e9 == pytest.approx(all_gb, rel=0.002)


def test_what_a_long_context_takes(tmp_path: Path) -> None:
    """At 131,072 tokens: of Qwen3-Next a quarter of the layers grow, of Llama 4 three of four stop at their chunk."""
    found = spec("qwen3-next-80b-a3b", tmp_path)
    # 12 layers of 2 KV heads of 256; 36 states of 32 heads of 128 x 128 and, of 8,192 channels, the 3 tokens before
    # that a convolution needs.
    assert found.kv_bytes(131_072) == 12 * 131_072 * 2 * 2 * 256 * 2 + 36 * 4 * (32 * 128 * 128 + 3 * 8192)
    found = spec("llama-4-maverick", tmp_path)
    assert found.kv_bytes(131_072) == (12 * 131_072 + 36 * 8192) * 2 * 8 * 128 * 2
    # Step's 8 groups of 64 query heads are its KV heads; three of four layers keep 512 tokens.
    found = spec("step-3.5-flash", tmp_path)
    assert (found.num_kv_heads, found.window_heads, found.shared_intermediate) == (8, 96, 1280)
    assert found.kv_bytes(131_072) == (12 * 131_072 + 33 * 512) * 2 * 8 * 128 * 2
