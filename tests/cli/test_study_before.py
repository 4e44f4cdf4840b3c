"""What a study refuses before its first cell: another model's recording, a file that is not there, an unknown part."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.study import cells as cells_module
from sim.study.command import cli
from sim.study.plan import cells, load_study, read_study
from tests.support.commands import small_trace
from tests.support.studies import command, write_study
from traces import shipped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_study(tmp_path, claims=None, best=None)
    small_trace(tmp_path / "r.safetensors", 24, 2, prompt=4)
    return tmp_path


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that the tiny study ends with; nothing has run and nothing is left."""
    assert command(folder, "--set", f"recording={folder / 'r.safetensors'}", *words) == 2
    told = capsys.readouterr()
    assert "cells, " not in told.out
    assert not (folder / "out").exists()
    assert (told.err.count("\n"), len(told.err) <= 301) == (1, True)
    return told.err


def test_a_recording_of_another_model_is_refused_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}=gpt-oss-20b-twin" for name in ("deepseek", "qwen", "gpt_oss")]
    assert cli(["paper", "--out", str(tmp_path / "out"), "--tokens", "300", "--set", *given]) == 2
    wanted = (
        "deepseek: needs a trace of deepseek-v2-lite (26×64 top 6), gpt-oss-20b-twin is of gpt-oss-20b (24×32 top 4)"
    )
    assert capsys.readouterr() == ("", f"error: {wanted}\n")
    assert not (tmp_path / "out").exists()


def test_one_of_the_right_shape_and_another_known_name_is_refused_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(folder, recordings={"recording": "mixtral-8x7b"})
    assert "recording: needs a trace of mixtral-8x7b (" in refused(folder, capsys)
    write_study(folder, recordings={"recording": "gpt-oss-20b"}, claims=None, best=None)
    small_trace(folder / "r.safetensors", model="mixtral-8x7b")
    cells_module._open_trace.cache_clear()
    assert "is of mixtral-8x7b (24×32 top 4)" in refused(folder, capsys)
    small_trace(folder / "r.safetensors", model="gpt-oss-20b-twin")
    cells_module._open_trace.cache_clear()
    assert command(folder, "--set", f"recording={folder / 'r.safetensors'}", "--only", "variant=lru") == 0


@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        ({"trace": "gpt-oss-20b"}, "tiny.yaml: recordings names trace, which is not among its parameters"),
        ({"recording": "gpt-oss-20"}, "recordings names the model 'gpt-oss-20', which does not exist .did you mean"),
        ({"recording": "auto"}, "recordings names the model 'auto', which does not exist$"),
        (["recording"], "recordings is .*; it must be parameters with the model"),
    ],
)
def test_a_mistake_in_what_recordings_says_is_named(recordings: object, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(write_study(folder, recordings=recordings))


def test_an_unknown_part_is_found_before_the_first_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(folder, capsys, "policy.eviction._target_=nix.Nix")
    assert told.startswith("error: every cell (12 of 12 cells): policy.eviction._target_='nix.Nix': there is no module")


def test_a_file_that_came_with_no_installation_is_found_before_the_first_cell_and_named_whole(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = "gpt-oss-20b-twin.forest.safetensors"
    monkeypatch.setattr(shipped, "FOLDER", folder)
    monkeypatch.setattr("sim.job.predictor.fitted_arrays", _asks_for(forest))
    variants = {"lru": ["+policy=lru"], "read": ["+policy=adaptive", "policy/predictor=forest"]}
    write_study(folder, variants=variants, claims=None, best=None)
    told = refused(folder, capsys)
    assert f"variant=read (2 of 4 cells): policy.predictor.fitted=auto: {forest} is in the repository" in told
    assert told.rstrip().endswith("for these alone: --set read:KEY=VALUE")


def _asks_for(name: str) -> object:
    def ask(source: object, model: str, kind: str, key: str) -> None:
        try:
            shipped.shipped(name)
        except ValueError as error:
            raise ValueError(f"{key}.fitted=auto: {error}, or null") from None

    return ask


def test_of_a_cause_of_several_variants_it_is_said_how_many_there_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(folder, capsys, "lru,fixed_1:policy.order._target_=nix.Nix")
    assert told.startswith(
        "error: variant=lru and 1 more (4 of 12 cells): policy.order._target_='nix.Nix': there is no"
    )
    assert told.rstrip().endswith("--set lru,…:KEY=VALUE")


def test_what_ails_one_place_is_not_said_of_another_with_the_same_policy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(folder, capsys, "eager:residency=null", "eager:gpu_memory_gb=0.5")
    assert told.startswith("error: stack=eager (6 of 12 cells): gpu_memory_gb=0.5")


def test_an_override_may_be_of_some_cells_alone(folder: Path) -> None:
    study = read_study(write_study(folder))
    found = cells(study, {"recording": "r.st"}, ["lru:seed=1", "eager,adaptive:seed=2", "chunk_mib=8"])
    assert all("chunk_mib=8" in cell.overrides for cell in found)
    assert {cell.variant for cell in found if "seed=1" in cell.overrides} == {"lru"}
    assert [str(cell) for cell in found if "seed=2" in cell.overrides] == ["model=small stack=eager variant=adaptive"]
    either = cells(study, {"recording": "r.st"}, ["graph,lru,perfect:seed=3"])
    assert [cell.variant for cell in either if "seed=3" in cell.overrides] == ["lru", "perfect"]
    assert {dict(cell.place)["stack"] for cell in either if "seed=3" in cell.overrides} == {"graph"}
    with pytest.raises(ValueError, match=r"--set lruu:seed=1: lruu is no variant .*did you mean lru"):
        cells(study, {"recording": "r.st"}, ["lruu:seed=1"])


def test_a_cell_knows_the_recordings_that_it_names_alone() -> None:
    values = {"deepseek": "a", "qwen": "b", "gpt_oss": "c"}
    for cell in cells(load_study("paper"), values):
        ((parameter, given, model),) = cell.recordings
        assert (values[parameter], cell.place[0][1].startswith(model)) == (given, True)


def test_an_underscore_for_a_dot_is_recognised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(folder, capsys, "trace_path=x")
    assert "no key is called trace_path (did you mean trace.path?)" in told
