"""The shipped recordings by their short names, wherever a trace may be named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sim.job.configure import configure
from sim.job.setup import make_trace
from sim.paths import config_files
from tests.support.commands import small_trace
from traces import cli
from traces.reader import open_trace
from traces.shipped import RECORDINGS, recording


@pytest.mark.parametrize("name", RECORDINGS)
def test_each_name_leads_to_its_recording_as_a_path_and_as_a_choice(name: str) -> None:
    stem = RECORDINGS[name].removesuffix(".safetensors")
    assert open_trace(name, validate=False).name == stem
    cfg = configure(["+hardware=a100", "+policy=lru", f"trace={name}"])["trace"]
    assert make_trace(cfg).name == stem


def test_the_choices_are_the_names_and_the_default_alone() -> None:
    assert set(config_files("trace")) == {"default", *RECORDINGS}


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(small_trace(tmp_path / "t.safetensors"), "gpt-oss-20b-twin")
    assert open_trace("gpt-oss-20b-twin").num_tokens == 12


def test_a_near_miss_is_answered_in_one_line_and_a_path_is_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", "gpt-oss-20b-twn"]) == 2
    told = capsys.readouterr().err
    assert "file: does not exist, and is no recording that is shipped (did you mean gpt-oss-20b-twin?)" in told
    assert (told.count("\n"), len(told) <= 301) == (1, True)
    assert cli.main(["stats", "./gpt-oss-20b-twin"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert recording("gpt-oss-20b.split.json") is None


def test_stats_takes_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", "gpt-oss-20b-twin", "--max-tokens", "4"]) == 0
    assert "4 tokens, 1 requests" in capsys.readouterr().out
