"""What may be said of a table of errors: bars, the noise of what they were measured against, ranks, one line to quote.

An error says nothing where the measurement differs from itself by as much. Each row was measured several times; its
noise is (most - least) / median of those. A figure whose noise is above its bar has no verdict; a row measured once, or
one that its host bounds, is not judged at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from replay.validation.plan import Case

Row = Mapping[str, Any]
HOLDS, MISSED, NOISE, ONCE, HOST_BOUND = "holds", "missed", "noise", "measured once", "host-bound"
JUDGED = (HOLDS, MISSED)
NOISY_SHARE = 0.10
"""Share of the rows that may be too noisy to be judged; above it nothing counts as shown."""
CONDITIONS = ("model", "stack", "residency", "batch_size")


@dataclass(frozen=True)
class Bars:
    """What an error may be. late: share of the time from which a row counts as host-bound; None where host and
    streams share a processor, and the simulation charges what they take from each other. link: share of the calibrated
    rate that the link must carry while it copies; None where its copies share a processor too."""

    tpot: float
    stall: float
    late: float | None = None
    link: float | None = None


BARS = {"cuda": Bars(0.02, 0.05, 0.02, 0.95), "cpu": Bars(0.10, 0.15)}


def figures(row: Row, bars: Bars) -> Iterator[tuple[str, float, float, float]]:
    """(name, error, noise, bar) of TPOT and of stall.

    Where the stall is too small to have an error of its own, its error is taken as a share of TPOT and compared with
    the bar of TPOT.
    """
    yield "TPOT", row["tpot_error"], row["tpot_noise"], bars.tpot
    if row["stall_counts"]:
        yield "stall", row["stall_error"], row["stall_noise"], bars.stall
    else:
        yield "stall of TPOT", row["stall_error_of_tpot"], row["stall_noise_of_tpot"], bars.tpot


def is_missed(error: float, noise: float, bar: float) -> bool:
    """Above the bar, and measured well enough to say so."""
    return noise <= bar < abs(error)


def verdict(row: Row, bars: Bars) -> str:
    """What may be said of one row. A figure that is missed for certain counts, however noisy the other one is."""
    if row["num_runs"] < 2:
        return ONCE
    if bars.late is not None and row["late_share"] > bars.late:
        return HOST_BOUND
    found = list(figures(row, bars))
    if any(is_missed(error, noise, bar) for _, error, noise, bar in found):
        return MISSED
    return NOISE if any(noise > bar for _, _, noise, bar in found) else HOLDS


def label(row: Row) -> str:
    """The row's name."""
    return str(Case(*(row[name] for name in (*CONDITIONS, "policy"))))


def rank_agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Pairs of policies under equal conditions whose measured TPOT differs by more than the noise of both together: how
    many the simulator orders the same way. Rows measured once have no noise, and no rank."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["num_runs"] > 1:
            groups.setdefault(tuple(row[name] for name in CONDITIONS), []).append(row)
    pairs = agreeing = 0
    against: list[str] = []
    for members in groups.values():
        for one, other in combinations(members, 2):
            low, high = sorted((one, other), key=lambda row: row["tpot_ms_measured"])
            spread = sum(row["tpot_ms_most"] - row["tpot_ms_least"] for row in (low, high))
            if high["tpot_ms_measured"] - low["tpot_ms_measured"] <= spread:
                continue
            pairs += 1
            if low["tpot_ms_predicted"] < high["tpot_ms_predicted"]:
                agreeing += 1
            else:
                # `label` ends with the policy.
                where = label(high).removesuffix(f" {high['policy']}")
                against.append(f"{low['policy']} is faster than {high['policy']} in {where}; predicted otherwise")
    return {"pairs": pairs, "agreeing": agreeing, "against": against}


