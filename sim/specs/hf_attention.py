"""The widths of a model's attention by its Hugging Face config.json, of every kind that its layers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertflow.attention import CHUNKED, GQA, HEAVY, INDEXED, LINEAR, MLA, NONE, SHARED_INDEX, SPARSE, WINDOWED
from sim.specs.hf_values import MOST_WIDTH, Values
from sim.specs.index_keys import fp8_key_bits
from traces.messages import fault

_OUTPUT_GATED = (
    "afmoe",
    "beam",
    "hy_v4",
    "hy_v4_vl_text",
    "muse_spark_text",
    "qwen3_next",
    "qwen3_5_moe_text",
    "qwen4_exp_text",
    "inkling2_text",
    "inkling2_loop_text",
)
"""Models whose attention has a gate for each value of its output."""
_HEAD_GATED = ("laguna", "step3p5", "step3p7", "dots3_note_text", "bailing_hybrid")
"""Models whose attention has a gate for each head."""
_TIED_KINDS = ("gemma4_text", "diffusion_gemma_text")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_attention_groups")
_OVERRIDES = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_attention_groups": "kv_heads",
    "head_dim": "head_dim",
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_dim",
    "v_head_dim": "v_dim",
}
"""Keys that a table of exceptions may give for a layer."""
_WINDOW_KEYS = {
    "heads": ("swa_num_attention_heads", "num_sliding_attention_heads"),
    "kv_heads": ("swa_num_key_value_heads",),
    "head_dim": ("swa_head_dim",),
    "v_dim": ("swa_v_head_dim",),
}


def read_attention(values: Values, pattern: str) -> dict[str, Any]:
    """Keys of `ModelSpec` for attention. pattern: the letters of all layers."""
    hidden = values.count("hidden_size", "d_model", "n_embd")
    sizes = _sizes(values, hidden)
    other, window = _by_kind(values, sizes, pattern)
    found = _spec_keys(other)
    if WINDOWED in pattern:
        found |= {f"window_{key}": window[key] for key in window if window[key] != other.get(key)}
    if _ties(values) and set(pattern) - {WINDOWED, LINEAR, NONE}:
        found["tied_kv"] = True
        values.notes.derive("one matrix gives keys and values of layers without a window")
    if set(pattern) & {WINDOWED, SPARSE, HEAVY}:
        found["window"] = _window(values)
    if CHUNKED in pattern:
        found["chunk"] = values.count("attention_chunk_size", "chunk_size", high=10_000_000)
    if set(pattern) & {INDEXED, SHARED_INDEX, SPARSE}:
        found |= _indexer(values)
    if set(pattern) & {SPARSE, HEAVY}:
        found |= _compressed(values, pattern)
    if LINEAR in pattern:
        found |= _linear(values, hidden)
    extra = _extra(values, hidden, other, pattern)
    return found | ({"extra_attention_params": extra} if extra else {})


def _sizes(values: Values, hidden: int) -> dict[str, int]:
    """Heads and widths that hold for every layer without an exception."""
    heads = values.count("num_attention_heads", "n_heads", "n_head", "num_heads", default=_jet_heads(values))
    if values.has("kv_lora_rank"):
        rank = values.count("q_lora_rank", low=0, default=0)
        return {
            "heads": heads,
            "kv_rank": values.count("kv_lora_rank"),
            "rope_dim": values.count("qk_rope_head_dim", low=0),
            "nope_dim": values.count("qk_nope_head_dim"),
            "v_dim": values.count("v_head_dim"),
            "q_rank": rank,
        }
    inner = values.inner("attn_config")
    if inner is not None and inner.has("kv_n_heads"):
        kv_heads = inner.count("kv_n_heads")
    elif values.has(*_KV_HEADS):
        kv_heads = values.count(*_KV_HEADS)
    else:
        kv_heads = heads
        values.notes.assume(f"num_key_value_heads is num_attention_heads, {heads}: the file does not give it")
    head_dim = values.count("head_dim", "kv_channels", "attention_head_dim", default=0, low=0)
    if not head_dim:
        head_dim = max(1, hidden // heads)
        values.notes.derive(f"head_dim = hidden_size / num_attention_heads = {head_dim}")
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    v_dim = values.count("v_head_dim", default=head_dim)
    return sizes if v_dim == head_dim else {**sizes, "v_dim": v_dim}


def _jet_heads(values: Values) -> int | None:
    """JetMoE: each token's experts of attention have a query head for every KV head."""
    if values.text("model_type") != "jetmoe":
        return None
    return values.count("num_key_value_heads") * values.count("num_experts_per_tok")


