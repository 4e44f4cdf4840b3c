"""The table that a run prints: what was run, and each number beside what it is read against."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sim.job.beside import WITH_PLACE

_SHARE = "of on-demand"
"""A column that is there only where on-demand ran beside."""
_HOST = ("host", "on host")
"""Columns that are there only where a policy places experts on the host: stall, and their share."""
_COLUMNS = ("TPOT ms", "ms/token", "stall ms", "late", "miss", _SHARE, "hits", "prefetch used", "link busy")


def _per_token(metrics: dict[str, Any], key: str) -> str:
    return f"{metrics[key] / max(metrics['num_tokens'], 1) / 1e6:.3f}"


def _host_cells(metrics: dict[str, Any]) -> list[str]:
    """Of the columns `_HOST`."""
    if "num_host" not in metrics:
        return ["–"] * len(_HOST)
    share = metrics["num_host"] / max(metrics["num_accesses"], 1)
    return [_per_token(metrics, "host_stall_ns"), f"{100 * share:.2f} %"]


def _row(name: str, metrics: dict[str, Any], on_demand_stall_ns: int | None, has_share: bool) -> list[str]:
    prefetch, accesses = metrics["prefetch"], max(metrics["num_accesses"], 1)
    issued = prefetch["issued"]
    left = f"{100 * metrics['stall_ns'] / on_demand_stall_ns:.2f} %" if on_demand_stall_ns else "–"
    mean = metrics["tpot_ms"]["mean"]
    return [
        name,
        "–" if mean is None else f"{mean:.3f}",
        _per_token(metrics, "elapsed_ns"),
        _per_token(metrics, "stall_ns"),
        _per_token(metrics, "late_stall_ns"),
        _per_token(metrics, "miss_stall_ns"),
        *([left] if has_share else []),
        f"{100 * metrics['num_hits'] / accesses:.2f} %",
        f"{100 * (prefetch['useful'] + prefetch['late']) / issued:.1f} %" if issued else "–",
        f"{100 * metrics['link']['utilisation']:.1f} %",
    ]


def print_report(
    console: Console, metrics: dict[str, Any], folder: str | None, title: str, note: str | None = None
) -> None:
    """One table a person can read, from the metrics of a run and those beside it.

    title: of the policy (see `sim.job.title`); where it is the name alone, a run of that name beside is the same run.
    note: what is said of this run alone.
    """
    capacity, trace = metrics["capacity"], metrics["trace"]
    console.print(
        f"[bold]{escape(title)}[/bold] on {metrics['hardware']}, {metrics['stack']} stack, {metrics['model']} with "
        f"{capacity['num_slots']} slots = {100 * capacity['residency']:.1f} % of its experts\n"
        f"trace {trace['name']}: {trace['num_tokens']} tokens, {trace['num_requests']} requests",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    compare = metrics["compare"] or {}
    base = compare.get("on_demand", {}).get("stall_ns")
    has_host = "num_host" in metrics
    for column in (*(one for one in _COLUMNS if compare or one != _SHARE), *(_HOST if has_host else ())):
        table.add_column(column, justify="right")
    is_named = title == metrics["policy"]
    own = f"{metrics['policy']} (changed)" if metrics["policy"] in compare and not is_named else metrics["policy"]
    rows = [(own, metrics), *((name, one) for name, one in compare.items() if not (is_named and name == own))]
    for place, (name, one) in enumerate(rows):
        cells = _row(name, one, base, bool(compare)) + (_host_cells(one) if has_host else [])
        table.add_row(*cells, style=None if place else "bold")
    bounds = metrics["bounds"]
    if bounds and bounds["floor_ns"] is not None:
        floor = bounds["floor_ns"] / max(metrics["num_tokens"], 1) / 1e6
        table.add_row("floor", "", f"{floor:.3f}", style="dim")
    _print_table(console, table)
    if note is not None:
        console.print(f"  {note}", highlight=False, soft_wrap=True)
    _print_notes(console, metrics, folder)


def _print_table(console: Console, table: Table) -> None:
    """Without the blanks that fill up a row's last cells."""
    for segments in console.render_lines(table, console.options, pad=False):
        line = Text.assemble(*((one.text, one.style or "") for one in segments))
        line.rstrip()
        console.print(line, highlight=False, no_wrap=True, overflow="ignore", crop=False)


def print_line(console: Console, metrics: dict[str, Any], folder: str, title: str) -> None:
    """One line a run, for sweeps. title: as in `print_report`."""
    mean = metrics["tpot_ms"]["mean"]
    place = f"{metrics['hardware']}/{metrics['stack']} at {100 * metrics['capacity']['residency']:.1f} %"
    times = f"TPOT {'–' if mean is None else f'{mean:.3f}'} ms, stall {_per_token(metrics, 'stall_ns')} ms/token"
    console.print(f"{escape(title)} on {place}: {times} → {folder}", highlight=False, soft_wrap=True)


def _print_notes(console: Console, metrics: dict[str, Any], folder: str | None) -> None:
    notes = []
    if metrics["uses_future"]:
        notes.append("policy or start state read ahead in the trace: a reference, not something that can be deployed")
    if metrics["num_streamed_layers"]:
        notes.append(
            f"{metrics['num_streamed_layers']} layer passes demanded more experts than there were slots: "
            "they streamed through"
        )
    if metrics["link"]["utilisation"] > 0.95:
        notes.append("the link is busy all the time: no prefetch can hide these copies, only fewer of them")
    share = f"; {_SHARE}: the share of its stall that is left" if metrics["compare"] else ""
    kinds = "late, miss and host" if "num_host" in metrics else "late and miss"
    notes.append(f"stall, {kinds} are per token{share}")
    if f"lru{WITH_PLACE}" in (metrics["compare"] or {}):
        notes.append(f"…{WITH_PLACE}: with this run's place; the other runs beside compute on the GPU alone")
    if "num_host" in metrics:
        notes.append(f"the host's processor was busy for {100 * metrics['host']['utilisation']:.1f} % of the time")
    if "clairvoyant" in (metrics["compare"] or {}):
        notes.append("clairvoyant: the best of five schedules that know the future")
    if metrics["bounds"] and metrics["bounds"]["floor_ns"] is not None:
        notes.append("floor: no schedule with these slots is faster")
    redundant = metrics["prefetch"]["redundant"]
    if redundant is not None and metrics["prefetch"]["issued"]:
        notes.append(
            f"{redundant} of {metrics['prefetch']['useful']} useful prefetches were redundant: the same "
            "policy without prefetch hit there too"
        )
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False)
    if folder is not None:
        console.print(f"written to {folder}", highlight=False, soft_wrap=True)
