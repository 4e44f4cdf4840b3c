"""What a new user writes on a command line of which a part would be ignored, or taken for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.job.clashes import prepared
from sim.paths import CONF
from sim.specs.model_file import read_model_file
from tests.support.commands import run_here
from traces.messages import TraceError
from traces.shipped import offered

WORDS = ("+hardware=a100", "+policy=lru")


def refused(words: list[str], folder: Path) -> str:
    found = run_here([*WORDS, *words], folder)
    assert (found.code, found.err.count("\n"), found.done) == (2, 1, False)
    assert len(found.err) <= 301
    return found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["residency=0.5", "residency=0.2"], "residency=0.5 and residency=0.2: residency is given twice"),
        (["policy.eviction.used=0.5", "++policy.eviction.used=0.2"], "policy.eviction.used is given twice"),
        (["trace.path=a", "trace.path='b c'"], "trace.path=a and trace.path='b c': trace.path is given twice"),
        (["hydra.run.dir=elsewhere"], "hydra.run.dir is given twice"),
        (["hydra.sweep.dir=s"], "hydra.sweep.dir=s means nothing without -m; say hydra.run.dir=s"),
        (["residency=0.2,0.5", "-m", "hydra.run.dir=r"], "means nothing with -m; say hydra.sweep.dir=r"),
        (["trace=gpt-oss-20b-twin", "trace.path=mine"], "trace=gpt-oss-20b-twin and trace.path=mine are two traces"),
    ],
)
def test_words_of_which_one_would_be_ignored_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(words, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.path=a=b.gguf"], """quote the value: "model.path='a=b.gguf'\""""),
        (["trace.path=größe.st"], """quote the value: "trace.path='größe.st'\""""),
        (["model=m.gguf"], "say model.path=m.gguf"),
        (["model=mine/config.json"], "say model.path=mine/config.json"),
        (["model.path='https://a.b/c'"], "is an address; download its config.json and give that file"),
        (["model.path=mine/x.yaml"], "--config-dir=FOLDER model=x"),
        (["model.path=qwen3-30b-a3b"], "say model=qwen3-30b-a3b"),
        (["link=pcie4"], "link=pcie4 does not exist (did you mean pcie4x16?); choose one of: pcie4x16, pcie4x1,"),
    ],
)
def test_what_is_said_shows_what_to_write(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(words, tmp_path / "run")


def test_what_quotes_are_said_to_mend_they_mend(tmp_path: Path) -> None:
    assert "a=b.gguf: file: does not exist" in refused(["model.path='a=b.gguf'"], tmp_path / "run")


def test_a_card_is_found_by_the_name_on_its_box(tmp_path: Path) -> None:
    found = run_here(["+hardware='RTX 3090'", "+policy=lru"], tmp_path / "run")
    assert found.code == 2
    assert "hardware=RTX 3090 does not exist (did you mean rtx3090?)" in found.err


def test_the_home_folder_and_the_flag_of_a_sweep_are_meant_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a b")
    assert prepared(["x=1", "-m", "trace.path=~/t", "~policy.place"]) == [
        "-m",
        "x=1",
        "trace.path='/home/a b/t'",
        "~policy.place",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x=1", "--config-dir", "mine", "y=2"], ["--config-dir", "mine", "x=1", "y=2"]),
        (["x=1", "--config-dir=mine", "y=2"], ["--config-dir=mine", "x=1", "y=2"]),
        (["x=1", "-cd", "mine", "-m", "y=2,3"], ["-m", "-cd", "mine", "x=1", "y=2,3"]),
        (["x=1", "--config-dir"], ["--config-dir", "x=1"]),
        (["--config-dir", "--run", "x=1"], ["--config-dir", "--run", "x=1"]),
    ],
)
def test_flags_are_meant_where_they_stand(words: list[str], expected: list[str]) -> None:
    assert prepared(words) == expected


@pytest.mark.slow
def test_the_folder_of_ones_own_may_be_named_between_the_keys(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = (CONF / "model" / "gpt-oss-20b.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine" / "model" / "q4.yaml").write_text(text, encoding="utf-8")
    words = ["+hardware=a100", "--config-dir", str(tmp_path / "mine"), "model=q4", "+policy=lru", "max_tokens=4"]
    found = run_here([*words, "compare=none"], tmp_path / "run")
    assert (found.code, found.err) == (0, "")


def test_of_a_folder_the_only_gguf_file_is_read(tmp_path: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(TraceError, match=r"m-00001-of-00002\.gguf"):
        read_model_file(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(TraceError, match=r"holds 2 GGUF files, and no config\.json; give one of the files"):
        read_model_file(tmp_path)


def test_a_recording_that_is_not_installed_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt-oss-20b-twin-eval.safetensors.packed").touch()
    monkeypatch.setattr("traces.shipped.FOLDER", tmp_path)
    assert offered() == "gpt-oss-20b-twin"
    assert "give a file, or one of: gpt-oss-20b-twin\n" in refused(["trace.path=absent"], tmp_path / "run")


@pytest.mark.slow
def test_a_card_of_ones_own_begins_from_another(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "hardware" / "box.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("name: box\nmemory_gb: 10.0\n", encoding="utf-8")
    words = [f"--config-dir={tmp_path / 'mine'}", "+hardware=box", "+policy=lru", "max_tokens=4", "compare=none"]
    lacking = run_here(words, tmp_path / "run")
    assert (lacking.code, lacking.err.count("\n")) == (2, 1)
    assert "`defaults: [NAME, _self_]` takes what it leaves out from the file NAME" in lacking.err
    path.write_text("defaults: [rtx3060, _self_]\nname: box\nmemory_gb: 10.0\n", encoding="utf-8")
    found = run_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    assert found.metrics()["hardware"] == "box"
