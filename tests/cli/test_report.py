"""What a run prints: no figure is cut on a narrow terminal, and what was not done as asked is said."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.commands import Outcome, run_here, small_trace
from traces.tables import blocks, print_columns

HEADS = ["policy", "TPOT ms", "ms/token", "stall ms", "of on-demand", "prefetch used", "link busy"]
ROWS = [
    ["lru (changed)", "1123.456", "1399.614", "1399.614", "100.00 %", "75.1 %", "93.8 %"],
    ["clairvoyant", "–", "1375.215", "1362.467", "93.89 %", "100.0 %", "99.3 %"],
    ["floor", "", "1414.412", "", "", "", ""],
]


def printed(width: int) -> list[str]:
    out = io.StringIO()
    print_columns(Console(file=out, width=width), HEADS, ROWS, ["bold", "", "dim"])
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [120, 104, 80, 60, 40, 25, 10])
def test_every_figure_is_printed_whole_at_any_width(width: int) -> None:
    lines = printed(width)
    text = "\n".join(lines)
    assert "…" not in text
    for row in ROWS:
        assert [cell for cell in row if cell not in text] == []
    assert all(line == line.rstrip() for line in lines)
    # The first column and one more stand in each table, however narrow it is.
    assert max(map(len, lines)) <= max(width, len("lru (changed)") + 2 + len("prefetch used"))


def test_what_fits_is_one_table_and_what_is_left_follows_with_the_names_again() -> None:
    assert len(printed(120)) == 4
    lines = printed(60)
    heads = [line.split("  ")[0] for line in lines]
    assert heads == ["policy", "lru (changed)", "clairvoyant", "floor", "policy", "lru (changed)", "clairvoyant"]
    assert [lines[0].split()[-1], lines[4].split()[-1]] == ["on-demand", "busy"]


def test_columns_by_hand() -> None:
    # 10 + (2 + 5) + (2 + 5) = 24; the fourth needs 7 more.
    assert blocks([10, 5, 5, 5], 24) == [[0, 1, 2], [0, 3]]
    assert blocks([10, 5, 5, 5], 23) == [[0, 1], [0, 2], [0, 3]]
    assert blocks([10, 5, 5, 5], 31) == [[0, 1, 2, 3]]
    assert blocks([10, 50], 20) == [[0, 1]]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("report") / "t.safetensors", 40, 3)


def ran(trace: Path, folder: Path, *words: str) -> Outcome:
    found = run_here(["+hardware=a100", f"trace.path={trace}", "compare=none", *words], folder)
    assert found.code == 0, found.err
    return found


@pytest.mark.parametrize(("batch", "said"), [(64, True), (4, True), (3, False)])
def test_a_batch_that_the_trace_cannot_fill_is_said(batch: int, said: bool, trace: Path, tmp_path: Path) -> None:
    text = ran(trace, tmp_path / "run", "+policy=lru", f"batch_size={batch}").out
    line = f"batch_size={batch}: the run has 3 requests, so that no more are decoded together"
    assert (line in text) is said


def test_the_requests_that_decode_together_are_in_the_metrics_where_they_are_fewer_than_asked_for(
    trace: Path, tmp_path: Path
) -> None:
    assert ran(trace, tmp_path / "run", "+policy=lru", "batch_size=64").metrics()["max_together"] == 3
    assert "max_together" not in ran(trace, tmp_path / "run", "+policy=lru", "batch_size=3").metrics()


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (8, "no token was decoded: max_tokens=8 ends within the first prompt, of 10 tokens; max_tokens=11 is"),
        (11, None),
        (None, None),
    ],
)
def test_a_run_without_a_decoded_token_says_why(most: int | None, said: str | None, tmp_path: Path) -> None:
    prompted = small_trace(tmp_path / "t.safetensors", 40, 2, prompt=10)
    words = [] if most is None else [f"max_tokens={most}"]
    found = ran(prompted, tmp_path / "run", "+policy=lru", *words)
    assert (found.metrics()["tpot_ms"]["mean"] is None) is (said is not None)
    assert ("TPOT" in found.out.replace("TPOT ms", "")) is (said is not None)
    assert said is None or said in " ".join(found.out.split())


def test_a_trace_of_prompts_alone_has_no_tpot_and_says_so(tmp_path: Path) -> None:
    prompted = small_trace(tmp_path / "t.safetensors", 20, 2, prompt=10)
    for words, said in (([], "no request has two tokens"), (["max_tokens=15"], "ends before a request has two tokens")):
        found = ran(prompted, tmp_path / "run", "+policy=lru", *words)
        assert found.metrics()["tpot_ms"]["mean"] is None
        assert said in " ".join(found.out.split())


def test_columns_says_how_wide_a_report_is_and_notes_keep_their_indent(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = ran(trace, tmp_path / "run", "+policy=lru", "batch_size=64", "max_tokens=14").out.splitlines()
    body = lines[2:-1]
    assert max(map(len, body)) <= 60
    first = next(place for place, line in enumerate(body) if line.startswith("  batch_size=64: the run has"))
    assert body[first + 1].startswith("  ")
    for word in ("none", "0", "-3", "99999999"):
        monkeypatch.setenv("COLUMNS", word)
        assert ran(trace, tmp_path / "run", "+policy=lru").out.count("policy  ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name", "shown"),
    [
        (["+policy=adaptive"], "hybrid", True),
        (["+policy=adaptive", "policy/predictor=transition"], "transition", False),
        (["+policy=lru"], "none", False),
        (["+policy=clairvoyant"], None, False),
    ],
)
def test_the_predictor_that_was_taken_is_in_title_and_metrics(
    words: list[str], name: str | None, shown: bool, trace: Path, tmp_path: Path
) -> None:
    found = ran(trace, tmp_path / "run", *words)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["predictor"] == name
    assert bool(re.search(rf" \(predictor: {name}\) on a100", found.out)) is shown
