"""Which modules are the core, and whether they run compiled or as they are written.

A build may compile the core with mypyc (`build_backend.py`). The extension modules lie apart from the sources, in
`expertflow/_core/`, with the hashes of the sources that they were made from: they stand in for these sources, all or
none, and only while these are what they were. Both ways give the same results to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NoReturn

MODULES = (
    "expertflow.byte_queue",
    "expertflow.byte_slots",
    "expertflow.copy_queue",
    "expertflow.counters",
    "expertflow.forward",
    "expertflow.hosting",
    "expertflow.journal",
    "expertflow.machine",
    "expertflow.observer",
    "expertflow.runtime",
    "expertflow.slots",
    "expertflow.stream",
    "expertflow.tiered_queue",
    "expertflow.view",
    "replay.drive",
    "replay.machine.cuda_clock",
    "replay.machine.launch_row",
    "replay.machine.real",
    "sim.machine.host_bound",
    "sim.machine.simulated",
    "sim.machine.slowed",
)
LIBRARY = "expertflow._core.shared__mypyc"
"""The module that holds the code of all of them."""
SWITCH = "EXPERTFLOW_COMPILED"
"""Environment variable, read by builds and by runs. 0: pure Python. 1: compiled, or an error that says why not. Unset:
compiled where that can be had."""
PACKAGES = ("expertflow", "replay", "sim", "traces")
SOURCES = "sources.json"
"""SHA-256 of each source that was compiled, by path below the folder that holds the packages."""
ROOT = Path(__file__).resolve().parent.parent
_REMEDY = "build it again (pip install ., or python build_backend.py in a checkout), or set EXPERTFLOW_COMPILED=0"


def source_of(name: str, root: Path = ROOT) -> Path:
    """The source of a module of the core."""
    return root.joinpath(*name.split(".")).with_suffix(".py")


def hashes(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of the core's sources as they are now, by path below `root`. OSError where one is missing."""
    paths = [source_of(name, root) for name in MODULES]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def file_of(name: str, root: Path = ROOT) -> Path:
    """The extension module that stands in for a module of the core, for the Python that runs. Laid out as the sources
    are, with what they share on top: mypyc's modules look for each other so."""
    parts = name.split(".") if name != LIBRARY else ["shared__mypyc"]
    return root.joinpath("expertflow", "_core", *parts[:-1], parts[-1] + EXTENSION_SUFFIXES[0])


def is_compiled() -> bool:
    """Whether the core of this process is the compiled one."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def described() -> str:
    """Which core runs, as every command tells it."""
    return "compiled core" if is_compiled() else "core in pure Python"


def start() -> None:
    """Choose, before any module of the core is imported; `expertflow/__init__.py` does. A choice that cannot be had
    ends the process with one line and exit code 2."""
    if not any(isinstance(one, _Beside) for one in sys.meta_path):
        sys.meta_path.insert(0, _Beside())
    if is_compiled():
        return
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1"):
        _refuse(f"{SWITCH}={wanted[:40]!r} is unknown; choose 0 for pure Python, 1 for the compiled core, or unset it")
    if wanted == "0":
        return
    if not all(file_of(name).is_file() for name in (LIBRARY, *MODULES)):
        if wanted:
            _refuse(f"{SWITCH}=1, but the core was not compiled for this Python; {_REMEDY}")
        return
    changed = _changed()
    if changed is None:
        sys.meta_path.insert(0, _Finder())
    elif wanted:
        _refuse(f"{SWITCH}=1, but {changed} is not what was compiled; {_REMEDY}")
    else:
        print(f"warning: {changed} is not what was compiled, so that pure Python runs; {_REMEDY}", file=sys.stderr)
        # The processes that this one starts need not say it again.
        os.environ[SWITCH] = "0"


def _changed() -> str | None:
    """Path of a source of the core that is not what was compiled, if there is one."""
    try:
        recorded = json.loads(file_of(LIBRARY).with_name(SOURCES).read_text(encoding="utf-8"))
        now = hashes()
    except (OSError, ValueError):
        return f"expertflow/_core/{SOURCES}"
    if not isinstance(recorded, dict):
        return f"expertflow/_core/{SOURCES}"
    return next((name for name in sorted({*now, *recorded}) if now.get(name) != recorded.get(name)), None)


def _refuse(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


class _Beside(MetaPathFinder):
    """Finds the packages of this distribution beside this one, whatever bears their names in the current folder or
    elsewhere on the path."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


class _Finder(MetaPathFinder):
    """Finds the core's extension modules in place of their sources."""

    def __init__(self) -> None:
        self._names = {LIBRARY, *MODULES}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._names:
            return None
        file = str(file_of(name))
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))
