"""A model of the user's own: `model.path=FILE`, any key of any model, and the YAML of `python -m sim.model`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertflow.model import model_from_dict
from sim.job.configure import configure
from sim.job.model import chosen_model
from sim.job.setup import make_workload
from sim.model import main
from sim.specs.model_file import read_model_file
from tests.cli.test_bad_input import assert_refused
from tests.support.commands import run_here, small_trace
from tests.unit.specs.hf_configs import PUBLISHED
from traces.reader import open_trace

WORDS = ("+hardware=a100", "+policy=lru", "compare=none")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt-oss-20b"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(PUBLISHED["gpt-oss-20b"]), encoding="utf-8")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return small_trace(tmp_path / "t.safetensors")


def model(*words: str) -> Any:
    return make_workload(configure([*WORDS, *words])).model


def test_a_folder_runs_as_the_shipped_model_does(config: Path, trace: Path) -> None:
    given = asdict(model(f"model.path={config.parent}", f"trace.path={trace}"))
    shipped = asdict(model("model=gpt-oss-20b", f"trace.path={trace}"))
    assert {key for key in given if given[key] != shipped[key]} == {"source"}


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("model.expert_bits=4.85", "expert_bits", 4.85),
        ("model.kv_bits=8", "kv_bits", 8),
        ("model.shared_intermediate=100", "shared_intermediate", 100),
        ("++model.expert_bits=4.85", "expert_bits", 4.85),
    ],
)
def test_any_key_changes_any_model(word: str, key: str, value: float, config: Path, trace: Path) -> None:
    for chosen in ("model=gpt-oss-20b", f"model.path={config}"):
        assert getattr(model(chosen, word, f"trace.path={trace}"), key) == value


def test_a_key_that_the_models_file_lacks_needs_no_sign() -> None:
    found = configure([*WORDS, "model=qwen3-30b-a3b", "model.expert_bits=4.85"])
    # 4.85 bits of 3 * 2048 * 768 weights, as GGUF's Q4_K_M has them.
    assert model_from_dict(found["model"]).mean_expert_bytes == pytest.approx(2_860_000, rel=0.01)


@pytest.mark.slow
def test_the_result_records_every_size_and_the_run_says_what_was_assumed(
    config: Path, trace: Path, tmp_path: Path
) -> None:
    words = [*WORDS, f"model.path={config}", "model.kv_bits=8", f"trace.path={trace}", "skip_done=true"]
    found = run_here(words, tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    assert "model: kv_bits=8, in place of 16.0" in found.out
    assert "model: assumed: weights take 16 bits: the file names no dtype" in found.out
    origin = json.loads((found.folder / "provenance.json").read_text(encoding="utf-8"))
    read = read_model_file(config)
    assert origin["model"] == {**asdict(read.spec), "kv_bits": 8}
    assert origin["model_file"] == {"derived": list(read.derived), "assumed": list(read.assumed)}
    assert model_from_dict(origin["model"]).kv_bits == 8
    # The content decides: the same again is not run, another is.
    assert "done before" in run_here(words, tmp_path / "out").out
    config.write_text(json.dumps({**PUBLISHED["gpt-oss-20b"], "vocab_size": 1000}), encoding="utf-8")
    assert "done before" not in run_here(words, tmp_path / "out").out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("model=gpt-oss-20b", "model.path={}"), ("two models", "leave one out")),
        (("model.path={}/nowhere",), ("nowhere: file: does not exist",)),
        (("model.path=7",), ("model.path=7 must be text",)),
        (("model.path={}", "model.expert_bits=100"), ("model.expert_bits=100 is outside [1, 64]",)),
        (("model.path={}", "model.expert_bit=4"), ("did you mean model.expert_bits?",)),
        (("model.path={}", "model.top_k=33"), ("model.top_k=33 is outside [1, 32]",)),
        (("model.expert_bits=4",), ("model.expert_bits means nothing with model=auto", "give model.path")),
        (("++model.foo=4",), ("model.foo is no key",)),
        (("model.window_every=2",), ("model.window_every is called model.attention_pattern now",)),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    words: tuple[str, ...], parts: tuple[str, ...], config: Path, trace: Path, tmp_path: Path
) -> None:
    given = [word.format(config.parent) for word in words]
    assert_refused(run_here([*WORDS, *given, f"trace.path={trace}"], tmp_path / "out"), parts)


def test_the_yaml_is_the_model_again(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config)]) == 0
    said = capsys.readouterr()
    assert model_from_dict(yaml.safe_load(said.out)) == read_model_file(config).spec
    assert "# assumed: weights take 16 bits: the file names no dtype" in said.out.splitlines()
    assert "24 MoE layers of 32 experts, 4 a token; an expert takes 13.22 MB" in said.err


def test_a_file_that_is_there_stays(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert main([str(config), "--out", str(path)]) == 0
    path.write_text("mine", encoding="utf-8")
    assert main([str(config), "--out", str(path)]) == 2
    assert "is there already; choose another name, or add --overwrite" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"
    assert main([str(config), "--out", str(path), "--overwrite"]) == 0
    assert model_from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))) == replace(
        read_model_file(config).spec, name="mine"
    )


def test_the_yaml_is_called_after_its_file_and_its_folder_is_made(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine" / "model" / "my-moe.yaml"
    assert main([str(config), "--out", str(path)]) == 0
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == "my-moe"


def test_what_is_no_model_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 10}', encoding="utf-8")
    assert main([str(tmp_path), "--out", str(tmp_path / "mine.yaml")]) == 2
    error = capsys.readouterr().err
    assert "is of no Mixture of Experts (llama;" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "mine.yaml").exists()


def test_sizes_that_lie_beside_the_trace_are_named_and_not_taken_silently(tmp_path: Path) -> None:
    trace = open_trace(small_trace(tmp_path / "tiny.safetensors", model="tiny"))
    with pytest.raises(ValueError, match=r"no sizes are known; say model\.path=FILE"):
        chosen_model({"name": "auto"}, trace)
    (tmp_path / "tiny.config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tiny\.config\.json lies beside it: say model\.path=.*tiny\.config\.json$"):
        chosen_model({"name": "auto"}, trace)
