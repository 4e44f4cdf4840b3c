"""The folder of a result: only a validation's own is written into, and what it holds stays until there is more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from traces.messages import TraceError
from traces.reading import read_table

COMMAND = "python -m replay.validate"
"""How the command begins that a summary names, by which a folder is known as a validation's."""
TITLE = "# Simulator against "
"""How the page of a result begins."""
PAGE, SUMMARY = "README.md", "summary.json"
_BESIDE = ("table.csv", "runs.csv", "beside.json", "provenance.json", "fidelity.png", "timeline.json")
_LOGS = ("cuda-*.parquet", "cpu-*.parquet")


def check_own(out: Path, name: str) -> None:
    """ValueError if `out` holds a file of a name that a validation writes, and no validation has written it.

    name: what the machine is called, for the remedy.
    """
    foreign = _foreign(out)
    if foreign is not None:
        raise ValueError(
            f"--out={out} holds a {foreign} that no validation has written, and would lose it; give another folder, "
            f"such as --out={out / name}"
        )


def _foreign(out: Path) -> str | None:
    page = out / PAGE
    if page.exists() and not _begins(page, TITLE):
        return PAGE
    there = [name for name in (PAGE, SUMMARY, *_BESIDE) if (out / name).exists()]
    return there[0] if there and not _summary(out) else None


def num_rows(out: Path) -> int:
    """Rows of the result that an earlier run has left in `out`."""
    try:
        return int(_summary(out)["judged"]["num_rows"])
    except (KeyError, TypeError, ValueError):
        return 0


def clear_beside(out: Path) -> None:
    """Remove what an earlier run has left beside page and summary: it is not to be taken for the next one's."""
    stale = [out / name for name in _BESIDE]
    for pattern in _LOGS:
        stale += (out / "logs").glob(pattern)
    for path in stale:
        path.unlink(missing_ok=True)


def _summary(out: Path) -> dict[str, Any]:
    """A validation's summary; empty where there is none."""
    try:
        found = read_table(out / SUMMARY)
    except (OSError, TraceError):
        return {}
    return found if str(found.get("command")).startswith(COMMAND) else {}


def _begins(path: Path, text: str) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(text)) == text
