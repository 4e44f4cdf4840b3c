"""Verdicts and pictures of tables written by hand."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim.study.pictures import draw, plot_shares, plot_steps
from sim.study.plan import Study
from sim.study.table import pivot
from sim.study.verdicts import judge, sentences

TABLE = pd.DataFrame(
    [
        {"hardware": hardware, "stack": stack, "variant": variant, "mean_S": 1.5, "ms": ms, "share": share}
        for hardware, stack, variant, ms, share in [
            ("slow", "eager", "fixed_1", 10.0, 0.5),
            ("slow", "eager", "fixed_2", 8.0, 0.0),
            ("slow", "eager", "adaptive", 6.0, 0.001),
            ("fast", "eager", "fixed_1", 12.0, 0.25),
            ("fast", "eager", "fixed_2", 4.0, 0.01),
            ("fast", "eager", "adaptive", 5.0, None),
        ]
    ]
)
AXES = ["hardware", "stack"]
STEPS = {
    "file": "s.png",
    "kind": "steps",
    "value": "ms",
    "variants": ["fixed_1", "fixed_2"],
    "marked": ["adaptive"],
    "title": "ms",
}
SHARES = {
    "file": "h.png",
    "kind": "shares",
    "value": "share",
    "variants": ["fixed_1", "fixed_2", "adaptive"],
    "title": "share",
    "line": 0.001,
}


def verdicts(**parts: Any) -> dict[str, Any]:
    return judge(Study("s", "about", **{key: (value,) for key, value in parts.items()}), TABLE, AXES)


def test_a_claim_is_judged_at_its_limit_and_without_empty_cells() -> None:
    claim = {"name": "n", "variants": ["adaptive", "fixed_2"], "column": "share", "at_most": 0.001, "split": {"ms": 5}}
    (found,) = verdicts(claims=claim)["claims"]
    assert [one["value"] for one in found["holds"]] == [0.0, 0.001]
    assert [one["place"] for one in found["fails"]] == ["fast eager"]
    (line,) = sentences({"claims": [found], "best": [], "pairs": []})
    assert "holds in 2 of 3 cells" in line
    assert "where ms is at most 5, in 0 of 1; where ms is above 5, in 2 of 2" in line


def test_the_best_of_others_is_found_by_place() -> None:
    contest = {"name": "n", "variant": "adaptive", "of": ["fixed_1", "fixed_2"], "column": "ms"}
    (found,) = verdicts(best=contest)["best"]
    places = [(one["place"], one["best"], one["gain"]) for one in found["places"]]
    assert places == [("slow eager", "fixed_2", 0.25), ("fast eager", "fixed_2", -0.25)]
    assert (found["num_wins"], found["num_places"], found["least_gain"], found["most_gain"]) == (1, 2, -0.25, 0.25)


def test_an_inversion_is_seen_where_the_fast_one_takes_longer() -> None:
    pair = {"name": "n", "axis": "hardware", "slow": "slow", "fast": "fast", "column": "ms"}
    (found,) = verdicts(pairs=pair)["pairs"]
    assert (found["num_places"], [one["place"] for one in found["inverted"]]) == (3, ["eager fixed_1"])
    assert found["inverted"][0]["ratio"] == 1.2


def test_a_table_has_a_row_a_variant_and_a_column_a_place() -> None:
    spec = {"title": "t", "value": "share", "columns": ["hardware"], "percent": True, "digits": 1}
    assert pivot(TABLE, spec).splitlines() == [
        "| variant | slow | fast |",
        "|---|---|---|",
        "| fixed_1 | 50.0 | 25.0 |",
        "| fixed_2 | 0.0 | 1.0 |",
        "| adaptive | 0.1 | – |",
    ]
    with pytest.raises(ValueError, match="two cells at"):
        pivot(TABLE, spec | {"columns": ["stack"]})
    with pytest.raises(ValueError, match="shore is no column"):
        pivot(TABLE, spec | {"value": "shore"})


def test_shares_stand_at_their_values_zero_too() -> None:
    (axes,) = plot_shares(TABLE, SHARES, AXES).axes
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[0.5, 0.0, 0.001], [0.25, 0.01]]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["one layer ahead", "two layers ahead", "adaptive (ExpertFlow)"]
    assert axes.get_xlim()[0] == 0.0
    assert list(axes.lines[2].get_xdata()) == [0.001, 0.001]


def test_steps_are_lines_and_adaptive_a_star_at_its_mean() -> None:
    (axes,) = plot_steps(TABLE, STEPS, AXES).axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:4]] == [
        ([1, 2], [10.0, 8.0]),
        ([1.5], [6.0]),
        ([1, 2], [12.0, 4.0]),
        ([1.5], [5.0]),
    ]
    assert axes.get_ylim()[1] > 12.0


@pytest.mark.slow
def test_a_picture_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for spec in (STEPS, SHARES):
        draw(TABLE, spec, AXES, tmp_path)
        first = (tmp_path / str(spec["file"])).read_bytes()
        draw(TABLE, spec, AXES, tmp_path)
        assert (tmp_path / str(spec["file"])).read_bytes() == first
    with pytest.raises(ValueError, match="kind='pie' is unknown"):
        draw(TABLE, STEPS | {"kind": "pie"}, AXES, tmp_path)
