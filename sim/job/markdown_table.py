"""One column of a table of runs as Markdown: a row a policy, a column a place, and below it what a reader must know."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from expertflow.keys import near_to, nearest
from sim.job.assumed import PAGE

BESIDE = "beside"
"""Column with the policy of the run that a row's was made beside; empty for the runs themselves."""
_OF_POLICY = ("policy.", "policy/")
_NONE = "–"
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")
_ASSUMED = "assumed.routing"
_RANGED = {
    "tpot_ms": lambda end: end["tpot_ms.mean"],
    "ms_per_token": lambda end: end["elapsed_ns"] / max(end["num_tokens"], 1) / 1e6,
    "stall_ms_per_token": lambda end: end["stall_ns"] / max(end["num_tokens"], 1) / 1e6,
    "hit_rate": lambda end: end["num_hits"] / max(end["num_accesses"], 1),
}
"""Columns that are known at the ends of assumed routing's range, from what is kept of these runs."""


def markdown(table: pd.DataFrame, value: str) -> str:
    """A Markdown table of one column: a row a policy, a column a (hardware with its link, stack, residency), the model
    where it differs, and what else the runs were given that differs."""
    _check_column(table, value)
    given = _given(table)
    # The model by its own name, which also a trace or a file may have given.
    told = [*(["model"] if "model" in table.columns else []), *given]
    swept = [name for name in dict.fromkeys(told) if name != "link" and _differs(table, name)]
    changes = [name for name in given if name.startswith(_OF_POLICY) and name not in swept]
    table = table.assign(**{name: table[name].map(text_of) for name in (*swept, *changes)})
    own = set(table["policy"] if BESIDE not in table.columns else table["policy"][table[BESIDE].isna()])
    table = table.assign(
        hardware=[_place(row) for row in rows_of(table)],
        policy=[_name(row, changes, own) for row in rows_of(table)],
    )
    keys = ["hardware", "stack", "residency", *swept]
    table = _each_once(table, keys, value)
    table = table.assign(shown=[_cell(row, value) for row in rows_of(table)])
    wide = table.pivot(index="policy", columns=keys, values="shown").reindex(table["policy"].unique())
    short = _short(swept)
    columns: list[tuple[Any, ...]] = [tuple(one) for one in wide.columns]
    places = sorted(columns, key=lambda place: [in_order(str(one)) for one in place])
    titles = []
    for place in places:
        hardware, stack, residency, *more = place
        said = [f"{short[key]}={one}" for key, one in zip(swept, more, strict=True) if one != _NONE]
        titles.append(" ".join([hardware, stack, f"{residency:.0%}", *said]))
    lines = ["| policy | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for policy, row in wide.iterrows():
        lines.append(f"| {policy} | " + " | ".join(_NONE if pd.isna(row[x]) else row[x] for x in places) + " |")
    return "\n".join([*lines, *_footnotes(table, changes, value)])


def rows_of(table: pd.DataFrame) -> list[Mapping[str, Any]]:
    """The rows, each by the names of its columns."""
    return [{str(key): one for key, one in row.items()} for row in table.to_dict("records")]


def _check_column(table: pd.DataFrame, value: str) -> None:
    """ValueError for what no figure of a Markdown table is."""
    if value not in table.columns:
        raise ValueError(
            f"--markdown={value} is no column{near_to(value, table.columns)}; "
            f"there are: {nearest(value, list(table.columns))}"
        )
    if table[value].isna().all():
        why = " (max_tokens ends inside the prompt?)" if value == "tpot_ms" else ""
        raise ValueError(f"--markdown={value}: {value} is empty in every run{why}; take another column")
    if not is_numeric_dtype(table[value]):
        raise ValueError(f"--markdown={value} is no column of figures; take one such as tpot_ms")


def _given(table: pd.DataFrame) -> list[str]:
    """The columns of what command lines gave: those between the name of the run and the version of its metrics."""
    names = list(table.columns)
    return names[names.index("run") + 1 : names.index("schema")] if "schema" in names else []


def _differs(table: pd.DataFrame, name: str) -> bool:
    """Whether the runs have several values of a key; of keys of the policy those beside them have none."""
    if name.startswith(_OF_POLICY) and BESIDE in table.columns:
        table = table[table[BESIDE].isna()]
    return bool(table[name].nunique(dropna=False) > 1)


def text_of(value: Any) -> str:
    """A value of a key as a command line has it: whole numbers whole, truth values in small letters."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return _NONE
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def in_order(text: str) -> list[tuple[int, float, str]]:
    """What sorts texts by the numbers in them: 4 before 16."""
    parts = _NUMBER.split(text)
    return [(0, float(one), "") if place % 2 else (1, 0.0, one) for place, one in enumerate(parts) if one]


def _name(row: Mapping[str, Any], changes: Sequence[str], own: Collection[str]) -> str:
    """The policy of a row: marked where its command changed it and no column says so, or where it ran beside and there
    are runs of that name, `own`, besides."""
    name = str(row["policy"])
    if isinstance(row.get(BESIDE), str):
        return f"{name} (beside)" if name in own else name
    return f"{name} (changed)" if any(row[key] != _NONE for key in changes) else name


def _each_once(table: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """The table with one row for a policy at a place. A run that ran beside several is one, if it was the same.

    ValueError where two runs of a policy differ in nothing that a column tells.
    """
    if BESIDE in table.columns:
        is_beside = table[BESIDE].notna()
        table = table[~(is_beside & table.duplicated([*keys, "policy", value]))]
        again = table.duplicated([*keys, "policy"], keep=False) & table[BESIDE].notna()
        of = [
            f"{row['policy'].removesuffix(' (beside)')} (beside {row[BESIDE]})" if one else row["policy"]
            for one, row in zip(again, rows_of(table), strict=True)
        ]
        table = table.assign(policy=of)
    repeated = table[table.duplicated([*keys, "policy"])]
    if len(repeated):
        first = repeated.iloc[0]
        same = table[(table[[*keys, "policy"]] == first[[*keys, "policy"]]).all(axis=1)]
        runs = " and ".join(str(run) for run in same.get("run", ["?"])[:2])
        raise ValueError(
            f"two runs of {first['policy']} at one place: {runs}; --markdown takes one of each: collect a folder that "
            "has but one"
        )
    return table


def _short(names: Sequence[str]) -> dict[str, str]:
    """Each dotted key by its last words, as many as tell it from the others."""
    found = {}
    for name in names:
        words = name.split(".")
        ends = (".".join(words[-number:]) for number in range(1, len(words) + 1))
        others = [other for other in names if other != name]
        found[name] = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name)
    return found


def _place(row: Mapping[str, Any]) -> str:
    """The hardware of a run, with the link that was chosen for it and, where that is more, the one asked for."""
    link, asked = row.get("link_preset.name"), row.get("link_preset.asked")
    if not isinstance(link, str):
        return str(row["hardware"])
    return f"{row['hardware']} {link}" + ("" if asked == link else f" of {asked}")


def _cell(row: Mapping[str, Any], value: str) -> str:
    """A figure, marked where its routing is assumed, with the range that this leaves."""
    if pd.isna(row[value]):
        return _NONE
    text = f"{row[value]:.3f}"
    if not isinstance(row.get(_ASSUMED), str):
        return text
    ends = range_of(row, value)
    return f"{text} ({ends[0]:.3f}–{ends[1]:.3f})\\*" if ends else f"{text}\\*"


def range_of(row: Mapping[str, Any], value: str) -> tuple[float, float] | None:
    """The least and the most of a column by how local assumed routing is; None where that was not run, or is not kept.

    row: of a table of runs.
    """
    if value not in _RANGED or isinstance(row.get(BESIDE), str):
        return None
    found = [float(row[value])]
    for end in ("low", "high"):
        before = f"assumed.range.{end}."
        kept = {str(key).removeprefix(before): one for key, one in row.items() if str(key).startswith(before)}
        try:
            figure = _RANGED[value](kept)
        except KeyError:
            return None
        if figure is None or pd.isna(figure):
            return None
        found.append(float(figure))
    return min(found), max(found)


def _footnotes(table: pd.DataFrame, changes: Sequence[str], value: str) -> list[str]:
    """What marks in the table mean."""
    lines = []
    if table["policy"].str.endswith("(changed)").any():
        told = ", ".join(f"{key}={next(one for one in table[key] if one != _NONE)}" for key in changes)
        lines.append(f"(changed): {told}")
    if table["policy"].str.contains(r" \(beside").any():
        lines.append("(beside): run beside the others (compare=full), by the policy as it comes")
    if _ASSUMED in table.columns and table[_ASSUMED].notna().any():
        lines.append(f"\\*: {assumed_note(table, value)}")
    return ["", *(f"{line}  " for line in lines[:-1]), *lines[-1:]] if lines else []


def assumed_note(table: pd.DataFrame, value: str) -> str:
    """What is said below a table in which routing is assumed."""
    kinds = ", ".join(dict.fromkeys(str(one) for one in table[_ASSUMED].dropna()))
    ranged = any(range_of(row, value) for row in rows_of(table))
    span = "; in brackets: by how local the routing is" if ranged else ""
    return f"{kinds}, not recorded{span} ({PAGE})"
