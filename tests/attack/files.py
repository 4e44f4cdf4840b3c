"""The content of tiny valid files, one function a kind: a model of 4 layers, 8 experts, 2 a token."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt

L, E, K = 4, 8, 2
PARAMS_HEADER = {
    "format": "expertflow-routing-parameters",
    "format_version": "1",
    "model": "tiny",
    "source": "tests",
    "license": "none",
}


def routing(num_tokens: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Distinct experts [num_tokens, L, K]."""
    drawn = np.random.default_rng(seed).random((num_tokens, L, E))
    return np.argsort(drawn, axis=2)[:, :, :K].astype(np.uint8)


def lines(values: list[Any]) -> str:
    """JSON, one value a line."""
    return "".join(json.dumps(value) + "\n" for value in values)


def trace_arrays() -> dict[str, Any]:
    """Every array that a trace may hold, of two requests of three tokens."""
    draws = np.random.default_rng(1)
    lookahead = draws.normal(size=(6, L, 2, E)).astype(np.float16)
    for layer in range(L):
        lookahead[:, layer, max(L - 1 - layer, 0) :] = np.nan
    return {
        "experts": routing(6),
        "weights": draws.random((6, L, K)).astype(np.float16),
        "request_start": [0, 3, 6],
        "prompt_len": [1, 2],
        "context_len": [0, 4],
        "forward_id": [0, 1, 2, 1, 2, 3],
        "token_ids": [5, 6, 7, 5, 6, 7],
        "embedding": draws.normal(size=(6, 3)).astype(np.float16),
        "logits": draws.normal(size=(6, L, E)).astype(np.float16),
        "lookahead": lookahead,
    }


