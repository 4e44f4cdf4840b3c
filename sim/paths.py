"""Where configuration lies: what comes with the package, and the user's own folder beside it.

What comes with the package is `conf/` in a checkout and `sim/conf/` in an installed wheel. The user's own folder is
laid out alike (`model/`, `hardware/`, `stack/`, `policy/`, `study/` …) and named by --config-dir.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from traces.shipped import FOLDER as DATA
from traces.yamltext import read_yaml

__all__ = ["CONF", "DATA", "INSTALLED", "ROOT"]

ROOT = Path(__file__).resolve().parent.parent
_INSIDE = Path(__file__).resolve().parent / "conf"
INSTALLED = _INSIDE.is_dir()
CONF = _INSIDE if INSTALLED else ROOT / "conf"

_own: list[Path] = []
"""The user's folder, if one was named: one entry at most."""


def use_own_folder(folder: str | Path | None) -> None:
    """From here on look for configuration in `folder`, too; None: no longer.

    ValueError if it is no folder, or if a file in it has the name of one that comes with the package: which of the
    two a configuration meant would not show.
    """
    _own.clear()
    if folder is None:
        return
    path = Path(folder).resolve()
    if not path.is_dir():
        raise ValueError(f"--config-dir={folder}: no such folder; give one with model/, hardware/, policy/ … in it")
    if path == CONF:
        return
    shipped = {file.relative_to(conf) for conf in (CONF, ROOT / "replay" / "conf") for file in conf.rglob("*.yaml")}
    for name in sorted(shipped):
        if (path / name).exists():
            raise ValueError(f"{Path(folder) / name}: a file of that name comes with the package; give yours another")
    check_files(path)
    _own.append(path)


def check_named(words: Sequence[str]) -> None:
    """`check_files` of the folder that a command line of Hydra's names, which Hydra itself reads before we can."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value if equals else "".join(words[place + 1 : place + 2]))
            if folder.is_dir() and folder.resolve() != CONF:
                check_files(folder)


def check_files(folder: Path) -> None:
    """ValueError for a file in a user's folder that is no YAML table, before Hydra follows its aliases."""
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
        for path in sorted((folder / group).rglob("*.yaml")):
            found = path.stat()
            _check_file(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4096)
def _check_file(path: Path, mtime_ns: int, size: int) -> None:
    """Once for a file that stays as it is."""
    read_yaml(path)


def own_folder() -> Path | None:
    """The user's folder, absolute, if one was named."""
    return _own[0] if _own else None


def config_files(group: str) -> dict[str, Path]:
    """Every file of a group such as `model`, by name: those of the package and the user's own."""
    folders = [CONF, *_own]
    return {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml"))}


def folder_to_write(folder: str | Path | None) -> Path:
    """Where configuration may be written: the user's folder, made if need be, or a checkout's `conf/`.

    ValueError where neither is there: nothing is written into an installed package.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        use_own_folder(folder)
        return Path(folder)
    if INSTALLED:
        raise ValueError("nothing is written into an installed package; say where: --config-dir FOLDER")
    return CONF


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """The flag of every command that reads configuration; `python -m sim` has it from Hydra."""
    parser.add_argument("--config-dir", metavar="FOLDER", help="your own model/, hardware/, stack/, policy/ … files")
