"""What the models of conf/model weigh, beside the sizes that their makers publish: in all, and for a token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from sim.paths import CONF
from sim.specs.hf_config import read_hf_config
from tests.unit.specs.hf_configs import RECENT
from tests.unit.specs.test_model import PUBLISHED as OLDER


class Size(NamedTuple):
    """10^9 weights in all and of a token, as the source has them. with_mtp: both with a layer of multi-token
    prediction, which the spec leaves out."""

    total: float
    active: float
    source: str
    with_mtp: bool = False


PUBLISHED: dict[str, Size] = {
    "qwen3-next-80b-a3b": Size(80, 3, "name; model card: 80B in total and 3B activated"),
    "qwen3.5-35b-a3b": Size(35, 3, "name"),
    "qwen3.6-35b-a3b": Size(35, 3, "name"),
    "qwen3.5-122b-a10b": Size(122, 10, "name"),
    "qwen3.5-397b-a17b": Size(397, 17, "name"),
    "qwen3-coder-480b-a35b": Size(480, 35, "name"),
    "qwen3-coder-30b-a3b": Size(30.5, 3.3, "GitHub QwenLM/Qwen3-Coder, as one who compared files of it reports"),
    "glm-4.5-air": Size(106, 12, "huggingface.co, docs/transformers, model_doc/glm4_moe"),
    "glm-4.5": Size(355, 32, "huggingface.co, docs/transformers, model_doc/glm4_moe"),
    "glm-4.7": Size(355, 32, "as GLM-4.5, whose dimensions it has"),
    "glm-4.7-flash": Size(30, 3, "GitHub yitianlian/slime, scripts/models/glm4.7-30B-A3B.sh"),
    "glm-5": Size(744, 40, "glennklockwood.com, garden/GLM-5"),
    "glm-5.3-flash": Size(320.76, 18, "GitHub ggml-org/llama.cpp#27754 and its model card", with_mtp=True),
    "deepseek-v3.2": Size(671, 37, "DeepSeek-V3's, the indexer aside"),
    "deepseek-v4-flash": Size(284, 13, "GitHub antirez/ds4, MODEL_CARD.md"),
    "deepseek-v4-pro": Size(1600, 49, "GitHub antirez/ds4, MODEL_CARD.md"),
    "deepseek-moe-16b": Size(16.4, 2.8, "arXiv 2401.06066"),
    "moonlight-16b-a3b": Size(16, 3, "name"),
    "kimi-k2": Size(1000, 32, "docs of radixark/miles: 1 T total, 32 B active"),
    "kimi-linear-48b-a3b": Size(48, 3, "name"),
    "minimax-m2": Size(230, 10, "model card, from memory, not re-checked"),
    "llama-4-scout": Size(109, 17, "model card, from memory, not re-checked"),
    "llama-4-maverick": Size(400, 17, "model card, from memory, not re-checked"),
    "gemma-4-26b-a4b": Size(25.2, 3.8, "model card, from memory, not re-checked; its name has 26B-A4B"),
    "granite-3.1-3b-a800m": Size(3.3, 0.8, "huggingface.co, card of granite-3.0-3b-a800m: 3.3B, 800M"),
    "granite-4.0-h-tiny": Size(7, 1, "GitHub llama-farm/LlamaPajamas: 7B, 1B"),
    "granite-4.0-h-small": Size(32, 9, "GitHub llama-farm/LlamaPajamas: 32B, 9B"),
    "ling-mini-2.0": Size(16, 1.4, "GitHub ant-yy/Ling-V2: 16B, 1.4B"),
    "ling-3.0-flash": Size(124, 5.1, "ollama.com/AntLing: 124B, 5.1B"),
    "hunyuan-a13b": Size(80, 13, "GitHub Tencent-Hunyuan/Hunyuan-A13B: 80B, 13B"),
    "ernie-4.5-21b-a3b": Size(22, 3, "huggingface.co lists its GGUF files with 22B; the name has 21B"),
    # Those that were there before, whose totals tests/unit/specs/test_model.py has; what a token takes.
    "qwen3-30b-a3b": Size(30.5, 3.3, "model card"),
    "qwen3-235b-a22b": Size(235, 22, "name"),
    "deepseek-v3": Size(671, 37, "model card"),
    "deepseek-v2-lite": Size(15.7, 2.4, "arXiv 2405.04434"),
    "qwen1.5-moe-a2.7b": Size(14.3, 2.7, "model card"),
    "qwen2-57b-a14b": Size(57.4, 14, "name"),
    "mixtral-8x7b": Size(46.7, 12.9, "arXiv 2401.04088"),
    "mixtral-8x22b": Size(141, 39, "model card"),
    "olmoe-1b-7b": Size(6.92, 1.3, "arXiv 2409.02060"),
    "phi-3.5-moe": Size(41.9, 6.6, "model card"),
    "gpt-oss-20b": Size(20.9, 3.6, "model card"),
    "gpt-oss-120b": Size(116.8, 5.1, "model card"),
}
NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "auto")


def load(name: str) -> ModelSpec:
    return model_from_dict(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def mtp_params(spec: ModelSpec, num_experts: int) -> int:
    """Weights of a layer of multi-token prediction with so many experts: a full layer, and the matrix that takes the
    hidden state and the embedding of the next token together."""
    experts = num_experts * spec.expert_params + spec.shared_params + spec.router_params
    return experts + spec.attention_params + 2 * spec.hidden_size**2


def total(spec: ModelSpec, with_mtp: bool = False) -> float:
    """10^9 weights."""
    return (spec.num_params + (mtp_params(spec, spec.num_experts) if with_mtp else 0)) / 1e9


def active(spec: ModelSpec, with_mtp: bool = False) -> tuple[float, ...]:
    """10^9 weights that a token meets, as makers count them: all, without the embedding, without embedding and head."""
    unused = spec.num_layers * (spec.num_experts - spec.top_k) * spec.expert_params
    every = spec.num_params - unused + (mtp_params(spec, spec.top_k) if with_mtp else 0)
    ends = 1 if spec.tied_embeddings else 2
    return tuple((every - count * spec.head_params) / 1e9 for count in range(ends + 1))


def digits(value: float) -> int:
    """Places behind the point of a published figure."""
    return len(f"{value:g}".partition(".")[2])


def agrees(spec: ModelSpec, size: Size) -> bool:
    """Whether one of the ways of counting gives the published figure: to 3 %, or rounded as it is."""
    counts = active(spec, size.with_mtp)
    return any(
        round(count, digits(size.active)) == size.active or abs(count / size.active - 1) <= 0.03 for count in counts
    )


def test_experts_in_fp4_may_be_told_beside_the_quantiser_or_within(tmp_path: Path) -> None:
    path, config = tmp_path / "config.json", RECENT["deepseek-v4-flash"]
    assert config["expert_dtype"] == "fp4"
    plain = {key: value for key, value in config.items() if key != "expert_dtype"}
    within = {**plain, "quantization_config": {**plain["quantization_config"], "expert_dtype": "fp4"}}
    bits = []
    for one in (config, within, plain):
        path.write_text(json.dumps(one), encoding="utf-8")
        spec, _, _ = read_hf_config(path)
        bits.append((spec.expert_bits, spec.weight_bits))
    assert bits == [(4.25, 8.0), (4.25, 8.0), (8.0, 8.0)]


def test_every_model_has_a_published_size() -> None:
    assert {*NAMES} == {*PUBLISHED, "qwen2-57b-a14b-int4"}
    assert len(NAMES) >= 44
    assert OLDER.keys() <= PUBLISHED.keys()
    assert RECENT.keys() == PUBLISHED.keys() - OLDER.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_as_many_weights_as_its_makers_say(name: str) -> None:
    size = PUBLISHED[name]
    assert total(load(name), size.with_mtp) == pytest.approx(size.total, rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_token_meets_as_many_weights_as_its_makers_say(name: str) -> None:
    spec, size = load(name), PUBLISHED[name]
    assert agrees(spec, size), active(spec, size.with_mtp)
    # Twice as many experts would show wherever these are two fifths of what a token meets.
    if spec.num_layers * spec.top_k * spec.expert_params / 1e9 > 0.4 * size.active:
        assert not agrees(replace(spec, top_k=min(2 * spec.top_k, spec.num_experts)), size)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_says_where_its_figures_are_from(name: str) -> None:
    source = load(name).source
    assert len(source) > 20
    assert any(word in source for word in ("config.json", "GitHub", "transformers", "configuration", "docs."))


def test_kinds_of_attention_are_those_of_the_architecture() -> None:
    kinds = {name: "".join(sorted({*load(name).attention_pattern})) for name in NAMES}
    assert {name for name in NAMES if "l" in kinds[name]} == {
        "qwen3-next-80b-a3b",
        "qwen3.5-35b-a3b",
        "qwen3.6-35b-a3b",
        "qwen3.5-122b-a10b",
        "qwen3.5-397b-a17b",
        "glm-5.3-flash",
        "kimi-linear-48b-a3b",
        "granite-4.0-h-tiny",
        "granite-4.0-h-small",
        "ling-3.0-flash",
    }
    assert {name for name in NAMES if "i" in kinds[name]} == {"glm-5", "glm-5.3-flash", "deepseek-v3.2"}
    assert {name for name in NAMES if "x" in kinds[name]} == {"deepseek-v4-flash", "deepseek-v4-pro"}
    assert {name for name in NAMES if "c" in kinds[name]} == {"llama-4-scout", "llama-4-maverick"}
    assert {name for name in NAMES if "w" in kinds[name]} == {
        "gpt-oss-20b",
        "gpt-oss-120b",
        "gemma-4-26b-a4b",
        "deepseek-v4-flash",
    }


def test_maverick_has_experts_in_every_second_layer() -> None:
    spec = load("llama-4-maverick")
    assert [layer.feed for layer in spec.layers[:4]] == ["d", "m", "d", "m"]
    assert len(spec.layers) == 48