def _by_kind(values: Values, sizes: dict[str, int], pattern: str) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of layers without a window, and of those with one."""
    other, window = dict(sizes), dict(sizes)
    for key, names in _WINDOW_KEYS.items():
        if values.has(*names) and (key in sizes or key == "v_dim"):
            window[key] = values.count(*names)
    setting = values.inner("attention_other_setting")
    if setting is not None:
        window |= {key: setting.count(name) for name, key in _OVERRIDES.items() if key in sizes and setting.has(name)}
    # Gemma: the file's own widths are those of windowed layers.
    if values.has("global_head_dim"):
        other["head_dim"] = values.count("global_head_dim")
    if _ties(values) and values.has("num_global_key_value_heads"):
        other["kv_heads"] = values.count("num_global_key_value_heads")
    for kinds, found in ((WINDOWED, window), ("", other)):
        layers = [at for at, kind in enumerate(pattern) if (kind == WINDOWED) == bool(kinds) and kind != LINEAR]
        found |= {key: size for key, size in _exceptions(values, layers).items() if key in sizes}
    return other, window


def _ties(values: Values) -> bool:
    """Whether layers without a window have no matrix of values (Gemma 4)."""
    kind = values.text("model_type")
    return kind.endswith(_TIED_KINDS) and values.flag("attention_k_eq_v", default=kind == "diffusion_gemma_text")


def _exceptions(values: Values, layers: list[int]) -> dict[str, int]:
    """What a table of exceptions has for these layers, which must all be alike: a spec has one size for each kind."""
    found: dict[str, int] = {}
    table = values.inner("per_layer_config")
    for name, key in _OVERRIDES.items():
        given = set()
        for at in layers if table is not None else ():
            one = None if table is None else table.inner(str(at), f"{at:02d}")
            given.add(one.count(name) if one is not None and one.has(name) else None)
        _take(values, "per_layer_config", name, given, found, key)
    if values.has("num_attention_heads_per_layer"):
        heads = values.items("num_attention_heads_per_layer", kinds=(int,))
        given = {heads[at] for at in layers if at < len(heads)}
        if not all(type(one) is int and 1 <= one <= MOST_WIDTH for one in given):
            raise values.wrong("num_attention_heads_per_layer", "numbers of heads")
        _take(values, "num_attention_heads_per_layer", "num_attention_heads", given, found, "heads")
    return found


def _take(values: Values, table: str, name: str, given: set[Any], found: dict[str, int], key: str) -> None:
    if len(given) > 1:
        largest = max(one for one in given if one is not None)
        values.notes.assume(f"{table} gives {name} otherwise from layer to layer: the largest, {largest}, is taken")
        found[key] = largest
    elif given and None not in given:
        found[key] = given.pop()


def _spec_keys(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Sizes by the names that `ModelSpec` has for them."""
    names = {"heads": "num_heads", "kv_heads": "num_kv_heads"}
    kind = MLA if "kv_rank" in sizes else GQA
    return {"attention": kind, **{names.get(key, key): value for key, value in sizes.items()}}


def _window(values: Values) -> int:
    if values.has("sliding_window"):
        return values.count("sliding_window", high=10_000_000)
    return values.count("sliding_window_size", high=10_000_000)


def _indexer(values: Values) -> dict[str, int | float]:
    """DeepSeek-V3.2 and those after it: heads and width of the indexer, and how many tokens it chooses."""
    legacy = values.inner("sparse_attention_config")
    if values.has("indexer_budget"):
        return {
            "index_top_k": values.count("indexer_budget", high=10_000_000),
            "index_heads": values.count("indexer_n_heads"),
            "index_dim": values.count("indexer_head_dim"),
            "index_block": values.count("indexer_compress_ratio"),
        }
    if legacy is not None and legacy.has("sparse_topk_blocks"):
        blocks, size = legacy.count("sparse_topk_blocks"), legacy.count("sparse_block_size")
        heads, dim = legacy.count("sparse_num_index_heads"), legacy.count("sparse_index_dim")
    elif values.has("index_topk_blocks"):
        blocks, size = values.count("index_topk_blocks"), values.count("index_block_size")
        heads, dim = values.count("index_n_heads"), values.count("index_head_dim")
    else:
        dim = values.count("index_head_dim")
        bits = fp8_key_bits(dim)
        found: dict[str, int | float] = {
            "index_top_k": values.count("index_topk", high=10_000_000),
            "index_heads": values.count("index_n_heads"),
            "index_dim": dim,
            "index_bits": bits,
        }
        values.notes.assume(f"index keys are kept in fp8 with a scale for each 128 values: {bits:g} bits (index_bits)")
        pool = values.count("index_kpool", default=1)
        return found | ({"index_block": pool} if pool > 1 else {})
    values.notes.derive(f"index_top_k = {blocks} blocks of {size} tokens")
    return {"index_top_k": blocks * size, "index_heads": heads, "index_dim": dim}


