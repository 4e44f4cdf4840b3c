"""What every command of an installed package does first: it writes elsewhere, and looks whether its files are its own.

Other distributions have packages called `traces`, `sim` or `replay`. Installed into the same environment, they write
over files of this one, and uninstalled, they take them away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from traces.processes.ending import begin
from traces.shipped import cache_folder

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("expertflow", "replay", "sim", "traces")
_CHECKED = "EXPERTFLOW_CHECKED"
"""Environment variable: set by the first check, so that worker processes do not repeat it."""
_REMEDY = "install expertflow anew, in an environment of its own"


def is_installed(root: Path) -> bool:
    """Whether the packages below `root` came from a wheel; else they are a checkout's."""
    return (root / "sim" / "conf").is_dir()


def start() -> None:
    """Keep compiled functions in the user's cache, not beside the source; warn of a mixed installation; and hear
    signals, if this process is a command."""
    if sys.argv[:1] == ["-m"]:
        # What `python -m` runs is being looked for: this process is a command, and hears signals from here on.
        begin()
    if is_installed(ROOT) and "NUMBA_CACHE_DIR" not in os.environ:
        with suppress(RuntimeError):
            os.environ["NUMBA_CACHE_DIR"] = str(cache_folder() / "numba")
    warn_if_mixed()


def warn_if_mixed() -> None:
    """Say in one line on stderr what is not as installed; once for a process and those that it starts."""
    if os.environ.get(_CHECKED):
        return
    os.environ[_CHECKED] = "1"
    line = shadowed() or strangers(ROOT)
    if line:
        print(f"warning: {line}; {_REMEDY}", file=sys.stderr)


def shadowed() -> str | None:
    """Which of the packages Python takes from elsewhere, if any."""
    for name in PACKAGES:
        spec = find_spec(name)
        places = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
        there = next(iter(places), None)
        if there is not None and Path(there).resolve() != ROOT / name:
            return f"Python takes the package {name} from {there}, which is not expertflow's"
    return None


def strangers(root: Path) -> str | None:
    """What lies in the installed packages' folders below `root` and is not as expertflow's installer wrote it.

    Looks at names and sizes in the top folder of each package, which is what is overwritten first.
    """
    if not is_installed(root):
        return None
    from importlib.metadata import Distribution

    own = next(iter(Distribution.discover(name="expertflow", path=[str(root)])), None)
    if own is None or not own.files:
        return None
    recorded: dict[str, int | None] = {}
    for file in own.files:
        recorded["/".join(file.parts[:2])] = file.size if len(file.parts) == 2 else None
    found = list(_unlike(root, recorded))
    if not found:
        return None
    whose = [
        name
        for one in Distribution.discover(path=[str(root)])
        if (name := one.metadata["Name"]) != "expertflow" and any(str(file) == found[0] for file in one.files or ())
    ]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    by = f" (by {whose[0]})" if whose else ""
    return f"another distribution has mixed files into expertflow's packages{by}: {found[0]}{more}"


def _unlike(root: Path, recorded: Mapping[str, int | None]) -> Iterator[str]:
    """Files and folders that are not recorded, or have another size. recorded: sizes by path; None for a folder."""
    for name in PACKAGES:
        for entry in os.scandir(root / name):
            path = f"{name}/{entry.name}"
            if entry.name == "__pycache__":
                continue
            if path not in recorded or recorded[path] not in (None, entry.stat().st_size):
                yield path
