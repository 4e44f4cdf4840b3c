"""Pictures of results that are there: stall against residency, TPOT by policy, a run's timeline.

Draws columns as they are and computes no metric. Colours are Okabe and Ito's, told apart by all readers; line
style and marker differ too. Knows no files but the one that `save` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sim.views.names import hardware_name, model_name, policy_name, predictor_name, stack_name
from traces.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from sim.views.timeline import Frames

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "lines.markeredgewidth": 1.3,
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
COMPUTE = {"attention": "#56B4E9", "experts": "#0072B2", "head": "#7f7f7f", "other": "#c7c7c7"}
LINK = {"demand": "#E69F00", "prefetch": "#009E73"}
STALLS = {"miss": "#B2182B", "late": "#F4A6A0"}
ON_HOST = {"experts": "#8C6BB1"}
READS = {"read": "#8C510A"}
HOST_STALLS = {**STALLS, "host": "#8C6BB1"}
"""Where a policy places experts on the host."""
ALL_STALLS = {**HOST_STALLS, "storage": "#8C510A"}
"""Where experts lie on storage."""
DARK = ("miss",)
REST = "#c9d3dc"
LABELS = {
    "residency": "residency (share of all experts)",
    "tpot_ms": "time per output token (ms)",
    "ms_per_token": "ms per token, with prompts",
    "hit_rate": "hit rate",
    "stall_ms_per_token": "stall (ms per token)",
    "late_ms_per_token": "late stall (ms per token)",
    "miss_ms_per_token": "miss stall (ms per token)",
    "link_utilisation": "link utilisation",
}
FACETS = ["hardware", "stack"]
FLOOR = "#222222"

P = ParamSpec("P")


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """The look that all plots share, around one that draws."""

    @wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return plot(*args, **kwargs)

    return drawn


@styled
def plot_stall_against_residency(
    table: pd.DataFrame, value: str = "stall_ms_per_token", log_y: bool = False, title: str = ""
) -> Figure:
    """One line per policy, one panel per hardware (across) and stack (down).

    table: columns policy, hardware, stack, residency (0 to 1) and `value`, one row a point. log_y: logarithmic
    but for a linear foot, so that a stall of zero is drawn too. ValueError if a point has two rows.
    """
    _check(table, [value], [*FACETS, "policy", "residency"])
    figure, panels = _panels(table, title)
    policies = list(dict.fromkeys(table["policy"]))
    positive = table[value][table[value] > 0]
    for axes, rows in panels:
        for index, policy in enumerate(policies):
            line = rows[rows["policy"] == policy].sort_values("residency")
            axes.plot(line["residency"], line[value], label=policy, clip_on=False, **_line_style(index))
        if log_y and len(positive):
            axes.set_yscale("symlog", linthresh=_foot(float(positive.min()), float(positive.max())))
        axes.set_xlabel(LABELS["residency"])
        axes.set_ylabel(LABELS.get(value, value))
    for axes, _ in panels:
        axes.set_ylim(bottom=0)
    handles = [Line2D([], [], label=policy_name(name), **_line_style(index)) for index, name in enumerate(policies)]
    figure.legend(handles=handles, loc="outside right center", title="policy", alignment="left", handlelength=3.2)
    return figure


@styled
def plot_tpot_bars(
    table: pd.DataFrame,
    show_stall: bool = True,
    title: str = "",
    across: str = "hardware",
    value: str = "tpot_ms",
) -> Figure:
    """One bar of TPOT per policy, in the table's order; a panel per hardware or residency (`across`) and stack (down).

    table: columns policy, stack, `value`, that of `across` and, with show_stall, late_ms_per_token and
    miss_ms_per_token: the bar's share that was stall, which is comparable at batch size 1; host_ms_per_token adds that
    of policies that place experts on the host, storage_ms_per_token that of experts on storage. One row a bar. Where
    there is a column floor_ms_per_token, a panel's largest is drawn as a line. value: tpot_ms, with which stall and
    floor compare where no prompt was run, or ms_per_token, with which they always do.
    """
    parts = {"miss": "miss_ms_per_token", "late": "late_ms_per_token"} if show_stall else {}
    _check(table, [value, *parts.values()], [across, "stack", "policy"])
    for kind in ("host", "storage"):
        column = f"{kind}_ms_per_token"
        if show_stall and column in table.columns:
            parts[kind] = column
            table = table.fillna({column: 0.0})
    policies = list(dict.fromkeys(table["policy"]))
    figure, panels = _panels(table, title, 0.9 + 0.3 * len(policies), across)
    has_floor = False
    for axes, rows in panels:
        places = [policies.index(policy) for policy in rows["policy"]]
        bars = axes.barh(places, rows[value], color=REST, height=0.7)
        axes.bar_label(bars, fmt=_three_digits, padding=3)
        left = rows[value] * 0.0
        for kind, column in parts.items():
            axes.barh(places, rows[column], left=left, color=ALL_STALLS[kind], height=0.7)
            left = left + rows[column]
        axes.set_yticks(range(len(policies)), [policy_name(name) for name in policies])
        axes.set_ylim(len(policies) - 0.4, -0.6)
        axes.margins(x=0.16)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(LABELS[value])
        floors = rows["floor_ms_per_token"].dropna().tolist() if "floor_ms_per_token" in rows.columns else []
        if len(floors):
            axes.axvline(max(floors), color=FLOOR, linewidth=0.9, linestyle="--")
            has_floor = True
    if parts or has_floor:
        colours = {f"{kind} stall": ALL_STALLS[kind] for kind in parts}
        colours |= {"compute, overhead": REST} if parts else {}
        _colour_legend(figure, colours, "floor: no schedule is faster" if has_floor else "")
    return figure


@styled
def plot_timeline(frames: Frames, start_ms: float, stop_ms: float, title: str = "") -> Figure:
    """What ran, was copied and was waited for between two times, with the horizon S above if it was recorded.

    frames: of `sim.views.timeline.load_timeline`; times in ms since the start of the run.
    """
    if not 0 <= start_ms < stop_ms:
        raise ValueError(f"start_ms={start_ms} must be 0 or more and below stop_ms={stop_ms}")
    lanes = [
        ("compute", frames.compute, "kind", COMPUTE),
        ("link", frames.link, "cause", LINK),
        ("stalls", frames.stalls, "kind", ALL_STALLS),
    ]
    has_host = len(frames.host) > 0
    if has_host:
        lanes.insert(2, ("host", frames.host, "kind", ON_HOST))
    has_storage = len(frames.storage) > 0
    if has_storage:
        lanes.insert(2, ("storage", frames.storage, "kind", READS))
    has_horizon = len(frames.horizon) > 0
    figure = Figure(figsize=(10, 3.7 if has_horizon else 2.6), layout="constrained")
    ratios = [1.3, 3] if has_horizon else [3]
    grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    axes = grid[-1]
    drawn = 0
    for place, (_, frame, category, colours) in enumerate(lanes):
        drawn += _draw_lane(axes, place, frame, category, colours, (start_ms, stop_ms))
    if not drawn:
        raise ValueError(f"nothing happened between start_ms={start_ms} and stop_ms={stop_ms} in this timeline")
    axes.set_yticks(range(len(lanes)), [name for name, *_ in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(start_ms, stop_ms)
    axes.set_xlabel("time (ms)")
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if has_horizon:
        _draw_horizon(grid[0], frames.horizon, stop_ms)
    grid[0].set_title(title)
    shown = {kind: colour for kind, colour in COMPUTE.items() if (frames.compute["kind"] == kind).any()}
    shown |= {f"{cause} copy": colour for cause, colour in LINK.items()}
    left_out = {kind for kind, is_there in (("host", has_host), ("storage", has_storage)) if not is_there}
    stalls = {kind: colour for kind, colour in ALL_STALLS.items() if kind not in left_out}
    _colour_legend(figure, shown | {f"{kind} stall": colour for kind, colour in stalls.items()})
    return figure


@styled
def plot_recall(table: pd.DataFrame) -> Figure:
    """Recall@k by distance (columns trace, predictor, distance, recall_k): a panel a trace, a line a predictor."""
    if table.empty:
        raise ValueError("nothing to draw: the table has no rows")
    traces, predictors = (list(dict.fromkeys(table[name])) for name in ("trace", "predictor"))
    figure = Figure(figsize=(1.2 + 2.6 * len(traces), 3.8), layout="constrained")
    figure.suptitle("How many of the experts that a later layer chooses are foreseen", x=0.01, ha="left")
    panels = figure.subplots(1, len(traces), sharex=True, sharey=True, squeeze=False)[0]
    for panel, trace in zip(panels, traces, strict=True):
        for index, predictor in enumerate(predictors):
            own = table[(table["trace"] == trace) & (table["predictor"] == predictor)]
            if len(own):
                panel.plot(own["distance"], own["recall_k"], label=predictor_name(predictor), **_line_style(index))
        panel.set_title(model_name(trace))
        panel.set_xlabel("distance (layers)")
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("recall@k")
    pairs = [pair for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5))
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all; the same figure gives the same bytes."""
    with whole_file(Path(path), sync=False) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


