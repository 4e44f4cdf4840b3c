"""Published seconds beside simulated ones: from a file of cases to a page, and one line for what is wrong."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from sim import simulate
from sim.published import Row as PublishedRow
from sim.published import cli, error_of, medians, read_cases, run_cases

WORDS = ["+hardware=a100", "+policy=lru", "stack=graph", "max_tokens=96"]


def _group(**changes: Any) -> dict[str, Any]:
    return {
        "name": "engine",
        "source": "GitHub a/b#1",
        "setting": "a card",
        "assumed": "all else",
        "words": WORDS,
        "rows": [{"name": "half", "measured": 100.0, "words": ["residency=0.5"]}],
        **changes,
    }


def _write(folder: Path, *groups: dict[str, Any]) -> Path:
    path = folder / "cases.yaml"
    path.write_text(yaml.safe_dump({"groups": list(groups)}), encoding="utf-8")
    return path


def _table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_page_and_a_table_say_what_the_same_run_says(tmp_path: Path) -> None:
    rows = [
        {"name": "half", "measured": 100.0, "words": ["residency=0.5"]},
        {"name": "quarter", "measured": 0.9, "over": "half", "words": ["residency=0.25"]},
    ]
    cases = _write(tmp_path, _group(rows=rows), _group(name="another", quantity="ms", why="it is slow"))
    assert cli([str(cases), "--out", str(tmp_path / "out")]) == 0

    def tpot(residency: float) -> float:
        run = simulate("a100", "lru", stack="graph", max_tokens=96, residency=residency, compare="none")
        return float(run.metrics["tpot_ms"]["mean"])

    half, quarter, other = _table(tmp_path / "out")
    assert float(half["predicted"]) == pytest.approx(1000 / tpot(0.5), rel=1e-5)
    assert float(half["error"]) == pytest.approx(10 / tpot(0.5) - 1, rel=1e-4)
    assert float(quarter["predicted"]) == pytest.approx(tpot(0.5) / tpot(0.25), rel=1e-5)
    assert (quarter["quantity"], other["kind"]) == ("x half", "blind")
    assert float(other["predicted"]) == pytest.approx(tpot(0.5), rel=1e-5)
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "over 3 rows" in page
    assert "- Errors: it is slow" in page
    assert "python -m sim +hardware=a100 +policy=lru stack=graph max_tokens=96 residency=0.5 compare=none" in page


@pytest.mark.slow
def test_what_fits_counts_for_nothing_and_gives_the_others_its_stack(tmp_path: Path) -> None:
    fits = ["residency=1.0", "start=resident", "stack.resident_tpot_ms=9.0"]
    rows = [
        {"name": "resident", "measured": 1000 / 9, "fits": True, "words": fits},
        {"name": "half", "measured": 90.0, "words": ["residency=0.5"]},
    ]
    resident, half = run_cases(read_cases(_write(tmp_path, _group(rows=rows))), 1)
    assert resident.error == pytest.approx(0.0, abs=1e-4)
    assert (resident.counts, half.counts, half.kind) == (False, True, "fitted")
    assert "stack.layer_overhead_ns=" in half.command
    assert medians([resident, half]) == {"fitted": (1, pytest.approx(abs(half.error)))}


@pytest.mark.parametrize(("predicted", "expected"), [(8.0, -0.2), (10.0, 0.0), (11.0, 0.0), (12.0, 0.0), (15.0, 0.25)])
def test_within_a_range_there_is_no_error(predicted: float, expected: float) -> None:
    row = PublishedRow(name="x", measured=10.0, to=12.0)
    assert error_of(row, predicted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (_group(rows=[]), "has no rows"),
        (_group(rows=[{"name": "x"}]), "case lacks measured"),
        (_group(rows=[{"name": "x", "measured": 0}]), "case.measured=0 is outside"),
        (_group(quantity="km/h"), "case.quantity='km/h'"),
        (_group(words="+hardware=a100"), "words must be a list of texts"),
        (_group(rows=[{"name": "x", "measured": 1, "over": "y"}]), "over=y is no earlier row"),
        ({**_group(), "extra": 1}, "case.extra"),
        (_group(words=["+hardware=none"]), "engine, half: "),
        (_group(rows=[{"name": "x", "measured": 1, "fits": True}]), "needs stack.resident_tpot_ms"),
    ],
)
def test_what_is_wrong_is_one_line(
    group: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([str(_write(tmp_path, group)), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1
    assert len(told) <= 301
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_published_cases_can_be_read_and_composed() -> None:
    from sim.job.configure import configure
    from sim.paths import ROOT

    cases = read_cases(ROOT / "results" / "published" / "cases.yaml")
    assert len(cases) >= 8
    for group, rows in cases:
        assert "GitHub" in group.source
        for row in rows:
            configure([*group.words, *row.words, "compare=none"])
