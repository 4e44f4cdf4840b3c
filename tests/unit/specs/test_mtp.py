"""Heads of multi-token prediction: what they weigh, which config.json names them, and when they count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertflow.attention import FULL, INDEXED, WINDOWED
from expertflow.layers import MOE
from expertflow.model import ModelSpec, model_from_dict
from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.model import summary
from sim.paths import CONF
from sim.specs.hf_mtp import head_params
from sim.specs.model_file import ReadModel, read_model_file
from tests.support.commands import small_trace
from tests.unit.specs.test_hf_config import MLA, SMALL, SPARSE
from tests.unit.specs.test_hf_published import MODELS

SHIPPED = {
    "deepseek-v3": FULL,
    "deepseek-v3.2": INDEXED,
    "deepseek-v4-flash": WINDOWED,
    "deepseek-v4-pro": WINDOWED,
    "glm-4.5": FULL,
    "glm-4.5-air": FULL,
    "glm-4.7": FULL,
    "glm-4.7-flash": FULL,
    "glm-5": INDEXED,
    "glm-5.3-flash": INDEXED,
    "ling-3.0-flash": FULL,
    "qwen3-next-80b-a3b": FULL,
    "qwen3.5-35b-a3b": FULL,
    "qwen3.5-122b-a10b": FULL,
    "qwen3.5-397b-a17b": FULL,
    "qwen3.6-35b-a3b": FULL,
}
"""Shipped models with a head, and what it attends to."""


def shipped(name: str) -> ModelSpec:
    return model_from_dict(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def read(folder: Path, **changes: Any) -> ReadModel:
    (folder / "config.json").write_text(json.dumps({**SMALL, **changes}), encoding="utf-8")
    return read_model_file(folder)


def test_models_with_heads_are_these() -> None:
    names = (path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "auto")
    assert {name for name in names if shipped(name).mtp_bytes} == set(SHIPPED)
    assert not any(shipped(name).mtp for name in SHIPPED)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        # GitHub deepseek-ai/DeepSeek-V3, README_WEIGHTS.md: 11.5 G of its own; 14 G with embedding and head.
        ("deepseek-v3", 11.5e9),
        # The rest of 320.76 G, which are with a head: tests/unit/specs/test_published_models.py.
        ("glm-5.3-flash", 7.43e9),
    ],
)
def test_a_head_weighs_what_its_makers_say(name: str, weights: float) -> None:
    assert sum(head_params(shipped(name), SHIPPED[name], MOE)) == pytest.approx(weights, rel=0.011)


def test_glm_5_with_its_head_has_as_many_weights_as_its_files() -> None:
    """Those of GLM-5.1, which has the same sizes: 753,864,139,008 (public list of its tensors), norms among them."""
    spec = shipped("glm-5")
    weights = spec.num_params + sum(head_params(spec, INDEXED, MOE))
    assert weights == pytest.approx(753_864_139_008, rel=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_head_is_a_layer_and_what_takes_two_embeddings_together(name: str) -> None:
    """By one layer more, in place of the formula for a head."""
    spec = shipped(name)
    more = replace(spec, num_layers=spec.num_layers + 1, attention_pattern=_with_layer(spec, SHIPPED[name]))
    layer = more.non_expert_bytes - spec.non_expert_bytes
    layer += more.total_expert_bytes - spec.total_expert_bytes
    if spec.o_rank:
        layer -= spec.extra_attention_params  # what compresses KV, in fp8: of a mean layer
    assert spec.mtp_bytes == pytest.approx(layer + 2 * spec.hidden_size**2 * spec.weight_bits / 8, abs=2)


def _with_layer(spec: ModelSpec, letter: str) -> str:
    return "".join(layer.attention for layer in spec.layers) + letter


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"])
def test_every_name_of_their_number(key: str, tmp_path: Path) -> None:
    one, three = (read(tmp_path, **{key: number}).spec.mtp_bytes for number in (1, 3))
    # Four heads of 16, two of keys; eight experts; two embeddings into one.
    attention = 64 * (64 + 32 + 32 + 64)
    assert one == 2 * (attention + 8 * 3 * 64 * 128 + 64 * 8 + 2 * 64 * 64)
    assert three == 3 * one
    assert read(tmp_path, **{key: 0}).spec.mtp_bytes == 0


def test_bits_are_those_of_the_parts(tmp_path: Path) -> None:
    quantised = {"quant_method": "mxfp4"}
    spec = read(tmp_path, num_nextn_predict_layers=1, quantization_config=quantised).spec
    experts = 8 * 3 * 64 * 128
    assert spec.mtp_bytes == 2 * (64 * 192 + 64 * 8 + 2 * 64 * 64) + experts * 17 // 32


def test_what_a_file_says_of_the_layer_of_a_head(tmp_path: Path) -> None:
    sliding = {"sliding_window": 8, "swa_num_key_value_heads": 4}
    both = ["full_attention", "sliding_attention"]
    plain = read(tmp_path, **sliding, layer_types=both * 2, num_nextn_predict_layers=1)
    behind = read(tmp_path, **sliding, layer_types=[*both * 2, "sliding_attention"], num_nextn_predict_layers=1)
    own = read(tmp_path, **sliding, layer_types=both * 2, num_mtp_layers=1, mtp_layer_types=["sliding_attention"])
    assert plain.spec.mtp_bytes + 2 * 64 * (32 + 32) == behind.spec.mtp_bytes == own.spec.mtp_bytes
    dense = read(tmp_path, mlp_layer_types=["dense", "sparse", "sparse", "sparse", "dense"], num_mtp_layers=1)
    assert dense.spec.mtp_bytes == 2 * (64 * 192 + 3 * 64 * 128 + 2 * 64 * 64)
    indexed = read(tmp_path, **MLA, **SPARSE, num_mtp_layers=1).spec
    assert indexed.mtp_bytes > read(tmp_path, **MLA, num_mtp_layers=1).spec.mtp_bytes


def test_the_heads_of_step_are_dense_as_the_layers_that_have_no_experts(tmp_path: Path) -> None:
    table = MODELS["step-3.5-flash"][0]
    (tmp_path / "config.json").write_text(json.dumps(table), encoding="utf-8")
    spec = read_model_file(tmp_path).spec
    feed, joined = 3 * 4096 * 11264, 2 * 4096**2
    heads = [head_params(spec, letter, "d").plain for letter in "www"]
    assert min(heads) > feed + joined
    assert spec.mtp_bytes == 2 * sum(heads)


def test_heads_take_memory_where_they_are_loaded(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.safetensors", 2, 1, shape=(45, 128, 8), model="glm-4.5-air")
    words = ["+hardware=h200", "+policy=lru", f"trace.path={path}", "model=glm-4.5-air", "gpu_memory_gb=60"]
    alone, loaded = (make_workload(configure([*words, *more])) for more in ((), ("model.mtp=true",)))
    each = alone.model.mean_expert_bytes
    assert alone.num_slots - loaded.num_slots == pytest.approx(4_750_049_280 / each, abs=1)
    assert "MTP heads beside 4.75 GB" in summary(alone.model)
    assert "MTP" not in summary(loaded.model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=qwen3-30b-a3b", "model.mtp=true"), r"model\.mtp=true loads heads .* has none \(model\.mtp_bytes=0\)"),
        (("model=glm-4.5-air", "model.mtp_bytes=7"), r"model\.mtp_bytes=7 counts where heads .*; add model\.mtp=true"),
    ],
)
def test_what_would_change_nothing_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.safetensors", 2, 1, shape=(48, 128, 8), model="qwen3-30b-a3b")
    with pytest.raises(ValueError, match=message):
        make_workload(configure(["+hardware=h200", "+policy=lru", f"trace.path={path}", "compare=none", *words]))
