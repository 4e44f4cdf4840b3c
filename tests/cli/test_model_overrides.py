"""A key of a model's own: it takes effect whatever else says the size of an expert, or is refused in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from expertflow.attention import KINDS, entries_read, index_keys
from expertflow.keys import declared
from expertflow.model import ModelSpec, model_from_dict
from sim.job.configure import configure
from sim.job.report import remarks_of
from sim.job.setup import Workload, make_workload
from sim.model import main
from sim.paths import CONF
from sim.specs.model_file import read_model_file
from tests.cli.test_bad_input import assert_refused
from tests.support import gguf_models
from tests.support.commands import TINY_MODEL_WORDS, run_here, small_trace, tiny_trace

WORDS = ("+hardware=a100", "+policy=lru", "compare=none")
SHAPE = (48, 128, 8)
WEIGHTS = 3 * 2048 * 768


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Qwen3-30B-A3B in Q4_K_M: experts of two sizes by layer, 4.85 bits a weight in the mean."""
    return gguf_models.write(tmp_path / "q4.gguf", *gguf_models.qwen3_30b_a3b())


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return small_trace(tmp_path / "t.safetensors", 4, shape=SHAPE, model="qwen3-30b-a3b")


@pytest.fixture
def own(mixed: Path, tmp_path: Path) -> str:
    """The same as a file of one's own, by its name; the folder is in `--config-dir`."""
    assert main([str(mixed), "--out", str(tmp_path / "own" / "model" / "q4.yaml")]) == 0
    return "q4"


def told(*words: str) -> tuple[Workload, list[str]]:
    """What runs, and what is said of it."""
    cfg = configure([*WORDS, *words])
    work = make_workload(cfg)
    return work, remarks_of(cfg, work)


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("model.expert_bits=8.5", WEIGHTS * 85 // 80),
        ("+model.expert_bits=8.5", WEIGHTS * 85 // 80),
        ("model.expert_bytes=1000000", 1_000_000),
    ],
)
def test_a_size_of_ones_own_takes_the_place_of_the_files(word: str, size: int, mixed: Path, trace: Path) -> None:
    work, said = told(f"model.path={mixed}", f"trace.path={trace}", word)
    assert (work.model.mean_expert_bytes, work.model.bytes_by_key) == (size, None)
    lines = [line for line in said if "hold no longer" in line]
    assert len(lines) == ("expert_bits" in word)
    for line in lines:
        assert (
            "5013504 bytes, 4718592 weights of 8.5 bits: the sizes that the model's file gives hold no longer" in line
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [("expert_intermediate", 1536), ("hidden_size", 4096), ("expert_matrices", 2), ("expert_hidden", 64)],
)
def test_widths_change_the_bytes_of_an_expert(key: str, value: int, mixed: Path, trace: Path) -> None:
    work, said = told(f"model.path={mixed}", f"trace.path={trace}", f"model.{key}={value}")
    spec = work.model
    assert spec.mean_expert_bytes == -(-spec.expert_params * spec.expert_bits // 8)
    assert spec.expert_params != WEIGHTS
    assert any("hold no longer" in line for line in said)
    assert ("model: extra_bytes as the file gives them" in " ".join(said)) == (key == "hidden_size")


@pytest.mark.parametrize("folder", [None, "own"])
def test_what_follows_nothing_is_said_of_a_named_model_too(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one of ours, and of a file of the user's own."""
    name = "glm-4.5-air"
    keys = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    spec = model_from_dict(keys)
    if folder is not None:
        name = "mine"
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump(keys | {"name": name}))
        monkeypatch.setattr("sim.paths._own", [tmp_path])
    trace = small_trace(tmp_path / "t.safetensors", 4, shape=(spec.num_layers, spec.num_experts, spec.top_k))
    words = [f"model={name}", f"trace.path={trace}", "residency=0.1"]
    assert not told(*words)[1]
    wider = told(*words, "model.hidden_size=2048")[1]
    assert any("mtp_bytes as the file gives them: they follow no width" in line for line in wider)
    bits = [line for line in told(*words, "model.mtp=true", "model.expert_bits=4")[1] if "mtp_bytes=" in line]
    assert bits == [f"model: mtp_bytes={spec.mtp_bytes} as the file gives it: it follows no bits, give it, too"]
    assert not told(*words, "model.mtp=true", "model.expert_bits=4", "model.mtp_bytes=7")[1]


def test_the_same_of_a_yaml_that_the_command_wrote(
    own: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_here(
        [f"--config-dir={tmp_path / 'own'}", *WORDS, f"model={own}", f"trace.path={trace}", "model.expert_bits=8.5"],
        tmp_path / "out",
    )
    assert (found.code, found.err) == (0, "")
    assert "the sizes that the model's file gives hold no longer" in " ".join(found.out.split())
    metrics = found.metrics()
    assert metrics["bytes"]["demand"] == metrics["num_misses"] * 5_013_504 > 0


def test_the_sizes_of_a_trace_give_way_too(tmp_path: Path) -> None:
    small_trace(tmp_path / "t.safetensors", model="gpt-oss-20b")
    trace = _with_sizes(tmp_path, json.dumps([1000] * 24))
    work, said = told("model=gpt-oss-20b", f"trace.path={trace}")
    assert work.model.mean_expert_bytes == 1000
    work, said = told("model=gpt-oss-20b", f"trace.path={trace}", "model.expert_bits=8")
    assert work.model.mean_expert_bytes == 3 * 2880 * 2880
    assert any("the sizes that the trace gives hold no longer" in line for line in said)


def _with_sizes(folder: Path, sizes: str) -> Path:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = folder / "t.safetensors"
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        save_file(arrays, folder / "s.safetensors", {**file.metadata(), "expert_bytes": sizes})
    return folder / "s.safetensors"


def test_a_model_of_words_alone_takes_the_sizes_of_its_trace(tmp_path: Path) -> None:
    tiny_trace(tmp_path / "t.safetensors")
    trace = _with_sizes(tmp_path, "[1000, 1000, 1000, 1000]")
    assert told(*TINY_MODEL_WORDS, f"trace.path={trace}")[0].model.mean_expert_bytes == 1000
    with_bits = told(*TINY_MODEL_WORDS, "+model.expert_bits=8", f"trace.path={trace}")[0]
    assert with_bits.model.mean_expert_bytes == 3 * 512 * 512


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("model.expert_bits=8.5", "model.expert_bytes=7"), ("both say how large an expert is", "leave one out")),
        (("model.num_layers=7",), ("model.expert_bytes lists 48 sizes, the model has num_layers=7",)),
        (("model.index_bits=8",), ("model.index_bits=8 changes nothing: it is of layers i or x",)),
        (("model.index_block=2",), ("model.index_block=2 changes nothing: it is of layers i",)),
        (("model.state_bits=16",), ("model.state_bits=16 changes nothing: it is of layers l",)),
        (("model.shared_gate=true",), ("model.shared_gate=true is of shared experts",)),
    ],
)
def test_what_would_change_nothing_is_refused_in_one_line(
    words: tuple[str, ...], parts: tuple[str, ...], mixed: Path, trace: Path, tmp_path: Path
) -> None:
    assert_refused(run_here([*WORDS, f"model.path={mixed}", f"trace.path={trace}", *words], tmp_path / "out"), parts)


