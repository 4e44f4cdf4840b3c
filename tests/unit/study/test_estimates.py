"""Estimates of N_e where the right answer is known."""

from pathlib import Path

import numpy as np
import pytest

from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.study.estimates import correlation, estimates_table, run_estimates
from tests.support.commands import GPT_OSS, routing, small_trace
from tests.support.studies import command, table, write_study


def perfect_pregate(experts: np.ndarray) -> np.ndarray:
    """Scores [T, L, 2, E] of a pre-gate that is certain, and right; NaN past the last layer."""
    num_tokens, num_layers, _ = experts.shape
    scores = np.full((num_tokens, num_layers, 2, GPT_OSS[1]), np.nan, np.float16)
    for ahead in (1, 2):
        chosen = np.full((num_tokens, num_layers - ahead, GPT_OSS[1]), -30.0, np.float16)
        np.put_along_axis(chosen, experts[:, ahead:].astype(np.int64), np.float16(0), axis=2)
        scores[:, :-ahead, ahead - 1] = chosen
    return scores


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    experts = routing(GPT_OSS, 24)
    rng = np.random.default_rng(0)
    arrays = {"lookahead": perfect_pregate(experts), "embedding": rng.normal(size=(24, 4)).astype(np.float16)}
    return small_trace(tmp_path / "r.safetensors", 24, 2, prompt=4, experts=experts, **arrays)


def rows(path: Path, batch_size: int) -> dict[tuple[str, int, str], dict[str, float]]:
    cfg = configure(["+hardware=a100", "+policy=lru", f"trace.path={path}", f"batch_size={batch_size}"])
    return {(row["phase"], row["distance"], row["estimate"]): row for row in run_estimates(make_workload(cfg))["rows"]}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_perfect_pregate_gives_the_true_number(recording: Path, batch_size: int) -> None:
    found = rows(recording, batch_size)
    for phase in ("decode", "prefill"):
        for distance in (1, 2):
            for name in ("tokens_top_k", "expected", "threshold_0.5"):
                assert found[phase, distance, name]["mean_abs_error"] == pytest.approx(0, abs=1e-6), name
    assert found["decode", 1, "tokens_top_k"]["mean_true"] == (4.0 if batch_size == 1 else pytest.approx(6, abs=2))


@pytest.mark.slow
def test_a_wrong_estimate_is_seen_to_be_wrong(recording: Path) -> None:
    found = rows(recording, 1)
    # The forward before the first decode was a prefill of four tokens: its number is not that of one token.
    assert found["decode", 1, "last_true"]["bias"] > 0
    assert found["prefill", 1, "last_true"]["bias"] < 0
    assert found["decode", 1, "last_true"]["correlation"] is None


def test_prefill_stands_once_and_dist_is_ranked_over_all(recording: Path) -> None:
    cfg = configure(["+hardware=a100", "+policy=lru", f"trace.path={recording}"])
    result = run_estimates(make_workload(cfg))
    found = estimates_table(["batch 1", "batch 1 again"], [result, result])
    of_prefill = found[(found["setting"] == "prefill") & (found["estimate"] == "expected") & (found["distance"] == 1)]
    assert len(of_prefill) == 1
    assert "rank of dist" in set(found["estimate"])
    # Two prefills of four tokens are all that has a Dist: too few to correlate.
    assert found[found["estimate"] == "rank of dist"]["num_layers"].tolist() == [2]


def test_correlation_needs_variation() -> None:
    some = np.array([1.0, 2.0, 4.0])
    assert correlation(some, -some) == pytest.approx(-1.0)
    assert correlation(some, np.ones(3)) is None
    assert correlation(some[:2], some[:2]) is None


@pytest.mark.slow
def test_the_command_writes_them(recording: Path, tmp_path: Path) -> None:
    spec = {
        "title": "t",
        "value": "mean_abs_error",
        "rows": ["estimate"],
        "columns": ["setting"],
        "digits": 2,
        "only": {"distance": 1},
    }
    write_study(
        tmp_path,
        kind="estimates",
        axes={"batch": {"1": [], "2": ["batch_size=2"]}},
        variants={"recorded": ["+policy=lru"]},
        claims=None,
        best=None,
        tables=[spec],
    )
    assert command(tmp_path, "--set", f"trace.path={recording}") == 0
    assert {"prefill", "decode batch 1", "decode batch 2"} <= set(table(tmp_path)["setting"])
    assert "| tokens_top_k | 0.00" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_trace_without_pregate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_trace(tmp_path / "r.safetensors", 8)
    write_study(
        tmp_path, kind="estimates", axes={}, variants={"recorded": ["+policy=lru"]}, claims=None, best=None, tables=None
    )
    assert command(tmp_path, "--set", f"trace.path={path}") == 2
    assert "has no recorded pre-gate" in capsys.readouterr().err
