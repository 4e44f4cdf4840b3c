"""What becomes of a GGUF header: each architecture's ways of naming layers, attention and experts, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertflow.model import ModelSpec
from sim.specs.gguf_header import read_gguf
from sim.specs.model_file import ReadModel
from tests.support.gguf_models import (
    Info,
    deepseek_v2_lite,
    delta,
    dense,
    ends,
    experts,
    gqa,
    in_parts,
    mla,
    norms,
    tiny,
    tiny_hybrid,
    write,
)

H, E = 256, 8


def read(tmp_path: Path, arch: str, keys: dict[str, Any], tensors: list[Info]) -> ReadModel:
    base = {
        "general.name": "M",
        ".embedding_length": H,
        ".attention.head_count": 8,
        ".attention.head_count_kv": 2,
        ".expert_count": E,
        ".expert_used_count": 2,
    }
    made = {key: value for key, value in (base | keys).items() if value is not None}
    return read_gguf(write(tmp_path / "m.gguf", arch, made, [*ends(H, 1000, "Q8_0"), *tensors]))


def blocks(count: int, *more: Any, width: int = 512) -> list[Info]:
    """Ordinary attention and experts."""
    made: list[Info] = []
    for layer in range(count):
        made += gqa(layer, H, 8, 2, 32, kind="Q8_0") + experts(layer, H, width, E, "Q4_K")
    return [*made, *more]


def others(spec: ModelSpec) -> dict[str, Any]:
    """Fields that are not at their default, but those of every model."""
    from dataclasses import fields

    plain = {"source", "name", "weight_bits", "expert_bits", "embedding_bits", "extra_bytes", "hidden_size"}
    plain |= {"num_experts", "top_k", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "num_layers"}
    return {f.name: v for f in fields(spec) if f.name not in plain and (v := getattr(spec, f.name)) != f.default}


# -- bytes ---------------------------------------------------------------------------------------------------


def test_a_dense_block_shared_experts_and_experts_of_two_sizes(tmp_path: Path) -> None:
    found = read_gguf(write(tmp_path / "m.gguf", *tiny()))
    spec = found.spec
    assert (spec.num_layers, spec.num_dense_layers, spec.num_experts, spec.top_k) == (2, 1, 8, 2)
    assert (spec.hidden_size, spec.expert_intermediate, spec.vocab_size) == (256, 512, 1000)
    assert (spec.shared_intermediate, spec.dense_intermediate) == (512, 768)
    small = 3 * 256 * 512 * 144 // 256  # three matrices of Q4_K
    large = 2 * 256 * 512 * 144 // 256 + 512 * 256 * 210 // 256  # the last of Q6_K
    assert spec.mean_expert_bytes == (small + large) // 2
    assert found.derived[0] == "experts take 221 kB to 255 kB by layer (Q4_K, Q6_K), 238 kB in the mean"
    # Attention 8.5 bits, dense 4.5, shared 5.5: of all the mean.
    attention, plain, shared = 3 * 256 * (2 * 256 + 2 * 64), 3 * 256 * 768, 2 * 3 * 256 * 512
    mean = (8.5 * attention + 4.5 * plain + 5.5 * shared) / (attention + plain + shared)
    assert spec.weight_bits == pytest.approx(mean)
    # Embedding and head Q6_K, two routers F32.
    wide = (6.5625 * 2 * 256_000 + 32 * 2 * 256 * 8) / (2 * 256_000 + 2 * 256 * 8)
    assert spec.embedding_bits == pytest.approx(wide)
    assert spec.extra_bytes == 5 * 256 * 4  # five norms
    assert found.assumed == ("the KV cache takes 16 bits a value",)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1", "Q2_K", "Q3_K", "IQ1_S", "IQ2_XXS", "IQ4_XS", "TQ1_0"])
def test_expert_bytes_are_exact_whatever_the_type(kind: str, tmp_path: Path) -> None:
    bits = {"F32": 32, "BF16": 16, "Q8_0": 8.5, "Q5_1": 6, "Q2_K": 2.625, "Q3_K": 3.4375, "IQ1_S": 1.5625}
    bits |= {"IQ2_XXS": 2.0625, "IQ4_XS": 4.25, "TQ1_0": 1.6875}
    tensors = [*gqa(0, H, 8, 2, 32), *experts(0, H, 768, E, kind)]
    spec = read(tmp_path, "olmoe", {".block_count": 1}, tensors).spec
    assert spec.mean_expert_bytes == 3 * H * 768 * bits[kind] / 8
    assert spec.expert_bits == pytest.approx(bits[kind])


def test_a_mean_that_is_no_whole_number_is_rounded_up(tmp_path: Path) -> None:
    # 8 experts of 3 x 256 x 512 weights in Q8_0, and of one layer a scale of 4 bytes for all of them together.
    one = [Info("blk.0.ffn_up_exps.scale", (1,), "F32")]
    tensors = [*gqa(0, H, 8, 2, 32), *experts(0, H, 512, E, "Q8_0"), *one]
    spec = read(tmp_path, "olmoe", {".block_count": 1}, tensors).spec
    assert spec.mean_expert_bytes == 3 * 256 * 512 * 34 // 32 + 1


def test_biases_and_scales_belong_to_the_expert(tmp_path: Path) -> None:
    more = [Info("blk.0.ffn_down_exps.bias", (H, E), "F32"), Info("blk.0.ffn_up_exps.scale", (E,), "F32")]
    spec = read(tmp_path, "gpt-oss", {".block_count": 1}, blocks(1, *more)).spec
    assert spec.mean_expert_bytes == 3 * 256 * 512 * 144 // 256 + 4 * 256 + 4


def test_gate_and_up_in_one_matrix_count_as_two(tmp_path: Path) -> None:
    spec = read_gguf(write(tmp_path / "m.gguf", *tiny_hybrid())).spec
    assert (spec.expert_matrices, spec.expert_intermediate) == (3, 256)
    assert spec.mean_expert_bytes == 3 * 256 * 256 * 144 // 256
    assert spec.tied_embeddings


def test_one_tensor_an_expert_as_until_spring_of_2024(tmp_path: Path) -> None:
    tensors = gqa(0, H, 8, 2, 32) + [Info("blk.0.ffn_gate_inp.weight", (H, E), "F16")]
    for expert in range(E):
        tensors += [Info(f"blk.0.ffn_{role}.{expert}.weight", (H, 512), "Q4_0") for role in ("gate", "up")]
        tensors += [Info(f"blk.0.ffn_down.{expert}.weight", (512, H), "Q8_0")]
    spec = read(tmp_path, "llama", {".block_count": 1}, tensors).spec
    assert spec.mean_expert_bytes == 2 * 256 * 512 * 18 // 32 + 512 * 256 * 34 // 32
    assert (spec.num_layers, spec.num_dense_layers, spec.expert_matrices) == (1, 0, 3)


def test_experts_without_a_gate_have_two_matrices(tmp_path: Path) -> None:
    tensors = [*gqa(0, H, 8, 2, 32), *experts(0, H, 512, E, "Q8_0", gated=False)]
    spec = read(tmp_path, "nomic-bert-moe", {".block_count": 1}, tensors).spec
    assert others(spec) == {"expert_matrices": 2, "expert_intermediate": 512}


# -- layers --------------------------------------------------------------------------------------------------


def test_dense_layers_between_the_others(tmp_path: Path) -> None:
    """Llama 4 Maverick: every second block has experts; three of four attend within a chunk."""
    tensors: list[Info] = []
    for layer in range(4):
        tensors += gqa(layer, H, 8, 2, 32)
        feed = experts(layer, H, 512, E) + dense(layer, H, 512, "_shexp") if layer % 2 else dense(layer, H, 768)
        tensors += feed
    spec = read(tmp_path, "llama4", {".block_count": 4}, tensors).spec
    assert others(spec) == {
        "expert_intermediate": 512,
        "shared_intermediate": 512,
        "num_dense_layers": 2,
        "dense_intermediate": 768,
        "feed_pattern": "dm",
        "attention_pattern": "cccf",
        "chunk": 8192,
    }


def test_an_ordinary_part_beside_the_experts_is_a_shared_one(tmp_path: Path) -> None:
    """Gemma 4: windows by an array, with heads of their own; no values of their own in full blocks."""
    tensors: list[Info] = []
    for layer, windowed in enumerate((True, True, False)):
        tensors += gqa(layer, H, 8, 4 if windowed else 1, 32 if windowed else 64)
        tensors += experts(layer, H, 512, E) + dense(layer, H, 768)
    keys = {
        ".block_count": 3,
        ".attention.head_count_kv": [4, 4, 1],
        ".attention.sliding_window": 1024,
        ".attention.sliding_window_pattern": [True, True, False],
        ".attention.key_length": 64,
        ".attention.value_length": 64,
        ".attention.key_length_swa": 32,
        ".attention.value_length_swa": 32,
    }
    spec = read(tmp_path, "gemma4", keys, tensors).spec
    assert others(spec) == {
        "expert_intermediate": 512,
        "shared_intermediate": 768,
        "attention_pattern": "wwf",
        "window": 1024,
        "window_kv_heads": 4,
        "window_head_dim": 32,
    }
    assert (spec.num_kv_heads, spec.head_dim) == (1, 64)


@pytest.mark.parametrize(
    ("arch", "keys", "pattern"),
    [
        ("gpt-oss", {}, "wf"),
        ("exaone-moe", {}, "wwwf"),
        ("afmoe", {}, "wwwf"),
        ("smallthinker", {}, "fwww"),
        ("exaone-moe", {".attention.sliding_window_pattern": 3}, "wwf"),
        ("mimo2", {".attention.sliding_window_pattern": [0, 1, 1, 1, 0, 1, 1, 1, 0]}, "fwww"),
    ],
)
def test_which_blocks_have_a_window(arch: str, keys: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    keys = {".block_count": 8, ".attention.sliding_window": 128, **keys}
    spec = read(tmp_path, arch, keys, blocks(8)).spec
    assert (spec.attention_pattern, spec.window) == (pattern, 128)


def test_a_window_that_llama_cpp_does_not_heed_is_left_out_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, "phimoe", {".block_count": 1, ".attention.sliding_window": 131_072}, blocks(1))
    assert (found.spec.window, found.spec.attention_pattern) == (0, "f")
    assert "the window of 131072 tokens is left out: llama.cpp has none for phimoe" in found.derived


def test_matrices_that_no_formula_has_are_counted_and_said(tmp_path: Path) -> None:
    """AFMoE: a gate on what attention gives."""
    gate = [Info(f"blk.{layer}.attn_gate.weight", (H, H), "Q8_0") for layer in range(2)]
    found = read(tmp_path, "afmoe", {".block_count": 2}, blocks(2, *gate))
    assert found.spec.extra_attention_params == H * H
    assert found.spec.mixer_params("f") == H * (2 * 256 + 2 * 64) + H * H
    told = "of attn_gate the weights are counted, whatever else these matrices do is not modelled"
    assert told in found.derived


def test_widths_for_which_a_file_may_have_no_key(tmp_path: Path) -> None:
    tensors = [*gqa(0, H, 8, 2, 64), *experts(0, H, 512, E)]
    keys: dict[str, Any] = {".block_count": 1, ".rope.dimension_count": 64}
    assert read(tmp_path, "bailingmoe", keys, tensors).spec.head_dim == 64
    tensors = [*mla(0, H, 8, 0, 64, 16, 32, 32, split_kv=False), *experts(0, H, 512, E)]
    keys = {
        ".block_count": 1,
        ".attention.kv_lora_rank": 64,
        ".attention.key_length": 48,
        ".attention.value_length": 32,
    }
    assert read(tmp_path, "deepseek2", keys, tensors).spec.rope_dim == 16


def test_linear_attention_with_its_state(tmp_path: Path) -> None:
    """Qwen3-Next: three of four blocks; queries have a gate as wide as they are."""
    spec = read_gguf(write(tmp_path / "m.gguf", *tiny_hybrid())).spec
    assert spec.attention_pattern == "lllf"
    keys, values = 64 * 4, 64 * 8
    assert spec.linear_params == 256 * (2 * keys + values) + 256 * values * 2 + 4 * (2 * keys + values) + 256 * 16
    assert spec.linear_state == 64 * 512 + 3 * (512 + 2 * 4 * 64)
    assert spec.extra_attention_params == 256 * 256  # the gate of the queries
    assert spec.shared_gate


def test_delta_attention_beside_latent(tmp_path: Path) -> None:
    """Kimi Linear: blocks with a state have queries and keys, too."""
    tensors: list[Info] = []
    for layer in range(4):
        if layer == 3:
            tensors += mla(layer, H, 8, 0, 64, 16, 32, 32, split_kv=True)
        else:
            tensors += gqa(layer, H, 8, 8, 32) + [Info(f"blk.{layer}.ssm_beta.weight", (H, 8), "F16")]
        tensors += experts(layer, H, 512, E)
    keys = {
        ".block_count": 4,
        ".attention.head_count_kv": [0, 0, 0, 1],
        ".attention.kv_lora_rank": 64,
        ".attention.key_length": 80,
        ".attention.value_length": 64,
        ".attention.key_length_mla": 48,
        ".attention.value_length_mla": 32,
        ".rope.dimension_count": 16,
        ".kda.head_dim": 32,
        ".ssm.conv_kernel": 4,
    }
    spec = read(tmp_path, "kimi-linear", keys, tensors).spec
    assert others(spec) == {
        "expert_intermediate": 512,
        "attention": "mla",
        "kv_rank": 64,
        "rope_dim": 16,
        "nope_dim": 32,
        "v_dim": 32,
        "attention_pattern": "lllf",
        "linear_params": 4 * 256 * 256 + 256 * 8,
        "linear_state": 32 * 32 * 8 + 3 * 3 * 32 * 8,
    }


def test_blocks_of_a_state_attention_or_experts_alone(tmp_path: Path) -> None:
    """Nemotron 3: each block is one of them; experts work in a narrower width."""
    mamba = [Info("blk.0.ssm_in.weight", (H, 1024), "Q8_0"), Info("blk.0.ssm_out.weight", (512, H), "Q8_0")]
    latent = [
        Info("blk.2.ffn_latent_down.weight", (H, 128), "F16"),
        Info("blk.2.ffn_latent_up.weight", (128, H), "F16"),
    ]
    router, up, down = experts(2, 128, 512, E, "Q8_0", gated=False)
    tensors = [
        *mamba,
        *gqa(1, H, 8, 2, 32),
        router._replace(shape=(H, E)),
        up,
        down,
        *latent,
        *dense(2, H, 768, "_shexp", gated=False),
        *(info for layer in range(3) for info in norms(layer, H, "attn_norm")),
    ]
    keys = {
        ".block_count": 3,
        ".attention.head_count_kv": [0, 2, 0],
        ".ssm.conv_kernel": 4,
        ".ssm.inner_size": 512,
        ".ssm.state_size": 16,
        ".ssm.group_count": 2,
    }
    spec = read(tmp_path, "nemotron_h_moe", keys, tensors).spec
    assert others(spec) == {
        "expert_intermediate": 512,
        "expert_matrices": 2,
        "expert_hidden": 128,
        "shared_intermediate": 768,
        "attention_pattern": "lf",
        "num_bare_layers": 1,
        "linear_params": H * 1024 + 512 * H,
        "linear_state": 16 * 512 + 3 * (512 + 2 * 2 * 16),
    }
    assert spec.mean_expert_bytes == 2 * 128 * 512 * 34 // 32
    assert spec.router_params == H * E + 2 * H * 128


def test_short_convolutions(tmp_path: Path) -> None:
    """LFM2-MoE: no head, which is the embedding."""
    conv = [
        Info("blk.0.shortconv.in_proj.weight", (H, 3 * H), "F16"),
        Info("blk.0.shortconv.conv.weight", (3, H), "F32"),
    ]
    conv += [Info("blk.0.shortconv.out_proj.weight", (H, H), "F16")]
    tensors = [*conv, *gqa(1, H, 8, 2, 32), *dense(0, H, 768), *experts(1, H, 512, E)]
    keys = {".block_count": 2, ".attention.head_count_kv": [0, 2], ".shortconv.l_cache": 3}
    spec = read(tmp_path, "lfm2moe", keys, tensors).spec
    assert (spec.attention_pattern, spec.linear_state) == ("lf", 2 * H)
    assert spec.linear_params == H * 3 * H + 3 * H + H * H


def test_an_indexer_and_a_block_that_predicts_further_tokens(tmp_path: Path) -> None:
    """DeepSeek-V3.2: latent attention of chosen tokens; the block of the second token ahead is left out."""
    tensors: list[Info] = []
    for layer in range(3):
        tensors += mla(layer, H, 8, 96, 64, 16, 32, 32, split_kv=True) + experts(layer, H, 512, E)
        index = {"attn_q_b": (96, 4 * 48), "attn_k": (H, 48), "proj": (H, 4)}
        tensors += [Info(f"blk.{layer}.indexer.{name}.weight", shape, "F16") for name, shape in index.items()]
    tensors += [Info("blk.2.nextn.eh_proj.weight", (2 * H, H), "F16")]
    keys = {
        ".block_count": 3,
        ".nextn_predict_layers": 1,
        ".attention.q_lora_rank": 96,
        ".attention.kv_lora_rank": 64,
        ".attention.key_length": 80,
        ".attention.value_length": 64,
        ".attention.key_length_mla": 48,
        ".attention.value_length_mla": 32,
        ".rope.dimension_count": 16,
        ".attention.indexer.head_count": 4,
        ".attention.indexer.key_length": 48,
        ".attention.indexer.top_k": 2048,
    }
    found = read(tmp_path, "deepseek32", keys, tensors)
    assert others(found.spec) == {
        "expert_intermediate": 512,
        "attention": "mla",
        "kv_rank": 64,
        "rope_dim": 16,
        "nope_dim": 32,
        "v_dim": 32,
        "q_rank": 96,
        "attention_pattern": "i",
        "index_top_k": 2048,
        "index_heads": 4,
        "index_dim": 48,
        "index_bits": 8 + 32 / 48,
        "mtp_bytes": sum(info.num_bytes for info in tensors if info.name.startswith("blk.2.")),
    }
    assert found.spec.num_layers == 2
    # The whole of the third block: attention, indexer, experts, and what takes two embeddings together.
    heads = sum(info.num_bytes for info in tensors if info.name.startswith("blk.2."))
    told = f"are left out: {heads / 1e9:.3g} GB, loaded with model.mtp=true"
    assert f"1 of 3 blocks, which predict further tokens (MTP), {told}" in found.derived
    assert (found.spec.mtp_bytes, found.spec.mtp) == (heads, False)
    loaded = replace(found.spec, mtp=True)
    assert loaded.non_expert_bytes == found.spec.non_expert_bytes + heads
    assert loaded.total_expert_bytes == found.spec.total_expert_bytes
    two = sum(
        info.num_bytes for info in tensors if info.name.startswith(("blk.0", "blk.1")) and "_exps" not in info.name
    )
    assert found.spec.non_expert_bytes == two + sum(info.num_bytes for info in ends(H, 1000, "Q8_0"))


def test_blocks_that_predict_further_tokens_may_be_gone(tmp_path: Path) -> None:
    tensors = [info for layer in range(2) for info in (*gqa(layer, H, 8, 2, 32), *experts(layer, H, 512, E))]
    found = read(tmp_path, "glm4moe", {".block_count": 3, ".nextn_predict_layers": 1}, tensors)
    assert "which predict further tokens (MTP), are left out; the file does not hold them" in " ".join(found.derived)
    assert found.spec.mtp_bytes == 0
    with pytest.raises(ValueError, match=r"model\.mtp=true loads heads .* the model has none .*; leave it out"):
        replace(found.spec, mtp=True)


def test_heads_that_differ_by_block_are_those_of_most(tmp_path: Path) -> None:
    tensors = [*gqa(0, H, 8, 2, 32), *gqa(1, H, 8, 4, 32), *gqa(2, H, 8, 4, 32)]
    tensors += [info for layer in range(3) for info in experts(layer, H, 512, E)]
    found = read(tmp_path, "olmoe", {".block_count": 3, ".attention.head_count_kv": [2, 4, 4]}, tensors)
    assert found.spec.num_kv_heads == 4
    assert any("2 to 4 KV heads; 8 and 4 of most are used" in text for text in found.derived)


def test_widths_that_differ_by_block_are_their_mean_and_the_bytes_stay_exact(tmp_path: Path) -> None:
    tensors = [
        *gqa(0, H, 8, 2, 32),
        *gqa(1, H, 8, 2, 32),
        *experts(0, H, 512, E, "Q8_0"),
        *experts(1, H, 256, E, "Q8_0"),
    ]
    found = read(tmp_path, "olmoe", {".block_count": 2}, tensors)
    assert found.spec.expert_intermediate == 384
    assert found.spec.mean_expert_bytes == 3 * 256 * (512 + 256) // 2 * 34 // 32
    assert "experts are 256 to 512 wide by layer; their mean width is used" in found.derived


def test_the_name_is_that_of_traces(tmp_path: Path) -> None:
    assert read(tmp_path, "olmoe", {".block_count": 1, "general.name": "Qwen3 30B A3B"}, blocks(1)).spec.name == (
        "qwen3-30b-a3b"
    )
    assert read(tmp_path, "olmoe", {".block_count": 1, "general.name": None}, blocks(1)).spec.name == "m"


# -- parts ---------------------------------------------------------------------------------------------------


def test_a_model_in_parts_is_the_model_whichever_part_is_named(tmp_path: Path) -> None:
    model = deepseek_v2_lite()
    whole = read_gguf(write(tmp_path / "w.gguf", *model))
    parts = in_parts(tmp_path, "m", model, 150)
    assert len(parts) == 3
    for part in parts:
        found = read_gguf(part)
        assert found.assumed == whole.assumed
        assert {**vars(found.spec), "source": ""} == {**vars(whole.spec), "source": ""}


def test_of_a_part_that_is_missing_the_blocks_are_taken_to_be_like_others(tmp_path: Path) -> None:
    model = deepseek_v2_lite()
    whole = read_gguf(write(tmp_path / "w.gguf", *model)).spec
    parts = in_parts(tmp_path, "m", model, 150)
    parts[1].unlink()
    found = read_gguf(parts[0])
    assert any("1 of 3 parts are not there (m-00002-of-00003.gguf first)" in text for text in found.incomplete)
    same = ("num_layers", "num_dense_layers", "shared_intermediate", "kv_rank", "vocab_size", "tied_embeddings")
    assert [getattr(found.spec, key) for key in same] == [getattr(whole, key) for key in same]
    assert found.spec.mean_expert_bytes == pytest.approx(whole.mean_expert_bytes, rel=0.05)


def test_without_the_last_part_the_head_is_assumed(tmp_path: Path) -> None:
    arch, keys, tensors = deepseek_v2_lite()
    head = [info for info in tensors if info.name == "output.weight"]
    model = (arch, keys, [info for info in tensors if info not in head] + head)
    parts = in_parts(tmp_path, "m", model, 150)
    parts[-1].unlink()
    found = read_gguf(parts[0])
    assert not found.spec.tied_embeddings
    assert "the head is a matrix of its own, in a part that is not there (m-00003-of-00003.gguf)" in found.assumed


def test_a_state_of_every_fourth_block_is_filled_in_at_its_place(tmp_path: Path) -> None:
    tensors = ends(H, 1000, tied=True)
    for layer in range(12):
        tensors += gqa(layer, H, 4, 2, 64) if layer % 4 == 3 else delta(layer, H, 64, 4, 8)
        tensors += experts(layer, H, 256, 16, "Q4_K")
    arch, keys, _ = tiny_hybrid()
    parts = in_parts(tmp_path, "m", (arch, {**keys, ".block_count": 12}, tensors), 70)
    parts[-1].unlink()
    assert read_gguf(parts[0]).spec.attention_pattern == "lllf"
