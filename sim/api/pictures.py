"""Pictures of results and of sweeps: which view of `sim.views.plots` shows them, and with which rows."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from expertflow.keys import nearest
from sim.views.plots import plot_stall_against_residency, plot_timeline, plot_tpot_bars
from sim.views.timeline import Frames

FACETS = ("hardware", "stack")


def plot_rows(table: pd.DataFrame, title: str) -> Figure:
    """Of one result: a bar a row. table: of `Result.table`."""
    rows = table.drop(index="floor", errors="ignore").reset_index()
    if "floor" in table.index:
        rows = rows.assign(floor_ms_per_token=table["ms_per_token"].loc["floor"])
    return plot_tpot_bars(rows, title=f"Time per token: {title}", value="ms_per_token")


def plot_window(frames: Frames, start_ms: float | None, stop_ms: float | None, title: str) -> Figure:
    """Of a timeline, what lies between two times; by default two tokens in the middle."""
    if start_ms is None and stop_ms is None:
        heads = frames.compute.loc[frames.compute["kind"] == "head", "end_ns"] / 1e6
        ends = [0.0, *heads.to_list()]
        middle = max(len(ends) // 2, 1)
        start_ms, stop_ms = ends[middle - 1], ends[min(middle + 1, len(ends) - 1)]
    elif start_ms is None or stop_ms is None:
        raise ValueError(f"start_ms={start_ms} and stop_ms={stop_ms} must be given together, or neither")
    return plot_timeline(frames, start_ms, stop_ms, title)


def plot_sweep(table: pd.DataFrame, swept: Sequence[str], value: str) -> Figure:
    """Of a sweep: lines over residency where that was swept, else bars of the time per token.

    A panel for each hardware and stack; what else was swept is told apart by the name of the policy.
    """
    rows, others = table, [key for key in swept if key not in (*FACETS, "policy", "residency")]
    names = rows["policy"].astype(str)
    for key in others:
        names = names + ", " + key + "=" + rows[key].astype(str)
    rows = rows.assign(policy=names)
    if value not in rows.columns:
        known = nearest(value, [str(name) for name in rows.columns])
        raise ValueError(f"value={value[:60]!r} is no column of the table; there are: {known}")
    if rows["residency"].nunique() > 1:
        return plot_stall_against_residency(rows, value)
    return plot_tpot_bars(rows, value="ms_per_token")
