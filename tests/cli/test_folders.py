"""Folders that a command line names: of output, of configuration; each mistake is one line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim.job.errors import one_line
from sim.paths import ROOT, check_files, resolved
from tests.support.commands import run_here
from traces.messages import TraceError, told

RUN = ("+hardware=a100", "+policy=lru", "compare=none")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("hydra.run.dir=",), "hydra.run.dir is empty, which is the current folder; give hydra.run.dir=FOLDER"),
        (('hydra.run.dir=""',), "hydra.run.dir is empty"),
        (("hydra.run.dir=' '",), "hydra.run.dir is empty"),
        (("-m", "hydra.sweep.dir="), "hydra.sweep.dir is empty"),
        (("--config-dir=nosuch",), "--config-dir=nosuch: no such folder; give one with"),
        (("--config-dir=loop",), "--config-dir=loop: no such folder; give one with"),
        (("--config-dir", "--run"), "argument --config-dir/-cd: expected one argument; "),
        (("--nosuch",), "unrecognized arguments: --nosuch"),
        (("-m", "hydra.sweep.dir=/proc/x"), "choose an output folder with hydra.sweep.dir=FOLDER"),
    ],
)
def test_one_line_says_what_is_wrong(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "DONE").touch()
    # run_here adds an output folder behind these: a flag that lacks its value takes none that follows a flag.
    found = run_here(
        [*words[:-1], *RUN, words[-1], "--run"] if words == ("--config-dir",) else [*words, *RUN], tmp_path
    )
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert says in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DONE", "loop"]


def test_the_remedy_is_the_commands_own() -> None:
    error = PermissionError(13, "Permission denied", "results/x")
    assert one_line(error) == "results/x: no permission; check the rights of file and folder"
    assert str(one_line(error, "give --out FOLDER")).endswith(", or give --out FOLDER")


@pytest.mark.parametrize(
    "files",
    [
        {"hardware/mine": "[mine, _self_]"},
        {"hardware/mine": "[/hardware/mine]"},
        {"hardware/a": "[b]", "hardware/b": "[_self_, a@there]"},
        {"hardware/a": "[{/stack: b}]", "stack/b": "[{optional /hardware@c: [a.yaml]}]"},
    ],
)
def test_a_file_that_includes_itself_is_named(files: dict[str, str], tmp_path: Path) -> None:
    for name, defaults in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(f"defaults: {defaults}\nx: 1\n")
    with pytest.raises(TraceError, match=rf"{next(iter(files))}\.yaml: defaults: includes itself .*; take it out"):
        check_files(tmp_path)


def test_files_that_include_others_are_none(tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    for name, defaults in {"a": "[h100, _self_]", "b": "[a, {/stack: h100}]", "c": "[a, b]"}.items():
        (tmp_path / "hardware" / f"{name}.yaml").write_text(f"defaults: {defaults}\n")
    check_files(tmp_path)
    (tmp_path / "hardware" / "gone.yaml").symlink_to("nowhere")
    with pytest.raises(TraceError, match=r"gone\.yaml: file: cannot be read \(does not exist\)"):
        check_files(tmp_path)


def test_what_is_nested_without_end_is_one_line() -> None:
    for line in (told(RecursionError("maximum recursion depth exceeded")), one_line(RecursionError())):
        assert line == "a file or configuration is nested too deeply, or includes itself; make it flatter"


def test_links_in_a_circle_are_no_error_until_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert resolved(tmp_path / "loop").name == "loop"
    (tmp_path / "link").symlink_to("there")
    assert resolved(tmp_path / "link") == resolved(tmp_path) / "there"


@pytest.mark.slow
def test_a_refused_run_leaves_no_folder_of_its_own(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sim", "+hardware=a100", "+policy=lru", "residency=2"]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    for more in ([], ["hydra.run.dir=mine"]):
        found = subprocess.run([*words, *more], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=60)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert [path for path in sorted(tmp_path.rglob("*"))] == [tmp_path / "mine", tmp_path / "outputs"]