# -- every key -----------------------------------------------------------------------------------------------


def effects(spec: ModelSpec) -> Any:
    """Everything that a run takes of a model."""
    kinds = sorted(set(KINDS) & {layer.attention for layer in spec.layers})
    found = [(spec.projections(kind), spec.mixer_params(kind), spec.entry_bytes(kind)) for kind in kinds]
    lengths = (1, 100, 5_000, 200_000)
    reads = [(entries_read(spec, kind, at), index_keys(spec, kind, at)) for kind in kinds for at in lengths]
    kept = [spec.kv_bytes(at) for at in lengths]
    sizes = (spec.num_params, spec.expert_params, spec.shared_params, spec.dense_params, spec.head_params)
    weight = (spec.mean_expert_bytes, spec.total_expert_bytes, spec.non_expert_bytes, spec.bytes_by_key)
    return spec.layers, spec.top_k, spec.name, spec.source, found, reads, kept, sizes, weight, spec.router_params


def others(key: str, value: Any) -> list[Any]:
    """Values in place of `value`."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value + 7, 2 * value + 16, max(value - 1, 0)]
    if key == "attention_pattern":
        return [*KINDS]
    return ["gqa", "mla"] if key == "attention" else [f"{value}x"]


def same_of_others(spec: ModelSpec, key: str) -> Any:
    """What a key of windowed layers is where they are as the others."""
    name = {"window_heads": "num_heads", "window_kv_heads": "num_kv_heads"}.get(key, key.removeprefix("window_"))
    return getattr(spec, name, None) or (spec.head_dim if name == "v_dim" else None)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "auto"))
def test_every_key_of_a_model_takes_effect_or_is_refused(name: str) -> None:
    table = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    spec = model_from_dict(table)
    before = effects(spec)
    # Bytes of heads that are not loaded are refused among the words, as sizes of experts are.
    for key in set(declared(ModelSpec)) - {"expert_bytes", "feed_pattern", "mtp_bytes"}:
        for value in others(key, getattr(spec, key)):
            try:
                changed = replace(spec, **{key: value})
            except ValueError:
                continue
            same = {getattr(spec, key), same_of_others(spec, key)}
            assert effects(changed) != before or value in same, (key, value)


def test_the_same_of_a_gguf_file(mixed: Path) -> None:
    """But for what its list of sizes goes before, which words take out: see above."""
    spec = read_model_file(mixed).spec
    assert spec.bytes_by_key is not None
    by_bits = model_from_dict({**asdict(spec), "expert_bytes": "by_bits"})
    assert by_bits.bytes_by_key is None
    for key in ("expert_bits", "expert_intermediate", "hidden_size", "expert_matrices"):
        value = 2 if key == "expert_matrices" else 2 * getattr(spec, key)
        assert replace(by_bits, **{key: value}).total_expert_bytes != by_bits.total_expert_bytes
    # What the bits say is the mean of what the list says.
    assert by_bits.total_expert_bytes == pytest.approx(np.sum(spec.bytes_by_key), rel=1e-6)
    assert {field.name for field in fields(spec)} == set(declared(ModelSpec))
