"""What may be said of a row: bars, noise, late hosts, ranks. From rows whose figures are known."""

from __future__ import annotations

from typing import Any

import pytest

from replay.validation.verdict import (
    BARS,
    HOLDS,
    HOST_BOUND,
    MISSED,
    NOISE,
    ONCE,
    judge,
    link_rates,
    rank_agreement,
    slow_links,
    verdict,
)
from tests.timing.validation.test_fidelity import row

GPU = BARS["cuda"]


def judged(*rows: dict[str, Any]) -> dict[str, Any]:
    """By the bars of a GPU."""
    return judge(rows, GPU)


def test_the_bars() -> None:
    assert (GPU.tpot, GPU.stall, GPU.late, GPU.link) == (0.02, 0.05, 0.02, 0.95)
    assert (BARS["cpu"].tpot, BARS["cpu"].stall, BARS["cpu"].late, BARS["cpu"].link) == (0.10, 0.15, None, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, HOLDS),
        ({"tpot_error": 0.0199}, HOLDS),
        ({"tpot_error": -0.0201}, MISSED),
        ({"stall_error": 0.0499}, HOLDS),
        ({"stall_error": -0.0501}, MISSED),
        # A stall too small to have an error of its own is a share of TPOT.
        ({"stall_counts": False, "stall_error": 9.0, "stall_error_of_tpot": 0.0199}, HOLDS),
        ({"stall_counts": False, "stall_error": 9.0, "stall_error_of_tpot": 0.0201}, MISSED),
        ({"stall_counts": False, "stall_noise": 9.0, "stall_noise_of_tpot": 0.0199}, HOLDS),
        ({"stall_counts": False, "stall_noise_of_tpot": 0.0201}, NOISE),
        # Noise up to the bar leaves the verdict, above it there is none: whether the error is large or small.
        ({"tpot_noise": 0.02, "tpot_error": 0.0201}, MISSED),
        ({"tpot_noise": 0.0201, "tpot_error": 0.0}, NOISE),
        ({"tpot_noise": 0.0201, "tpot_error": 0.9}, NOISE),
        ({"stall_noise": 0.0501, "stall_error": 0.9}, NOISE),
        # What is missed for certain is missed, however noisy the other figure is.
        ({"stall_noise": 0.9, "tpot_error": 0.03}, MISSED),
        ({"tpot_noise": 0.9, "stall_error": 0.06}, MISSED),
        ({"num_runs": 1, "tpot_error": 0.9}, ONCE),
        ({"late_share": 0.02, "tpot_error": 0.9}, MISSED),
        ({"late_share": 0.0201, "tpot_error": 0.9}, HOST_BOUND),
        ({"late_share": 0.0201}, HOST_BOUND),
    ],
)
def test_each_verdict_on_both_sides_of_its_border(changes: dict[str, Any], expected: str) -> None:
    assert verdict(row(**changes), GPU) == expected


def test_a_cpu_machines_host_is_charged_and_no_excuse() -> None:
    assert verdict(row(late_share=0.9, tpot_error=0.5), BARS["cpu"]) == MISSED


def test_worst_and_mean_are_of_judged_rows_alone() -> None:
    found = judged(
        row("lru", tpot_error=0.01, stall_error=-0.04),
        row("oracle", tpot_error=-0.03, stall_error=0.02),
        row("adaptive", noise=0.5, tpot_error=0.4),
        row("fixed_1", late_share=0.5, tpot_error=0.7),
        row("two_level", num_runs=1, tpot_error=0.8),
    )
    assert (found["num_rows"], found["num_judged"], found["rows_with_stall"]) == (5, 2, 2)
    assert found["worst_tpot_error"] == pytest.approx(0.03)
    assert found["mean_tpot_error"] == pytest.approx(0.02)
    assert found["worst_stall_error"] == pytest.approx(0.04)
    assert found["missed"] == ["gpt-oss-20b eager 50 % batch 1 oracle: TPOT -3.0 % (noise 1.0 %)"]
    assert found["verdicts"] == [HOLDS, MISSED, NOISE, HOST_BOUND, ONCE]
    assert found["rows_by_verdict"][HOST_BOUND] == ["gpt-oss-20b eager 50 % batch 1 fixed_1"]
    assert found["noisy_share"] == pytest.approx(1 / 3)


def test_a_tenth_of_noise_is_shown_and_more_is_not() -> None:
    good = [row(f"p{number}") for number in range(9)]
    assert judged(*good, row("noisy", noise=0.03))["not_shown"] == []
    assert judged(*good[:8], row("noisy", noise=0.03))["not_shown"] == [
        "rows whose repeats differ by more than a bar, or of which no two are alike: 1, 11 % (at most 10 % may)"
    ]
    # Rows that are not judged anyway are no part of the ten.
    assert judged(*good, row("noisy", noise=0.03), row("slow", late_share=1.0))["not_shown"] == []


