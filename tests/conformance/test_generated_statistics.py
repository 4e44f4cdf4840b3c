"""A generated trace has the statistics of the trace its parameters were fitted to: reuse, popularity, LRU hits.

What is aimed at was counted by `tests.conformance.figures`, which shares no code with `traces`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.conformance import statistics_of
from tests.support.recordings import SHIPPED as RECORDING
from tests.support.recordings import named, recordings
from traces.fitting.generator import fit_trace
from traces.generate import SHIPPED, generate, load_params, split_tokens
from traces.reader import open_trace
from traces.stats import check_routing, lru_distances, next_layer_recall, popularity_entropy, reuse

SOURCE = statistics_of("gpt-oss-20b.train")
"""Figures of the trace that the shipped parameters were fitted to; the trace itself is not shipped."""

NUM_EXPERTS, NUM_LAYERS = 32, 24
SHARES = (0.25, 0.5, 0.75)


def statistics(experts: npt.NDArray[Any], request_start: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """reuse at lags 1 … 64, entropy in bits, LRU hit rates at 25, 50 and 75 % (one cache), next-layer recall."""
    ids = check_routing(experts, request_start, NUM_EXPERTS)
    distances, _ = lru_distances(ids, NUM_EXPERTS)
    slots = [int(share * NUM_LAYERS * NUM_EXPERTS) for share in SHARES]
    return {
        "reuse": np.nanmean(reuse(experts, request_start, NUM_EXPERTS), axis=1),
        "entropy": np.mean(popularity_entropy(experts, request_start, NUM_EXPERTS)),
        "lru": np.array([distances[:room].sum() for room in slots]) / distances.sum(),
        "recall": np.nanmean(next_layer_recall(experts, request_start, NUM_EXPERTS)[0]),
    }


BOUNDS = {"reuse": 0.02, "entropy": 0.1, "lru": 0.02, "recall": 0.05}


def misses(found: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """The statistics that are off by more than their bound, with the figures."""
    return [
        f"{name}: {np.round(found[name], 4)} for {np.round(source[name], 4)}"
        for name, bound in BOUNDS.items()
        if np.max(np.abs(found[name] - source[name])) > bound
    ]


@pytest.mark.parametrize("path", recordings("train"), ids=named)
def test_statistics_are_those_counted_with_sets(path: Path) -> None:
    trace, expected = open_trace(path), statistics_of(path.stem)
    assert np.diff(trace.request_start).tolist() == expected["request_lengths"]
    for name, found in statistics(np.asarray(trace.experts), trace.request_start).items():
        assert found == pytest.approx(np.array(expected[name]), abs=1e-7), name  # the shares are float32


@pytest.mark.slow
def test_a_generated_trace_has_its_sources_statistics() -> None:
    made = generate(load_params(SHIPPED)[0], SOURCE["request_lengths"], seed=0)
    assert misses(statistics(made["experts"], made["request_start"]), SOURCE) == []


@pytest.mark.slow
def test_a_trace_generated_from_a_fit_has_the_statistics_of_what_was_fitted() -> None:
    expected = statistics_of(RECORDING.stem)
    params = fit_trace(open_trace(RECORDING), rounds=10)
    made = generate(params, expected["request_lengths"], seed=0)
    assert misses(statistics(made["experts"], made["request_start"]), expected) == []


@pytest.mark.slow
def test_independent_draws_from_popularity_do_not() -> None:
    params, _ = load_params(SHIPPED)
    rng = np.random.Generator(np.random.PCG64(0))
    start = np.cumsum([0, *SOURCE["request_lengths"]])
    num_tokens = int(start[-1])
    noise = rng.gumbel(size=(num_tokens, NUM_LAYERS, NUM_EXPERTS)).astype(np.float32)
    drawn = np.argsort(-(noise + params["bias"].astype(np.float32)), axis=2)[:, :, :4].astype(np.uint8)
    off = " ".join(misses(statistics(drawn, start), SOURCE))
    assert "reuse" in off
    assert "lru" in off


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    params, _ = load_params(SHIPPED)
    first, again, other = (generate(params, split_tokens(300, 3), seed)["experts"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_row_holds_distinct_experts() -> None:
    made = generate(load_params(SHIPPED)[0], [1, 40, 7], seed=5)
    assert made["request_start"].tolist() == [0, 1, 41, 48]
    assert made["experts"].shape == (48, NUM_LAYERS, 4)
    assert all(len(set(row)) == 4 for layer_rows in made["experts"].tolist() for row in layer_rows)


def test_no_request_is_empty() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        generate(load_params(SHIPPED)[0], [4, 0], seed=0)
