"""Figures of `python -m traces stats`: by hand on tiny routings, and against the independent cache reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.reference import count_hits, per_layer_capacity, trace_events
from traces import cli
from traces.fitting.generator import fit_trace
from traces.format import About, write_trace
from traces.generate import generate
from traces.reader import open_trace
from traces.stats import cache_table, check_routing, lru_distances, popularity_entropy, reuse

ONE_LAYER = np.array([[[0, 1]], [[1, 2]], [[0, 1]], [[3, 2]]], np.uint8)
TWO_REQUESTS = np.array([0, 2, 4])


def drawn(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int) -> npt.NDArray[np.uint8]:
    """Routing [T, L, K] with some persistence, so that caches have something to keep."""
    rng = np.random.Generator(np.random.PCG64(seed))
    taste = rng.random((num_layers, num_experts)) * 2
    scores = taste + rng.random((num_tokens, num_layers, num_experts))
    return np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.uint8)


def test_reuse_counts_shared_experts_within_a_request_only() -> None:
    # Tokens 0-1 share expert 1 of two; tokens 2-3 share none; 1-2 lie in different requests.
    assert reuse(ONE_LAYER, TWO_REQUESTS, 4, lags=(1,)).tolist() == [[0.25]]
    assert reuse(ONE_LAYER, np.array([0, 4]), 4, lags=(1, 2)).ravel() == pytest.approx([2 / 6, 3 / 4])


def test_reuse_at_a_lag_longer_than_every_request_is_not_a_number() -> None:
    assert np.isnan(reuse(ONE_LAYER, TWO_REQUESTS, 4, lags=(2,))).all()


def test_entropy_is_two_bits_for_four_experts_used_alike() -> None:
    even = np.array([[[0, 1]], [[2, 3]]], np.uint8)
    assert popularity_entropy(even, np.array([0, 2]), 4).tolist() == [2.0]
    assert popularity_entropy(np.array([[[2]], [[2]]], np.uint8), np.array([0, 2]), 4).tolist() == [0.0]


@pytest.mark.parametrize("seed", range(4))
def test_lru_distances_answer_every_capacity_as_the_reference_does(seed: int) -> None:
    experts = drawn(60, 3, 8, 2, seed)
    everywhere, by_layer = lru_distances(check_routing(experts, np.array([0, 60]), 8), 8)
    events = list(trace_events(experts))
    shape = {"num_layers": 3, "num_experts": 8}
    for slots in range(2, 25):
        counted = count_hits(events, **shape, capacity=slots, policy="lru", scope="global")
        assert everywhere[:slots].sum() == counted.hits
    rooms = per_layer_capacity(11, 3)
    counted = count_hits(events, **shape, capacity=rooms, policy="lru", scope="layer")
    assert sum(by_layer[layer, :room].sum() for layer, room in enumerate(rooms)) == counted.hits


def test_the_cache_table_equals_the_reference() -> None:
    experts = drawn(80, 2, 20, 3, seed=9)
    events = list(trace_events(experts))
    shape = {"num_layers": 2, "num_experts": 20}
    for row in cache_table(experts, np.array([0, 30, 80]), 20):
        slots = row["slots"]
        if slots < 6:
            continue
        rooms = per_layer_capacity(slots, 2)
        assert row["lru_global"] == count_hits(events, **shape, capacity=slots, policy="lru", scope="global").hits
        assert row["lru_per_layer"] == count_hits(events, **shape, capacity=rooms, policy="lru", scope="layer").hits
        belady = count_hits(events, **shape, capacity=slots, policy="belady_forced", scope="global").hits
        assert row["belady_global"] == belady
        belady = count_hits(events, **shape, capacity=rooms, policy="belady_forced", scope="layer").hits
        assert row["belady_per_layer"] == belady


def small_trace(path: Path) -> Path:
    """Two requests of 60 tokens, 3 layers, 2 of 8 experts, with weights."""
    experts = drawn(120, 3, 8, 2, seed=3)
    weights = np.tile(np.array([0.75, 0.25], np.float16), (120, 3, 1))
    arrays = {"experts": experts, "weights": weights, "request_start": [0, 60, 120], "prompt_len": [0, 0]}
    return write_trace(path, arrays, About("tiny", 8, "made up", "CC0"))


def test_stats_prints_tables_and_writes_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    assert cli.main(["stats", str(trace), "--json", str(tmp_path / "s.json")]) == 0
    assert "120 tokens, 2 requests, 3 layers, 2 of 8 experts" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())


@pytest.mark.slow
def test_a_trace_of_another_shape_is_fitted_and_generated_anew(tmp_path: Path) -> None:
    trace = open_trace(small_trace(tmp_path / "t.safetensors"))
    params = fit_trace(trace, seed=0, rounds=2)
    made = generate(params, [50, 70], seed=1)
    assert made["experts"].shape == (120, 3, 2)
    assert all(len(set(row)) == 2 for layers in made["experts"].tolist() for row in layers)
    both = (np.asarray(trace.experts), made["experts"])
    source, found = (popularity_entropy(experts, np.array([0, 60, 120]), 8) for experts in both)
    assert np.abs(source - found).max() < 0.5


def test_fit_and_generate_run_from_the_command_line(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    assert cli.main(["fit", str(trace), str(tmp_path / "p.safetensors"), "--rounds", "1"]) == 0
    words = ["--params", str(tmp_path / "p.safetensors"), "--tokens", "40", "--requests", "2"]
    assert cli.main(["generate", *words, str(tmp_path / "g.safetensors")]) == 0
    assert open_trace(tmp_path / "g.safetensors").num_tokens == 40
