"""Names that a person reads in a picture, for those that files, keys and tables have."""

from __future__ import annotations

import re
from collections.abc import Mapping

POLICIES: Mapping[str, str] = {
    "on_demand": "on demand",
    "hf_offload": "module hooks",
    "lru": "LRU",
    "lru_per_layer": "LRU per layer",
    "lfu": "LFU",
    "lfu_per_layer": "LFU per layer",
    "two_level": "two-level LRU",
    "fixed_1": "one layer ahead",
    "fixed_2": "two layers ahead",
    "fixed_4": "four layers ahead",
    "adaptive": "adaptive (ExpertFlow)",
    "expertflow_shen": "paper's parts",
    "as_read": "paper's parts",
    "forest": "paper's parts, forest alone",
    "oracle": "perfect prediction",
    "belady": "Belady",
    "clairvoyant": "knows the future",
}
HARDWARE: Mapping[str, str] = {
    "a100": "A100",
    "a6000": "A6000",
    "a6000_as_printed": "A6000, link as printed",
    "gh200": "GH200",
    "h100": "H100",
    "h20": "H20",
    "h20_as_printed": "H20, link as printed",
    "h200": "H200",
    "ideal_link": "a link without delay",
    "l40s": "L40S",
    "a10": "A10",
    "a100_40": "A100 40 GB",
    "a40": "A40",
    "a5000": "RTX A5000",
    "b200": "B200",
    "l4": "L4",
    "mi210": "MI210",
    "mi300x": "MI300X",
    "rtx2080": "RTX 2080",
    "rtx2080ti": "RTX 2080 Ti",
    "rtx3060": "RTX 3060",
    "rtx3070": "RTX 3070",
    "rtx3080": "RTX 3080",
    "rtx3090": "RTX 3090",
    "rtx3090ti": "RTX 3090 Ti",
    "rtx4060ti": "RTX 4060 Ti",
    "rtx4070tisuper": "RTX 4070 Ti Super",
    "rtx4080": "RTX 4080",
    "rtx4090": "RTX 4090",
    "rtx5060ti": "RTX 5060 Ti",
    "rtx5070": "RTX 5070",
    "rtx5070ti": "RTX 5070 Ti",
    "rtx5080": "RTX 5080",
    "rtx5090": "RTX 5090",
    "rtx6000ada": "RTX 6000 Ada",
    "rtxpro6000": "RTX PRO 6000",
    "t4": "T4",
    "v100": "V100",
}
STACKS: Mapping[str, str] = {"eager": "eager stack", "graph": "graph stack", "found": "no stack added"}
MODELS: Mapping[str, str] = {
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "deepseek-v3": "DeepSeek-V3",
    "deepseek-moe-16b": "DeepSeekMoE-16B",
    "deepseek-v3.2": "DeepSeek-V3.2",
    "deepseek-v4-flash": "DeepSeek-V4-Flash",
    "deepseek-v4-pro": "DeepSeek-V4-Pro",
    "ernie-4.5-21b-a3b": "ERNIE-4.5-21B-A3B",
    "gemma-4-26b-a4b": "Gemma-4-26B-A4B",
    "glm-4.5": "GLM-4.5",
    "glm-4.5-air": "GLM-4.5-Air",
    "glm-4.7": "GLM-4.7",
    "glm-4.7-flash": "GLM-4.7-Flash",
    "glm-5": "GLM-5",
    "glm-5.3-flash": "GLM-5.3-Flash",
    "gpt-oss-20b": "gpt-oss-20b",
    "granite-3.1-3b-a800m": "Granite-3.1-3B-A800M",
    "granite-4.0-h-small": "Granite-4.0-H-Small",
    "granite-4.0-h-tiny": "Granite-4.0-H-Tiny",
    "hunyuan-a13b": "Hunyuan-A13B",
    "kimi-k2": "Kimi-K2",
    "kimi-linear-48b-a3b": "Kimi-Linear-48B-A3B",
    "ling-3.0-flash": "Ling-3.0-Flash",
    "ling-mini-2.0": "Ling-mini-2.0",
    "llama-4-maverick": "Llama-4-Maverick",
    "llama-4-scout": "Llama-4-Scout",
    "minimax-m2": "MiniMax-M2",
    "moonlight-16b-a3b": "Moonlight-16B-A3B",
    "qwen3-coder-30b-a3b": "Qwen3-Coder-30B-A3B",
    "qwen3-coder-480b-a35b": "Qwen3-Coder-480B-A35B",
    "qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B",
    "qwen3.5-122b-a10b": "Qwen3.5-122B-A10B",
    "qwen3.5-35b-a3b": "Qwen3.5-35B-A3B",
    "qwen3.5-397b-a17b": "Qwen3.5-397B-A17B",
    "qwen3.6-35b-a3b": "Qwen3.6-35B-A3B",
    "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
}
PREDICTORS: Mapping[str, str] = {
    "transition": "transition table",
    "pregate": "pre-gate",
    "calibrated": "pre-gate, calibrated",
    "hybrid": "network",
    "hybrid_9216": "network, 9,216 rows",
}


def policy_name(name: str) -> str:
    """Of a policy or of a study's variant; a name without an entry stays, with spaces for its underscores."""
    return POLICIES.get(name, name.replace("_", " "))


def hardware_name(name: str) -> str:
    """Of a file of `conf/hardware`; one's own stays as it is."""
    return HARDWARE.get(name, name)


def stack_name(name: str) -> str:
    """Of a file of `conf/stack`."""
    return STACKS.get(name, f"{name} stack")


def predictor_name(name: str) -> str:
    """Of a column of `python -m traces score-predictors`."""
    return PREDICTORS.get(name, name)


def model_name(name: str) -> str:
    """Of a model, a twin of one (`…-twin`), or a place of a study with its memory (`…_20GB`)."""
    found = re.fullmatch(r"(.+?)(-twin)?(?:_(\d+)GB)?", name)
    assert found is not None
    model, twin, memory = found.groups()
    return MODELS.get(model, model) + (" twin" if twin else "") + (f" in {memory} GB" if memory else "")
