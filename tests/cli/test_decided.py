"""A finished run stands until something that decided it has changed: what was asked, a file it read, code that ran."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sim.job import reads
from sim.job.decided import Decided, code_that_ran, stands
from sim.job.fitted_start import fitted_arrays
from sim.paths import DATA, ROOT
from tests.support.commands import run_here, small_trace

LRU = ("+hardware=a100", "+policy=lru")
MINE = """from expertflow.evictions.lru import LRU


class Mine(LRU):
    pass
"""


def test_done_names_the_code_that_ran_and_no_other(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.safetensors")
    folder = run_here([*LRU, f"trace.path={path}", "compare=none"], tmp_path / "run").folder
    done = json.loads((folder / "DONE").read_text(encoding="utf-8"))
    ran = {"expertflow/runtime.py", "expertflow/evictions/lru.py", "sim/machine/simulated.py", "sim/app.py"}
    assert ran <= set(done["code"])
    # Whatever else this process has loaded.
    others = ("tests/", "replay/", "sim/study/", "traces/fitting/", "traces/twin/", "expertflow/evictions/outlook.py")
    assert [name for name in done["code"] if name.startswith(others)] == []
    for name, sha256 in done["code"].items():
        assert reads.sha256_of(ROOT / name) == sha256
    assert done["files"] == {}


def test_done_names_the_fitted_files_that_were_read_or_missed(tmp_path: Path) -> None:
    fitted = tmp_path / "mine.safetensors"
    fitted.write_bytes((DATA / "gpt-oss-20b.hybrid.safetensors").read_bytes())
    with Decided("mark", "sim.app", {}) as decided:
        fitted_arrays(str(fitted), "gpt-oss-20b", "hybrid")
        fitted_arrays("auto", "gpt-oss-20b", "hybrid")
        fitted_arrays("auto", "a-model-nobody-fitted", "hybrid")
    fitted_arrays("auto", "gpt-oss-20b-twin", "hybrid")  # too late
    done = json.loads(decided.to_json())
    sha256 = reads.sha256_of(fitted)
    assert done["files"] == {
        str(fitted): sha256,
        "shipped: gpt-oss-20b.hybrid.safetensors": sha256,
        "shipped: a-model-nobody-fitted.hybrid.safetensors": None,
    }
    (tmp_path / "DONE").write_text(decided.to_json())
    assert stands(tmp_path / "DONE", "mark")
    assert not stands(tmp_path / "DONE", "another mark")
    fitted.unlink()
    assert not stands(tmp_path / "DONE", "mark")


@pytest.mark.parametrize("text", ["", "a mark of before\n", "[]", "{}", '{"asked": "mark", "files": [1], "code": {}}'])
def test_what_says_nothing_does_not_stand(text: str, tmp_path: Path) -> None:
    (tmp_path / "DONE").write_text(text)
    assert not stands(tmp_path / "DONE", "mark")
    assert not stands(tmp_path / "nothing", "mark")


def test_modules_are_followed_by_their_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "followed"
    folder.mkdir()
    for name, text in {
        "__init__": "",
        "part": "from . import near\nimport json\n",
        "near": "def late():\n    from followed.later import x\n",
        "later": "x = 1\n",
        "other": "",
    }.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("followed.part")
    __import__("followed.other")
    names = ("__init__", "part", "near")
    assert set(code_that_ran({"followed.part"})) == {str(folder / f"{name}.py") for name in names}
    __import__("followed.later")
    assert str(folder / "later.py") in code_that_ran({"followed.part"})
    for name in [name for name in sys.modules if name.partition(".")[0] == "followed"]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_change_of_code_that_ran_and_of_no_other_voids_a_run(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for package in ("expertflow", "sim", "traces", "conf"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    (copy / "traces" / "data").symlink_to(DATA)
    (copy / "mine.py").write_text(MINE)
    words = [
        *LRU,
        f"trace.path={small_trace(tmp_path / 't.safetensors')}",
        "compare=none",
        "skip_done=true",
        "policy.eviction._target_=mine.Mine",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]

    def is_done() -> bool:
        command = [sys.executable, "-m", "sim", *words]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        found = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr
        return found.stdout.startswith("done before")

    def change(name: str) -> None:
        (copy / name).write_text((copy / name).read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")

    assert not is_done()
    assert is_done()
    for name in ("sim/study/report.py", "traces/fitting/forest.py", "expertflow/evictions/outlook.py", "sim/bench.py"):
        change(name)
        assert is_done(), name
    for name in ("expertflow/evictions/lru.py", "mine.py", "traces/reader.py"):
        change(name)
        assert not is_done(), name
        assert is_done(), name
