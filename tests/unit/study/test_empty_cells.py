"""Cells without a value are told of, and are no verdict; and the command that a report prints is the one given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim.study.command import _from_here
from sim.study.plan import Study
from sim.study.verdicts import judge, sentences

AXES = ["hardware"]
CLAIM = {"name": "n", "variants": ["adaptive"], "column": "ms", "at_most": 1.0}
BEST = {"name": "n", "variant": "adaptive", "of": ["lru"], "column": "ms"}
PAIR = {"name": "n", "axis": "hardware", "slow": "slow", "fast": "fast", "column": "ms"}
ENDS = "the run ends before the first decoded token; give more --tokens."


def table(decode_forwards: tuple[int, int], ms: float | None = 1.0) -> pd.DataFrame:
    """Two places with two variants, each with so many forwards of decode."""
    return pd.DataFrame(
        [
            {"hardware": place, "variant": variant, "decode_forwards": count, "ms": ms, "prefill_ms": ms}
            for place, count in zip(("slow", "fast"), decode_forwards, strict=True)
            for variant in ("lru", "adaptive")
        ]
    )


def said(table: pd.DataFrame, **parts: Any) -> str:
    (line,) = sentences(judge(Study("s", "about", **{key: (value,) for key, value in parts.items()}), table, AXES))
    return line


def test_runs_that_decoded_nothing_are_no_verdict() -> None:
    short = table((0, 0))
    assert said(short, claims=CLAIM) == f"n (ms at most 1): no value in 2 cells: {ENDS}"
    assert said(short, best=BEST) == f"n (ms, adaptive against lru): no value in 4 cells: {ENDS}"
    assert said(short, pairs=PAIR) == f"n (ms, fast over slow): no value in 4 cells: {ENDS}"


def test_what_is_of_prompts_is_judged_without_a_decoded_token() -> None:
    assert "holds in 2 of 2 cells" in said(table((0, 0)), claims={**CLAIM, "column": "prefill_ms"})


def test_some_that_decoded_nothing_are_left_out_and_told_of() -> None:
    line = said(table((5, 0)), claims=CLAIM)
    assert line == f"n (ms at most 1): holds in 1 of 1 cells: adaptive at slow; no value in 1 cell: {ENDS}"


def test_a_claim_about_what_was_not_run_is_not_dropped() -> None:
    assert said(table((5, 5)), claims={**CLAIM, "variants": ["x"]}).endswith(
        "no value, since what it is about was not run."
    )
    # Half of it was.
    assert said(table((5, 5)), best={**BEST, "of": ["x"]}).endswith(
        "no value, since what it is held against was not run."
    )
    assert "no value in 2 cells: what it is held against was not run, or is 0." in said(
        table((5, 5), None), claims=CLAIM
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("out", "out"),
        ("results/out", "results/out"),
        ("./a/../b", "b"),
        ("../else/out", "out"),
        ("/far/away/out", "out"),
    ],
)
def test_the_output_folder_is_printed_as_it_was_given(given: str, shown: str) -> None:
    assert _from_here(Path(given)) == shown


def test_a_folder_below_this_one_is_printed_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _from_here(tmp_path / "sub" / "out") == "sub/out"
