"""From the results of the cells to one table: a row a cell, each beside the other variants of its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from expertflow.forward import DECODE, PREFILL
from sim.collect import derived
from sim.study.plan import Cell

BASELINES = ("on_demand", "hf_offload")
CACHE = "lru"
NOTHING = "–"

COLUMNS = {
    "variant": "what was run",
    "tpot_ms, ttft_ms": "mean time between tokens, and to the first (with the prompt recorded)",
    "decode_tok_per_s": "tokens a second between the first and the last: 1000 / tpot_ms",
    "stall_left_on_demand, stall_left_hf_offload": "share of that baseline's stall that is left, 1 = all",
    "stall_of_time": "stall over the time of the whole run",
    "decode_…, prefill_…": "the same of forwards of one phase; ms per token in decode, per forward in prefill",
    "gap_closed": "(stall of lru - stall) / (stall of lru - stall with perfect prediction)",
    "slower_than_lru_pct": "time of the whole run over that of lru, minus 1, in %",
    "copy_over_compute": "N_e · E_s / (C_s · T_l): copying all a layer demands, over its time without stall",
    "link_pressure": "the same times lru's miss rate: above 1 the link is oversubscribed, and no step alone hides it",
    "num_expected": "mean N_e that the horizon was told",
    "mean_S": "mean of the farthest layer looked ahead",
}
"""What the columns mean, for the report."""


def make_table(cells: Sequence[Cell], results: Sequence[Mapping[str, Any]], perfect: str) -> pd.DataFrame:
    """One row a cell, in order. Columns that need another variant of the place are empty where it was not run."""
    rows = [
        # First and last: an axis of the same name as a column, such as residency, keeps the study's words.
        {**dict(cell.place), "variant": cell.variant, **_row(result), **dict(cell.place)}
        for cell, result in zip(cells, results, strict=True)
    ]
    places: dict[tuple[tuple[str, str], ...], dict[str, dict[str, Any]]] = {}
    for cell, row in zip(cells, rows, strict=True):
        places.setdefault(cell.place, {})[cell.variant] = row
    for cell, row in zip(cells, rows, strict=True):
        row |= _beside(row, places[cell.place], perfect)
    return pd.DataFrame(rows)


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    prefetch, horizon = result["prefetch"], result["horizon"]
    row = {
        "policy": result["policy"],
        "model": result["model"],
        "trace": result["trace"]["name"],
        "uses_future": result["uses_future"],
        "num_slots": result["capacity"]["num_slots"],
        "slots_share": result["capacity"]["residency"],
        "num_tokens": result["num_tokens"],
        "num_forwards": result["num_forwards"],
        "elapsed_ns": result["elapsed_ns"],
        "stall_ns": result["stall_ns"],
        **derived(dict(result)),
        "stall_of_time": _ratio(result["stall_ns"], result["elapsed_ns"]),
        "decode_tok_per_s": _ratio(1000.0, result["tpot_ms"]["mean"]),
        "tpot_p99_ms": result["tpot_ms"]["p99"],
        "ttft_ms": result["ttft_ms"]["mean"],
        "prefetch_issued": prefetch["issued"],
        "prefetch_useful": prefetch["useful"],
        "prefetch_late": prefetch["late"],
        "prefetch_wasted": prefetch["wasted"],
        "prefetch_redundant": prefetch["redundant"],
        "redundant_of_useful": _ratio(prefetch["redundant"], prefetch["useful"]),
        "copied_gb": (result["bytes"]["demand"] + result["bytes"]["prefetch"]) / 1e9,
        "num_expected": result["phases"]["num_expected"],
        "mean_S": horizon["mean"],
        "max_S": horizon["max"],
    }
    for phase in (DECODE, PREFILL):
        row |= {f"{phase}_{key}": value for key, value in _phase(phase, result).items()}
    return row


def _phase(phase: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Time, stall and demand of one phase; None where it did not occur."""
    sums, costs = result["phases"][phase], result["costs"]
    units = sums["num_tokens"] if phase == DECODE else sums["num_forwards"]
    layers = sums["num_forwards"] * costs["num_layers"]
    experts = _ratio(sums["num_accesses"], layers)
    layer_ns = _ratio(sums["elapsed_ns"] - sums["stall_ns"], layers)
    return {
        "forwards": sums["num_forwards"],
        "ms": _ratio(sums["elapsed_ns"] / 1e6, units),
        "stall_ms": _ratio(sums["stall_ns"] / 1e6, units),
        "hit_rate": _ratio(sums["num_hits"], sums["num_accesses"]),
        "experts_per_layer": experts,
        "layer_ms": None if layer_ns is None else layer_ns / 1e6,
        "copy_over_compute": None if experts is None else _ratio(experts * costs["load_ns"], layer_ns),
        "stall_ns": sums["stall_ns"],
    }


