"""Features: what each column holds, and that rows in blocks give the same as forwards one by one."""

from __future__ import annotations

import numpy as np
import pytest

from expertflow.diversity import embedding_distance
from expertflow.features import CHANCE_ONE, NUM_HASHES, SHARE_ONE, SPREAD_ONE, ForwardFeatures, hashed, num_features
from tests.policy.forest.support import LENGTH, D, E, K, L, knowable
from tests.support.commands import routing
from tests.support.workloads import memory_trace
from traces.batching import BatchConfig, Batches
from traces.fitting.rows import row_blocks
from traces.reader import Trace

ONE_BY_ONE = BatchConfig(prefill_chunk=1)


def by_forward(trace: Trace) -> dict[tuple[int, int, int], list[int]]:
    """Features of every (row, layer, distance), from forwards of one token."""
    features = ForwardFeatures(trace.num_layers, trace.num_experts)
    found = {}
    for forward in Batches(trace, ONE_BY_ONE):
        features.begin(forward)
        for layer in range(trace.num_layers):
            features.know(forward, layer)
            for distance in range(1, D + 1):
                chance = features.pregate(forward, layer, distance)
                found[forward.rows[0], layer, distance] = features.fill(chance, layer, distance).tolist()
    return found


@pytest.mark.parametrize("size", [5, 256])
@pytest.mark.parametrize("listed", [False, True])
def test_blocks_of_rows_give_what_forwards_give(listed: bool, size: int) -> None:
    trace = knowable(3, listed=listed)
    expected = by_forward(trace)
    seen = 0
    for block in row_blocks(trace, range(3), size):
        for layer in range(L):
            for distance in range(1, D + 1):
                for place, row in enumerate(block.features(layer, distance).tolist()):
                    assert row == expected[block.first + place, layer, distance]
                    seen += 1
    assert seen == 3 * LENGTH * L * D


def test_blocks_and_forwards_agree_in_a_model_of_fewer_layers_than_are_looked_back_on() -> None:
    trace = memory_trace(routing((3, E, K), 12), E, [0, 5, 12], [0, 3])
    features = ForwardFeatures(3, E)
    rows = np.concatenate([block.features(2, 1) for block in row_blocks(trace, range(2), 4)])
    for forward in Batches(trace, ONE_BY_ONE):
        features.begin(forward)
        features.know(forward, 2)
        assert features.fill(None, 2, 1).tolist() == rows[forward.rows[0]].tolist()


def test_some_rows_of_a_block_are_those_rows() -> None:
    block = next(row_blocks(knowable(2), range(2)))
    some = np.array([3, 20, 31])
    assert block.features(1, 2, some).tolist() == block.features(1, 2)[some].tolist()
    assert block.take(some).features(1, 2).tolist() == block.features(1, 2)[some].tolist()
    assert block.take(some).take(np.array([2, 0])).features(1, 2).tolist() == block.features(1, 2)[[31, 3]].tolist()


def test_each_column_holds_what_it_says() -> None:
    """The second row of a request, at layer 1, two layers ahead."""
    trace = knowable(2)
    vector = by_forward(trace)[LENGTH + 1, 1, 2]
    assert len(vector) == num_features(E)
    logits = np.asarray(trace.lookahead)[LENGTH + 1, 1, 1].astype(np.float32)  # type: ignore[arg-type]
    chance = np.minimum(K * np.exp(logits) / np.exp(logits).sum(), 1)
    assert np.abs(np.array(vector[:E]) - CHANCE_ONE * chance).max() <= 0.501
    expected = []
    for row, layer in ((LENGTH, L - 2), (LENGTH, L - 1), (LENGTH + 1, 0), (LENGTH + 1, 1)):
        chosen = set(np.asarray(trace.experts)[row, layer].tolist())
        expected += [SHARE_ONE if expert in chosen else 0 for expert in range(E)]
    assert vector[E : 5 * E] == expected
    assert trace.token_ids is not None
    bucket = int(hashed(np.asarray(trace.token_ids)[LENGTH + 1 : LENGTH + 2])[0])
    assert vector[5 * E : 5 * E + NUM_HASHES] == [1 if place == bucket else 0 for place in range(NUM_HASHES)]
    assert vector[-4:] == [0, 1, 1, 2]


def test_a_request_begins_with_nothing_before_it() -> None:
    vector = by_forward(knowable(2))[LENGTH, 0, 1]
    assert not any(vector[E : 4 * E])
    assert sum(vector[4 * E : 5 * E]) == K * SHARE_ONE


def test_past_the_last_layer_stands_what_the_target_layer_chose() -> None:
    trace = knowable(1)
    vector = by_forward(trace)[5, L - 2, 3]
    chosen = set(np.asarray(trace.experts)[5, 1].tolist())
    assert vector[:E] == [CHANCE_ONE if expert in chosen else 0 for expert in range(E)]


def test_several_tokens_give_shares_counts_spread_and_the_chance_of_any() -> None:
    trace = knowable(1, prompt=6)
    forward = next(iter(Batches(trace, BatchConfig())))
    features = ForwardFeatures(L, E)
    features.begin(forward)
    features.know(forward, 0)
    vector = features.fill(features.pregate(forward, 0, 1), 0, 1).tolist()
    counts = np.bincount(np.asarray(trace.experts)[:6, 0].ravel(), minlength=E)
    assert vector[4 * E : 5 * E] == [SHARE_ONE * int(count) // 6 for count in counts]
    assert sum(vector[5 * E : 5 * E + NUM_HASHES]) == 6
    assert forward.recorded is not None
    assert trace.embedding is not None
    spread = embedding_distance(np.asarray(trace.embedding)[:6].astype(np.float32)) / 36
    assert vector[-4:] == [round(SPREAD_ONE * spread), 6, 0, 1]
    chances = forward.recorded.lookahead(forward.rows, 0)
    assert chances is not None
    union = 1 - np.prod(1 - chances[:, 0].astype(np.float64), axis=0)
    assert vector[:E] == np.rint(CHANCE_ONE * union).astype(int).tolist()


def test_the_hash_is_knuths() -> None:
    ids = np.array([0, 1, 2, 151_000], np.int32)
    assert hashed(ids).tolist() == [(int(token) * 2654435761 % 2**32) >> 26 for token in ids]
    spread = np.bincount(hashed(np.arange(6400)), minlength=NUM_HASHES)
    assert spread.min() > 80