def test_nothing_compared_is_nothing_shown() -> None:
    assert (judged()["not_shown"], judged()["quote"]) == (["nothing was compared"], "nothing was compared")
    once = judged(row(num_runs=1))
    assert (once["not_shown"], once["quote"]) == (["no row could be judged"], "no row could be judged")
    assert judged(row(late_share=1.0))["not_shown"] == ["no row could be judged"]


def test_the_line_to_quote() -> None:
    found = judged(row("lru", 10.0, 10.1, stall_error=-0.031), row("oracle", 5.0, 5.05, noise=0.014))
    assert found["quote"] == "TPOT within 1.0 % (noise 1.4 %), stall within 3.1 %, policies ranked alike 1 of 1"
    assert found["not_shown"] == []
    none = judged(row("lru", stall_counts=False))
    assert none["quote"] == "TPOT within 0.0 % (noise 1.0 %), no stall to compare, policies ranked alike 0 of 0"


def test_ranks_count_pairs_that_differ_by_more_than_their_noise_under_equal_conditions() -> None:
    """a is measured between 9.9 and 10.1, b 0.2 wide too: together 0.4."""
    a = row("a", 10.0, 12.0, noise=0.02)
    apart, close = 10.41, 10.39
    for measured, pairs in ((apart, 1), (close, 0)):
        found = rank_agreement([a, row("b", measured, 11.0, noise=0.2 / measured)])
        assert (found["pairs"], found["agreeing"]) == (pairs, 0)
    assert rank_agreement([a, row("b", apart, 12.5, noise=0.2 / apart)])["agreeing"] == 1
    found = rank_agreement([a, row("b", apart, 11.0, noise=0.2 / apart), row("c", 1.0, 99.0, batch_size=8)])
    assert found["against"] == ["a is faster than b in gpt-oss-20b eager 50 % batch 1; predicted otherwise"]
    assert rank_agreement([a, row("b", 20.0, 1.0, num_runs=1)])["pairs"] == 0


def test_a_pair_ranked_otherwise_is_not_shown_and_a_host_bound_row_has_no_rank() -> None:
    one, other = row("a", 10.0, 10.1), row("b", 10.3, 10.1)
    assert judged(one, other)["not_shown"] == ["pairs of policies ranked otherwise: 1"]
    assert judged(one, row("b", 10.3, 10.1, late_share=1.0))["ranks"]["pairs"] == 0


def test_repeats_of_which_no_two_are_alike_are_noise_and_few_judged_rows_show_nothing() -> None:
    apart = [row(f"apart{number}", num_runs=1, num_set_aside=5) for number in range(2)]
    good = [row(f"p{number}") for number in range(8)]
    assert judged(*good, *apart)["not_shown"] == [
        "rows whose repeats differ by more than a bar, or of which no two are alike: 2, 20 % (at most 10 % may)"
    ]
    once = [row(f"once{number}", num_runs=1, num_set_aside=0) for number in range(15)]
    assert judged(row("lru"), *once)["not_shown"] == [
        "fewer than half of the rows that no host bounds could be judged: 1 of 16"
    ]


def test_a_link_that_is_slower_than_it_was_calibrated_is_not_shown_on_a_gpu() -> None:
    """Of each model the row counts whose link is busy for most of the time, whatever the others carry."""

    def copying(policy: str, link_ms: float, gb_per_s: float, **changes: Any) -> dict[str, Any]:
        return row(policy, link_ms_measured=link_ms, link_gb_per_s_measured=gb_per_s, **changes)

    rows = [copying("lru", 1.0, 10.0), copying("on_demand", 9.0, 48.0), copying("lru", 5.0, 47.4, model="other")]
    found = link_rates(rows, {"gpt-oss-20b": 50.0, "other": 50.0})
    assert [(link["row"].split()[0], link["share"]) for link in found] == [
        ("gpt-oss-20b", pytest.approx(0.96)),
        ("other", pytest.approx(0.948)),
    ]
    assert list(slow_links(found, GPU)) == [
        "the link carries 94.8 % of its calibrated rate in other eager 50 % batch 1 lru (at least 95.0 % is asked for)"
    ]
    assert list(slow_links(found, BARS["cpu"])) == []
    # Nothing copied, or nothing calibrated: nothing is said.
    assert link_rates([copying("lru", 0.0, 0.0)], {"gpt-oss-20b": 50.0}) == []
    assert link_rates(rows[:1], {"gpt-oss-20b": None}) == []
