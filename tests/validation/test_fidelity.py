"""Errors, bars, ranks and the pages made of them: from rows whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from expertflow.forward import DECODE, Forward
from expertflow.parts import DEMAND
from replay.calibrate import named_model
from replay.fidelity import Case, ForwardTimes, judge, rank_agreement, row_of
from replay.fidelity_report import page, plot_fidelity
from replay.overlay import write_overlay
from replay.standin import standin_trace
from sim.default_trace import generated_trace
from sim.timeline import Timeline


def metrics(**changes: Any) -> dict[str, Any]:
    """Of a run of 10 tokens at 10 ms each, 2 ms of it stall."""
    plain: dict[str, Any] = {
        "num_tokens": 10, "elapsed_ns": 100_000_000, "compute_ns": 30_000_000, "overhead_ns": 50_000_000,
        "stall_ns": 20_000_000, "late_stall_ns": 5_000_000, "miss_stall_ns": 15_000_000, "num_hits": 90, "num_late": 4,
        "num_misses": 6, "tpot_ms": {"mean": 10.0}, "link": {"busy_ns": 10_000_000},
        "bytes": {"demand": 200_000_000, "prefetch": 50_000_000}, "prefetch": {"issued": 7},
    }  # fmt: skip
    return {**plain, **changes}


def times(*ends_ms: float) -> ForwardTimes:
    """Forwards that ended then."""
    seen = ForwardTimes()
    forward = Forward(0, DECODE, [0], (0,), (1,), [], [], None)
    for end in ends_ms:
        seen.end_forward(forward, round(end * 1e6))
    return seen


CASE = Case("gpt-oss-20b", "eager", 0.5, 1, "lru")


def row(policy: str = "lru", measured: float = 10.0, predicted: float = 10.0, **changes: Any) -> dict[str, Any]:
    """A row of the table: TPOT as given, a stall of 2 ms in both worlds."""
    made = row_of(Case("gpt-oss-20b", "eager", 0.5, 1, policy), metrics(tpot_ms={"mean": measured}),
                  metrics(tpot_ms={"mean": predicted}), times(10, 20), times(10, 20))  # fmt: skip
    return made | changes


def test_a_row_holds_both_worlds_and_their_errors() -> None:
    predicted = metrics(tpot_ms={"mean": 10.4}, stall_ns=18_000_000, link={"busy_ns": 11_000_000})
    made = row_of(CASE, metrics(), predicted, times(10, 20, 40), times(11, 20, 44))
    assert made["tpot_error"] == pytest.approx(0.04)
    assert made["stall_error"] == pytest.approx(-0.1)
    assert made["stall_error_of_tpot"] == pytest.approx(-0.02)
    assert made["stall_counts"]
    assert made["link_error"] == pytest.approx(0.1)
    assert made["link_gb_per_s_measured"] == pytest.approx(25.0)
    assert made["stall_ms_measured"] == 2.0
    assert made["forward_error_p50"] == pytest.approx(0.1)
    # Forwards lasted 10, 10, 20 ms and 11, 9, 24.
    assert made["forward_error_p95"] == pytest.approx(0.19)


def test_no_stall_at_all_has_no_error_of_its_own() -> None:
    made = row_of(CASE, metrics(stall_ns=0), metrics(stall_ns=1_000_000), times(1), times(1))
    assert made["stall_error"] is None
    assert not made["stall_counts"]
    assert made["stall_error_of_tpot"] == pytest.approx(0.01)


def test_bars_are_held_against_each_row() -> None:
    rows = [
        row("lru", 10.0, 10.49),
        row("oracle", 10.0, 10.51),
        row("adaptive", stall_error=-0.2),
        row("fixed_1", stall_counts=False, stall_error=9.0, stall_error_of_tpot=0.01),
        row("fixed_2", stall_counts=False, stall_error_of_tpot=-0.06),
    ]
    judged = judge(rows, 0.05, 0.10)
    assert [text.split(" batch 1 ")[1] for text in judged["missed"]] == [
        "oracle: TPOT +5.1 %",
        "adaptive: stall -20.0 %",
        "fixed_2: stall off by -6.0 % of TPOT",
    ]
    assert judged["worst_tpot_error"] == pytest.approx(0.051)
    assert (judged["rows_with_stall"], judged["num_rows"]) == (3, 5)
    assert judged["worst_stall_error"] == pytest.approx(0.2)


def test_ranks_count_only_pairs_that_differ_by_more_than_the_bar_under_equal_conditions() -> None:
    rows = [row("a", 10.0, 12.0), row("b", 10.4, 11.0), row("c", 20.0, 11.5), row("d", 1.0, 99.0, batch_size=8)]
    ranks = rank_agreement(rows, 0.05)
    assert (ranks["pairs"], ranks["agreeing"]) == (2, 1)
    assert ranks["against"] == ["a before c in gpt-oss-20b eager 0.5 1"]
    assert rank_agreement(rows, 0.01)["pairs"] == 3


def summary(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What a validation writes about `rows`."""
    plain: dict[str, Any] = {
        "machine": {"name": "Test GPU", "torch": "2.11", "dtype": "bfloat16"}, "world": "cuda", "scale": 1,
        "command": "python -m replay.validate test", "wall_s": 12.3, "tokens": 10, "repeat": 1,
        "judged": judge(rows, 0.05, 0.1),
        "left_out": [], "stamps": {"executions": 1_000_000, "checks": 8_000_000, "wrong": 0, "runs": []},
        "lockstep": [{"policy": "lru", "decisions": 99, "forwards": 3, "difference": None}], "link_peak_gb_per_s": 25.5,
    }  # fmt: skip
    return {**plain, **changes}


