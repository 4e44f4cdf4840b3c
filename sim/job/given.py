"""What the command line of a finished run gave: the columns by which the runs of a sweep are told apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.job.output import IGNORED, VIEWS
from traces.messages import fault
from traces.reading import read_table
from traces.yamltext import read_yaml

_WORD = re.compile(r"[+~]*([\w./@-]{1,200})=(.*)", re.DOTALL)
_NO_COLUMN = (*IGNORED, "compare", *(name.partition(".")[0] for name in VIEWS))
"""Keys that decide nothing of what a table shows."""
_REMEDY = "remove the folder or run it again"
_PLAIN = {"true": True, "false": False, "null": None}


def given_keys(folder: Path) -> dict[str, Any]:
    """Keys and values of a run's overrides, as `provenance.json` has them; none where that is missing."""
    path = folder / "provenance.json"
    return given_in(path) if path.exists() or path.is_symlink() else {}


def given_in(path: Path) -> dict[str, Any]:
    """The same of the file itself. TraceError names it where it holds something else."""
    words = read_table(path, _REMEDY).get("overrides", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise fault(path, "overrides", "is no list of texts", _REMEDY)
    found = {}
    for word in words:
        match = _WORD.fullmatch(word)
        if match and match[1] not in _NO_COLUMN and match[1].isprintable():
            found[match[1]] = _value(match[2])
    return found


def _value(text: str) -> Any:
    """A number, true, false or null where the word is one, else its text."""
    word = text.strip()
    if word.lower() in _PLAIN:
        return _PLAIN[word.lower()]
    for kind in (int, float):
        try:
            number = kind(word)
        except ValueError:
            continue
        if math.isfinite(number) and abs(number) < 2**63:
            return number
    return word[:200].strip("'\"").encode(errors="replace").decode()


def columns(folders: Sequence[Path], taken: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each run: the keys that any of the runs was given, but for those of `taken`, which are columns already.

    Where a run was not given a key, what its configuration held.
    """
    rows = [given_keys(folder) for folder in folders]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in set(taken)]
    filled = [
        {name: row[name] if name in row else _held(folder, name) for name in names}
        for folder, row in zip(folders, rows, strict=True)
    ]
    for name in names:
        kinds = {float if type(row[name]) is int else type(row[name]) for row in filled if row[name] is not None}
        if len(kinds) > 1:
            for row in filled:
                one = row[name]
                row[name] = None if one is None else str(one).lower() if isinstance(one, bool) else str(one)
    return filled


def _held(folder: Path, key: str) -> Any:
    """What the run's record of its configuration holds at `key`; None where that is no plain value."""
    is_group = "/" in key
    path = folder / ".hydra" / ("hydra.yaml" if is_group else "config.yaml")
    if not path.is_file():
        return None
    value: Any = read_yaml(path, _REMEDY)
    for name in ["hydra", "runtime", "choices", key] if is_group else key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool | None):
        return value
    return _value(str(value)) if isinstance(value, int | float | str) else None