# -- parts of a picture --------------------------------------------------------------------------------------


def _check(table: pd.DataFrame, values: Sequence[str], point: Sequence[str]) -> None:
    """ValueError if a column is missing, if there is no row, or if a point has two."""
    missing = [name for name in [*point, *values] if name not in table.columns]
    if missing:
        raise ValueError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    if table.empty:
        raise ValueError("the table has no rows")
    twice = table[table.duplicated([*point])]
    if len(twice):
        found = ", ".join(f"{name}={twice.iloc[0][name]}" for name in point)
        raise ValueError(f"the table has two rows for {found}; select one model, trace and setting first")


def _panels(
    table: pd.DataFrame, title: str = "", height: float = 2.9, across: str = "hardware"
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """The figure, and each panel with its rows: `across` across, stacks down, empty where there is no row.

    All panels have the same scales, so that they compare at a glance.
    """
    columns = list(dict.fromkeys(table[across]))
    down = list(dict.fromkeys(table["stack"]))
    figure = Figure(
        figsize=(max(1.7 + 3.1 * len(columns), 6.4), height * len(down) + 0.3 * bool(title)), layout="constrained"
    )
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    grid = figure.subplots(len(down), len(columns), sharex=True, sharey=True, squeeze=False)
    panels = []
    for i, stack in enumerate(down):
        for j, column in enumerate(columns):
            rows = table[(table[across] == column) & (table["stack"] == stack)]
            if rows.empty:
                grid[i, j].set_axis_off()
                continue
            name = hardware_name(column) if across == "hardware" else f"{100 * column:g} % of the experts resident"
            grid[i, j].set_title(f"{name}, {stack_name(stack)}" if across == "hardware" or len(down) > 1 else name)
            grid[i, j].tick_params(labelbottom=True, labelleft=j == 0 or across == "hardware")
            panels.append((grid[i, j], rows))
    return figure, panels


def _line_style(index: int) -> dict[str, Any]:
    round_ = index // len(LINES)
    return {
        "color": LINES[index % len(LINES)],
        "marker": MARKERS[(index + 3 * round_) % len(MARKERS)],
        "markerfacecolor": "none",  # What lies beneath stays visible where lines meet.
        "linestyle": DASHES[round_ % len(DASHES)],
    }


def _foot(smallest: float, largest: float) -> float:
    """Where a logarithmic axis turns linear, to reach zero: a power of ten, four decades down at most."""
    return float(10.0 ** max(floor(log10(smallest)), floor(log10(largest)) - 4))


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _colour_legend(figure: Figure, colours: dict[str, str], dashed: str = "") -> None:
    """One entry a colour, and one for the dashed line if it has a label."""
    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in colours.items()]
    if dashed:
        handles.append(Line2D([], [], color=FLOOR, linewidth=0.9, linestyle="--", label=dashed))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.4)


