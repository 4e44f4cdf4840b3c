"""Compiled functions are kept without a lock: whoever finds one finds it whole, and made as it would have made it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("numba")

MODULE = """from expertflow.compiled.compiling import compiled


@compiled("int64(int64)")
def twice(number):
    return 2 * number


print(twice(21), sum(twice.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_two_that_compile_at_once_leave_what_a_third_one_finds(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    # The module's own is kept beside it, the package's where it was kept before.
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment.pop("NUMBA_CACHE_DIR", None)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "import module"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    together = [start() for _ in range(3)]
    for process in together:
        assert process.communicate(timeout=300)[0].split()[0] == "42"
    kept = sorted(path.name for path in (tmp_path / "__pycache__").glob("module.twice-*"))
    assert [name.rpartition(".")[2] for name in kept] == ["nbc", "nbi"]  # and nothing half written
    assert start().communicate(timeout=300)[0].split() == ["42", "1"]


class Another:
    """Makes code for another processor."""

    def magic_tuple(self) -> tuple[str, ...]:
        return ("x86_64", "another-processor", "")


@pytest.mark.parametrize("what", ["numba", "llvmlite", "processor"])
def test_what_another_compiler_or_processor_keeps_has_another_name(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process may find the index that it has written itself, and the code of who shares its folder."""
    from expertflow.compiled import compiling

    before = compiling._sources_hash()
    assert compiling._sources_hash() == before == compiling._SOURCES
    changed: Any = {
        "numba": ("numba.__version__", "0.0.1"),
        "llvmlite": ("llvmlite.__version__", "0.0.1"),
        "processor": ("_codegen", Another),
    }[what]
    monkeypatch.setattr(f"expertflow.compiled.compiling.{changed[0]}", changed[1])
    assert compiling._sources_hash() != before


def test_a_function_is_kept_under_that_name() -> None:
    from expertflow.compiled import compiling, learning

    assert learning.learn.py_func.__qualname__ == f"learn-{compiling._SOURCES}"