def _compressed(values: Values, pattern: str) -> dict[str, Any]:
    """DeepSeek-V4: entries that stand for several tokens, keys that serve as values, an output of low rank."""
    rates = values.inner("compress_rates")
    sparse = values.count("compress_rate_csa", default=4)
    heavy = values.count("compress_rate_hca", default=128)
    if rates is not None:
        sparse = rates.count("compressed_sparse_attention", default=sparse)
        heavy = rates.count("heavily_compressed_attention", default=heavy)
    found: dict[str, Any] = {"shared_kv": True, "q_rank": values.count("q_lora_rank", low=0, default=0)}
    found |= {"o_rank": values.count("o_lora_rank"), "o_groups": values.count("o_groups")}
    found |= {"sparse_ratio": sparse} if SPARSE in pattern else {}
    return found | ({"heavy_ratio": heavy} if HEAVY in pattern else {})


# -- layers that keep a state ----------------------------------------------------------------------------------


def _linear(values: Values, hidden: int) -> dict[str, int]:
    """Weights of a layer whose state does not grow, and the values of that state, by the kind its keys tell of.

    A convolution over k tokens keeps the k - 1 before the next one, as in llama.cpp (n_embd_r) and vLLM.
    """
    legacy = values.inner("linear_attn_config")
    if values.has("linear_num_value_heads"):
        params, state = _gated_delta(values, hidden)
    elif values.has("linear_num_heads", "short_conv_kernel_size") or (legacy is not None and legacy.has("num_heads")):
        params, state = _kimi_delta(values, legacy, hidden)
    elif values.has("mamba_n_heads", "mamba_num_heads"):
        params, state = _mamba2(values, hidden)
    elif values.has("mamba_d_state"):
        params, state = _mamba(values, hidden)
    elif values.has("conv_L_cache"):
        size = values.count("conv_L_cache", high=1024)
        params, state = hidden * (4 * hidden + size), hidden * (size - 1)
    elif values.text("model_type").startswith("minimax"):
        heads = values.count("num_attention_heads")
        dim = values.count("head_dim", default=max(1, hidden // heads))
        # Queries, keys, values, output and its gate.
        params, state = 5 * hidden * heads * dim, heads * dim * dim
    else:
        problem = "has linear attention, and no keys that are known to tell its sizes"
        raise fault(values.path, "file", problem, "give linear_params and linear_state in a model YAML of your own")
    values.notes.derive(f"a linear layer has {params} weights and a state of {state} values for each request")
    values.notes.assume("states of linear layers are kept in 32 bits a value (state_bits)")
    return {"linear_params": params, "linear_state": state}


def _gated_delta(values: Values, hidden: int) -> tuple[int, int]:
    """Qwen3-Next: queries and keys, values, output gate, two scalars a head, a convolution (arXiv 2412.06464)."""
    key_dim = values.count("linear_num_key_heads") * values.count("linear_key_head_dim")
    heads, width = values.count("linear_num_value_heads"), values.count("linear_value_head_dim")
    mixed, kernel = 2 * key_dim + heads * width, values.count("linear_conv_kernel_dim", high=1024)
    params = hidden * (mixed + 2 * heads * width + 2 * heads) + mixed * kernel
    return params, heads * width * values.count("linear_key_head_dim") + mixed * (kernel - 1)


def _kimi_delta(values: Values, legacy: Values | None, hidden: int) -> tuple[int, int]:
    """Kimi Linear (arXiv 2510.26692): its two gates are of the rank of a head, in Ling 2.5 full matrices."""
    if legacy is not None:
        heads, dim = legacy.count("num_heads"), legacy.count("head_dim")
        kernel = legacy.count("short_conv_kernel_size", high=1024, default=4)
    else:
        heads = values.count("linear_num_heads", "num_attention_heads")
        dim = values.count("linear_head_dim", "head_dim")
        kernel = values.count("linear_conv_kernel_dim", "short_conv_kernel_size", high=1024)
    wide = heads * dim
    is_full = values.text("model_type") == "bailing_hybrid"
    gates = 2 * hidden * wide if is_full else 2 * dim * (hidden + wide)
    return hidden * (4 * wide + heads) + gates + 3 * wide * kernel, wide * dim + 3 * wide * (kernel - 1)


def _mamba2(values: Values, hidden: int) -> tuple[int, int]:
    """Mamba-2 (arXiv 2405.21060): gate, values, B, C and a step a head from one matrix; a convolution; output."""
    heads = values.count("mamba_num_heads", "mamba_n_heads")
    dim = values.count("mamba_head_dim", "mamba_d_head", default=0, low=0) if _is_number(values) else 0
    dim = dim or values.count("mamba_expand", "expand") * hidden // heads
    groups, size = values.count("mamba_n_groups", "n_groups"), values.count("mamba_d_state", "ssm_state_size")
    kernel = values.count("mamba_d_conv", "conv_kernel", high=1024)
    inner = heads * dim
    mixed = inner + 2 * groups * size
    params = hidden * (inner + mixed + heads) + mixed * kernel + inner * hidden
    return params, inner * size + mixed * (kernel - 1)


def _is_number(values: Values) -> bool:
    return bool(values.raw("mamba_head_dim", "mamba_d_head") != "auto")


def _mamba(values: Values, hidden: int) -> tuple[int, int]:
    """Mamba (arXiv 2312.00752), as in Jamba."""
    inner = values.count("mamba_expand") * hidden
    size, kernel = values.count("mamba_d_state"), values.count("mamba_d_conv", high=1024)
    rank = -(-hidden // 16) if values.raw("mamba_dt_rank") in (None, "auto") else values.count("mamba_dt_rank")
    params = 3 * hidden * inner + inner * (rank + 2 * size) + rank * inner + inner * (size + kernel)
    return params, inner * (size + kernel - 1)


# -- what the formulas leave out -------------------------------------------------------------------------------


def _extra(values: Values, hidden: int, sizes: Mapping[str, int], pattern: str) -> int:
    """Weights of a layer's attention beyond its queries, keys, values and output."""
    kind, heads = values.text("model_type"), sizes["heads"]
    out = heads * (sizes.get("v_dim") or sizes["head_dim"])
    extra = 0
    if kind in _OUTPUT_GATED or values.flag("attn_output_gate"):
        extra += hidden * out
        values.notes.derive("attention has an output gate of hidden_size x heads x head_dim weights")
    elif kind in _HEAD_GATED:
        extra += hidden * heads
    if kind == "axk2" and "nope_dim" in sizes:
        # Queries and gate come from one matrix over two latents.
        query = heads * (sizes["nope_dim"] + sizes["rope_dim"])
        extra += sizes["q_rank"] * (2 * (query + out) - query)
    if values.has("d_rel"):
        extra += hidden * heads * values.count("d_rel")
    if kind == "jetmoe":
        # Queries and output of every expert of attention, of which a token takes top_k.
        share = values.count("num_local_experts") - values.count("num_experts_per_tok")
        extra += 2 * hidden * values.count("num_key_value_heads") * sizes["head_dim"] * max(0, share)
        values.notes.assume("every expert of attention is read in every step")
    if set(pattern) & {SPARSE, HEAVY}:
        extra += _compressors(values, hidden, sizes, pattern)
    return extra


def _compressors(values: Values, hidden: int, sizes: Mapping[str, int], pattern: str) -> int:
    """DeepSeek-V4: what makes one entry of several, of all layers together, as the mean of a layer."""
    sparse = 4 * hidden * sizes["head_dim"] + 3 * hidden * values.count("index_head_dim")
    heavy = 2 * hidden * sizes["head_dim"]
    total = pattern.count(SPARSE) * sparse + pattern.count(HEAVY) * heavy
    values.notes.derive("the weights that compress KV are spread evenly over the layers")
    return total // len(pattern)
