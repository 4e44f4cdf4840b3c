"""The output folder of a run: each file written whole or not at all, `DONE` last.

Nothing without `DONE` counts as a result. It says what decided the result (`sim.job.decided`), so that a sweep that is
started again repeats nothing and takes no stale result for a fresh one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from expertflow.core import described
from sim.paths import ROOT

PACKAGES = ("expertflow", "simpy", "numpy", "pandas", "pyarrow", "safetensors", "hydra-core")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_json(value: Any) -> str:
    """JSON with stable bytes: keys in the order given, no NaN."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def code_sha256(*extra: str) -> str:
    """Content hash of the packages that decide results; extra: more of them."""
    root = ROOT
    digest = hashlib.sha256()
    for package in ("expertflow", "sim", "traces", *extra):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def provenance(overrides: list[str], trace_sha256: str, wall_s: float, *extra: str) -> dict[str, Any]:
    """Where a result came from: code, trace, versions, compiled or not, host, time taken."""
    commit, dirty = _git_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "code_sha256": code_sha256(*extra),
        "overrides": overrides,
        "trace_sha256": trace_sha256,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "core": described(),
        "host": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "wall_s": round(wall_s, 3),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    root = ROOT
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
