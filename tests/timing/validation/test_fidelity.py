"""Rows, their noise, and the pages made of them: from runs whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from expertflow.forward import DECODE, Forward
from expertflow.parts import DEMAND
from replay.calibration.hostspeed import drift
from replay.calibration.record import named_model
from replay.calibration.surrogate import surrogate_trace
from replay.validation.fidelity import ForwardTimes, Ran, row_of
from replay.validation.overlay import write_overlay
from replay.validation.plan import Case
from replay.validation.report import page, plot_fidelity, write_report
from replay.validation.verdict import BARS, Bars, judge, link_rates
from sim.job.default_trace import generated_trace
from sim.views.timeline import Timeline


def metrics(**changes: Any) -> dict[str, Any]:
    """Of a run of 10 tokens at 10 ms each, 2 ms of it stall."""
    plain: dict[str, Any] = {
        "num_tokens": 10,
        "elapsed_ns": 100_000_000,
        "compute_ns": 30_000_000,
        "overhead_ns": 50_000_000,
        "stall_ns": 20_000_000,
        "late_stall_ns": 5_000_000,
        "miss_stall_ns": 15_000_000,
        "num_hits": 90,
        "num_late": 4,
        "num_misses": 6,
        "tpot_ms": {"mean": 10.0},
        "link": {"busy_ns": 10_000_000},
        "bytes": {"demand": 200_000_000, "prefetch": 50_000_000},
        "prefetch": {"issued": 7},
    }
    return {**plain, **changes}


def times(*ends_ms: float) -> ForwardTimes:
    """Forwards that ended then."""
    seen = ForwardTimes()
    forward = Forward(0, DECODE, [0], (0,), (1,), [], [], None)
    for end in ends_ms:
        seen.end_forward(forward, round(end * 1e6))
    return seen


CASE = Case("gpt-oss-20b", "eager", 0.5, 1, "lru")


def ran(*ends_ms: float, late_ns: int = 0, **changes: Any) -> Ran:
    """One run."""
    return Ran(metrics(**changes), times(*(ends_ms or (10, 20))), late_ns)


def tpot(mean: float) -> dict[str, Any]:
    """A run at `mean` ms a token."""
    return {"tpot_ms": {"mean": mean}}


def row(
    policy: str = "lru", measured: float = 10.0, predicted: float = 10.0, noise: float = 0.01, **changes: Any
) -> dict[str, Any]:
    """A row of the table, of three runs: TPOT as given, a stall of 2 ms in both worlds."""
    half = measured * noise / 2
    runs = [ran(**tpot(value)) for value in (measured - half, measured, measured + half)]
    return row_of(Case("gpt-oss-20b", "eager", 0.5, 1, policy), runs, ran(**tpot(predicted))) | changes


def test_a_row_holds_both_worlds_and_their_errors() -> None:
    predicted = ran(11, 20, 44, stall_ns=18_000_000, link={"busy_ns": 11_000_000}, **tpot(10.4))
    made = row_of(CASE, [ran(10, 20, 40)], predicted)
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
    assert (made["num_runs"], made["tpot_noise"], made["stall_noise"]) == (1, 0.0, 0.0)


def test_of_several_runs_the_median_of_each_figure_counts_and_their_spread_is_the_noise() -> None:
    runs = [
        ran(9, 20, stall_ns=30_000_000, num_hits=88, late_ns=2_000_000, **tpot(9.0)),
        ran(10, 20, stall_ns=20_000_000, num_hits=93, late_ns=9_000_000, **tpot(12.0)),
        ran(10, 20, stall_ns=24_000_000, num_hits=90, late_ns=3_000_000, **tpot(10.0)),
    ]
    made = row_of(CASE, runs, ran(11, 22, stall_ns=24_000_000, **tpot(10.5)))
    assert (made["tpot_ms_measured"], made["tpot_ms_least"], made["tpot_ms_most"]) == (10.0, 9.0, 12.0)
    assert made["tpot_noise"] == pytest.approx(0.3)
    assert made["stall_ms_measured"] == pytest.approx(2.4)
    assert made["stall_noise"] == pytest.approx(1.0 / 2.4)
    assert made["stall_noise_of_tpot"] == pytest.approx(0.1)
    assert made["tpot_error"] == pytest.approx(0.05)
    assert made["stall_error"] == pytest.approx(0.0)
    assert (made["num_hits_measured"], made["num_runs"]) == (90, 3)
    assert made["late_share"] == pytest.approx(0.03)
    # Forwards lasted 10 and 10 ms (medians), and 11 and 11.
    assert made["forward_error_p50"] == pytest.approx(0.1)


def test_of_two_runs_a_count_is_one_that_occurred() -> None:
    made = row_of(CASE, [ran(num_hits=90), ran(num_hits=91)], ran())
    assert made["num_hits_measured"] == 90


def test_no_stall_at_all_has_no_error_of_its_own() -> None:
    made = row_of(CASE, [ran(1, stall_ns=0)], ran(1, stall_ns=1_000_000))
    assert made["stall_error"] is None
    assert not made["stall_counts"]
    assert made["stall_error_of_tpot"] == pytest.approx(0.01)
    assert made["stall_noise"] == 0.0


def summary(rows: list[dict[str, Any]], bars: Bars = BARS["cuda"], **changes: Any) -> dict[str, Any]:
    """What a validation writes about `rows`."""
    judged = judge(rows, bars)
    plain: dict[str, Any] = {
        "quote": judged["quote"],
        "not_shown": judged["not_shown"],
        "machine": {"name": "Test GPU", "torch": "2.11", "dtype": "bfloat16"},
        "world": "cuda",
        "scale": 1,
        "command": "python -m replay.validate test",
        "wall_s": 12.3,
        "tokens": 10,
        "repeat": 3,
        "beside": True,
        "judged": judged,
        "host_loop": drift([2_000_000, 3_000_000, 2_500_000]),
        "breadth_s": 6.2,
        "minutes": 6,
        "left_out": [],
        "stamps": {"executions": 1_000_000, "checks": 8_000_000, "wrong": 0, "runs": []},
        "lockstep": [{"policy": "lru", "decisions": 99, "forwards": 3, "difference": None}],
        "set_aside": 0,
        "replays": 6,
        "links": link_rates(rows, {"gpt-oss-20b": 25.5}),
        "unlogged": [],
    }
    return {**plain, **changes}


def test_the_page_begins_with_the_line_to_quote() -> None:
    rows = [row("lru"), row("oracle", 20.0, 20.2)]
    text = page(pd.DataFrame(rows), summary(rows))
    assert text.splitlines()[:3] == [
        "# Simulator against Test GPU (cuda)",
        "",
        "**Shown: TPOT within 1.0 % (noise 1.0 %), stall within 0.0 %, policies ranked alike 1 of 1.**",
    ]
    for expected in (
        "python -m replay.validate test",
        "| TPOT error (2 rows judged) | 1.0 % | 0.5 % | 2.0 % |",
        "| noise of TPOT | 1.0 % | 1.0 % | 2.0 % |",
        "| noise of stall | 0.0 % | 0.0 % | 5.0 % |",
        "0 wrong in 1,000,000",
        "1 of 1 policies take the same decisions",
        "Over a bar: 0 of 4 errors.",
        "took 2.00 ms before, 2.50 between (median) and 2.50 after; the slowest of 3 is 50.0 % above",
        "Every policy and capacity once: after 6 s of 360.",
        "the grey band is as wide as the bar",
        "25 GB/s while copying",
        "98.0 % of the 25.5 at which such chunks",
        "| lru | 10.000 | 10.000 | +0.0 % | 1.0 % | 2.000 | 2.000 | +0.0 % | 0.0 % |",
        "+0.0 % | holds |",
    ):
        assert expected in text
    for unsaid in (
        "Left out",
        "left out",
        "copies by",
        "Rows that are",
        "Rows without",
        "Rows of which",
        "Replays set aside",
        "Not shown",
        "NOT shown",
    ):
        assert unsaid not in text


def test_what_the_host_computed_stands_in_a_table_of_its_own() -> None:
    """Only rows of policies with a place are in it."""
    hosted = {"host_stall_ns": 7_000_000, "num_host": 12, "host": {"busy_ns": 30_000_000}}
    placed = row_of(Case("gpt-oss-20b", "eager", 0.5, 1, "lru+cheaper"), [ran(**hosted)] * 2, ran(**hosted))
    rows = [row("lru"), placed]
    lines = page(pd.DataFrame(rows), summary(rows)).splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("| policy | host stall measured"))
    assert lines[at + 2] == "| lru+cheaper | 0.700 | 0.700 | 3.000 | 3.000 | 12 | 12 |"
    assert lines[at + 3 :] == []
    assert "host stall" not in page(pd.DataFrame([row("lru")]), summary([row("lru")]))


def test_the_page_owns_up_to_what_was_missed_left_out_or_not_judged() -> None:
    rows = [
        row("lru", predicted=12.0),
        row("oracle", noise=0.03),
        row("adaptive", late_share=0.021),
        row("on_demand", num_runs=1, stall_error=None, stall_counts=False),
    ]
    text = page(
        pd.DataFrame(rows),
        summary(
            rows,
            left_out=["a", "b"],
            unlogged=["lru", "oracle"],
            breadth_s=180.4,
            scale=16,
            machine={
                "name": "x",
                "torch": "2",
                "dtype": "float32",
                "throttle_gb_per_s": 0.1,
                "copies_by": "torch (no cuda-bindings)",
            },
        ),
    )
    for expected in (
        "**NOT shown: TPOT within 20.0 %",
        "- Not shown: rows that miss a bar: 1.",
        "- Not shown: rows whose repeats differ by more than a bar, or of which no two are alike: 1, 50 % (at most",
        "eager 50 % batch 1 lru: TPOT +20.0 % (noise 1.0 %)",
        "more than a bar: 1.\n  - gpt-oss-20b eager 50 % batch 1 oracle",
        "host-bound, so not judged: 1. For more than 2.0 %",
        "  - gpt-oss-20b eager 50 % batch 1 adaptive: 2.1 %",
        "fewer than two replays count, so not judged: 1.\n  - gpt-oss-20b eager 50 % batch 1 on_demand",
        "2 comparisons",
        "divided by 16; copies by torch (no cuda-bindings); the link keeps pace with 0.1 GB/s",
        "once: after 180 s of 360, later than the half that it should take.",
        "- Lockstep left out for want of time: lru, oracle.",
        "| – | 2.000 | 2.000 | – | – |",
        "| host-bound |",
        "| noise |",
        "| measured once |",
    ):
        assert expected in text


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    write_report(tmp_path, pd.DataFrame(), summary([]))
    assert "**NOT shown: nothing was compared.**" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "fidelity.png").exists()
    write_report(tmp_path, pd.DataFrame(), summary([], breadth_s=None))
    assert "- Every policy and capacity once: not reached." in (tmp_path / "README.md").read_text()


def test_the_plot_shows_every_policy_in_both_panels_and_explains_itself() -> None:
    rows = [row("lru"), row("oracle", 12.0, 11.0)]
    figure = plot_fidelity(pd.DataFrame(rows), judge(rows, BARS["cuda"]), "Test GPU")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Time per token (TPOT)", "Stall per token"]
    assert figure.get_suptitle() == "Test GPU"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "LRU",
        "perfect prediction",
        "predicted = measured",
        "grey: within the bar, 2 % of TPOT, 5 % of stall",
    ]
    points = [line for line in figure.axes[0].lines if line.get_label() in ("lru", "oracle") and len(line.get_xdata())]
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points] == [(10.0, 10.0), (12.0, 11.0)]
    assert [line.get_alpha() for line in points] == [1.0, 1.0]


def test_rows_without_a_verdict_are_pale() -> None:
    rows = [row("lru"), row("oracle", 12.0, 11.0, noise=0.5)]
    figure = plot_fidelity(pd.DataFrame(rows), judge(rows, BARS["cuda"]), "Test GPU")
    points = [line for line in figure.axes[0].lines if line.get_label() in ("lru", "oracle") and len(line.get_xdata())]
    assert [line.get_alpha() for line in points] == [1.0, 0.3]
    assert figure.legends[0].get_texts()[-1].get_text() == "pale: row without a verdict"


def test_a_plot_without_any_stall_is_drawn_all_the_same() -> None:
    without = row("lru", stall_ms_measured=0.0, stall_ms_predicted=0.0)
    assert len(plot_fidelity(pd.DataFrame([without]), judge([without], BARS["cpu"]), "x").axes) == 2


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
    made = surrogate_trace(source, model)
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
    assert surrogate_trace(source, named_model("gpt-oss-20b")) is source


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "phi-3.5-moe", "deepseek-v3"])
def test_a_stand_in_is_valid_routing_for_models_of_any_shape(name: str) -> None:
    model = named_model(name)
    made = surrogate_trace(generated_trace(8, 1, 1, None), model)
    for token in made.experts:
        for chosen in token:
            assert len(set(chosen.tolist())) == model.top_k
            assert int(chosen.max()) < model.num_experts
