"""What a study's table says of the claims that its file names. Reads columns, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sim.study.plan import Study


def judge(study: Study, table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """Every claim, contest and comparison of the study, as plain values."""
    return {
        "claims": [_claim(spec, table, axes) for spec in study.claims],
        "best": [_best(spec, table, axes) for spec in study.best],
        "pairs": [_pair(spec, table, axes) for spec in study.pairs],
    }


def _place(row: Any, axes: Sequence[str]) -> str:
    return " ".join(str(row[axis]) for axis in axes) or "the study"


def _claim(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """Where a column of some variants stays within a limit, and where not; cells without a value are left out.

    split: column -> value, at which the cells are told apart.
    """
    chosen = table[table["variant"].isin(spec["variants"])].dropna(subset=[spec["column"]])
    holds: list[dict[str, Any]] = []
    fails: list[dict[str, Any]] = []
    for row in chosen.to_dict("records"):
        value = float(row[spec["column"]])
        kept = value <= spec.get("at_most", float("inf")) and value >= spec.get("at_least", float("-inf"))
        entry = {"place": _place(row, axes), "variant": row["variant"], "value": value}
        entry |= {column: row[column] for column in spec.get("split", {})}
        (holds if kept else fails).append(entry)
    return {**spec, "num_holds": len(holds), "num_fails": len(fails), "holds": holds, "fails": fails}


def _best(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """One variant against the best of others, by place; `gain` > 0 where it is better (the column is a cost)."""
    places: list[dict[str, Any]] = []
    column = spec["column"]
    for _, rows in _by_place(table, axes):
        values = rows.set_index("variant")[column].dropna()
        others = values[[name for name in spec["of"] if name in values.index]]
        if spec["variant"] not in values.index or others.empty:
            continue
        own, best = float(values[spec["variant"]]), float(others.min())
        places.append(
            {
                "place": _place(rows.iloc[0], axes),
                "best": str(others.idxmin()),
                "best_value": best,
                "value": own,
                "gain": (best - own) / best if best else None,
            }
        )
    gains = [place["gain"] for place in places if place["gain"] is not None]
    return {
        **spec,
        "num_wins": sum(gain > 0 for gain in gains),
        "num_places": len(gains),
        "least_gain": min(gains, default=None),
        "most_gain": max(gains, default=None),
        "places": places,
    }


def _by_place(table: pd.DataFrame, axes: Sequence[str]) -> list[tuple[Any, pd.DataFrame]]:
    return list(table.groupby(list(axes), sort=False)) if axes else [((), table)]


def _pair(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """The same cell at two values of one axis: where the one named fast costs more than the one named slow."""
    rest = [axis for axis in axes if axis != spec["axis"]]
    keys = [*rest, "variant"]
    fast = table[table[spec["axis"]] == spec["fast"]].set_index(keys)[spec["column"]]
    slow = table[table[spec["axis"]] == spec["slow"]].set_index(keys)[spec["column"]]
    found: list[dict[str, Any]] = []
    for key in fast.dropna().index.intersection(slow.dropna().index, sort=False):
        names = key if isinstance(key, tuple) else (key,)
        found.append({"place": " ".join(map(str, names)), "ratio": float(fast[key] / slow[key])})
    inverted = [one for one in found if one["ratio"] > 1]
    return {**spec, "num_places": len(found), "num_inverted": len(inverted), "inverted": inverted, "places": found}


def sentences(verdicts: Mapping[str, Any]) -> list[str]:
    """Each verdict as a line of the report."""
    lines = [_claim_line(claim) for claim in verdicts["claims"] if claim["num_holds"] + claim["num_fails"]]
    lines += [_best_line(best) for best in verdicts["best"] if best["num_places"]]
    return lines + [_pair_line(pair) for pair in verdicts["pairs"] if pair["num_places"]]


def _listed(found: Sequence[str], most: int = 8) -> str:
    return f": {'; '.join(found)}" if 0 < len(found) <= most else ""


def _claim_line(claim: Mapping[str, Any]) -> str:
    limits = [f"{key.replace('_', ' ')} {claim[key]:g}" for key in ("at_most", "at_least") if key in claim]
    held = [f"{one['variant']} at {one['place']}" for one in claim["holds"]]
    parts = [f"{claim['num_holds']} of {claim['num_holds'] + claim['num_fails']} cells{_listed(held)}"]
    for column, at in claim.get("split", {}).items():
        for word, is_above in (("at most", False), ("above", True)):
            holds, fails = (sum((one[column] > at) == is_above for one in claim[key]) for key in ("holds", "fails"))
            parts.append(f"where {column} is {word} {at:g}, in {holds} of {holds + fails}")
    return f"{claim['name']} ({claim['column']} {' and '.join(limits)}): holds in {'; '.join(parts)}."


def _best_line(best: Mapping[str, Any]) -> str:
    low, high = 100 * best["least_gain"], 100 * best["most_gain"]
    others = best["of"][0] if len(best["of"]) == 1 else f"the best of {len(best['of'])}"
    return (
        f"{best['name']} ({best['column']}, {best['variant']} against {others}): better in {best['num_wins']} of "
        f"{best['num_places']} places; it saves {low:.2f} to {high:.2f} %."
    )


def _pair_line(pair: Mapping[str, Any]) -> str:
    inverted = [f"{one['place']} ({one['ratio']:.2f})" for one in pair["inverted"]]
    return (
        f"{pair['name']} ({pair['column']}, {pair['fast']} over {pair['slow']}): in {pair['num_inverted']} of "
        f"{pair['num_places']} places{_listed(inverted)}."
    )
