"""What a simulation answers: its metrics, and tables and pictures of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pandas as pd
from rich.console import Console

from expertflow.parts import Part
from sim.collect import derived
from sim.job.output import to_json
from sim.job.report import named_runs, print_report
from sim.job.title import hardware_title
from sim.views.timeline import Frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 120
"""Characters of a printed line, as of the command where it prints to a file."""
_PRE = '<pre style="font-family:monospace;line-height:1.25;white-space:pre;overflow-x:auto">{code}</pre>'
FIGURES = (
    "tpot_ms",
    "ms_per_token",
    "stall_ms_per_token",
    "late_ms_per_token",
    "miss_ms_per_token",
    "of_on_demand",
    "hit_rate",
    "prefetch_used",
    "link_utilisation",
)
"""Columns of a result's table, as the command prints them; shares from 0 to 1."""


class Recorded(NamedTuple):
    """What was recorded of a run beside its metrics."""

    events: pd.DataFrame | None = None
    timeline: Frames | None = None


class Runnable(Protocol):
    """The run that a result is of, which can be run again."""

    @property
    def title(self) -> str:
        """What its policy is called."""

    @property
    def cfg(self) -> Mapping[str, Any]:
        """Its configuration."""

    def record(self, metrics: Mapping[str, Any]) -> Recorded:
        """Events and timeline of it, run again. ValueError where it then differs from `metrics`."""


class Result:
    """What one simulation answers.

    metrics: what `metrics.json` holds (docs/metrics.md). title: what its policy is called. out: the folder it was
    written to. parts: those of the policy that were given in Python, by name, as the run left them: copies of the
    objects that were given. Empty where another process ran them, or the result was there before. recorded: events and
    timeline so far. notes: what the report says of a model that was read from a file.
    """

    def __init__(
        self,
        metrics: Mapping[str, Any],
        job: Runnable,
        out: Path | None = None,
        parts: Mapping[str, Part] | None = None,
        recorded: Recorded | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        # As they stand in the file, and nobody else's.
        self.metrics: dict[str, Any] = json.loads(to_json(dict(metrics)))
        self.title = job.title
        self.out = out
        self.parts: dict[str, Part] = dict(parts or {})
        self._job = job
        self.recorded = recorded or Recorded()
        self.notes = notes

    @property
    def table(self) -> pd.DataFrame:
        """The rows that the command prints, by policy: the run, those beside it, and the floor where it was computed.

        Columns: hardware, stack, model, residency and `FIGURES`; times in ms, shares from 0 to 1, NaN for what a row
        does not have.
        """
        metrics, base = self.metrics, (self.metrics["compare"] or {}).get("on_demand", {}).get("stall_ns")
        place = {name: metrics[name] for name in ("hardware", "stack", "model")}
        rows = []
        for name, one in named_runs(metrics, self.title):
            figures = derived({**metrics, **one})
            prefetch = one["prefetch"]
            used = prefetch["useful"] + prefetch["late"]
            figures["of_on_demand"] = one["stall_ns"] / base if base else None
            figures["prefetch_used"] = used / prefetch["issued"] if prefetch["issued"] else None
            rows.append({"policy": name, **place, **{key: figures[key] for key in ("residency", *FIGURES)}})
        floor = derived(metrics).get("floor_ms_per_token")
        if floor is not None:
            rows.append({"policy": "floor", **place, "residency": rows[0]["residency"], "ms_per_token": floor})
        table = pd.DataFrame(rows).set_index("policy")
        return table.astype(dict.fromkeys(FIGURES, float))

    @property
    def events(self) -> pd.DataFrame:
        """A row for each demanded expert of each layer of each forward, as `events.parquet` has them (docs/metrics.md).

        Where the run did not record them (`events=True`) it is run again, once; the runs beside it are not.
        """
        if self.recorded.events is None:
            self.recorded = self._job.record(self.metrics)
        assert self.recorded.events is not None
        return self.recorded.events

    @property
    def timeline(self) -> Frames:
        """What was computed, copied and waited for, and how far the policy looked ahead: six tables.

        Recorded as `events` are (`timeline=True`).
        """
        if self.recorded.timeline is None:
            self.recorded = self._job.record(self.metrics)
        assert self.recorded.timeline is not None
        return self.recorded.timeline

    def plot(self, kind: str = "time", *, start_ms: float | None = None, stop_ms: float | None = None) -> Figure:
        """A picture. kind: `time`, the time per token of each row, the stall in it, and the floor; or `timeline`, from
        start_ms to stop_ms of the run, by default two tokens in its middle."""
        from sim.api.pictures import plot_rows, plot_window

        if kind == "time":
            return plot_rows(self.table, self.title)
        if kind == "timeline":
            return plot_window(self.timeline, start_ms, stop_ms, self.title)
        raise ValueError(f"kind={str(kind)[:60]!r} is no picture of a result; choose time or timeline")

    def __str__(self) -> str:
        """The report that the command prints."""
        return self._report().export_text().rstrip("\n")

    def __repr__(self) -> str:
        mean = self.metrics["tpot_ms"]["mean"]
        tpot = "–" if mean is None else f"{mean:.3f}"
        return f"<Result {self.title} on {hardware_title(self.metrics)}: TPOT {tpot} ms>"

    def _repr_html_(self) -> str:
        return self._report().export_html(inline_styles=True, code_format=_PRE)

    def _report(self) -> Console:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=False, force_jupyter=False)
        print_report(
            console, self.metrics, None if self.out is None else str(self.out), self.title, self._job.cfg, self.notes
        )
        return console

    def __getstate__(self) -> dict[str, Any]:
        # What parts hold of a run is large, and may be bound to its process.
        return {**vars(self), "parts": {}}
