"""GGUF files without weights: the headers of public models, and small ones whose every byte is counted by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter


class Info(NamedTuple):
    """What a header says of a tensor; shape as in the file, the contiguous dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def num_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Iterable[Info], **writer: Any) -> Path:
    """The header alone, by the package's own writer. keys: `.x` stands for `ARCH.x`."""
    made = GGUFWriter(path, arch, **writer)
    for key, value in keys.items():
        _add(made, arch + key if key.startswith(".") else key, value)
    for info in tensors:
        kind = GGMLQuantizationType[info.kind]
        made.add_tensor_info(info.name, info.shape[::-1], np.dtype(np.float32), info.num_bytes, kind)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_ti_data_to_file()
    made.close()
    return path


def _add(made: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        made.add_bool(key, value)
    elif isinstance(value, int):
        made.add_uint32(key, value)
    elif isinstance(value, float):
        made.add_float32(key, value)
    elif isinstance(value, str):
        made.add_string(key, value)
    else:
        made.add_array(key, value)


# -- the recipe of a quantisation ----------------------------------------------------------------------------


def q4_k_m(tensors: Iterable[Info], num_layers: int, num_experts: int, tied: bool = False) -> list[Info]:
    """Types as `llama-quantize … Q4_K_M` gives them (llama_tensor_get_type_impl of src/llama-quant.cpp, llama.cpp)."""
    made = []
    for name, shape, kind in tensors:
        made.append(Info(name, shape, _q4_k_m(name, shape, kind, num_layers, num_experts, tied)))
    return made


def _q4_k_m(name: str, shape: tuple[int, ...], kind: str, num_layers: int, num_experts: int, tied: bool) -> str:
    if len(shape) < 2 or not name.endswith("weight") or "_norm" in name or "ffn_gate_inp." in name:
        return kind
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more = layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2
    chosen = "Q4_K"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K" if shape[0] % 256 == 0 else "Q8_0"
    if "attn_v.weight" in name or "attn_kv_b.weight" in name:
        chosen = "Q8_0" if num_experts == 8 else "Q6_K" if more else "Q4_K"
    elif "attn_k.weight" in name and num_experts == 8:
        chosen = "Q8_0"
    elif ("attn_output" in name and num_experts == 8) or "attn_qkv" in name:
        chosen = "Q5_K"
    elif "ffn_down" in name and more:
        chosen = "Q6_K"
    # Rows that no block of 256 divides fall back to a type with blocks of 32.
    return chosen if shape[0] % 256 == 0 else {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(chosen, chosen)


def of_one_type(model: tuple[str, dict[str, Any], list[Info]], kind: str) -> tuple[str, dict[str, Any], list[Info]]:
    """The same model as `llama-quantize … Q8_0` or `Q6_K` gives it: every matrix but routers in one type, rows that its
    blocks do not divide in Q8_0."""
    arch, keys, tensors = model
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    made = []
    for name, shape, was in tensors:
        plain = len(shape) < 2 or not name.endswith("weight") or "_norm" in name or "ffn_gate_inp." in name
        made.append(Info(name, shape, was if plain else kind if shape[0] % block == 0 else "Q8_0"))
    return arch, keys, made


# -- public models -------------------------------------------------------------------------------------------


def qwen3_30b_a3b() -> tuple[str, dict[str, Any], list[Info]]:
    """Qwen3-30B-A3B, Q4_K_M; dimensions of its config.json."""
    keys = {
        "general.name": "Qwen3 30B A3B",
        ".block_count": 48,
        ".embedding_length": 2048,
        ".feed_forward_length": 6144,
        ".context_length": 40960,
        ".attention.head_count": 32,
        ".attention.head_count_kv": 4,
        ".attention.key_length": 128,
        ".attention.value_length": 128,
        ".expert_count": 128,
        ".expert_used_count": 8,
        ".expert_feed_forward_length": 768,
    }
    tensors = [*ends(2048, 151_936)]
    for layer in range(48):
        tensors += gqa(layer, 2048, 32, 4, 128, head_norms=True)
        tensors += norms(layer, 2048, "attn_norm", "ffn_norm")
        tensors += experts(layer, 2048, 768, 128)
    return "qwen3moe", keys, q4_k_m(tensors, 48, 128)


def mixtral_8x7b() -> tuple[str, dict[str, Any], list[Info]]:
    """Mixtral-8x7B, Q4_K_M: attention wider where there are eight experts."""
    keys = {
        "general.name": "Mixtral 8x7B Instruct v0.1",
        ".block_count": 32,
        ".embedding_length": 4096,
        ".feed_forward_length": 14_336,
        ".context_length": 32_768,
        ".attention.head_count": 32,
        ".attention.head_count_kv": 8,
        ".vocab_size": 32_000,
        ".expert_count": 8,
        ".expert_used_count": 2,
    }
    tensors = [*ends(4096, 32_000)]
    for layer in range(32):
        tensors += gqa(layer, 4096, 32, 8, 128)
        tensors += norms(layer, 4096, "attn_norm", "ffn_norm")
        tensors += experts(layer, 4096, 14_336, 8)
    return "llama", keys, q4_k_m(tensors, 32, 8)


def olmoe() -> tuple[str, dict[str, Any], list[Info]]:
    """OLMoE-1B-7B, Q4_K_M."""
    keys = {
        "general.name": "OLMoE 1B 7B 0924 Instruct",
        ".block_count": 16,
        ".embedding_length": 2048,
        ".feed_forward_length": 1024,
        ".context_length": 4096,
        ".attention.head_count": 16,
        ".attention.head_count_kv": 16,
        ".expert_count": 64,
        ".expert_used_count": 8,
    }
    tensors = [*ends(2048, 50_304)]
    for layer in range(16):
        tensors += gqa(layer, 2048, 16, 16, 128)
        tensors += norms(layer, 2048, "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
        tensors += experts(layer, 2048, 1024, 64)
    return "olmoe", keys, q4_k_m(tensors, 16, 64)


def gpt_oss_20b() -> tuple[str, dict[str, Any], list[Info]]:
    """gpt-oss-20b as ggml-org publishes it: experts mxfp4 with biases, all other matrices Q8_0."""
    keys = {
        "general.name": "Gpt Oss 20b",
        ".block_count": 24,
        ".embedding_length": 2880,
        ".feed_forward_length": 2880,
        ".context_length": 131_072,
        ".attention.head_count": 64,
        ".attention.head_count_kv": 8,
        ".attention.key_length": 64,
        ".attention.value_length": 64,
        ".attention.sliding_window": 128,
        ".expert_count": 32,
        ".expert_used_count": 4,
        ".expert_feed_forward_length": 2880,
    }
    tensors = [Info("token_embd.weight", (2880, 201_088), "Q8_0"), Info("output.weight", (2880, 201_088), "Q8_0")]
    tensors += [Info("output_norm.weight", (2880,), "F32")]
    for layer in range(24):
        tensors += gqa(layer, 2880, 64, 8, 64, kind="Q8_0", biases=True)
        tensors += [Info(f"blk.{layer}.attn_sinks.weight", (64,), "F32")]
        tensors += norms(layer, 2880, "attn_norm", "post_attention_norm")
        tensors += experts(layer, 2880, 2880, 32, "MXFP4")
        for role in ("gate", "up", "down"):
            tensors += [Info(f"blk.{layer}.ffn_{role}_exps.bias", (2880, 32), "F32")]
        tensors += [Info(f"blk.{layer}.ffn_gate_inp.bias", (32,), "F32")]
    return "gpt-oss", keys, tensors


def deepseek_v2_lite(split_kv: bool = False) -> tuple[str, dict[str, Any], list[Info]]:
    """DeepSeek-V2-Lite, Q4_K_M: rows of 1408 fall back to types with smaller blocks. split_kv: as since April 2025."""
    keys = {
        "general.name": "DeepSeek V2 Lite Chat",
        ".block_count": 27,
        ".embedding_length": 2048,
        ".feed_forward_length": 10_944,
        ".leading_dense_block_count": 1,
        ".vocab_size": 102_400,
        ".attention.head_count": 16,
        ".attention.head_count_kv": 1 if split_kv else 16,
        ".attention.kv_lora_rank": 512,
        ".attention.key_length": 576 if split_kv else 192,
        ".attention.value_length": 512 if split_kv else 128,
        ".rope.dimension_count": 64,
        ".expert_count": 64,
        ".expert_used_count": 6,
        ".expert_shared_count": 2,
        ".expert_feed_forward_length": 1408,
    }
    if split_kv:
        keys |= {".attention.key_length_mla": 192, ".attention.value_length_mla": 128}
    tensors = [*ends(2048, 102_400)]
    for layer in range(27):
        tensors += mla(layer, 2048, 16, 0, 512, 64, 128, 128, split_kv)
        tensors += norms(layer, 2048, "attn_norm", "ffn_norm")
        if layer:
            tensors += experts(layer, 2048, 1408, 64) + dense(layer, 2048, 2816, "_shexp")
        else:
            tensors += dense(layer, 2048, 10_944)
    return "deepseek2", keys, q4_k_m(tensors, 27, 64)


def qwen3_next_80b() -> tuple[str, dict[str, Any], list[Info]]:
    """Qwen3-Next-80B-A3B, not quantised: linear attention in three of four blocks."""
    keys = {
        ".block_count": 48,
        ".embedding_length": 2048,
        ".attention.head_count": 16,
        ".attention.head_count_kv": 2,
        ".attention.key_length": 256,
        ".attention.value_length": 256,
        ".full_attention_interval": 4,
        ".ssm.conv_kernel": 4,
        ".ssm.inner_size": 4096,
        ".ssm.state_size": 128,
        ".ssm.time_step_rank": 32,
        ".ssm.group_count": 16,
        ".expert_count": 512,
        ".expert_used_count": 10,
    }
    tensors = ends(2048, 151_936)
    for layer in range(48):
        if layer % 4 == 3:
            query, *rest = gqa(layer, 2048, 16, 2, 256)
            tensors += [query._replace(shape=(2048, 2 * 16 * 256)), *rest]  # with their gate
        else:
            tensors += delta(layer, 2048, 128, 16, 32)
        tensors += experts(layer, 2048, 512, 512) + dense(layer, 2048, 512, "_shexp")
        tensors += norms(layer, 2048, "attn_norm", "post_attention_norm", "ffn_gate_inp_shexp")
    return "qwen3next", keys, tensors


NEMOTRON_BLOCKS = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""Of Nemotron-3-Nano-30B-A3B: M Mamba-2, * attention, E experts; each is a block of its own."""


def nemotron_3_nano() -> tuple[str, dict[str, Any], list[Info]]:
    """Nemotron-3-Nano-30B-A3B, not quantised."""
    hidden = 2688
    keys = {
        ".block_count": len(NEMOTRON_BLOCKS),
        ".embedding_length": hidden,
        ".attention.head_count": 32,
        ".attention.head_count_kv": [2 if kind == "*" else 0 for kind in NEMOTRON_BLOCKS],
        ".attention.key_length": 128,
        ".attention.value_length": 128,
        ".ssm.conv_kernel": 4,
        ".ssm.inner_size": 4096,
        ".ssm.state_size": 128,
        ".ssm.time_step_rank": 64,
        ".ssm.group_count": 8,
        ".expert_count": 128,
        ".expert_used_count": 6,
    }
    tensors = ends(hidden, 131_072)
    for layer, kind in enumerate(NEMOTRON_BLOCKS):
        tensors += norms(layer, hidden, "attn_norm")
        if kind == "*":
            tensors += gqa(layer, hidden, 32, 2, 128)
        elif kind == "M":
            mixed = 4096 + 2 * 8 * 128
            shapes = {"ssm_in": (hidden, 4096 + mixed + 64), "ssm_conv1d": (4, mixed), "ssm_out": (4096, hidden)}
            tensors += [Info(f"blk.{layer}.{name}.weight", shape, "F16") for name, shape in shapes.items()]
            tensors += [Info(f"blk.{layer}.ssm_norm.weight", (512, 8), "F32")]
            tensors += [Info(f"blk.{layer}.{name}", (1, 64), "F32") for name in ("ssm_a", "ssm_d")]
        else:
            tensors += experts(layer, hidden, 1856, 128, gated=False)
            tensors += dense(layer, hidden, 3712, "_shexp", gated=False)
    return "nemotron_h_moe", keys, tensors


# -- parts of a block ----------------------------------------------------------------------------------------


def ends(hidden: int, vocab: int, kind: str = "F16", tied: bool = False) -> list[Info]:
    """What stands before and after the blocks."""
    head = [] if tied else [Info("output.weight", (hidden, vocab), kind)]
    return [Info("token_embd.weight", (hidden, vocab), kind), Info("output_norm.weight", (hidden,), "F32"), *head]


def norms(layer: int, width: int, *names: str) -> list[Info]:
    """Vectors of that width."""
    return [Info(f"blk.{layer}.{name}.weight", (width,), "F32") for name in names]


def gqa(
    layer: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    kind: str = "F16",
    biases: bool = False,
    head_norms: bool = False,
) -> list[Info]:
    """Grouped-query attention."""
    sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    made = [Info(f"blk.{layer}.attn_{name}.weight", (hidden, size), kind) for name, size in sizes.items()]
    made.append(Info(f"blk.{layer}.attn_output.weight", (heads * head_dim, hidden), kind))
    if biases:
        made += [Info(f"blk.{layer}.attn_{name}.bias", (size,), "F32") for name, size in sizes.items()]
        made.append(Info(f"blk.{layer}.attn_output.bias", (hidden,), "F32"))
    if head_norms:
        made += norms(layer, head_dim, "attn_q_norm", "attn_k_norm")
    return made


def mla(
    layer: int, hidden: int, heads: int, q_rank: int, kv_rank: int, rope: int, nope: int, value: int, split_kv: bool
) -> list[Info]:
    """Multi-head latent attention; split_kv: keys and values expanded by a matrix each."""
    query = heads * (nope + rope)
    made = {"attn_kv_a_mqa": (hidden, kv_rank + rope), "attn_output": (heads * value, hidden)}
    if q_rank:
        made |= {"attn_q_a": (hidden, q_rank), "attn_q_b": (q_rank, query)}
    else:
        made |= {"attn_q": (hidden, query)}
    matrices: dict[str, tuple[int, ...]] = dict(made)
    if split_kv:
        matrices |= {"attn_k_b": (nope, kv_rank, heads), "attn_v_b": (kv_rank, value, heads)}
    else:
        matrices |= {"attn_kv_b": (kv_rank, heads * (nope + value))}
    return [
        *(Info(f"blk.{layer}.{name}.weight", shape, "F16") for name, shape in matrices.items()),
        *norms(layer, kv_rank, "attn_kv_a_norm"),
        *(norms(layer, q_rank, "attn_q_a_norm") if q_rank else []),
    ]


def experts(layer: int, hidden: int, width: int, number: int, kind: str = "F16", gated: bool = True) -> list[Info]:
    """Routed experts and their router."""
    names = ("gate", "up") if gated else ("up",)
    into = [Info(f"blk.{layer}.ffn_{name}_exps.weight", (hidden, width, number), kind) for name in names]
    down = Info(f"blk.{layer}.ffn_down_exps.weight", (width, hidden, number), kind)
    return [Info(f"blk.{layer}.ffn_gate_inp.weight", (hidden, number), "F32"), *into, down]


def dense(layer: int, hidden: int, width: int, suffix: str = "", kind: str = "F16", gated: bool = True) -> list[Info]:
    """A feed-forward part that every token passes; suffix `_shexp`: the shared expert."""
    names = ("gate", "up") if gated else ("up",)
    into = [Info(f"blk.{layer}.ffn_{name}{suffix}.weight", (hidden, width), kind) for name in names]
    return [*into, Info(f"blk.{layer}.ffn_down{suffix}.weight", (width, hidden), kind)]


# -- small ones ----------------------------------------------------------------------------------------------


def tiny(**changed: Any) -> tuple[str, dict[str, Any], list[Info]]:
    """A dense block, and two with eight experts of unlike size and a shared one. changed: keys, None leaves one out."""
    keys: dict[str, Any] = {
        "general.name": "Tiny MoE",
        ".block_count": 3,
        ".embedding_length": 256,
        ".feed_forward_length": 768,
        ".leading_dense_block_count": 1,
        ".attention.head_count": 8,
        ".attention.head_count_kv": 2,
        ".expert_count": 8,
        ".expert_used_count": 2,
        ".expert_feed_forward_length": 512,
        "tokenizer.ggml.tokens": ["a", "bc", ""],
        **changed,
    }
    tensors = [*ends(256, 1000, "Q6_K"), *gqa(0, 256, 8, 2, 32, kind="Q8_0"), *dense(0, 256, 768, kind="Q4_K")]
    for layer in (1, 2):
        tensors += gqa(layer, 256, 8, 2, 32, kind="Q8_0") + norms(layer, 256, "attn_norm", "ffn_norm")
        tensors += experts(layer, 256, 512, 8, "Q4_K") + dense(layer, 256, 512, "_shexp", "Q5_K")
    tensors = [info._replace(kind="Q6_K") if info.name == "blk.1.ffn_down_exps.weight" else info for info in tensors]
    return "deepseek", {key: value for key, value in keys.items() if value is not None}, tensors


def tiny_hybrid() -> tuple[str, dict[str, Any], list[Info]]:
    """Linear attention in three of four blocks, experts in one matrix for gate and up, a gate on the shared one."""
    keys = {
        "general.name": "Tiny Next",
        ".block_count": 4,
        ".embedding_length": 256,
        ".attention.head_count": 4,
        ".attention.head_count_kv": 2,
        ".attention.key_length": 64,
        ".attention.value_length": 64,
        ".full_attention_interval": 4,
        ".ssm.conv_kernel": 4,
        ".ssm.inner_size": 512,
        ".ssm.state_size": 64,
        ".ssm.time_step_rank": 8,
        ".ssm.group_count": 4,
        ".expert_count": 16,
        ".expert_used_count": 4,
    }
    tensors = ends(256, 1000, "Q8_0", tied=True)
    for layer in range(4):
        if layer == 3:
            tensors += gqa(layer, 256, 4, 2, 64, kind="Q8_0")
            # Queries and their gate are one matrix.
            tensors = [i._replace(shape=(256, 512)) if i.name == "blk.3.attn_q.weight" else i for i in tensors]
        else:
            tensors += delta(layer, 256, 64, 4, 8)
        tensors += norms(layer, 256, "attn_norm", "post_attention_norm", "ffn_gate_inp_shexp")
        tensors += dense(layer, 256, 256, "_shexp", "Q8_0")
        router, _, _, down = experts(layer, 256, 256, 16, "Q4_K")
        tensors += [router, down, Info(f"blk.{layer}.ffn_gate_up_exps.weight", (256, 512, 16), "Q4_K")]
    return "qwen3next", keys, tensors


def delta(layer: int, hidden: int, state: int, groups: int, heads: int) -> list[Info]:
    """Gated delta net, as llama.cpp has it for Qwen3-Next."""
    keys, values = state * groups, state * heads
    shapes = {
        "attn_qkv": (hidden, 2 * keys + values),
        "attn_gate": (hidden, values),
        "ssm_conv1d": (4, 2 * keys + values),
        "ssm_ba": (hidden, 2 * heads),
        "ssm_out": (values, hidden),
    }
    kinds = {"ssm_conv1d": "F32", "ssm_ba": "F16"}
    made = [Info(f"blk.{layer}.{name}.weight", shape, kinds.get(name, "Q8_0")) for name, shape in shapes.items()]
    return [*made, Info(f"blk.{layer}.ssm_a", (heads,), "F32"), Info(f"blk.{layer}.ssm_dt.bias", (heads,), "F32")]


def in_parts(folder: Path, name: str, model: tuple[str, Mapping[str, Any], list[Info]], most: int) -> list[Path]:
    """The model in parts of at most so many tensors, each the header alone."""
    arch, keys, tensors = model
    write(folder / f"{name}.gguf", arch, keys, tensors, split_max_tensors=most)
    return sorted(folder.glob(f"{name}-*.gguf"))