def _beside(row: Mapping[str, Any], place: Mapping[str, Mapping[str, Any]], perfect: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in BASELINES:
        base = place.get(name, {})
        for prefix in ("", f"{DECODE}_", f"{PREFILL}_"):
            found[f"{prefix}stall_left_{name}"] = _ratio(row[f"{prefix}stall_ns"], base.get(f"{prefix}stall_ns"))
        found[f"tpot_over_{name}"] = _ratio(row["tpot_ms"], base.get("tpot_ms"))
    cache, best = place.get(CACHE, {}), place.get(perfect, {})
    time = _ratio(row["elapsed_ns"], cache.get("elapsed_ns"))
    found["slower_than_lru_pct"] = None if time is None else 100 * (time - 1)
    found["tpot_over_lru"] = _ratio(row["tpot_ms"], cache.get("tpot_ms"))
    found["stall_over_lru"] = _ratio(row["stall_ns"], cache.get("stall_ns"))
    found["gap_closed"] = None
    if cache and best and cache["stall_ns"] > best["stall_ns"]:
        found["gap_closed"] = (cache["stall_ns"] - row["stall_ns"]) / (cache["stall_ns"] - best["stall_ns"])
    for phase in (DECODE, PREFILL):
        hit_rate, ratio = cache.get(f"{phase}_hit_rate"), row[f"{phase}_copy_over_compute"]
        found[f"{phase}_link_pressure"] = None if hit_rate is None or ratio is None else (1 - hit_rate) * ratio
    return found


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def pivot(table: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """A Markdown table of one column: `rows` (default: variant) against `columns` (lists of axes).

    variants: only these; only: column -> its one value.
    """
    value, rows, columns = spec["value"], spec.get("rows", "variant"), list(spec["columns"])
    rows = [rows] if isinstance(rows, str) else list(rows)
    for name in [value, *rows, *columns]:
        if name not in table.columns:
            raise ValueError(f"table {spec['title']!r}: {name} is no column; there are: {', '.join(table.columns)}")
    chosen = table[table["variant"].isin(spec["variants"])] if "variants" in spec else table
    for name, wanted in spec.get("only", {}).items():
        chosen = chosen[chosen[name] == wanted]
    scale, digits = (100, spec.get("digits", 2)) if spec.get("percent") else (1, spec.get("digits", 3))
    across = chosen[columns].drop_duplicates().itertuples(index=False, name=None)
    heads = [tuple(head) for head in across]
    lines = [
        "| " + " | ".join([*rows, *(" ".join(map(str, head)) for head in heads)]) + " |",
        "|---" * (len(rows) + len(heads)) + "|",
    ]
    at: dict[tuple[tuple[Any, ...], tuple[Any, ...]], Any] = {}
    for record in chosen.to_dict("records"):
        key = (tuple(record[name] for name in rows), tuple(record[name] for name in columns))
        if key in at:
            raise ValueError(f"table {spec['title']!r}: two cells at {key}; name the other axis in rows or columns")
        at[key] = record[value]
    for row in dict.fromkeys(row for row, _ in at):
        shown = [_shown(at.get((row, head)), scale, digits) for head in heads]
        if set(shown) != {NOTHING}:
            lines.append("| " + " | ".join([*map(str, row), *shown]) + " |")
    return "\n".join(lines)


def _shown(value: Any, scale: float, digits: int) -> str:
    if value is None or pd.isna(value):
        return NOTHING
    return f"{value * scale:.{digits}f}" if isinstance(value, float) else str(value)
