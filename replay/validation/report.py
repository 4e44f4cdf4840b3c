"""What a validation found, for readers: a page with tables, and predicted against measured as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from replay.packages import copies_note
from replay.validation.fidelity import STALL_COUNTS_FROM
from replay.validation.folder import PAGE, TITLE
from replay.validation.lateness import LAUNCH_GAP_NS, SEEN_NS
from replay.validation.plan import breadth_by_s
from replay.validation.verdict import HOST_BOUND, JUDGED, NOISE, ONCE, percent
from sim.job.output import write_text
from sim.views.names import policy_name
from sim.views.plots import LINES, MARKERS, save, styled

GROUP = ["model", "stack", "residency", "batch_size"]
PANELS = (("tpot_ms", "tpot_bar", "Time per token (TPOT)"), ("stall_ms", "stall_bar", "Stall per token"))
_SHOWN = 40
_WORLDS = ("measured", "predicted")
_HEAD = (
    "policy",
    "TPOT measured",
    "predicted",
    "error",
    "noise",
    "stall measured",
    "predicted",
    "error",
    "noise",
    "late measured",
    "predicted",
    "link measured",
    "predicted",
    "hits measured",
    "predicted",
    "forwards",
    "verdict",
)


@styled
def plot_fidelity(table: pd.DataFrame, judged: dict[str, Any], title: str) -> Figure:
    """TPOT and stall per token, predicted against measured; one colour and marker a policy, paler where a row has no
    verdict. The line is equality, the grey band what the bars of `judged` allow."""
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    axes = figure.subplots(1, 2)
    has_verdict = [found in JUDGED for found in judged["verdicts"]]
    policies = list(dict.fromkeys(table["policy"]))
    for axis, (column, bar, panel) in zip(axes, PANELS, strict=True):
        _panel(axis, table, column, judged[bar], has_verdict, policies)
        axis.set(title=panel, xlabel="measured (ms)", ylabel="predicted (ms)")
    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKERS[number % len(MARKERS)],
            color=LINES[number % len(LINES)],
            fillstyle="none",
            label=policy_name(policy),
        )
        for number, policy in enumerate(policies)
    ]
    handles.append(Line2D([], [], color="#7f7f7f", linewidth=0.8, label="predicted = measured"))
    allowed = f"grey: within the bar, {100 * judged['tpot_bar']:g} % of TPOT, {100 * judged['stall_bar']:g} % of stall"
    handles.append(Patch(color="#d4d4d4", label=allowed))
    if not all(has_verdict):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                color="#000000",
                alpha=0.3,
                fillstyle="none",
                label="pale: row without a verdict",
            )
        )
    figure.legend(handles=handles, loc="outside lower left", ncols=4)
    return figure


def _panel(
    axis: Axes, table: pd.DataFrame, column: str, bar: float, has_verdict: Sequence[bool], policies: Sequence[str]
) -> None:
    measured, predicted = table[f"{column}_measured"], table[f"{column}_predicted"]
    there = (measured > 0) & (predicted > 0)
    for number, policy in enumerate(policies):
        for known in (True, False):
            rows = there & (table["policy"] == policy) & (pd.Series(has_verdict, index=table.index) == known)
            axis.plot(
                measured[rows],
                predicted[rows],
                MARKERS[number % len(MARKERS)],
                fillstyle="none",
                color=LINES[number % len(LINES)],
                alpha=1.0 if known else 0.3,
                label=policy,
            )
    if not there.any():
        return
    values = pd.concat([measured[there], predicted[there]])
    ends = [values.min() * 0.8, values.max() * 1.25]
    axis.plot(ends, ends, "-", color="#7f7f7f", linewidth=0.8, zorder=1)
    axis.fill_between(
        ends,
        [end * (1 - bar) for end in ends],
        [end * (1 + bar) for end in ends],
        color="#d4d4d4",
        zorder=0,
        linewidth=0,
    )
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(NullFormatter())


def write_report(out: Path, table: pd.DataFrame, summary: dict[str, Any]) -> None:
    """README.md and fidelity.png of a results folder, from the table and the summary that lie there."""
    if len(table):
        title = f"{summary['machine']['name']}: what the simulator predicts against what was measured"
        save(plot_fidelity(table, summary["judged"], title), out / "fidelity.png")
    write_text(out / PAGE, page(table, summary))


def page(table: pd.DataFrame, summary: dict[str, Any]) -> str:
    """The page: the line to quote, what was run, how far off the simulator is, and every row."""
    shown = "NOT shown" if summary["not_shown"] else "Shown"
    lines = [
        f"{TITLE}{summary['machine']['name']} ({summary['world']})",
        "",
        f"**{shown}: {summary['quote']}.**",
        "",
        *(f"- Not shown: {reason}." for reason in summary["not_shown"]),
        *([""] if summary["not_shown"] else []),
        f"{_made(summary)}. {summary['wall_s']:.0f} s in all.",
        "",
        "```sh",
        summary["command"],
        "```",
        "",
        *_errors(summary["judged"]),
        "",
        *_findings(table, summary),
        "",
    ]
    if not len(table):
        return "\n".join(lines)
    lines += [
        "![Predicted against measured](fidelity.png)",
        "",
        "Each point is a row of the tables below; on the line both worlds agree, and the grey band is as wide "
        "as the bar (TPOT left, stall right). Pale points have no verdict.",
        "",
        "Times in ms per token; error = predicted / measured - 1; noise = (most - least) / median of the "
        "repeats; forwards: 5th, 50th and 95th percentile of the error of single forwards.",
        "",
    ]
    table = table.assign(verdict=summary["judged"]["verdicts"])
    for _, rows in table.groupby(GROUP, sort=False):
        model, stack, residency, batch = (rows[name].iloc[0] for name in GROUP)
        lines += [
            f"## {model}, {stack} stack, {100 * float(residency):.0f} % resident, batch {batch}",
            "",
            f"| {' | '.join(_HEAD)} |",
            "|---" * len(_HEAD) + "|",
            *(_row(row) for _, row in rows.iterrows()),
            "",
            *_on_host(rows),
        ]
    return "\n".join(lines)


def _made(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    made = f"torch {machine['torch']}, computing in {machine['dtype']}; {summary['tokens']} tokens a run"
    if summary["repeat"] > 1:
        made += f"; {summary['repeat']} replays of each row or more, as time sufficed, in turn with those of other rows"
    if summary["beside"]:
        made += "; the host's costs measured beside each"
    if summary["scale"] > 1:
        made += f"; the models' widths divided by {summary['scale']}"
    if note := copies_note(machine):
        made += f"; {note}"
    if machine.get("throttle_gb_per_s"):
        made += f"; the link keeps pace with {machine['throttle_gb_per_s']:.4g} GB/s"
    return made


def _errors(judged: dict[str, Any]) -> list[str]:
    lines = ["| | worst | mean | bar |", "|---|---|---|---|"]
    with_stall = f"{judged['rows_with_stall']} of them stall for at least {percent(STALL_COUNTS_FROM)} of the time"
    labels = {
        "tpot_error": f"TPOT error ({judged['num_judged']} rows judged)",
        "tpot_noise": "noise of TPOT",
        "stall_error": f"stall error ({with_stall})",
        "stall_noise": "noise of stall",
    }
    for name, text in labels.items():
        bar = judged["tpot_bar" if name.startswith("tpot") else "stall_bar"]
        lines.append(
            f"| {text} | {percent(judged[f'worst_{name}'])} | {percent(judged[f'mean_{name}'])} | {percent(bar)} |"
        )
    return lines


def _findings(table: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    judged, stamps, lockstep = summary["judged"], summary["stamps"], summary["lockstep"]
    ranks, rows = judged["ranks"], judged["rows_by_verdict"]
    lines = [
        f"- Ranking: of {ranks['pairs']} pairs of policies whose measured TPOT differs by more than their noise, "
        f"{ranks['agreeing']} are ordered alike." + _list(ranks["against"]),
        f"- Over a bar: {len(judged['missed'])} of {2 * judged['num_judged']} errors." + _list(judged["missed"]),
    ]
    if rows[NOISE]:
        lines.append(
            f"- Rows without a verdict, since repeats differ by more than a bar: {len(rows[NOISE])}."
            + _list(rows[NOISE])
        )
    if rows[HOST_BOUND]:
        late = table["late_share"][[found == HOST_BOUND for found in judged["verdicts"]]]
        lines.append(
            f"- Rows that are host-bound, so not judged: {len(rows[HOST_BOUND])}. For more than "
            f"{percent(judged['late_bar'])} of the time the device waited for a host that was late: it found what had "
            f"ended more than {SEEN_NS // 1000} us after it, or launched more than {LAUNCH_GAP_NS // 1000} us after "
            "what was to hide the launch."
            + _list([f"{name}: {percent(share)}" for name, share in zip(rows[HOST_BOUND], late, strict=True)])
        )
    if rows[ONCE]:
        lines.append(
            f"- Rows of which fewer than two replays count, so not judged: {len(rows[ONCE])}." + _list(rows[ONCE])
        )
    if summary["set_aside"]:
        lines.append(
            f"- Replays set aside: {summary['set_aside']} of {summary['replays']}. The fixed loops around or in them "
            "say that the host changed its speed meanwhile, or had another than in the rest of the row "
            "(`runs.csv`)."
        )
    lines += [
        f"- Stamps: {stamps['wrong']} wrong in {stamps['executions']:,} expert executions ({stamps['checks']:,} "
        "checks).",
        f"- Lockstep: {sum(one['difference'] is None for one in lockstep)} of {len(lockstep)} policies take the same "
        f"decisions from the logged records ({sum(one['decisions'] for one in lockstep):,} decisions).",
    ]
    loop = summary["host_loop"]
    if loop["times_ns"]:
        first, middle, last = (f"{loop[f'{name}_ns'] / 1e6:.2f}" for name in ("first", "median", "last"))
        lines.append(
            f"- Host: a fixed Python loop took {first} ms before, {middle} between (median) and {last} after; "
            f"the slowest of {len(loop['times_ns'])} is {percent(loop['drift'])} above the "
            "fastest."
        )
    for link in summary["links"]:
        lines.append(
            f"- Link: {link['gb_per_s']:.4g} GB/s while copying in the most transfer-bound row ({link['row']}), "
            f"{100 * link['share']:.1f} % of the {link['calibrated']:.4g} at which such chunks follow one another."
        )
    lines.append(f"- Every policy and capacity once: {_breadth(summary['breadth_s'], summary['minutes'])}.")
    if summary["unlogged"]:
        lines.append(f"- Lockstep left out for want of time: {', '.join(summary['unlogged'])}.")
    if summary["left_out"]:
        lines.append(f"- Left out for want of time: {len(summary['left_out'])} comparisons.")
    return lines


def _row(row: pd.Series[Any]) -> str:
    def both(name: str) -> str:
        return f"{row[f'{name}_measured']:.3f} | {row[f'{name}_predicted']:.3f}"

    spread = " / ".join(f"{100 * row[f'forward_error_p{part}']:+.1f}" for part in (5, 50, 95))
    stall = "–" if pd.isna(row["stall_error"]) else f"{100 * row['stall_error']:+.1f} %"
    once = row["num_runs"] < 2
    noise = ["–" if once else percent(row[f"{name}_noise"]) for name in ("tpot", "stall")]
    cells = [
        row["policy"],
        both("tpot_ms"),
        f"{100 * row['tpot_error']:+.1f} %",
        noise[0],
        both("stall_ms"),
        stall,
        noise[1],
        both("late_stall_ms"),
        both("link_ms"),
        row["num_hits_measured"],
        row["num_hits_predicted"],
        f"{spread} %",
        row["verdict"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _on_host(rows: pd.DataFrame) -> list[str]:
    """A table of what the host computed, of those rows whose policy has a place."""
    if "num_host_measured" not in rows:
        return []
    placed = rows[rows["num_host_measured"].notna()]
    if placed.empty:
        return []
    head = [f"{what} {world}" for what in ("host stall", "host busy", "on host") for world in ("measured", "predicted")]
    lines = [f"| policy | {' | '.join(head)} |", "|---" * 7 + "|"]
    for _, row in placed.iterrows():
        times = [f"{row[f'{name}_{world}']:.3f}" for name in ("host_stall_ms", "host_ms") for world in _WORLDS]
        counts = [f"{row[f'num_host_{world}']:.0f}" for world in _WORLDS]
        lines.append(f"| {' | '.join([row['policy'], *times, *counts])} |")
    return [*lines, ""]


def _breadth(after_s: float | None, minutes: float) -> str:
    """When every policy and capacity had been measured once, beside the time that was given for it."""
    if after_s is None:
        return "not reached"
    late = after_s > breadth_by_s(minutes)
    return f"after {after_s:.0f} s of {60 * minutes:.0f}{', later than the half that it should take' if late else ''}"


def _list(items: Sequence[str]) -> str:
    more = f"\n  - and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "".join(f"\n  - {item}" for item in items[:_SHOWN]) + more
