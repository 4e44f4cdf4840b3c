"""Reading a config.json: the shipped models from their published files, each kind of key, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertflow.model import model_from_dict
from sim.paths import CONF
from sim.specs.hf_config import model_name
from sim.specs.hf_layers import shortest
from sim.specs.model_file import ReadModel, read_model_file
from tests.unit.specs.hf_configs import PUBLISHED as OLDER
from tests.unit.specs.hf_configs import RECENT

SHIPPED = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "auto")
PUBLISHED = OLDER | RECENT

SMALL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MLA = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 12,
}


def read(folder: Path, config: object) -> ReadModel:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_model_file(folder / "config.json")


def small(folder: Path, **changes: Any) -> ReadModel:
    return read(folder, {**SMALL, **changes})


def test_every_shipped_model_has_its_published_file() -> None:
    assert sorted(PUBLISHED) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_published_file_gives_what_is_shipped(name: str, tmp_path: Path) -> None:
    shipped = asdict(model_from_dict(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))))
    found = asdict(read(tmp_path, PUBLISHED[name]).spec)
    for own in ("name", "source"):
        del shipped[own], found[own]
    assert found == shipped


def test_a_folder_stands_for_its_file_and_gives_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "My Model-8x1B"
    folder.mkdir()
    assert read(folder, SMALL) == read_model_file(folder)
    assert read_model_file(folder).spec.name == "my-model-8x1b"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--Qwen--Qwen3-30B-A3B/snapshots/0123abc/config.json", "qwen3-30b-a3b"),
        ("mixtral.json", "mixtral"),
        ("@@/config.json", "model"),
    ],
)
def test_names(path: str, name: str, tmp_path: Path) -> None:
    assert model_name(tmp_path / path) == name


def test_the_content_is_the_source_wherever_it_lies(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    sources = {read(tmp_path / folder, SMALL).spec.source for folder in ("a", "b")}
    assert len(sources) == 1
    assert sources != {small(tmp_path / "a", vocab_size=999).spec.source}


@pytest.mark.parametrize(
    ("pattern", "expected"), [("ffff", "f"), ("wfwf", "wf"), ("wfwfw", "wf"), ("wff", "wff"), ("llflf", "llflf")]
)
def test_the_shortest_pattern(pattern: str, expected: str) -> None:
    assert shortest(pattern) == expected


LINEAR = {"linear_num_heads": 2, "linear_head_dim": 8, "linear_conv_kernel_dim": 4}
GATED_DELTA = {
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
SPARSE = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 8}


@pytest.mark.parametrize(
    ("changes", "attention", "feed", "counts"),
    [
        ({}, "f", None, (4, 0, 0)),
        ({"sliding_window": 8}, "w", None, (4, 0, 0)),
        ({"sliding_window": 8, "use_sliding_window": False}, "f", None, (4, 0, 0)),
        ({"sliding_window": 4096, "max_position_embeddings": 4096}, "f", None, (4, 0, 0)),
        ({"sliding_window": 8, "max_window_layers": 1}, "fwww", None, (4, 0, 0)),
        ({"sliding_window": 8, "sliding_window_pattern": 2}, "wf", None, (4, 0, 0)),
        ({"sliding_window": 8, "sliding_window_pattern": "LLG"}, "wwf", None, (4, 0, 0)),
        ({"sliding_window": 8, "hybrid_layer_pattern": [0, 1, 1, 0]}, "fww", None, (4, 0, 0)),
        ({"sliding_window": 8, "local_layer_ids": [0, 2]}, "wf", None, (4, 0, 0)),
        ({"sliding_window": 8, "global_attn_every_n_layers": 4}, "wwwf", None, (4, 0, 0)),
        ({"attention_chunk_size": 8, "no_rope_layers": [1, 1, 0, 1]}, "ccf", None, (4, 0, 0)),
        ({"attention_chunk_size": 8, "no_rope_layers": []}, "cccf", None, (4, 0, 0)),
        ({**LINEAR, "full_attention_interval": 2}, "lf", None, (4, 0, 0)),
        ({"model_type": "minimax", "attn_type_list": [0, 0, 1, 0]}, "llf", None, (4, 0, 0)),
        (
            {"linear_attn_config": {"full_attn_layers": [2, 4], "num_heads": 2, "head_dim": 8}},
            "lf",
            None,
            (4, 0, 0),
        ),
        ({"first_k_dense_replace": 1}, "f", None, (3, 1, 0)),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, "f", "ddm", (1, 3, 0)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, "f", "dmm", (2, 2, 0)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, "f", None, (1, 3, 0)),
        ({"mlp_layer_types": ["sparse", "dense"] * 2}, "f", "md", (2, 2, 0)),
        ({"moe_layers_enum": "1,3"}, "f", "dm", (2, 2, 0)),
        ({"moe_layers": [3]}, "f", None, (1, 3, 0)),
        ({"interleave_moe_layer_step": 2}, "f", "dm", (2, 2, 0)),
        ({"expert_layer_period": 2, "expert_layer_offset": 0}, "f", "md", (2, 2, 0)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, "f", "dmm", (2, 2, 0)),
        ({"model_type": "kimi_linear", "layer_types": ["full_attention"] * 4}, "f", None, (3, 1, 0)),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "*E**-E", "num_hidden_layers": 6},
            "fffn",
            "mnd",
            (2, 1, 1),
        ),
        ({**MLA, **SPARSE}, "i", None, (4, 0, 0)),
        ({**MLA, **SPARSE, "indexer_types": ["full", "shared"] * 2}, "is", None, (4, 0, 0)),
        ({**MLA, **SPARSE, "index_topk_pattern": "FFSS"}, "iiss", None, (4, 0, 0)),
        ({**MLA, **SPARSE, "index_topk_freq": 2}, "iis", None, (4, 0, 0)),
        ({**MLA, **SPARSE, "layer_types": ["deepseek_sparse_attention"] * 4}, "i", None, (4, 0, 0)),
        (
            {**MLA, **SPARSE, **LINEAR, "layer_types": ["linear_attention", "deepseek_sparse_attention"] * 2},
            "li",
            None,
            (4, 0, 0),
        ),
        # What these models call full attention has an indexer all the same.
        *(
            ({**MLA, **SPARSE, "model_type": kind, "layer_types": ["full_attention"] * 4}, "i", None, counts)
            for kind, counts in (
                ("deepseek_v32", (4, 0, 0)),
                ("glm_moe_dsa", (4, 0, 0)),
                ("glm5_next_text", (1, 3, 0)),
                ("hy_v4", (3, 1, 0)),
                ("axk2", (3, 1, 0)),
            )
        ),
        ({**MLA, **SPARSE, **LINEAR, "model_type": "glm5_next_text"}, "llli", None, (1, 3, 0)),
        ({**MLA, "layer_types": ["full_attention"] * 4}, "f", None, (4, 0, 0)),
        (
            {"model_type": "granitemoehybrid", "layers_block_type": ["attention"] * 4},
            "f",
            None,
            (4, 0, 0),
        ),
        (
            {"model_type": "nemotron_h", "layer_types": ["attention", "moe", "attention", "mlp"]},
            "f",
            "md",
            (1, 1, 0),
        ),
    ],
)
def test_layers(
    changes: dict[str, Any], attention: str, feed: str | None, counts: tuple[int, int, int], tmp_path: Path
) -> None:
    spec = small(tmp_path, **changes).spec
    assert (spec.attention_pattern, spec.feed_pattern) == (attention, feed)
    assert (spec.num_layers, spec.num_dense_layers, spec.num_bare_layers) == counts


@pytest.mark.parametrize(
    ("quantised", "experts", "weights"),
    [
        ({"quant_method": "mxfp4"}, 4.25, 16),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8, 8),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, 9, 9),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, 4.25, 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, 4.25, 4.25),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["self_attn"]}, 4 + 20 / 128, 16),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, 4.5),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            4 + 1 / 8 + 32 / 16384,
            4 + 1 / 8 + 32 / 16384,
        ),
        ({"load_in_8bit": True}, 8, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*self_attn*"]}, 4.5, 16),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}}
                },
                "ignore": [*(f"model.layers.{at}.self_attn.q_proj" for at in range(4)), "re:.*gate$", "lm_head"],
                "kv_cache_scheme": {"num_bits": 8},
            },
            4.5,
            16,
        ),
        # Half of the layers' experts stay as they are.
        ({"quant_method": "fp8", "ignored_layers": ["layers.0.mlp.experts", "layers.1.mlp.experts"]}, 12, 8),
        ({"quant_method": "fp8", "modules_to_not_convert": ["re:.*shared_expert.*"]}, 8, 8),
        ({"quant_method": "quip"}, 16, 16),
    ],
)
def test_bits(quantised: dict[str, Any], experts: float, weights: float, tmp_path: Path) -> None:
    found = small(tmp_path, quantization_config=quantised)
    assert (found.spec.expert_bits, found.spec.weight_bits) == (experts, weights)
    assert (found.spec.embedding_bits, found.spec.kv_bits) == (16, 8 if "kv_cache_scheme" in quantised else 16)
    assert ("say model.expert_bits" in " ".join(found.assumed)) == (quantised.get("quant_method") == "quip")


def test_attention_that_is_not_converted_counts_by_its_weights(tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}
    found = small(tmp_path, quantization_config=quantised, n_shared_experts=1)
    spec = found.spec
    total = spec.attention_params + spec.shared_params
    assert spec.weight_bits == pytest.approx((16 * spec.attention_params + 8 * spec.shared_params) / total)
    assert any("a mean" in text for text in found.derived)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tie_word_embeddings": None}, "tie_word_embeddings is false"),
        ({"torch_dtype": None}, "weights take 16 bits"),
        ({"num_key_value_heads": None}, "num_key_value_heads is num_attention_heads, 4"),
        ({"sliding_window": 8}, "every layer has the window"),
        ({"model_type": "laguna"}, "the first 1 of 4 layers are dense"),
        ({"num_mtp_modules": 3}, "num_mtp_modules=3: heads that the published files do not hold"),
        ({"model_type": "qwen3_next", **GATED_DELTA}, "1 head of multi-token prediction, which the file does not name"),
        ({**LINEAR, "full_attention_interval": 2}, "32 bits a value"),
        ({"num_kv_shared_layers": 2}, "counted with one of their own"),
        ({"kv_source_layers": [0, 0, 2, 2]}, "counted with one of their own"),
        ({"model_type": "nova_moe"}, "model_type 'nova_moe' is not known here: its keys are read as those of others"),
        ({"model_type": None}, "there is no model_type: its keys are read as those of others"),
        ({"num_experts": 16}, "num_experts=16 is taken, and num_local_experts=8 left aside"),
        ({"moe_topk": 4}, "num_experts_per_tok=2 is taken, and moe_topk=4 left aside"),
    ],
)
def test_what_the_file_does_not_say_is_told(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said not in " ".join(small(tmp_path).assumed)
    assert said in " ".join(small(tmp_path, **changes).assumed)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_published_file_is_of_a_known_kind(name: str, tmp_path: Path) -> None:
    assumed = " ".join(read(tmp_path, PUBLISHED[name]).assumed)
    assert "model_type" not in assumed
    assert "left aside" not in assumed


@pytest.mark.parametrize("inner", ["text_config", "llm_config", "language_config"])
def test_the_language_part_of_a_larger_file(inner: str, tmp_path: Path) -> None:
    whole = {"model_type": "seer", inner: SMALL, "vision_config": {"hidden_size": 7}, "tie_word_embeddings": True}
    found = read(tmp_path, whole)
    assert (found.spec.hidden_size, found.spec.tied_embeddings) == (64, True)
    assert any("pictures" in text for text in found.assumed)


def test_infinity_in_a_key_that_tells_of_no_size_is_no_harm(tmp_path: Path) -> None:
    text = json.dumps({**SMALL, "time_step_limit": [0.0, float("inf")]})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert "Infinity" in text
    assert read_model_file(tmp_path).spec.hidden_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": None}, "is of no Mixture of Experts"),
        ({"num_local_experts": 1}, "is of no Mixture of Experts"),
        ({"num_local_experts": -8}, r"num_local_experts: is -8, not a whole number in \[0, 65535\]"),
        ({"num_local_experts": float("nan")}, "num_local_experts: is nan, not a whole number"),
        ({"num_local_experts": True}, "num_local_experts: is True"),
        ({"num_experts_per_tok": 9}, r"model.top_k=9 is outside \[1, 8\]"),
        ({"hidden_size": "64"}, "hidden_size: is '64'"),
        ({"hidden_size": 10**40}, "hidden_size: is a huge number"),
        ({"hidden_size": [64, 65]}, r"hidden_size: is \[64, 65\]"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": None}, "is of no language model"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers: is 10000000"),
        ({"layer_types": ["full_attention"]}, "layer_types: has 1 entries for 4 layers"),
        ({"layer_types": ["nonsense"] * 4}, "nonsense.* is none"),
        ({"layer_types": {"a": 1}}, "layer_types: is a table of 1, not a list of str"),
        ({"layer_types": ["linear_attention"] * 4}, "no keys that are known to tell its sizes"),
        ({"mlp_layer_types": ["dense"] * 4}, r"num_layers=0 is outside"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 does not divide"),
        ({"torch_dtype": "int3"}, "torch_dtype: is 'int3'"),
        ({"is_encoder_decoder": True}, "of an encoder and a decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 99}}, "quantization_config.bits: is 99"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}}, "group_size: is 0"),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": "all"}}, "ignored_layers: is 'all'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        small(tmp_path, **changes)
    text = str(refusal.value)
    assert text.startswith(str(tmp_path))
    assert len(text) <= 300
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds no table"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"a": ' * 100_000, "nested too deeply|is no JSON"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b" " * (17 << 20), "has more than"),
        (b"GGUF", "file"),
    ],
)
def test_files_that_are_no_config(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_model_file(path)
    assert len(str(refusal.value)) <= 300


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: file: does not exist"):
        read_model_file(tmp_path)
