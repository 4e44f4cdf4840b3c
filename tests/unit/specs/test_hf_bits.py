"""Bits by the lists of published quantised models: which names of modules count, and of which weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from sim.paths import CONF
from sim.specs.hf_modules import ATTENTION, EXPERTS, FEED, SHARED, named
from sim.specs.model_file import ReadModel, read_model_file

QWEN3 = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
NEXT = {
    **QWEN3,
    "model_type": "qwen3_next",
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
}
GLM = {
    "model_type": "glm4_moe",
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
W8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
W4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def read(folder: Path, model: dict[str, Any], **changes: Any) -> ReadModel:
    (folder / "config.json").write_text(json.dumps({**model, **changes}), encoding="utf-8")
    return read_model_file(folder)


def bits(folder: Path, model: dict[str, Any], **quantised: Any) -> tuple[float, float]:
    """Of experts, and of the other matrices of layers."""
    spec = read(folder, model, quantization_config=quantised).spec
    return spec.expert_bits, spec.weight_bits


def groups(*found: tuple[list[str], dict[str, Any]]) -> dict[str, Any]:
    """A config of compressed-tensors whose groups have these targets and weights."""
    named_groups = {f"group_{at}": {"targets": one, "weights": weights} for at, (one, weights) in enumerate(found)}
    return {"quant_method": "compressed-tensors", "config_groups": named_groups}


def in_layers(count: int, *names: str) -> list[str]:
    return ["lm_head", *(f"model.layers.{at}.{name}" for at in range(count) for name in names)]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (QWEN3, in_layers(48, "input_layernorm", "post_attention_layernorm", "mlp.gate")),
        (QWEN3, in_layers(48, "self_attn.q_norm", "self_attn.k_norm")),
        (NEXT, in_layers(48, "mlp.gate", "mlp.shared_expert_gate", "linear_attn.conv1d", "linear_attn.in_proj_ba")),
        (
            NEXT,
            in_layers(48, "linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.A_log", "linear_attn.norm"),
        ),
        (QWEN3, [f"model.visual.blocks.{at}.{name}" for at in range(27) for name in ("attn.qkv", "mlp.linear_fc1")]),
        (QWEN3, [f"vision_model.model.layers.{at}.self_attn.q_proj" for at in range(34)]),
        (QWEN3, ["audio_tower.layers.0.self_attn", "multi_modal_projector", "mtp.layers.0.self_attn.q_proj", "mtp.fc"]),
        (QWEN3, ["model.layers.48.self_attn.q_a_proj", "model.layers.61.mlp.experts"]),
        (
            GLM,
            in_layers(47, "post_attention_layernorm", "mlp.gate.e_score_correction_bias", "self_attn.q_proj.bias"),
        ),
        (QWEN3, ["re:.*mlp.gate$", "re:.*router.*", "*.mlp.gate*", "gate", "re:.*_layernorm$", "model.norm"]),
    ],
)
def test_names_that_no_size_depends_on_change_nothing(model: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    assert bits(tmp_path, model, **FP8, modules_to_not_convert=names) == (8, 8)
    assert bits(tmp_path, model, **groups((["Linear"], W8)), ignore=names) == (8, 8)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.self_attn", {ATTENTION}),
        ("re:.*self_attn.*", {ATTENTION}),
        ("*.self_attn*", {ATTENTION}),
        ("re:.*\\.(q|k|v|o)_proj$", {ATTENTION}),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", {ATTENTION}),
        ("backbone.layers.0.mixer.in_proj", {ATTENTION}),
        ("model.layers.0.mlp.shared_experts.up_proj", {SHARED}),
        ("re:.*shared_expert.*", {SHARED}),
        ("model.layers.0.mlp.experts.7.up_proj", {EXPERTS}),
        ("re:.*block_sparse_moe\\.experts.*", {EXPERTS}),
        ("re:.*mlp\\.(gate|up|gate_up|down)_proj.*", {FEED}),
        ("model.layers.0.feed_forward.w[123]", {FEED}),
        ("model.layers.0.mlp", {EXPERTS, SHARED, FEED}),
        ("re:model\\.layers\\.0\\..*", {EXPERTS, ATTENTION, SHARED, FEED}),
        ("model.layers.0.", {EXPERTS, ATTENTION, SHARED, FEED}),
        ("lm_head", set()),
        ("model.embed_tokens", set()),
        ("model.layers.0.self_attn.indexer.wk", set()),
        ("", set()),
        ("(((" * 90, set()),
        ("re:" + "(a|b)" * 50, set()),
    ],
)
def test_what_a_name_speaks_of(name: str, parts: set[str]) -> None:
    assert {part for one in named(name) for part in one.parts} == parts


def test_layers_of_a_pattern() -> None:
    found = [one.layer for one in named("re:model\\.layers\\.(0|[2-3]|1[0-1])\\.self_attn.*")]
    assert sorted({at for at in found if at is not None}) == [0, 2, 3, 10, 11]
    assert len(found) == 5
    assert [one.layer for one in named("re:model.layers.\\d+.self_attn")] == [None]


def test_a_share_is_by_the_weights_of_the_layers_named(tmp_path: Path) -> None:
    spec = read(tmp_path, GLM).spec
    first = spec.attention_params
    others = 46 * first + 45 * spec.shared_params + spec.dense_params
    # The one dense layer, then a whole layer.
    assert bits(tmp_path, GLM, **FP8, ignore=["model.layers.0.mlp.up_proj"])[1] == pytest.approx(
        8 + 8 * spec.dense_params / others
    )
    found = bits(tmp_path, GLM, **FP8, ignore=["model.layers.1"])
    assert found[1] == pytest.approx(8 + 8 * (first + spec.shared_params) / others)
    assert found[0] == pytest.approx(8 + 8 / 45)
    # One expert of one layer.
    experts = bits(tmp_path, GLM, **FP8, ignore=["model.layers.1.mlp.experts.5.up_proj"])[0]
    assert experts == pytest.approx(8 + 8 / 45 / 128)


def test_linear_attention_may_be_left_out_alone(tmp_path: Path) -> None:
    spec = read(tmp_path, NEXT).spec
    linear, full = 36 * spec.linear_params, 12 * spec.attention_params
    total = linear + full + 48 * spec.shared_params
    for name, left in (("linear_attn", linear), ("self_attn", full), ("re:.*attn.*", linear + full)):
        found = bits(tmp_path, NEXT, **FP8, modules_to_not_convert=[name])[1]
        assert found == pytest.approx(8 + 8 * left / total), name


def test_the_block_beside_the_experts_is_named_as_a_dense_one(tmp_path: Path) -> None:
    shared = {**GLM, "first_k_dense_replace": 0}
    spec = read(tmp_path, shared).spec
    total = spec.attention_params + spec.shared_params
    found = bits(tmp_path, shared, **FP8, ignore=["re:.*mlp\\.(gate|up|down)_proj$"])[1]
    assert found == pytest.approx(8 + 8 * spec.shared_params / total)


EXPERTS_ONLY = ["re:.*mlp\\.experts\\..*(gate|up|down)_proj$"]


@pytest.mark.parametrize(
    ("found", "expected", "differ"),
    [
        ([(["re:.*self_attn.*"], W8), (EXPERTS_ONLY, W4)], (4.5, 8), True),
        ([(EXPERTS_ONLY, W4), (["re:.*self_attn.*"], W8)], (4.5, 8), True),
        ([(EXPERTS_ONLY, W4), (["Linear"], W8)], (4.5, 8), True),
        ([(["Linear"], W8), (EXPERTS_ONLY, W4)], (4.5, 8), True),
        ([(EXPERTS_ONLY, W4)], (4.5, 16), False),
        ([(["re:.*self_attn.*"], W8)], (16, 8), False),
        ([(["Linear"], W8)], (8, 8), False),
    ],
)
def test_groups_count_for_what_they_target_in_any_order(
    found: list[tuple[list[str], dict[str, Any]]], expected: tuple[float, float], differ: bool, tmp_path: Path
) -> None:
    read_model = read(tmp_path, QWEN3, quantization_config=groups(*found))
    assert (read_model.spec.expert_bits, read_model.spec.weight_bits) == expected
    assert any("differ in bits" in text for text in read_model.assumed) == differ


def test_parts_with_bits_of_their_own_are_a_mean(tmp_path: Path) -> None:
    spec = read(tmp_path, GLM).spec
    attention, shared = 46 * spec.attention_params, 45 * spec.shared_params
    dense = spec.dense_params
    quantised = groups((["re:.*self_attn.*"], W8), (["re:.*shared_experts.*"], W4))
    expected = (8 * attention + 4.5 * shared + 16 * dense) / (attention + shared + dense)
    assert bits(tmp_path, GLM, **quantised) == (16, pytest.approx(expected))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    "left_out",
    [
        {"dynamic": {"-:.*self_attn.*": {}}},
        {"modules_to_not_convert": [], "ignored_layers": ["self_attn"]},
        {"ignored_layers": None, "exclude_modules": ["*self_attn*"], "ignore": ["lm_head"]},
        {"extra_config": {"model.layers.*.self_attn": {"bits": 16, "data_type": "fp"}}},
        {"quantization": {"exclude_modules": ["*self_attn*"]}},
    ],
)
def test_every_key_of_names_counts(left_out: dict[str, Any], tmp_path: Path) -> None:
    assert bits(tmp_path, QWEN3, **GPTQ, **left_out) == (4 + 20 / 128, 16)


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        ({**GPTQ, "dynamic": {"+:.*down_proj.*": {"bits": 8}}}, "gives some modules other bits"),
        ({"bits": 4, "group_size": 64, "model.layers.0.mlp": {"bits": 8}}, "gives some modules other bits"),
        ({**FP8, "ignore": ["re:^(?!.*experts).*$"]}, "with a look-ahead are not read"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT3"}, "say model.kv_bits"),
    ],
)
def test_what_is_not_read_is_told(quantised: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in " ".join(read(tmp_path, QWEN3, quantization_config=quantised).assumed)


HQQ = {"weight_quant_params": {"nbits": 4, "group_size": 64}}
AO_INT4 = {"_type": "Int4WeightOnlyConfig", "_version": 1, "_data": {"group_size": 64}}
QUARK_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}


@pytest.mark.parametrize(
    ("quantised", "expected"),
    [
        ({"quant_method": "exl2", "bits": 4.0, "head_bits": 6}, 4),
        ({"quant_method": "exl2", "bits": 4.65}, 4.65),
        ({"quant_method": "exl3", "bits": 3.0, "group_size": -1}, 3),
        ({"quant_method": "exl3", "bits": 2.25, "head_bits": 6}, 2.25),
        ({"quant_method": "gptq", "bits": 4.0, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "hqq", "quant_config": HQQ}, 4.5),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8, "group_size": None}}}, 8),
        ({"quant_method": "hqq", "quant_config": {"self_attn.q_proj": HQQ, "mlp.experts": HQQ}}, 4.5),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 32}}, 5),
        ({"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int4_weight"}, 4.25),
        ({"quant_method": "torchao", "quant_type": "float8_weight_only"}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": AO_INT4}}, 4.5),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "NVFP4WeightOnlyConfig"}}}, 4.5),
        ({"quant_method": "quark", "global_quant_config": {"weight": QUARK_FP4}}, 4.25),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
            },
            8,
        ),
        ({"quant_method": "quark", "global_quant_config": {"weight": {**QUARK_FP4, "dtype": "uint4"}}}, 4 + 20 / 32),
        ({"quant_method": "quanto", "weights": "int4"}, 4.25),
        ({"quant_method": "quanto", "weights": "float8"}, 8),
    ],
)
def test_quantisers_with_a_form_of_their_own(quantised: dict[str, Any], expected: float, tmp_path: Path) -> None:
    assert bits(tmp_path, QWEN3, **quantised) == (pytest.approx(expected), pytest.approx(expected))


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "hqq"},
        {"quant_method": "hqq", "quant_config": {"a": HQQ, "b": {"weight_quant_params": {"nbits": 8}}}},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "ModuleFqnToConfig", "_data": {}}}},
        {"quant_method": "torchao"},
        {"quant_method": "quark"},
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "odd"}}},
        {"quant_method": "quanto", "weights": "none"},
    ],
)
def test_bits_that_are_not_told_in_a_known_way_are_asked_for(quantised: dict[str, Any], tmp_path: Path) -> None:
    found = read(tmp_path, QWEN3, quantization_config=quantised)
    assert (found.spec.expert_bits, found.spec.weight_bits) == (16, 16)
    assert "taken as not quantised; say model.expert_bits and model.weight_bits" in " ".join(found.assumed)


@pytest.mark.parametrize("bits", ["4", 0, -4.0, 17, float("nan"), True, None])
def test_bits_that_are_no_number_of_bits_are_refused(bits: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bits") as refused:
        read(tmp_path, QWEN3, quantization_config={"quant_method": "exl3", "bits": bits})
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"bits": 4, "group_size": 64}, 4.5),
        ({"bits": 8, "group_size": 32}, 9),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, 4.25),
    ],
)
def test_mlx(key: str, table: dict[str, Any], expected: float, tmp_path: Path) -> None:
    found = read(tmp_path, QWEN3, **{key: table})
    spec = found.spec
    assert (spec.expert_bits, spec.weight_bits, spec.embedding_bits) == (expected,) * 3
    assert any("taken as MLX's" in text for text in found.assumed)
    left = read(tmp_path, QWEN3, **{key: {**table, "model.layers.0.self_attn": False}}).spec
    assert left.weight_bits == pytest.approx(expected + (16 - expected) / 48)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 16),
        ({"torch_dtype": "float32"}, 32),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, 8),
        ({"quantization_config": {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}}, 8),
        ({"quantization_config": {**groups((["Linear"], W8)), "kv_cache_scheme": {"num_bits": 8}}}, 8),
        ({"torch_dtype": "float32", "quantization_config": {**FP8, "kv_cache_scheme": {"num_bits": 8}}}, 8),
    ],
)
def test_bits_of_cached_values(changes: dict[str, Any], expected: float, tmp_path: Path) -> None:
    found = read(tmp_path, QWEN3, **changes)
    assert found.spec.kv_bits == expected
    assert any("cached keys and values take 32 bits" in one for one in found.derived) == ("torch_dtype" in changes)


INDEXER = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_topk": 2048,
    "index_n_heads": 64,
}


@pytest.mark.parametrize(("width", "expected"), [(128, 8.25), (256, 8.25), (64, 8.5), (192, 8 + 64 / 192)])
def test_index_keys_are_kept_in_fp8_with_their_scales(width: int, expected: float, tmp_path: Path) -> None:
    found = read(tmp_path, GLM, **INDEXER, index_head_dim=width)
    assert found.spec.index_bits == pytest.approx(expected)
    assert found.spec.index_key_bytes == width + 4 * -(-width // 128)
    assert any("index keys are kept in fp8" in one for one in found.assumed)


def shipped(name: str) -> ModelSpec:
    return model_from_dict(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro", "glm-5", "glm-5.3-flash"])
def test_an_index_key_of_a_shipped_model_takes_132_bytes(name: str) -> None:
    assert shipped(name).index_key_bytes == 132


def test_layers_of_kimi_linear_that_attend() -> None:
    """full_attn_layers of its config.json, which counts from 1: 4, 8, 12, 16, 20, 24 and 27."""
    found = [at for at, layer in enumerate(shipped("kimi-linear-48b-a3b").layers) if layer.attention == "f"]
    assert found == [3, 7, 11, 15, 19, 23, 26]


@pytest.mark.parametrize(("kind", "num_layers", "expected"), [("gpt_oss", 5, "wfwfw"), ("gemma4_text", 8, "wwwwwfwf")])
def test_windows_where_the_file_has_no_layer_types(kind: str, num_layers: int, expected: str, tmp_path: Path) -> None:
    found = read(tmp_path, QWEN3, model_type=kind, num_hidden_layers=num_layers, sliding_window=128)
    assert "".join(layer.attention for layer in found.spec.layers) == expected
    assert any("as transformers takes them to be" in text for text in found.assumed)


def test_full_layers_of_gemma_4_have_no_matrix_of_values() -> None:
    spec = shipped("gemma-4-26b-a4b")
    assert spec.tied_kv
    # Queries and output of 16 heads, keys of 2, each 512 wide; windowed layers have values, too.
    assert spec.mixer_params("f") == 2816 * 512 * (16 + 16 + 2)
    assert spec.mixer_params("w") == 2816 * 256 * (16 + 16 + 8 + 8)
    # What is cached are both: keys have a norm with weights and positions, values neither.
    assert spec.entry_bytes("f") == 2 * 2 * 512 * 2


def test_keys_and_values_are_tied_where_the_kind_has_it(tmp_path: Path) -> None:
    gemma = {**QWEN3, "layer_types": ["sliding_attention", "full_attention"] * 24, "sliding_window": 128}
    for kind, flag, tied in (("gemma4_text", True, True), ("gemma4_text", None, False), ("qwen3_moe", True, False)):
        assert read(tmp_path, gemma, model_type=kind, attention_k_eq_v=flag).spec.tied_kv == tied


def test_more_patterns_than_can_be_read_are_refused(tmp_path: Path) -> None:
    names = [f"re:.*layers.({at}|1)(a|b)" for at in range(1001)]
    with pytest.raises(ValueError, match="quantization_config: has more than 1000 patterns of names"):
        bits(tmp_path, QWEN3, **FP8, ignore=names)


def test_a_quantiser_that_is_a_word_alone_is_not_taken_for_nothing_silently(tmp_path: Path) -> None:
    found = read(tmp_path, QWEN3, quantization_config="awq")
    assert found.spec.expert_bits == 16
    assert any("quantization_config is a word, 'awq'" in one for one in found.assumed)
