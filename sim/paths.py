"""Where configuration lies: what comes with the package, and the user's own folder beside it.

What comes with the package is `conf/` in a checkout and `sim/conf/` in an installed wheel. The user's own folder is
laid out alike (`model/`, `hardware/`, `stack/`, `policy/`, `study/` …) and named by --config-dir.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from traces.messages import fault, plain
from traces.reading import unreadable
from traces.shipped import FOLDER as DATA
from traces.yamltext import read_yaml

__all__ = ["CONF", "DATA", "INSTALLED", "ROOT", "resolved"]

ROOT = Path(__file__).resolve().parent.parent
_INSIDE = Path(__file__).resolve().parent / "conf"
INSTALLED = _INSIDE.is_dir()
CONF = _INSIDE if INSTALLED else ROOT / "conf"

_own: list[Path] = []
"""The user's folder, if one was named: one entry at most."""


def resolved(path: str | Path) -> Path:
    """The path from the root, symbolic links followed; of links in a circle one of them, which cannot be opened."""
    # Path.resolve raises RuntimeError there, in some versions of Python.
    return Path(os.path.realpath(path))


def use_own_folder(folder: str | Path | None) -> None:
    """From here on look for configuration in `folder`, too; None: no longer.

    ValueError if it is no folder, or if a file in it has the name of one that comes with the package: which of the
    two a configuration meant would not show.
    """
    _own.clear()
    if folder is None:
        return
    path = _own_place(folder)
    if path == CONF:
        return
    # By their names alone, without an object for each: a study asks before each of its runs.
    places = (CONF, ROOT / "replay" / "conf")
    for name in sorted({name for conf in places for name in glob("**/*.yaml", root_dir=conf, recursive=True)}):
        if os.path.exists(os.path.join(path, name)):
            raise ValueError(f"{Path(folder) / name}: a file of that name comes with the package; give yours another")
    check_files(path)
    _own.append(path)


def _own_place(folder: str | Path) -> Path:
    path = resolved(folder)
    if not path.is_dir():
        raise ValueError(f"--config-dir={folder}: no such folder; give one with model/, hardware/, policy/ … in it")
    return path


def check_named(folder: str | Path) -> None:
    """`check_files` of the folder that --config-dir names, which Hydra itself reads before we can."""
    path = _own_place(folder)
    if path != CONF:
        check_files(path)


def check_files(folder: Path) -> None:
    """ValueError for a file in a user's folder that is no YAML table, before Hydra follows its aliases, or that
    includes itself by its `defaults`, which Hydra follows without end."""
    includes: dict[str, tuple[str, ...]] = {}
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
        for path in sorted((folder / group).rglob("*.yaml")):
            try:
                found = path.stat()
            except OSError as error:
                raise unreadable(path, error) from None
            name = path.relative_to(folder).with_suffix("").as_posix()
            includes[name] = _check_file(path, name.rpartition("/")[0], found.st_mtime_ns, found.st_size)
    for name in includes:
        _check_circle(folder, name, includes)


def _check_circle(folder: Path, name: str, includes: Mapping[str, Sequence[str]]) -> None:
    """ValueError if following what `name` includes leads back to it."""
    seen: set[str] = set()
    waiting = list(includes[name])
    while waiting:
        other = waiting.pop()
        if other == name:
            problem = "includes itself by its defaults, or by those of a file that it includes"
            raise fault(folder / f"{name}.yaml", "defaults", problem, "take it out of the list")
        if other not in seen:
            seen.add(other)
            waiting += includes.get(other, ())


def _included(group: str, defaults: Any) -> tuple[str, ...]:
    """Group and name of what a defaults list includes: `name`, `group: name`, and either from the root with a slash."""
    found: list[str] = []
    for entry in defaults if isinstance(defaults, list) else []:
        for key, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            # Before a group may stand `optional` or `override`, behind it the place of what is included.
            inner = str(key).rpartition(" ")[2].partition("@")[0]
            for one in value if isinstance(value, list) else [value]:
                word = str(one).partition("@")[0].removesuffix(".yaml")
                path = f"{inner}/{word}" if inner else word
                found.append(path[1:] if path.startswith("/") else f"{group}/{path}")
    return tuple(found)


@lru_cache(maxsize=4096)
def _check_file(path: Path, group: str, mtime_ns: int, size: int) -> tuple[str, ...]:
    """What the file includes; once for one that stays as it is."""
    table = read_yaml(path)
    _check_interpolations(path, table, "")
    return _included(group, table.get("defaults"))


def _check_interpolations(path: Path, value: Any, key: str) -> None:
    """ValueError for an interpolation that is not one: of these Hydra says neither file nor key."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_interpolations(path, item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _check_interpolations(path, item, f"{key}[{place}]")
    elif isinstance(value, str) and "${" in value:
        from omegaconf import OmegaConf
        from omegaconf.errors import GrammarParseError

        try:
            OmegaConf.create([value])
        except GrammarParseError as error:
            problem = f"is no interpolation ({plain(str(error).splitlines()[0])[:80]})"
            raise fault(path, plain(key)[:60] or "file", problem, "write ${KEY}, or leave the ${ out") from None


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
