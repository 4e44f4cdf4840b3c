"""The pictures of a study: a share by hardware, stack and policy, a cost against the step, and curves that cross.

Draws columns as they are. A panel has one value of every axis but `hardware`, which colours tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sim.study.crossings import crossings, curves
from sim.views.names import hardware_name, model_name, policy_name, stack_name
from sim.views.plots import _foot, _line_style, save, styled

ACROSS, COLOURED = "stack", "hardware"


def draw(table: pd.DataFrame, spec: Mapping[str, Any], axes: Sequence[str], folder: Path) -> tuple[str, str]:
    """Draw one picture into `folder`; its title and file name."""
    kinds: dict[str, Callable[..., Figure]] = {"shares": plot_shares, "steps": plot_steps, "curves": plot_curves}
    if spec["kind"] not in kinds:
        raise ValueError(f"picture {spec['file']}: kind={spec['kind']!r} is unknown; choose one of: {', '.join(kinds)}")
    if spec["value"] not in table.columns:
        raise ValueError(f"picture {spec['file']}: {spec['value']} is no column; there are: {', '.join(table.columns)}")
    save(kinds[spec["kind"]](table, spec, axes), folder / spec["file"])
    return spec["title"], spec["file"]


@styled
def plot_shares(table: pd.DataFrame, spec: Mapping[str, Any], axes: Sequence[str]) -> Figure:
    """A dot per cell: variants down, the value across on a logarithmic scale with zero at its left end."""
    chosen = table[table["variant"].isin(spec["variants"])].dropna(subset=[spec["value"]])
    variants = [name for name in spec["variants"] if name in set(chosen["variant"])]
    figure, panels = _grid(chosen, spec, axes, 0.75 + 0.24 * len(variants), 4.6)
    positive = chosen[spec["value"]][chosen[spec["value"]] > 0]
    groups = list(dict.fromkeys(chosen[COLOURED])) if COLOURED in axes else [""]
    for panel, rows in panels:
        for index, group in enumerate(groups):
            dots = rows[rows[COLOURED] == group] if group else rows
            # Beside each other, so that equal values do not hide one another.
            shift = (index - (len(groups) - 1) / 2) * 0.16
            places = [variants.index(name) + shift for name in dots["variant"]]
            panel.plot(dots[spec["value"]], places, **_dots(index), label=_shown(COLOURED, group), clip_on=False)
        if len(positive):
            panel.set_xscale("symlog", linthresh=_foot(float(positive.min()), float(positive.max())))
            panel.set_xlim(0, 1.3 * float(positive.max()))
        if "line" in spec:
            panel.axvline(spec["line"], color="#222222", linewidth=0.9, linestyle="--")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        panel.set_yticks(range(len(variants)), [policy_name(name) for name in variants])
        panel.set_ylim(len(variants) - 0.5, -0.5)
        panel.tick_params(labelleft=True, labelbottom=True)
        panel.set_xlabel(spec["title"])
    if groups != [""]:
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(groups))
    return figure


@styled
def plot_steps(table: pd.DataFrame, spec: Mapping[str, Any], axes: Sequence[str]) -> Figure:
    """The value at each fixed S (variants named …_S, in order); what is `marked` stands at its mean S as a star."""
    marked = list(spec.get("marked", ()))
    chosen = table[table["variant"].isin([*spec["variants"], *marked])].dropna(subset=[spec["value"]])
    figure, panels = _grid(chosen, spec, axes, 2.5, 4.0, sharey=False)
    groups = list(dict.fromkeys(chosen[COLOURED])) if COLOURED in axes else [""]
    for panel, rows in panels:
        for index, group in enumerate(groups):
            own = rows[rows[COLOURED] == group] if group else rows
            line = own[own["variant"].isin(spec["variants"])]
            steps = [int(name.rpartition("_")[2]) for name in line["variant"]]
            label = _shown(COLOURED, group) if group else "fixed S"
            panel.plot(steps, line[spec["value"]], label=label, **_line_style(index))
            stars = own[own["variant"].isin(marked)]
            panel.plot(
                stars["mean_S"],
                stars[spec["value"]],
                linestyle="none",
                marker="*",
                markersize=11,
                markerfacecolor=_line_style(index)["color"],
                markeredgecolor="white",
                markeredgewidth=0.8,
                zorder=5,
            )
        panel.set_ylim(0, 1.08 * float(rows[spec["value"]].max()) or 1.0)
        panel.set_xlabel("S (layers)")
        panel.tick_params(labelleft=True, labelbottom=True)
    figure.supylabel(spec["title"], fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if marked:
        star = panels[0][0].plot([], [], linestyle="none", marker="*", markersize=11, color="#444444")[0]
        names = ", ".join(policy_name(name) for name in marked)
        handles, labels = [*handles, star], [*labels, f"{names}, at its mean S"]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), 5))
    return figure


@styled
def plot_curves(table: pd.DataFrame, spec: Mapping[str, Any], axes: Sequence[str]) -> Figure:
    """The value along an axis of numbers, a line a variant, a panel for each value of the other axes, side by side.

    Where the two variants that are `marked` cross a thin line goes down to the axis, with the number there.
    """
    if spec.get("axis") not in axes:
        raise ValueError(f"picture {spec['file']}: axis={spec.get('axis')!r} is no axis; there are: {', '.join(axes)}")
    chosen = table[table["variant"].isin(spec["variants"])]
    panels = list(_groups(chosen, [axis for axis in axes if axis != spec["axis"]]))
    figure = Figure(figsize=(0.9 + 3.7 * len(panels), 3.9), layout="constrained")
    if "heading" in spec:
        figure.suptitle(spec["heading"], x=0.01, ha="left")
    places = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, rows) in zip(places, panels, strict=True):
        found = curves(rows, spec["axis"], spec["value"], spec["variants"])
        for index, (variant, points) in enumerate(found.items()):
            panel.plot(*zip(*points, strict=True), label=policy_name(variant), **_line_style(index))
        for first, second in combinations(spec.get("marked", ()), 2):
            for at, value in crossings(found.get(first, []), found.get(second, [])):
                panel.plot([at, at], [0, value], color="#222222", linewidth=0.9, linestyle="--")
                panel.annotate(f"{at:.1f}", (at, 0), (3, 3), textcoords="offset points", fontsize=8)
        panel.set_title(name)
        panel.set_xlabel(spec.get("axis_title", spec["axis"]))
        panel.set_ylim(bottom=0)
        panel.tick_params(labelleft=True)
    places[0].set_ylabel(spec["title"])
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _dots(index: int) -> dict[str, Any]:
    return {**_line_style(index), "linestyle": "none", "markersize": 5}


def _shown(axis: str, value: Any) -> str:
    """An axis' value as a person reads it."""
    known: dict[str, Callable[[str], str]] = {"hardware": hardware_name, "stack": stack_name, "model": model_name}
    return known[axis](value) if axis in known and value else str(value)


