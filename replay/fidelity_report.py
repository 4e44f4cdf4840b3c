"""What a validation found, for readers: a page with tables, and predicted against measured as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from replay.fidelity import STALL_COUNTS_FROM
from sim.output import write_text
from sim.plots import LINES, MARKERS, save, styled

GROUP = ["model", "stack", "residency", "batch_size"]


@styled
def plot_fidelity(table: pd.DataFrame, bar: float) -> Figure:
    """TPOT and stall per token, predicted against measured; one colour and marker a policy. The grey band is `bar`."""
    figure = Figure(figsize=(9.2, 4.3), layout="constrained")
    axes = figure.subplots(1, 2)
    for place, (column, title) in enumerate((("tpot_ms", "TPOT (ms)"), ("stall_ms", "stall (ms per token)"))):
        axis = axes[place]
        shown = table[(table[f"{column}_measured"] > 0) & (table[f"{column}_predicted"] > 0)]
        for number, (policy, rows) in enumerate(shown.groupby("policy", sort=False)):
            axis.plot(rows[f"{column}_measured"], rows[f"{column}_predicted"], MARKERS[number % len(MARKERS)],
                      color=LINES[number % len(LINES)], label=str(policy), fillstyle="none")  # fmt: skip
        if len(shown):
            values = pd.concat([shown[f"{column}_measured"], shown[f"{column}_predicted"]])
            ends = [values.min() * 0.8, values.max() * 1.25]
            axis.plot(ends, ends, "-", color="#7f7f7f", linewidth=0.8, zorder=0)
            axis.fill_between(ends, [end * (1 - bar) for end in ends], [end * (1 + bar) for end in ends],
                              color="#e4e4e4", zorder=0, linewidth=0)  # fmt: skip
            axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                scale.set_minor_formatter(NullFormatter())
        axis.set(title=title, xlabel="measured", ylabel="predicted")
    axes[0].legend(loc="upper left")
    return figure


def write_report(out: Path, table: pd.DataFrame, summary: dict[str, Any]) -> None:
    """README.md and fidelity.png of a results folder, from the table and the summary that lie there."""
    judged = summary["judged"]
    save(plot_fidelity(table, judged["tpot_bar"]), out / "fidelity.png")
    write_text(out / "README.md", page(table, summary))


def page(table: pd.DataFrame, summary: dict[str, Any]) -> str:
    """The page: what was run, how far off the simulator is, and every row."""
    judged, machine, stamps = summary["judged"], summary["machine"], summary["stamps"]
    ranks = judged["ranks"]
    made = f"torch {machine['torch']}, computing in {machine['dtype']}; {summary['tokens']} tokens a run"
    if summary["repeat"] > 1:
        made += f"; the median of {summary['repeat']} replays"
    if summary["scale"] > 1:
        made += f"; the models' widths divided by {summary['scale']}"
    if machine.get("throttle_gb_per_s"):
        made += f"; the link keeps pace with {machine['throttle_gb_per_s']:.4g} GB/s"
    lines = [
        f"# Simulator against {machine['name']} ({summary['world']})",
        "",
        f"{made}. {summary['wall_s']:.0f} s in all.",
        "",
        "```sh",
        summary["command"],
        "```",
        "",
        "| | worst | mean | bar |",
        "|---|---|---|---|",
        f"| TPOT error | {_percent(judged['worst_tpot_error'])} | {_percent(judged['mean_tpot_error'])} | "
        f"{_percent(judged['tpot_bar'])} |",
        f"| stall error ({judged['rows_with_stall']} of {judged['num_rows']} rows have a stall of at least "
        f"{100 * STALL_COUNTS_FROM:.0f} % of the time) | {_percent(judged['worst_stall_error'])} | "
        f"{_percent(judged['mean_stall_error'])} | {_percent(judged['stall_bar'])} |",
        "",
        f"- Ranking: of {ranks['pairs']} pairs of policies that differ by more than "
        f"{_percent(ranks['differing_by'])} in measured TPOT, {ranks['agreeing']} are ordered alike."
        + _list(ranks["against"]),
        f"- Stamps: {stamps['wrong']} wrong in {stamps['executions']:,} expert executions ({stamps['checks']:,} "
        "checks).",
        f"- Lockstep: {sum(one['difference'] is None for one in summary['lockstep'])} of {len(summary['lockstep'])} "
        f"policies take the same decisions from the logged records "
        f"({sum(one['decisions'] for one in summary['lockstep']):,} decisions).",
    ]
    busiest = _busiest(table, summary["link_peak_gb_per_s"])
    if busiest:
        lines.append(busiest)
    lines.append(f"- Over a bar: {len(judged['missed'])} of {2 * judged['num_rows']} errors." + _list(judged["missed"]))
    if summary["left_out"]:
        lines.append(f"- Left out for want of time: {len(summary['left_out'])} comparisons.")
    if "graph" in set(table["stack"]):
        lines.append("- Rows of the graph stack are not confirmed on hardware: kernels are launched one by one.")
    lines += ["", "![Predicted against measured](fidelity.png)", "",
              "Times in ms per token; error = predicted / measured - 1; forwards: 5th, 50th and 95th percentile of the "
              "error of single forwards.", ""]  # fmt: skip
    for _, rows in table.groupby(GROUP, sort=False):
        model, stack, residency, batch = (rows[name].iloc[0] for name in GROUP)
        lines += [
            f"## {model}, {stack} stack, {100 * float(residency):.0f} % resident, batch {batch}", "",
            "| policy | TPOT measured | predicted | error | stall measured | predicted | error | late measured | "
            "predicted | link measured | predicted | hits measured | predicted | forwards |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(row) for _, row in rows.iterrows()), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _row(row: pd.Series[Any]) -> str:
    def both(name: str) -> str:
        return f"{row[f'{name}_measured']:.3f} | {row[f'{name}_predicted']:.3f}"

    spread = " / ".join(f"{100 * row[f'forward_error_p{percent}']:+.1f}" for percent in (5, 50, 95))
    stall = "–" if pd.isna(row["stall_error"]) else f"{100 * row['stall_error']:+.1f} %"
    return (f"| {row['policy']} | {both('tpot_ms')} | {100 * row['tpot_error']:+.1f} % | {both('stall_ms')} | {stall} "
            f"| {both('late_stall_ms')} | {both('link_ms')} | {row['num_hits_measured']} | "
            f"{row['num_hits_predicted']} | {spread} % |")  # fmt: skip


def _busiest(table: pd.DataFrame, peak: float | None) -> str | None:
    """How fast the link was where it was the bottleneck: most link time per elapsed time."""
    if not peak or table.empty:
        return None
    row = table.iloc[int((table["link_ms_measured"] / table["elapsed_ms_measured"]).to_numpy().argmax())]
    share = row["link_gb_per_s_measured"] / peak
    return (f"- Link: {row['link_gb_per_s_measured']:.4g} GB/s while copying in the most transfer-bound row "
            f"({row['policy']}, {row['stack']}), {100 * share:.1f} % of the {peak:.4g} measured at best.")  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _list(items: list[str]) -> str:
    more = f"\n  - and {len(items) - 40} more" if len(items) > 40 else ""
    return "".join(f"\n  - {item}" for item in items[:40]) + more
