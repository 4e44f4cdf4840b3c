"""A scaled model is a valid model of the same shape whose experts weigh scale² less."""

from __future__ import annotations

import re

import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from replay.machine.scale import check_replayable, scaled_model
from sim.paths import CONF

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "auto")


def model_of(name: str) -> ModelSpec:
    return model_from_dict(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def is_replayed(name: str) -> bool:
    """Whether a replay has kernels for the model."""
    try:
        check_replayable(model_of(name))
    except ValueError:
        return False
    return True


REPLAYED = [name for name in NAMES if is_replayed(name)]


def test_there_are_models() -> None:
    assert {"gpt-oss-20b", "deepseek-v3", "qwen2-57b-a14b-int4", "glm-4.5-air", "kimi-k2"} <= set(REPLAYED)
    assert {"qwen3-next-80b-a3b", "deepseek-v3.2", "llama-4-scout"} <= set(NAMES) - set(REPLAYED)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(REPLAYED)))
def test_a_model_without_kernels_is_refused_by_the_key_that_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.\w+=.* of {re.escape(name)} is only simulated") as told:
        check_replayable(model_of(name))
    assert len(str(told.value)) <= 300


@pytest.mark.parametrize("scale", [2, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_an_expert_weighs_as_much_less_as_the_square_of_the_scale(name: str, scale: int) -> None:
    model = model_of(name)
    small = scaled_model(model, scale)
    assert small.name == f"{name}/{scale}"
    assert small.mean_expert_bytes * scale**2 == pytest.approx(model.mean_expert_bytes, rel=0.01)
    assert small.attention_params * scale**2 == pytest.approx(model.attention_params, rel=0.05)
    kept = (
        "num_layers",
        "num_experts",
        "top_k",
        "num_heads",
        "num_kv_heads",
        "window",
        "attention_pattern",
        "expert_matrices",
        "num_dense_layers",
        "expert_bits",
        "weight_bits",
        "attention",
    )
    assert [getattr(small, key) for key in kept] == [getattr(model, key) for key in kept]
    for key in ("shared_intermediate", "dense_intermediate", "q_rank", "kv_rank", "head_dim"):
        assert bool(getattr(small, key)) == bool(getattr(model, key)), key


@pytest.mark.parametrize("name", NAMES)
def test_no_scale_makes_an_invalid_model(name: str) -> None:
    """At the end of the range a width may be 1, never 0 where the model has one."""
    for scale in (3, 100, 1024):
        assert scaled_model(model_of(name), scale).mean_expert_bytes > 0


def test_a_scale_of_one_changes_nothing() -> None:
    model = model_of("mixtral-8x7b")
    assert scaled_model(model, 1) is model
