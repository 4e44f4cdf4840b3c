"""The output folder of a run: one process at a time, each file written whole or not at all, `DONE` last.

Nothing without `DONE` counts as a result. It says what decided the result (`sim.job.decided`), so that a sweep that is
started again repeats nothing and takes no stale result for a fresh one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from expertflow.core import described
from sim.paths import ROOT
from traces.files import replace_text
from traces.processes.locks import locked_folder
from traces.processes.whole import clear

__all__ = [
    "begin_folder",
    "clear_results",
    "code_sha256",
    "of_one_job",
    "provenance",
    "results_of",
    "to_json",
    "write_text",
]

IGNORED = ("skip_done", "timeout_s")
"""Keys that decide whether a run takes place or is given up, not what it results in."""
VIEWS = ("events.parquet", "timeline.json")
"""What a run writes only if it is asked to: an earlier run's must not lie beside a later one's result."""
PACKAGES = ("expertflow", "simpy", "numpy", "pandas", "pyarrow", "safetensors", "hydra-core")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all. ValueError names the file where that cannot be."""
    replace_text(path, text, sync=False)


@contextmanager
def of_one_job(folder: Path) -> Iterator[None]:
    """Hold the run's folder: another process that runs into it waits, and says so. What a killed one has left
    unfinished in it is removed."""
    with locked_folder(folder):
        clear(folder)
        yield


def begin_folder(folder: Path, cfg: DictConfig, *stale: str) -> None:
    """Nothing in `folder` counts from here on: `DONE` goes first, then what might pass for this run's, and `stale`.

    Writes Hydra's record of the configuration, as Hydra itself would, but each file whole.
    """
    clear_results(folder, *stale)
    hydra: Any = HydraConfig.instance().cfg
    if hydra is None or hydra.hydra.output_subdir is not None:
        # Asked for on the command line: then it is Hydra that writes it.
        return
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, content in (("config", cfg), ("hydra", hydra), ("overrides", hydra.hydra.overrides.task)):
        write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(content))


def clear_results(folder: Path, *stale: str) -> None:
    """Remove `DONE`, then what might pass for a result of the run that begins, and `stale`."""
    for name in ("DONE", *VIEWS, *stale):
        (folder / name).unlink(missing_ok=True)


def results_of(folder: Path, cfg: Mapping[str, Any], *more: str) -> list[Path]:
    """What a run of `cfg` writes into `folder` before `DONE`; more: names that it writes besides."""
    views = [name for name in VIEWS if cfg[name.partition(".")[0]]]
    return [folder / name for name in ("metrics.json", "provenance.json", *views, *more)]


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
        # What is written is not what ran: a result that is made again would be dirty by its own pages.
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
        return commit, bool(changed.strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
