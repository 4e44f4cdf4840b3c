"""A measured kernel table is of a model with its sizes: another's is refused, and says which size differs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.paths import CONF, ROOT

TABLE = {"expert": [[1, 10]], "head": [[1, 10]], "attention": [[1, 10]], "kv": 0.0}


def configured(*words: str, measured: str = "gpt-oss-20b") -> dict[str, Any]:
    """A configuration on an A100 with a table of `measured`."""
    cfg = configure(["+hardware=a100", "+policy=lru", "compare=none", *words])
    hardware = yaml.safe_load((CONF / "hardware" / "a100.yaml").read_text())
    return {**cfg, "hardware": {**hardware, "kernel_ns": {measured: TABLE}}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_bits", 16.0),
        ("expert_intermediate", 8192),
        ("hidden_size", 5760),
        ("num_kv_heads", 64),
        ("kv_bits", 4.0),
        ("vocab_size", 1000),
        ("window_heads", 128),
        ("attention_pattern", "wfl"),
    ],
)
def test_a_size_that_kernels_depend_on_is_refused(key: str, value: object) -> None:
    words = ["model=gpt-oss-20b", f"model.{key}={value}"]
    if value == "wfl":
        words += ["model.linear_params=9", "model.linear_state=9"]
    with pytest.raises(ValueError, match=rf"model\.{key}=.* was measured with .*hardware\.kernel_ns=\{{\}}") as found:
        make_workload(configured(*words))
    assert len(str(found.value)) <= 300


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model=gpt-oss-20b",),
        ("model=gpt-oss-20b", "model.window=64"),
        ("model=gpt-oss-20b", "model.window_heads=64"),
        ("model=gpt-oss-20b", "model.extra_bytes=7"),
        ("model=gpt-oss-20b", "model.name=mine", "model.expert_bits=16"),
    ],
)
def test_a_table_serves_what_it_was_measured_with(words: tuple[str, ...]) -> None:
    assert make_workload(configured(*words)).hardware.kernel_ns.keys() == {"gpt-oss-20b"}


def test_without_the_table_any_size_runs() -> None:
    cfg = configured("model=gpt-oss-20b", "model.expert_bits=16")
    assert make_workload({**cfg, "hardware": {**cfg["hardware"], "kernel_ns": {}}}).model.expert_bits == 16


def test_a_table_of_another_model_is_not_asked() -> None:
    cfg = configured("model=gpt-oss-20b", "model.expert_bits=16", measured="mixtral-8x7b")
    assert make_workload(cfg).model.expert_bits == 16


def test_a_name_that_is_not_shipped_has_the_table_of_its_own() -> None:
    words = ("model=gpt-oss-20b", "model.name=mine", "model.expert_bits=16")
    assert make_workload(configured(*words, measured="mine")).model.name == "mine"


def test_the_recorded_calibration_is_that_of_the_shipped_model() -> None:
    path = ROOT / "results" / "validation-h200" / "found" / "profile" / "hardware" / "h200-a.yaml"
    cfg = {**configured(), "hardware": yaml.safe_load(path.read_text())}
    assert "gpt-oss-20b" in make_workload(cfg).hardware.kernel_ns
