"""What a round found: a table, and the inputs that failed, each in a file of its own."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.attack.outcome import FAILURES
from tests.attack.round import Tally
from tests.attack.work import Failure

COLUMNS = ("kind", "tried", "of", "refused", "confirmed", "accepted", "re-checked", "failures", "peak MiB", "CPU s")


def rows(tallies: Mapping[str, Tally]) -> list[tuple[str, ...]]:
    """A row a kind, and the sum."""
    found = []
    for name, tally in tallies.items():
        failed = ", ".join(f"{tally.failures[verdict]} {verdict}" for verdict in FAILURES if tally.failures[verdict])
        counts = (tally.tried, tally.target, tally.refused, tally.confirmed, tally.accepted, tally.rechecked)
        peak = f"{tally.peak_bytes / (1 << 20):.0f}"
        found.append((name, *map(_number, counts), failed or "0", peak, _number(round(tally.cpu_seconds))))
    return found


def _number(value: int) -> str:
    return f"{value:,}"


def text_table(tallies: Mapping[str, Tally]) -> str:
    """For the terminal."""
    table = [COLUMNS, *rows(tallies)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = []
    for row in table:
        cells = zip(range(len(row)), row, widths, strict=True)
        lines.append("  ".join(cell.ljust(width) if i in (0, 7) else cell.rjust(width) for i, cell, width in cells))
    return "\n".join(lines)


EXPLAINED = """*tried* of so many wanted; *refused* with a message in order, *confirmed*: by a second opinion as well;
*accepted*, and of these *re-checked* by a second opinion; *failures*: a traceback, a message that is not one line of at
most 300 characters that names the file, a stray warning, more than 10 s, more memory than the bound, a wrong answer.
*peak*: memory beyond what the process had before the input."""


def markdown(tallies: Mapping[str, Tally], command: str, failed: int) -> str:
    """For a page: the command, the table, what its columns mean."""
    lines = [f"`{command}`", "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * 6 + "|---|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(tallies)]
    tried = sum(tally.tried for tally in tallies.values())
    lines += ["", f"{tried:,} inputs, {failed:,} failures.", "", EXPLAINED, ""]
    return "\n".join(lines)


def as_json(tallies: Mapping[str, Tally], command: str, seed: int) -> str:
    """For programs."""
    kinds = {}
    for name, tally in tallies.items():
        kinds[name] = {key: value for key, value in asdict(tally).items() if key != "under_way"}
        kinds[name] |= {"seconds": round(tally.seconds, 1), "cpu_seconds": round(tally.cpu_seconds, 1)}
        kinds[name]["failures"] = dict(tally.failures)
    return json.dumps({"command": command, "seed": seed, "kinds": kinds}, indent=1) + "\n"


def go_on_from(path: Path, tallies: Mapping[str, Tally], seed: int) -> None:
    """Take up the counts of a round that was written to `path`: no input is tried twice, none is counted twice.

    ValueError where it was a round of another seed.
    """
    told = json.loads(path.read_text(encoding="utf-8"))
    if told["seed"] != seed:
        raise ValueError(f"{path} is of a round with --seed {told['seed']}")
    for name, counts in told["kinds"].items():
        if name in tallies:
            failures = Counter(counts.pop("failures"))
            counts.pop("target")
            for key, value in counts.items():
                setattr(tallies[name], key, value)
            tallies[name].failures = failures


class Kept:
    """Failures as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def __call__(self, failure: Failure) -> Path:
        """Write one; its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{failure.kind}-{failure.verdict.replace(' ', '-')}-{failure.seed}.json"
        content: dict[str, Any] = asdict(failure) | {"content": base64.b64encode(failure.content).decode()}
        path = self.folder / name
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        self.paths.append(path)
        return path


def load(path: Path) -> Failure:
    """A failure that was kept."""
    told = json.loads(path.read_text(encoding="utf-8"))
    lists = {key: tuple(told.pop(key)) for key in ("steps", "left_out")}
    return Failure(**told | lists | {"content": base64.b64decode(told["content"])})
