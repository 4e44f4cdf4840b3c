"""A copy of what a wheel is built from, and the wheel built from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "build_backend.py",
    "README.md",
    "LICENSE",
    "conf",
    "expertflow",
    "sim",
    "replay",
    "traces",
)


def copy_checkout(copy: Path, with_kernels: bool = False) -> None:
    """Copy what a build reads: it leaves folders behind. What was compiled here does not come along, but for what numba
    has kept, where a test is of something else and each copy would compile it anew for half a minute."""
    for name in CARRIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_core"))
        else:
            shutil.copy(ROOT / name, copy / name)
    if with_kernels:
        # Good for these sources alone, by their hash, and for their dates, which a copy keeps.
        for path in (ROOT / "expertflow" / "compiled" / "__pycache__").glob("*.nb[ci]"):
            place = copy / path.relative_to(ROOT)
            place.parent.mkdir(exist_ok=True)
            shutil.copy2(path, place)


def pip(*words: str, compiled: str = "0") -> None:
    """Run pip of this environment, without a network. compiled: EXPERTFLOW_COMPILED of the build."""
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *words]
    environment = {**os.environ, "EXPERTFLOW_COMPILED": compiled}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr


def build_wheel(copy: Path, out: Path, compiled: str = "0") -> Path:
    """The wheel of a copied checkout."""
    pip("wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", str(out), str(copy), compiled=compiled)
    (found,) = out.glob("*.whl")
    return found
