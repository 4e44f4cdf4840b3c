"""What an installed package does at its start, the data that it carries packed, and the one command in front."""

from __future__ import annotations

import io
import json
import lzma
import os
import runpy
import subprocess
import sys
import tomllib
import warnings
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors.numpy import save

from expertflow.core import described
from replay.keys import main as keys
from sim import console
from sim.console import COMMANDS, main
from traces import installed, shipped
from traces.cli import main as traces
from traces.flags import called_as
from traces.installed import shadowed, strangers, warn_if_mixed
from traces.packing import pack, unpack

ROOT = Path(__file__).parents[2]


# -- mixed installations -------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as an installer leaves it: four packages, and a record of what it wrote."""
    rows = []
    for name in [*(f"{package}/__init__.py" for package in installed.PACKAGES), "sim/conf/config.yaml"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# ours\n")
        rows.append(f"{name},,{path.stat().st_size}")
    record(tmp_path, "expertflow", rows)
    (tmp_path / "traces" / "__pycache__").mkdir()
    return tmp_path


def record(site: Path, name: str, rows: list[str]) -> None:
    """The metadata of a distribution that wrote these files."""
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "RECORD").write_text("\n".join([*rows, f"{folder.name}/RECORD,,"]) + "\n")


def test_a_whole_installation_is_not_spoken_of(site: Path) -> None:
    assert strangers(site) is None


def test_a_file_that_another_distribution_added_is_named_with_it(site: Path) -> None:
    (site / "traces" / "timeseries.py").write_text("# theirs\n")
    record(site, "traces-of-others", ["traces/timeseries.py,,9"])
    line = strangers(site)
    assert line is not None
    assert "(by traces-of-others): traces/timeseries.py" in line
    assert "\n" not in line


def test_a_file_that_was_overwritten_is_named(site: Path) -> None:
    (site / "traces" / "__init__.py").write_text("from traces.timeseries import TimeSeries\n")
    (site / "sim" / "more").mkdir()
    line = strangers(site)
    assert line is not None
    assert line.endswith("packages: sim/more and 1 more")


def test_a_checkout_may_hold_what_it_likes(site: Path) -> None:
    (site / "traces" / "timeseries.py").write_text("# mine\n")
    (site / "sim" / "conf" / "config.yaml").unlink()
    (site / "sim" / "conf").rmdir()
    assert strangers(site) is None


def test_a_package_taken_from_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shadowed() is None
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "__init__.py").touch()
    # On the path alone it stands in nobody's way.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert shadowed() is None
    spec = PathFinder.find_spec("replay", [str(tmp_path)])
    assert spec is not None
    monkeypatch.setitem(sys.modules, "replay", module_from_spec(spec))
    line = shadowed()
    assert line is not None
    assert f"package replay from {tmp_path / 'replay'}" in line


def test_it_is_said_once_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installed, "ROOT", site)
    monkeypatch.setattr(installed, "shadowed", lambda: None)
    monkeypatch.delenv("EXPERTFLOW_CHECKED", raising=False)
    (site / "sim" / "other.py").touch()
    warn_if_mixed()
    warn_if_mixed()
    said = capsys.readouterr().err
    assert said.startswith("warning: another distribution has mixed files")
    assert said.count("\n") == 1
    assert os.environ.pop("EXPERTFLOW_CHECKED") == "1"