def params() -> dict[str, npt.NDArray[Any]]:
    """Parameters of the generator: 3 topics, 2 factors."""
    draws = np.random.default_rng(2)
    shapes = {"bias": (L, E), "cross": (L, E, E), "loadings": (L, E, 2), "topics": (3, 2)}
    made: dict[str, npt.NDArray[Any]] = {name: draws.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    sizes = np.zeros((L, K + 1), np.float32)
    sizes[:, -1] = 1
    return {
        **made,
        "residual": draws.random((L, E)).astype(np.float32),
        "topic_length": np.array([4, 5, 6], np.float32),
        "topic_scale": np.ones(L, np.float32),
        "drift_scale": np.ones(L, np.float32),
        "repeat": np.full(L, 0.5, np.float32),
        "wander_share": np.array(0.3, np.float32),
        "skew": np.array(0.2, np.float32),
        "half_lives": np.array([400, 4], np.float32),
        "row_size": sizes,
        "weight_gap": np.sort(draws.random((L, K - 1, 5)), axis=2).astype(np.float32),
        "weight_sum": np.ones(L, np.float32),
    }


def prompts() -> str:
    """One of each form."""
    return lines(["a text", [1, 2, 3], {"prompt": "p", "label": "x"}, {"messages": [{"role": "user", "content": "c"}]}])


# -- sources of importers ------------------------------------------------------------------------------------


def fingerprints() -> list[dict[str, Any]]:
    """Records of GPT-OSS-MoE-ExpertFingerprinting."""

    def layers(row: npt.NDArray[np.uint8]) -> dict[str, Any]:
        return {
            f"layer_{i}": {"selected_experts": ids.tolist(), "selected_probs": [0.75, 0.25]}
            for i, ids in enumerate(row)
        }

    return [
        {
            "dataset": "d",
            "category": "c",
            "finished_successfully": True,
            "has_repetition": False,
            "router_data": [{f"token_{70 + t}": layers(row)} for t, row in enumerate(routing(3, seed))],
        }
        for seed in range(2)
    ]


def activations() -> str:
    """CSV of MoE-Beyond."""
    rows = ["Layer ID,Batch Number,Token,Activated Expert IDs"]
    for layer, ids in enumerate(routing(3).transpose(1, 0, 2).tolist()):
        rows += [f'{layer + 1},0,token{t},"{chosen}"' for t, chosen in enumerate(ids)]
    return "\n".join(rows) + "\n"


def routes() -> str:
    """Route CSV of BigMoeOnEdge."""
    rows = [f"# model=tiny.gguf n_layer={L} n_expert={E}", "turn,phase,step,layer,slot,expert,weight,expert_bytes"]
    for step, layers in enumerate(routing(3).tolist()):
        for layer, ids in enumerate(layers):
            place, size = f"0,{int(step > 0)},{step},{layer}", 100 * (layer + 1)
            rows += [f"{place},{slot},{expert},0.5,{size}" for slot, expert in enumerate(ids)]
    return "\n".join(rows) + "\n"


def events() -> dict[str, npt.NDArray[Any]]:
    """Event CSR: a prefill of three tokens and a decode of one, in each of L layers."""
    columns = []
    entries = []
    for step, tokens in enumerate((3, 1)):
        for layer, ids in enumerate(routing(2, step).reshape(L, -1).tolist()):
            columns.append((7, step, 0, step, layer, tokens))
            chosen = list(dict.fromkeys(ids))
            counts = [1] * len(chosen) if len(chosen) >= tokens else [min(tokens, 2)] * len(chosen)
            entries.append([(expert, count, 0.5) for expert, count in zip(chosen, counts, strict=True)])
    flat = [entry for event in entries for entry in event]
    table = np.array(columns, np.int32)
    names = ("request", "scheduler_step", "forward_cycle", "phase", "layer", "token_count")
    return {
        **{name: table[:, index].copy() for index, name in enumerate(names)},
        "offsets": np.cumsum([0, *map(len, entries)]).astype(np.int64),
        "expert_ids": np.array([entry[0] for entry in flat], np.int16),
        "assignment_counts": np.array([entry[1] for entry in flat], np.int32),
        "gate_mass": np.array([entry[2] for entry in flat], np.float32),
    }


def npy() -> bytes:
    """A dump of one request."""
    file = io.BytesIO()
    np.save(file, routing(5).astype(np.int32))
    return file.getvalue()


def npz() -> bytes:
    """Dumps of two requests, and the lengths of their prompts."""
    file = io.BytesIO()
    np.savez(file, first=routing(3, 1), second=routing(2, 2).astype(np.int32), prompt_len=np.array([1, 2]))
    return file.getvalue()


def npz_compressed() -> bytes:
    """The same, deflated."""
    file = io.BytesIO()
    np.savez_compressed(file, first=routing(3, 1), second=routing(2, 2), prompt_len=np.array([1, 2]))
    return file.getvalue()


def answers() -> list[dict[str, Any]]:
    """Answers of serving engines: lists, lists with the prompt's before them, base64."""
    packed = base64.b64encode(routing(2, 6).astype("<i4").tobytes()).decode()
    return [
        {"outputs": [{"routed_experts": routing(3, 3).tolist()}], "prompt_token_ids": [1, 2]},
        {"routed_experts": routing(2, 4).tolist(), "prompt_routed_experts": routing(2, 5).tolist()},
        {"meta_info": {"routed_experts": packed, "prompt_tokens": 1, "routed_experts_start_len": 0}},
    ]


# -- fitted predictors ---------------------------------------------------------------------------------------


def transition() -> dict[str, npt.NDArray[Any]]:
    """Counts at three distances."""
    draws = np.random.default_rng(3)
    return {
        "frequency": draws.integers(0, 50, (L, E)).astype(np.uint16),
        "cross": draws.integers(0, 20, (3, L, E, E)).astype(np.uint16),
        "persistence": draws.integers(0, 20, (L, E, E)).astype(np.uint16),
        "num_forwards": np.array([100.0]),
    }


def network() -> dict[str, npt.NDArray[Any]]:
    """A history network with hidden widths of 6 and 5, at 3 distances."""
    from expertflow.network import NUM_OWN, SHIFTS

    draws = np.random.default_rng(4)
    H, M, D, N = 6, 5, 3, L * E

    def whole(low: int, high: int, *shape: int, kind: type = np.int32) -> npt.NDArray[Any]:
        return draws.integers(low, high, shape).astype(kind)

    return {
        "rank_weights": np.array([14, 10], np.int32),
        "tables": whole(-3000, 3000, N, (2 + len(SHIFTS)) * H, kind=np.int16),
        "table_bits": np.array([8], np.int32),
        "place": whole(-5000, 5000, L + 1, H),
        "prior": whole(-900_000, 900_000, len(SHIFTS), H, kind=np.int64),
        "mix": whole(-127, 128, L, H, M, kind=np.int8),
        "mix_scale": whole(20, 400, L, M),
        "mix_bias": whole(-9000, 9000, D, L, M),
        "out": whole(-127, 128, L, M, E, kind=np.int8),
        "out_scale": whole(1000, 9000, L, E),
        "bias": whole(-2500, 500, D, L, E),
        "own": whole(-400, 400, D, NUM_OWN, L, E),
        "frequency": whole(0, 40_000, L, E),
        "forecast": whole(-127, 128, H, N, kind=np.int8),
        "forecast_scale": whole(1000, 9000, N),
        "forecast_bias": whole(-2500, 500, N),
        "forecast_own": whole(-400, 400, NUM_OWN, N),
    }


def forest() -> dict[str, npt.NDArray[Any]]:
    """A forest of one tree a layer: a node and two leaves; one distance."""
    from expertflow.forest import KNOTS

    draws = np.random.default_rng(5)
    return {
        "nodes": np.array([[layer, 3, ~0, ~1] for layer in range(L)], np.int16),
        "first_node": np.arange(L + 1, dtype=np.int32),
        "first_leaf": np.arange(0, 2 * L + 1, 2, dtype=np.int32),
        "leaves": draws.integers(-100, 100, (2 * L, E)).astype(np.int8),
        "calibration": np.sort(draws.integers(0, 1 << 16, (1, L, len(KNOTS))), axis=2).astype(np.uint16),
        "max_tokens": np.array([4], np.int32),
    }


# -- what runs leave behind, and what they are told ----------------------------------------------------------


def pins() -> str:
    """Golden runs: one with metrics."""
    overrides = ["+hardware=a100", "+policy=lru", "trace.num_tokens=4", "trace.num_requests=1"]
    return json.dumps({"runs": {"one": {"overrides": overrides, "metrics": {"elapsed_ns": 5, "tpot_ms.mean": 0.5}}}})


def ratios() -> str:
    """What `sim.bench --update` writes."""
    return json.dumps({"core in pure Python": {"lru": 11.7, "adaptive": 31.6}})


def done() -> str:
    """What decided a result."""
    return json.dumps({"asked": "0" * 64, "files": {"shipped: x": None}, "code": {"sim/app.py": "0" * 64}})


def study() -> str:
    """A study of two cells."""
    import yaml

    content = {
        "name": "mine",
        "about": "Two policies.",
        "base": ["+hardware=a100", "trace.num_tokens=4"],
        "axes": {"share": {"half": ["residency=0.5"]}},
        "variants": {"lru": ["+policy=lru"], "lfu": ["+policy=lfu"]},
        "claims": [{"name": "Below", "variants": ["lru"], "column": "ms_per_token", "at_most": 1.0}],
        "tables": [{"title": "Time", "value": "ms_per_token", "columns": ["share"]}],
    }
    return yaml.safe_dump(content, sort_keys=False)


def published() -> str:
    """One source with a figure and a ratio."""
    import yaml

    group = {
        "name": "engine",
        "source": "a page",
        "setting": "a card",
        "assumed": "the rest",
        "words": ["+hardware=a100", "+policy=lru"],
        "rows": [{"name": "one", "measured": 3.5, "to": 4.0}, {"name": "two", "measured": 2.0, "over": "one"}],
    }
    return yaml.safe_dump({"groups": [group]}, sort_keys=False)


def model_config() -> dict[str, Any]:
    """A config.json with latent attention, an indexer, a dense layer, shared experts and block-wise fp8."""
    return {
        "model_type": "deepseek_v32",
        "first_k_dense_replace": 1,
        "hidden_size": 64,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "index_topk": 16,
        "intermediate_size": 96,
        "kv_lora_rank": 16,
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "num_attention_heads": 4,
        "num_experts_per_tok": K,
        "num_hidden_layers": L + 1,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "v_head_dim": 8,
        "vocab_size": 100,
    }


def hybrid_config() -> dict[str, Any]:
    """One with its language part inside, linear and windowed layers, and groups of integers."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    return {
        "model_type": "qwen3_5_moe",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": ["re:.*self_attn.*", "lm_head"],
            "kv_cache_scheme": {"num_bits": 8},
        },
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "head_dim": 16,
            "hidden_size": 64,
            "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_value_head_dim": 8,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "num_attention_heads": 4,
            "num_experts": E,
            "num_experts_per_tok": K,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 32,
            "sliding_window": 16,
            "vocab_size": 100,
        },
        "vision_config": {"depth": 2},
    }
