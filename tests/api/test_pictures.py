"""What a result and a sweep draw: the rows that are there, under names that a person reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sim import simulate, sweep
from tests.support.commands import small_trace


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trace = small_trace(tmp_path_factory.mktemp("pictures") / "t.safetensors", 16, prompt=3)
    return {"hardware": "a100", "trace": trace}


def texts(figure: Figure) -> set[str]:
    """Every text of a picture, as drawn."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    found = {text.get_text() for axes in figure.axes for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]}
    found |= {axes.get_title("left") for axes in figure.axes} | {axes.get_xlabel() for axes in figure.axes}
    found |= {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    return found | {figure.get_suptitle()}


def test_a_result_shows_its_rows_and_the_floor_below_them(keys: dict[str, Any]) -> None:
    result = simulate(policy="adaptive", **keys)
    figure = result.plot()
    assert {"adaptive (ExpertFlow)", "LRU", "on demand", "knows the future", "Time per token: adaptive"} <= texts(
        figure
    )
    (axes,) = figure.axes
    floor = axes.lines[0].get_xdata()[0]  # type: ignore[index]
    assert floor == result.table.loc["floor", "ms_per_token"]
    lengths = [bar.get_width() for bar in axes.patches[:4]]  # type: ignore[attr-defined]
    assert lengths == result.table["ms_per_token"].to_list()[:4]
    # With prompts in the run, TPOT alone would lie below the floor.
    assert floor <= min(lengths)


def test_without_runs_beside_there_is_one_bar_and_no_floor(keys: dict[str, Any]) -> None:
    (axes,) = simulate(policy="lru", compare="none", **keys).plot().axes
    assert len(axes.lines) == 0


def test_a_timeline_shows_two_tokens_or_what_is_asked_for(keys: dict[str, Any]) -> None:
    result = simulate(policy="fixed_1", compare="none", **keys)
    assert {"compute", "link", "stalls"} <= texts(result.plot("timeline"))
    low, high = result.plot("timeline", start_ms=0, stop_ms=2).axes[-1].get_xlim()
    assert (low, high) == (0, 2)
    heads = result.timeline.compute.query("kind == 'head'")["end_ns"].to_numpy() / 1e6
    low, high = result.plot("timeline").axes[-1].get_xlim()
    assert ((heads >= low) & (heads <= high)).sum() == 3
    with pytest.raises(ValueError, match="must be given together"):
        result.plot("timeline", start_ms=1)
    with pytest.raises(ValueError, match="choose time or timeline"):
        result.plot("pie")


@pytest.mark.slow
def test_a_sweep_over_residency_is_lines_and_another_bars(keys: dict[str, Any], tmp_path: Path) -> None:
    found = sweep(policy=["lru", "on_demand"], residency=[0.25, 0.5], batch_size=[1, 2], jobs=1, **keys)
    names = texts(found.plot("hit_rate"))
    assert {"lru, batch size=1", "on demand, batch size=2", "A100, eager stack"} <= names
    bars = sweep(policy=["lru", "on_demand"], stack=["eager", "graph"], jobs=1, **keys).plot()
    assert {"LRU", "on demand", "A100, eager stack", "A100, graph stack"} <= texts(bars)
    with pytest.raises(ValueError, match="value='nosuch' is no column of the table"):
        found.plot("nosuch")