def judge(rows: Sequence[Row], bars: Bars) -> dict[str, Any]:
    """Every row's verdict, worst and mean errors of the judged ones, ranks, and the line to quote."""
    verdicts = [verdict(row, bars) for row in rows]
    by_verdict = {
        name: [label(row) for row, found in zip(rows, verdicts, strict=True) if found == name]
        for name in (HOLDS, MISSED, NOISE, ONCE, HOST_BOUND)
    }
    judged = [row for row, found in zip(rows, verdicts, strict=True) if found in JUDGED]
    stalls = [row for row in judged if row["stall_counts"]]
    candidates = [row for row, found in zip(rows, verdicts, strict=True) if found in (*JUDGED, NOISE)]
    ranks = rank_agreement(candidates)
    # Repeats of which no two are alike, since the host changed its speed, are as noisy as those that differ too much.
    apart = [row for row, found in zip(rows, verdicts, strict=True) if found == ONCE and row.get("num_set_aside", 0)]
    doubtful = len(by_verdict[NOISE]) + len(apart)
    noisy = doubtful / (len(candidates) + len(apart)) if doubtful else 0.0
    found = {
        "num_rows": len(rows),
        "num_judged": len(judged),
        "tpot_bar": bars.tpot,
        "stall_bar": bars.stall,
        "late_bar": bars.late,
        **_worst_and_mean("tpot_error", [row["tpot_error"] for row in judged]),
        **_worst_and_mean("tpot_noise", [row["tpot_noise"] for row in judged]),
        **_worst_and_mean("stall_error", [row["stall_error"] for row in stalls]),
        **_worst_and_mean("stall_noise", [row["stall_noise"] for row in stalls]),
        "rows_with_stall": len(stalls),
        "missed": [
            text for row, found in zip(rows, verdicts, strict=True) if found == MISSED for text in _missed(row, bars)
        ],
        "verdicts": verdicts,
        "rows_by_verdict": by_verdict,
        "num_noisy": doubtful,
        "noisy_share": noisy,
        "ranks": ranks,
    }
    return {**found, "not_shown": _why_not(found), "quote": quote(found)}


def _worst_and_mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    sizes = [abs(value) for value in values]
    return {f"worst_{name}": max(sizes, default=None), f"mean_{name}": float(np.mean(sizes)) if sizes else None}


def _missed(row: Row, bars: Bars) -> Iterator[str]:
    for name, error, noise, bar in figures(row, bars):
        if is_missed(error, noise, bar):
            yield f"{label(row)}: {name} {100 * error:+.1f} % (noise {100 * noise:.1f} %)"


def _why_not(judged: Mapping[str, Any]) -> list[str]:
    """Why the simulator is not shown to be right; empty if it is."""
    rows, ranks = judged["rows_by_verdict"], judged["ranks"]
    why = []
    if not judged["num_rows"]:
        why.append("nothing was compared")
    elif not judged["num_judged"]:
        why.append("no row could be judged")
    if rows[MISSED]:
        why.append(f"rows that miss a bar: {len(rows[MISSED])}")
    if judged["noisy_share"] > NOISY_SHARE:
        why.append(
            f"rows whose repeats differ by more than a bar, or of which no two are alike: {judged['num_noisy']}, "
            f"{100 * judged['noisy_share']:.0f} % (at most {100 * NOISY_SHARE:.0f} % may)"
        )
    could_be = judged["num_rows"] - len(rows[HOST_BOUND])
    if 0 < judged["num_judged"] < could_be / 2:
        why.append(
            f"fewer than half of the rows that no host bounds could be judged: {judged['num_judged']} of {could_be}"
        )
    if ranks["agreeing"] < ranks["pairs"]:
        why.append(f"pairs of policies ranked otherwise: {ranks['pairs'] - ranks['agreeing']}")
    return why


def link_rates(rows: Sequence[Row], chunk_gb_per_s: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Of each model the row whose link is busy for the largest share of the time, and its rate while it copies beside
    that at which chunks follow one another, `chunk_gb_per_s` by model; no row where either is unknown."""
    busiest: dict[str, Row] = {}
    for row in rows:
        best = busiest.setdefault(row["model"], row)
        if _link_share(row) > _link_share(best):
            busiest[row["model"]] = row
    found = []
    for model, row in busiest.items():
        rate, calibrated = row["link_gb_per_s_measured"], chunk_gb_per_s.get(model)
        if rate and calibrated:
            found.append({"row": label(row), "gb_per_s": rate, "calibrated": calibrated, "share": rate / calibrated})
    return found


def _link_share(row: Row) -> float:
    return float(row["link_ms_measured"] / row["elapsed_ms_measured"])


def slow_links(links: Sequence[Mapping[str, Any]], bars: Bars) -> Iterator[str]:
    """Those of `link_rates` that carry less than the bar."""
    for link in links:
        if bars.link is not None and link["share"] < bars.link:
            yield (
                f"the link carries {percent(link['share'])} of its calibrated rate in {link['row']} (at least "
                f"{percent(bars.link)} is asked for)"
            )


def quote(judged: Mapping[str, Any]) -> str:
    """One line that a reader can quote."""
    ranks = judged["ranks"]
    if not judged["num_judged"]:
        return "no row could be judged" if judged["num_rows"] else "nothing was compared"
    stall = "no stall to compare"
    if judged["worst_stall_error"] is not None:
        stall = f"stall within {percent(judged['worst_stall_error'])}"
    return (
        f"TPOT within {percent(judged['worst_tpot_error'])} (noise {percent(judged['worst_tpot_noise'])}), "
        f"{stall}, policies ranked alike {ranks['agreeing']} of {ranks['pairs']}"
    )


def percent(value: float | None) -> str:
    """`value`, a share, for a person."""
    return "–" if value is None else f"{100 * value:.1f} %"