def _draw_lane(
    axes: Axes, place: int, frame: pd.DataFrame, category: str, colours: dict[str, str], window_ms: tuple[float, float]
) -> int:
    """Draw the slices of one lane that touch the window, clipped to it; returns how many."""
    low, high = window_ms
    inside = frame[(frame["end_ns"] > low * 1e6) & (frame["start_ns"] < high * 1e6)]
    starts = (inside["start_ns"] / 1e6).clip(lower=low)
    widths = (inside["end_ns"] / 1e6).clip(upper=high) - starts
    # A seam parts neighbours; where it would hide them, an outline keeps the thinnest visible.
    has_seam = len(inside) > 0 and widths.median() > (high - low) * 0.005
    for kind, colour in colours.items():
        chosen = inside[category] == kind
        spans = list(zip(starts[chosen], widths[chosen], strict=True))
        edge = "white" if has_seam else colour
        axes.broken_barh(spans, (place - 0.36, 0.72), facecolor=colour, edgecolor=edge, linewidth=0.4)
    if "expert" in inside.columns:
        names = [f"L{layer}/E{expert}" for layer, expert in zip(inside["layer"], inside["expert"], strict=True)]
        inks = ["white" if kind in DARK else "black" for kind in inside[category]]
        for name, ink, start, width in zip(names, inks, starts, widths, strict=True):
            if width > (high - low) * 0.0095 * len(name):
                axes.text(start + width / 2, place, name, color=ink, ha="center", va="center", fontsize=7.5)
    return len(inside)


def _draw_horizon(axes: Axes, horizon: pd.DataFrame, stop_ms: float) -> None:
    """S as a step line: each value holds until the next."""
    seen = horizon[horizon["at_ns"] < stop_ms * 1e6]
    if len(seen):
        times = [*(seen["at_ns"] / 1e6), stop_ms]
        axes.step(times, [*seen["reach"], seen["reach"].iloc[-1]], where="post", color="#222222")
    axes.set_ylim(0, horizon["reach"].max() + 0.5)
    axes.set_ylabel("S (layers)")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(axis="x", labelbottom=False)
