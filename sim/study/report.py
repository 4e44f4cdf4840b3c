"""The output folder of a study: `table.csv`, `summary.json`, pictures, `README.md`, `provenance.json`, `DONE` last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sim.job.output import provenance, to_json, write_text
from sim.study.estimates import ESTIMATES
from sim.study.pictures import draw
from sim.study.plan import Study
from sim.study.table import COLUMNS, pivot
from sim.study.verdicts import judge, sentences


@dataclass(frozen=True)
class Run:
    """What a report says beside the table.

    words: of the command, as printed. code_sha256: of the code that ran. traces: name -> content hash. left_out:
    cell -> why it was not run.
    """

    study: Study
    words: tuple[str, ...]
    code_sha256: str
    traces: Mapping[str, str]
    left_out: Mapping[str, str]
    wall_s: float

    @property
    def command(self) -> str:
        """The command as it is printed."""
        return " ".join(["python -m sim.study", *self.words])


def write_study(folder: Path, run: Run, table: pd.DataFrame) -> dict[str, Any]:
    """Write all that was found; returns the summary."""
    study = run.study
    axes = [axis for axis in study.axes if axis in table.columns]
    (folder / "DONE").unlink(missing_ok=True)
    summary = {
        "study": study.name,
        "about": study.about,
        "command": run.command,
        "num_cells": len(table),
        "traces": dict(run.traces),
        "code_sha256": run.code_sha256,
        "left_out": dict(run.left_out),
        **judge(study, table, axes),
    }
    pictures = [draw(table, spec, axes, folder) for spec in study.pictures]
    write_text(folder / "table.csv", table.to_csv(index=False, lineterminator="\n"))
    write_text(folder / "summary.json", to_json(summary))
    write_text(folder / "README.md", _markdown(run, summary, table, pictures))
    origin = provenance(list(run.words), " ".join(run.traces.values()), run.wall_s)
    write_text(folder / "provenance.json", to_json(origin))
    write_text(folder / "DONE", f"{run.code_sha256}\n")
    return summary


def _markdown(run: Run, summary: Mapping[str, Any], table: pd.DataFrame, pictures: Sequence[tuple[str, str]]) -> str:
    study = run.study
    lines = [f"# {study.name}", "", study.about, "", "```sh", run.command, "```", ""]
    lines += ["| trace | content |", "|---|---|"]
    lines += [f"| {name} | sha256 `{sha256[:16]}…` |" for name, sha256 in run.traces.items()]
    lines += [
        "",
        "Simulated, not confirmed on hardware. All columns: `table.csv`; each verdict, cell by cell: `summary.json`.",
        "",
    ]
    found = sentences(summary)
    found += [f"Not run in {count} cells: {why}" for why, count in Counter(run.left_out.values()).items()]
    lines += ["## What it says", "", *(f"- {line}" for line in found), ""] if found else []
    for title, file in pictures:
        lines += [f"![{title}]({file})", ""]
    for spec in study.tables:
        lines += [f"## {spec['title']}", ""]
        lines += [spec["note"], ""] if "note" in spec else []
        lines += [pivot(table, spec), ""]
    meanings = COLUMNS if study.kind == "runs" else ESTIMATES
    lines += ["## Words", "", "| | |", "|---|---|", *(f"| {name} | {meaning} |" for name, meaning in meanings.items())]
    return "\n".join(lines) + "\n"