def _grid(
    table: pd.DataFrame, spec: Mapping[str, Any], axes: Sequence[str], height: float, width: float, sharey: bool = True
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A panel per value of the axes but `hardware`: stacks across, everything else down. spec: its heading, if any."""
    down = [axis for axis in axes if axis not in (ACROSS, COLOURED)]
    across = list(dict.fromkeys(table[ACROSS])) if ACROSS in axes else [""]
    rows = list(_groups(table, down))
    figure = Figure(figsize=(1.2 + width * len(across), 0.8 + height * len(rows)), layout="constrained")
    if "heading" in spec:
        figure.suptitle(spec["heading"], x=0.01, ha="left")
    grid = figure.subplots(len(rows), len(across), sharex=True, sharey=sharey, squeeze=False)
    panels = []
    for i, (name, part) in enumerate(rows):
        for j, stack in enumerate(across):
            own = part[part[ACROSS] == stack] if stack else part
            if own.empty:
                grid[i, j].set_axis_off()
                continue
            grid[i, j].set_title(", ".join(word for word in (name, _shown(ACROSS, stack)) if word))
            panels.append((grid[i, j], own))
    if not panels:
        raise ValueError("nothing to draw: none of the picture's variants was run")
    return figure, panels


def _groups(table: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    if not names:
        yield "", table
        return
    for _, part in table.groupby(list(names), sort=False):
        yield ", ".join(_shown(name, part.iloc[0][name]) for name in names), part