def test_a_shadowed_traces_is_explained_when_nothing_works(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    # Without site: the finder of an editable installation would find what the other package lacks.
    command = [sys.executable, "-S", "-c", "import traces; import sim"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("ImportError: Python takes the package traces from another")


# -- shipped data --------------------------------------------------------------------------------------------


SCORES = np.random.default_rng(0).integers(0, 6, (40, 3, 2, 8), np.uint8)
LARGE = save({"lookahead_scores": np.sort(SCORES)[..., ::-1].copy(), "other": np.arange(5)})
LARGER = save({"other": np.arange(9.0)})
WAVES = np.sin(np.arange(3000) / 50)
FLOATS = save(
    {f"{size}": WAVES.astype(f"f{size}").reshape(30, 100) for size in (2, 4, 8)} | {"u": np.arange(3, dtype=np.uint8)}
)
WORDS = save(
    {f"{kind}{size}": (WAVES * 100).astype(f"{kind}{size}") for kind in "iu" for size in (2, 4, 8)} | {"f": WAVES}
)


@pytest.mark.parametrize("content", [LARGE, LARGER, FLOATS, WORDS, save({}), save({"lookahead_scores": SCORES[:0]})])
def test_what_is_packed_comes_back_byte_for_byte(content: bytes) -> None:
    assert unpack(pack(content)) == content


def test_numbers_are_taken_apart_where_that_helps() -> None:
    for content, share in ((FLOATS, 0.9), (WORDS, 1.0)):
        assert len(pack(content)) < share * len(lzma.compress(content, preset=9))


def test_scores_that_fall_are_packed_smaller_than_by_xz_alone() -> None:
    content = (shipped.FOLDER / "gpt-oss-20b-twin-eval.safetensors").read_bytes()
    start = int.from_bytes(content[:8], "little") + 8
    about = json.loads(content[8:start])["lookahead_scores"]
    scores = content[start + about["data_offsets"][0] :][:80_000]
    header = json.dumps({"lookahead_scores": {"dtype": "U8", "shape": [10_000, 8], "data_offsets": [0, 80_000]}})
    grouped = pack(len(header).to_bytes(8, "little") + header.encode() + scores)
    other = header.replace("lookahead_scores", "candidate_scores")
    assert len(grouped) < 0.9 * len(pack(len(other).to_bytes(8, "little") + other.encode() + scores))


def lists(rows: np.ndarray) -> bytes:
    """A file of candidates [tokens, layers, distances, K]."""
    about = {"lookahead_ids": {"dtype": "U8", "shape": list(rows.shape), "data_offsets": [0, rows.size]}}
    header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header + rows.astype(np.uint8).tobytes()


def test_lists_of_candidates_that_repeat_are_packed_as_ranks() -> None:
    """Of one token for one layer, from four distances: each the one before with two that changed places."""
    rng, layers, distances = np.random.default_rng(0), 6, 4
    rows = np.full((50, layers, distances, 8), 255)
    for token, target in np.ndindex(50, layers):
        found = rng.permutation(64)[:8]
        for distance in range(min(distances, target)):
            place = rng.integers(7)
            found[[place, place + 1]] = found[[place + 1, place]]
            rows[token, target - distance - 1, distance] = found
    content = lists(rows)
    assert unpack(pack(content)) == content
    # A list that holds one twice, or none among others, has no ranks: all are packed as they are.
    for last in (rows[0, 0, 0, 0], 255):
        other = rows.copy()
        other[0, 0, 0, -1] = last
        assert unpack(pack(lists(other))) == lists(other)
        assert len(pack(content)) < 0.9 * len(pack(lists(other)))


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder as a wheel has it: one file packed, none of the repository's own."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "small.safetensors").write_bytes(b"small")
    (data / "large.safetensors.packed").write_bytes(pack(LARGE))
    monkeypatch.setattr(shipped, "FOLDER", data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped._unpacked.cache_clear()
    return data


def test_packed_files_are_unpacked_into_the_cache_once(packed: Path, tmp_path: Path) -> None:
    assert shipped.shipped("small.safetensors") == packed / "small.safetensors"
    path = shipped.shipped("large.safetensors")
    assert path is not None
    assert path.is_relative_to(tmp_path / "cache" / "expertflow")
    assert (path.name, path.read_bytes()) == ("large.safetensors", LARGE)
    written = path.stat().st_mtime_ns
    shipped._unpacked.cache_clear()
    assert shipped.shipped("large.safetensors") == path
    assert path.stat().st_mtime_ns == written
    assert [one.name for one in path.parent.iterdir()] == ["large.safetensors"]


def test_another_version_of_a_packed_file_is_another_file(packed: Path) -> None:
    before = shipped.shipped("large.safetensors")
    (packed / "large.safetensors.packed").write_bytes(pack(LARGER))
    shipped._unpacked.cache_clear()
    after = shipped.shipped("large.safetensors")
    assert before is not None
    assert after is not None
    assert (before.read_bytes(), after.read_bytes()) == (LARGE, LARGER)


def test_without_a_cache_that_can_be_written_a_temporary_folder_serves(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    path = shipped.shipped("large.safetensors")
    assert path is not None
    assert path.read_bytes() == LARGE
    assert not path.is_relative_to(tmp_path)


def test_what_only_the_repository_has_is_not_taken_for_nothing(packed: Path) -> None:
    assert shipped.shipped("a-model.hybrid.safetensors") is None
    assert shipped.shipped("../data/small.safetensors") is None
    with pytest.raises(ValueError, match=r"gpt-oss-20b-twin\.forest\.safetensors is in the repository"):
        shipped.shipped("gpt-oss-20b-twin.forest.safetensors")


def test_every_data_file_is_in_the_wheel_or_said_to_be_in_the_repository_only() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = told["tool"]["setuptools"]["package-data"]["traces"]
    names = {path.name for path in shipped.FOLDER.iterdir()}
    carried = {name for name in names if any(fnmatch(f"data/{name}", pattern) for pattern in patterns)}
    assert {Path(pattern).name for pattern in patterns} == carried
    assert names - carried == set(shipped.REPOSITORY_ONLY)


# -- the command in front ------------------------------------------------------------------------------------


def test_the_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    for name, (module, about) in COMMANDS.items():
        assert f"  {name} " in printed
        assert f"{about} (python -m {module})" in words
        assert f"(python -m {module})" in printed  # never parted
    assert max(map(len, printed.splitlines())) <= 80
    assert main([]) == 2
    assert capsys.readouterr().out == printed


def test_a_misspelt_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stuyd", "gap"]) == 2
    assert "did you mean study?" in capsys.readouterr().err


def test_an_error_names_the_command_as_it_was_called(capsys: pytest.CaptureFixture[str]) -> None:
    with called_as("python -m replay.keys", "expertflow keys"), pytest.raises(SystemExit):
        keys(["resid", "more"])
    assert capsys.readouterr().err == "error: unrecognized arguments: more; see expertflow keys --help\n"
    with called_as("python -m traces", "expertflow traces"), pytest.raises(SystemExit):
        traces(["stats"])
    assert capsys.readouterr().err.endswith("; see expertflow traces stats --help\n")
    with pytest.raises(SystemExit):
        keys(["resid", "more"])
    assert capsys.readouterr().err.endswith("; see python -m replay.keys --help\n")


def test_a_command_is_run_as_python_m_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []
    monkeypatch.setattr(console.runpy, "run_module", lambda *words, **how: ran.append((words, how, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["expertflow", "study", "gap", "--out", "out"])
    monkeypatch.setattr(sys, "path", ["where the command lies", *sys.path[1:]])
    monkeypatch.chdir(tmp_path)
    assert main() == 0
    assert ran == [(("sim.study",), {"run_name": "__main__", "alter_sys": True}, ["gap", "--out", "out"])]
    # The current folder is looked in, but behind the folder of the packages themselves.
    assert sys.path.index(str(tmp_path)) == sys.path.index(str(ROOT)) + 1


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "version", lambda name: {"expertflow": "7.8.9"}[name])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"expertflow 7.8.9, {described()}\n"


def help_there(words: list[str], folder: Path) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of `python -m WORDS --help` in a process of its own."""
    command = [sys.executable, "-m", *words, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return found.returncode, found.stdout, found.stderr


def help_here(module: str, words: list[str], patched: pytest.MonkeyPatch) -> tuple[object, str, str]:
    """The same in this process, whose folder and paths are left as they were."""
    out, err = io.StringIO(), io.StringIO()
    GlobalHydra.instance().clear()
    with patched.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["given by runpy", *words, "--help"])
        patch.setattr(sys, "path", list(sys.path))
        with warnings.catch_warnings():
            # The module has been imported here before, which a process would not have done.
            warnings.simplefilter("ignore", RuntimeWarning)
            with pytest.raises(SystemExit) as stop:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
    GlobalHydra.instance().clear()
    return stop.value.code, out.getvalue(), err.getvalue()


def assert_same_help(found: tuple[object, str, str], module: tuple[object, str, str]) -> None:
    assert found == module
    assert "usage" in (found[1] + found[2]).lower() or "hydra" in found[1].lower()


IN_PROCESSES = ("sim", "traces", "lockstep")
"""One command by Hydra, one by argparse, one that needs torch."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_its_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same help, the same exit code. A start costs more than all else, so that most are made in this process."""
    module = COMMANDS[name][0]
    if module.startswith("replay"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    if name in IN_PROCESSES:
        assert_same_help(help_there(["sim.console", name], tmp_path), help_there([module], tmp_path))
    else:
        found = help_here("sim.console", [name], monkeypatch)
        assert_same_help(found, help_here(module, [], monkeypatch))
