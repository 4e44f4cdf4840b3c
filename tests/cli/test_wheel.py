"""The wheel: built, installed into an environment of its own, and used from another folder, without a checkout."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from expertflow.network import compiled_functions
from tests.cli.wheels import build_wheel, copy_checkout, pip
from tests.support.commands import TINY_MODEL, tiny_trace

ROOT = Path(__file__).parents[2]
MOST_MB = 8.0
POLICY = """defaults:
  - lru
  - override eviction: mine
  - _self_
name: mine
"""
COMPILED_ANEW = "deciding.settle-"
"""The function that the installed package compiles itself, and keeps; by how numba's files begin."""
PART = "from expertflow.evictions.lru import LRU\n\n\nclass Mine(LRU):\n    pass\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed"),
]


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and a folder to work in."""

    bin: Path
    site: Path
    work: Path

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One command in the working folder, of this environment alone."""
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= {"XDG_CACHE_HOME": str(self.work / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        for name in ("EXPERTFLOW_CHECKED", "EXPERTFLOW_COMPILED", "NUMBA_CACHE_DIR"):
            environment.pop(name, None)
        command = [str(self.bin / words[0]), *words[1:]]
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=300)

    def run(self, *words: str) -> str:
        """Output of one command; it must succeed and warn of nothing."""
        found = self.start(*words)
        assert found.returncode == 0, found.stderr + found.stdout
        assert "warning" not in found.stderr
        return found.stdout

    @property
    def kernels(self) -> Path:
        """The folder that an installed package keeps compiled functions in."""
        return self.work / "cache" / "expertflow" / "numba"

    def files(self) -> dict[str, str]:
        """Hashes of everything in site-packages."""
        return {
            path.relative_to(self.site).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.site.rglob("*")
            if path.is_file()
        }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_checkout(copy)
    # What an earlier build left must not come along.
    stale = copy / "build" / "lib" / "conf" / "stale.yaml"
    stale.parent.mkdir(parents=True)
    stale.touch()
    return build_wheel(copy, out)


@pytest.fixture(scope="module")
def there(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A new environment that finds the packages of this one beside the wheel's; a folder with files of one's own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    places = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", places))
    # Compiled, whatever the environment says: none of the starts below may write into it.
    pip("--python", str(scripts / "python"), "install", "--compile", "--no-index", "--no-deps", str(wheel))
    # Only now, and after the environment's own: what is installed here in editable form is not found by this.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n", encoding="utf-8")
    found = Installed(scripts, site, tmp_path_factory.mktemp("work"))
    keep_kernels(found)
    return found


def keep_kernels(there: Installed) -> None:
    """Put what numba has kept of the checkout's functions where the installed ones are kept: to compile them all takes
    half a minute. Not `COMPILED_ANEW`."""
    if importlib.util.find_spec("numba") is None:
        return
    from numba.core.caching import _CacheLocator

    compiled_functions()  # so that all are kept
    source = there.site / "expertflow" / "compiled" / "deciding.py"
    place = there.kernels / _CacheLocator.get_suitable_cache_subpath(str(source))
    place.mkdir(parents=True)
    kept = (ROOT / "expertflow" / "compiled" / "__pycache__").glob("*.nb[ci]")
    for path in kept:
        if not path.name.startswith(COMPILED_ANEW):
            shutil.copy(path, place)


@pytest.fixture(scope="module")
def mine(there: Installed) -> Path:
    """A folder with a model, hardware and a policy."""
    folder = there.work / "mine"
    hardware = yaml.safe_load((ROOT / "conf" / "hardware" / "a100.yaml").read_text(encoding="utf-8"))
    for name, text in {
        "model/tiny.yaml": yaml.safe_dump(TINY_MODEL),
        "hardware/box.yaml": yaml.safe_dump({**hardware, "name": "box"}),
        "policy/mine.yaml": POLICY,
        "policy/eviction/mine.yaml": "_target_: part.Mine\n",
        "study/small.yaml": yaml.safe_dump(STUDY),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (there.work / "part.py").write_text(PART, encoding="utf-8")
    return folder


STUDY = {
    "name": "small",
    "about": "Two policies on a box of one's own.",
    "base": ["+hardware=box"],
    "variants": {"lru": ["+policy=lru"], "mine": ["+policy=mine"]},
    "tables": [{"title": "Stall", "value": "stall_ms_per_token", "columns": ["num_slots"]}],
}


@pytest.fixture(autouse=True)
def unchanged(there: Installed, mine: Path) -> object:
    """Nothing is written into site-packages."""
    before = there.files()
    yield
    assert there.files() == before


def run_of(there: Installed, *words: str, command: Sequence[str] = ("python", "-m", "sim")) -> dict[str, object]:
    """Metrics of one run."""
    there.run(*command, *words, "hydra.run.dir=out")
    found: dict[str, object] = json.loads((there.work / "out" / "metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(there.work / "out")
    return found


def test_the_wheel_is_small_and_claims_four_names(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size <= MOST_MB * 1e6
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"expertflow", "sim", "replay", "traces"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    there = {name.removeprefix("sim/") for name in names if name.startswith("sim/conf/")}
    assert there == {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}


def test_it_says_its_version(there: Installed) -> None:
    version = yaml.safe_load((ROOT / "pyproject.toml").read_text().split("version = ")[1].splitlines()[0])
    assert there.run("expertflow", "--version") == f"expertflow {version}, core in pure Python\n"


def test_the_main_command_gives_what_a_checkout_gives(there: Installed) -> None:
    words = ["+hardware=a100", "+policy=adaptive", "max_tokens=40", "compare=none"]
    found = run_of(there, *words)
    assert run_of(there, *words, command=("expertflow", "sim")) == found
    command = [sys.executable, "-m", "sim", *words, f"hydra.run.dir={there.work / 'here'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    assert json.loads((there.work / "here" / "metrics.json").read_text()) == found
    assert found["trace"]["name"] == "gpt-oss-20b-twin-eval"  # type: ignore[index]
    if importlib.util.find_spec("numba") is not None:
        # What an installed package compiles is kept in the user's cache, and nowhere else: see `unchanged`.
        kept = [path.name for path in there.kernels.rglob("*.nb[ci]") if path.name.startswith(COMPILED_ANEW)]
        assert sorted(name.rpartition(".")[2] for name in kept) == ["nbc", "nbi"]


def test_ones_own_model_hardware_and_policy(there: Installed, mine: Path) -> None:
    trace = tiny_trace(there.work / "t.safetensors")
    words = ["--config-dir", str(mine), "+hardware=box", "+policy=mine", f"trace.path={trace}", "compare=none"]
    for command in (("python", "-m", "sim"), ("expertflow", "sim")):
        found = run_of(there, *words, command=command)
        assert [found[key] for key in ("hardware", "policy", "model")] == ["box", "mine", "tiny"]


def test_a_sweep(there: Installed, mine: Path) -> None:
    there.run(
        "expertflow",
        "sim",
        "-m",
        "--config-dir",
        str(mine),
        "+hardware=a100,box",
        "+policy=lru,mine",
        "max_tokens=8",
        "compare=none",
        "hydra.sweep.dir=sweep",
        "hydra.launcher.n_jobs=2",
    )
    there.run("expertflow", "collect", "sweep")
    table = pd.read_csv(there.work / "sweep" / "table.csv")
    found = sorted(zip(table["hardware"], table["policy"], strict=True))
    assert found == [("a100", "lru"), ("a100", "mine"), ("box", "lru"), ("box", "mine")]


def test_a_study_of_ours_and_one_of_ones_own(there: Installed, mine: Path) -> None:
    there.run("expertflow", "study", "gap", "--out", "gap", "--tokens", "8", "--only", "residency=50%", "stack=graph")
    assert "tokens 8" in (there.work / "gap" / "README.md").read_text(encoding="utf-8")
    told = ["--config-dir", str(mine), "--out", "small", "--tokens", "8", "--jobs", "2"]
    there.run("python", "-m", "sim.study", "small", *told)
    assert "| mine |" in (there.work / "small" / "README.md").read_text(encoding="utf-8")


def test_traces_are_generated(there: Installed) -> None:
    there.run("expertflow", "traces", "generate", "made.safetensors", "--tokens", "32", "--requests", "2")
    assert there.run("python", "-m", "traces", "validate", "made.safetensors").startswith("ok: made: gpt-oss-20b")
    # The network fitted to that model is carried packed.
    words = ["+hardware=a100", "+policy=adaptive", "trace.path=made.safetensors", "compare=none"]
    assert run_of(there, *words)["num_tokens"] == 32


def test_what_only_the_repository_has_is_asked_for(there: Installed) -> None:
    pytest.importorskip("numba")
    words = ["+hardware=a100", "+policy=expertflow_shen", "max_tokens=4", "compare=none"]
    refused = there.start("expertflow", "sim", *words, "hydra.run.dir=out")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    name = "gpt-oss-20b-twin.forest.safetensors"
    assert f"policy.predictor.forest.fitted=auto: {name} is in the repository" in refused.stderr
    given = f"policy.predictor.forest.fitted={ROOT / 'traces' / 'data' / name}"
    assert run_of(there, *words, given)["policy"] == "expertflow_shen"


def test_a_calibration_is_written_into_ones_own_folder(there: Installed, mine: Path) -> None:
    pytest.importorskip("torch")
    words = ["calibrate", "box2", "--machine", "cpu", "--quick", "--policies", "lru", "--throttle", "0.2"]
    there.run("expertflow", *words, "--config-dir", str(mine))
    assert (mine / "hardware" / "box2.yaml").is_file()
    refused = there.start("expertflow", *words)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--config-dir FOLDER" in refused.stderr


def test_python_simulates_without_a_checkout(there: Installed, mine: Path) -> None:
    code = """
from sim import simulate, sweep

keys = {"hardware": "box", "trace": "tiny.safetensors", "config_dir": "mine", "compare": "none"}
print(simulate(policy="mine", **keys).title)
own = {"name": "lru", "eviction": {"_target_": "part.Mine"}}
print(*sweep(policy=["lru", own], jobs=2, **keys).table["num_tokens"])
print(simulate(hardware="a100", policy="adaptive", max_tokens=4, compare="none").metrics["trace"]["num_tokens"])
"""
    tiny_trace(there.work / "tiny.safetensors")
    before = there.files()
    assert there.run("python", "-c", code).splitlines() == ["mine", "12 12", "4"]
    assert there.files() == before


def test_files_of_another_distribution_are_told_of(there: Installed) -> None:
    stranger = there.site / "traces" / "timeseries.py"
    stranger.touch()
    try:
        done = there.start("expertflow", "traces", "--help")
    finally:
        stranger.unlink()
    assert done.returncode == 0
    assert done.stderr.startswith("warning: another distribution has mixed files")
    assert done.stderr.count("\n") == 1