def test_the_page_says_what_was_run_and_what_was_missed() -> None:
    rows = [row("lru"), row("oracle", 10.0, 12.0)]
    text = page(pd.DataFrame(rows), summary(rows))
    for expected in ("# Simulator against Test GPU (cuda)", "python -m replay.validate test", "| TPOT error | 20.0 % |",
                     "0 wrong in 1,000,000", "1 of 1 policies take the same decisions", "oracle: TPOT +20.0 %",
                     "25 GB/s while copying", "98.0 % of the 25.5",
                     "| lru | 10.000 | 10.000 | +0.0 % | 2.000 | 2.000 |"):  # fmt: skip
        assert expected in text
    assert "not confirmed" not in text
    assert "Left out" not in text


def test_the_page_owns_up_to_graph_rows_missing_rows_and_smaller_models() -> None:
    rows = [row("lru", stack="graph", stall_error=None, stall_counts=False)]
    text = page(pd.DataFrame(rows), summary(rows, left_out=["a", "b"], scale=16,
                                            machine={"name": "x", "torch": "2", "dtype": "float32",
                                                     "throttle_gb_per_s": 0.1}))  # fmt: skip
    assert "graph stack are not confirmed on hardware" in text
    assert "2 comparisons" in text
    assert "divided by 16; the link keeps pace with 0.1 GB/s" in text
    assert "| – |" in text


def test_the_plot_shows_every_policy_in_both_panels() -> None:
    figure = plot_fidelity(pd.DataFrame([row("lru"), row("oracle", 12.0, 11.0)]), 0.05)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["TPOT (ms)", "stall (ms per token)"]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["lru", "oracle"]
    points = [line for line in figure.axes[0].lines if line.get_label() in ("lru", "oracle")]
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points] == [(10.0, 10.0), (12.0, 11.0)]


def test_a_plot_without_any_stall_is_drawn_all_the_same() -> None:
    without = row("lru", stall_ms_measured=0.0, stall_ms_predicted=0.0)
    assert len(plot_fidelity(pd.DataFrame([without]), 0.05).axes) == 2


def test_two_timelines_stand_in_one_file_as_two_processes(tmp_path: Path) -> None:
    pair = [Timeline(name, 4) for name in ("measured: x", "predicted: x")]
    for start, timeline in enumerate(pair):
        timeline.computed("attention", 0, (), start, start + 10)
        timeline.copied(5, 0, DEMAND, start, start + 20)
    write_overlay(tmp_path / "timeline.json", pair[0], pair[1])
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "predicted: x", 2: "measured: x"}
    assert [event["pid"] for event in events if event["ph"] == "X"] == [1, 1, 2, 2]
    assert {event["ts"] for event in events if event["ph"] == "X" and event["pid"] == 2} == {0.0}


def test_a_stand_in_has_the_models_shape_and_the_sources_reuse() -> None:
    source = generated_trace(64, 4, 1, None)
    model = named_model("deepseek-v2-lite")
    made = standin_trace(source, model)
    assert (made.num_layers, made.num_experts, made.top_k) == (26, 64, 6)
    assert made.experts.shape == (64, 26, 6)
    assert "stand-in" in made.header["source"]
    for token in made.experts:
        for chosen in token:
            assert len(set(chosen.tolist())) == 6
            assert int(chosen.max()) < 64
    # Both halves follow a layer of the source each, three experts from either.
    assert (made.experts[:, 3, :3] == source.experts[:, 3, :3]).all()
    assert (made.experts[:, 3, 3:] == source.experts[:, 10, :3] + 32).all()
    assert standin_trace(source, named_model("gpt-oss-20b")) is source


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "phi-3.5-moe", "deepseek-v3"])
def test_a_stand_in_is_valid_routing_for_models_of_any_shape(name: str) -> None:
    model = named_model(name)
    made = standin_trace(generated_trace(8, 1, 1, None), model)
    for token in made.experts:
        for chosen in token:
            assert len(set(chosen.tolist())) == model.top_k
            assert int(chosen.max()) < model.num_experts
