"""Training learns what a trace holds, and rounding to integers loses next to nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from expertflow.forward import Forward
from expertflow.network import UNIT
from tests.policy.hybrid.support import started_for
from tests.support.workloads import memory_trace
from traces.batching import BatchConfig, Batches
from traces.fitting.dataset import Dataset, rank_weights, read_dataset, read_pregate
from traces.fitting.network import (
    Batch,
    FloatNetwork,
    Training,
    calibrate_pregate,
    losses,
    pregate_logits,
    to_integers,
    train,
)
from traces.reader import Trace

L, E, K = 4, 8, 2
TRAINING = Training(epochs=8, hidden=24, mixed=16, distances=2, batch=32, lr=0.02, distances_a_step=2)


def chained(num_tokens: int = 400, seed: int = 0) -> Trace:
    """A token's experts at a layer follow from those at the layer before: e → 3e + 1 (mod 8)."""
    draw = np.random.default_rng(seed)
    experts = np.zeros((num_tokens, L, K), np.uint8)
    experts[:, 0] = [draw.choice(E, K, replace=False) for _ in range(num_tokens)]
    for layer in range(1, L):
        experts[:, layer] = (3 * experts[:, layer - 1].astype(int) + 1) % E
    starts = list(range(0, num_tokens + 1, 40))
    return memory_trace(experts, E, starts, [0] * (len(starts) - 1))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return read_dataset(chained(), range(10), 0.75)


@pytest.fixture(scope="module")
def net(data: Dataset) -> FloatNetwork:
    torch.set_num_threads(1)
    return train(data, TRAINING, None, lambda line: None)


def recall(fitted: dict[str, npt.NDArray[Any]], trace: Trace) -> float:
    """Of the experts one layer ahead, the share among the K best, over a trace that was not learned."""
    predictor = started_for(fitted, L, E, K)
    found = asked = 0
    for forward in Batches(trace, BatchConfig()):
        predictor.begin_forward(forward)
        for layer in range(L - 1):
            scores = predictor.predict(forward, layer, 1)
            assert scores is not None
            found += len(set(scores[0][:K]) & set(forward.demands[layer + 1]))
            asked += K
        predictor.end_forward(forward)
    return found / asked


def test_a_rule_between_layers_is_learned(data: Dataset, net: FloatNetwork) -> None:
    fresh = chained(120, seed=1)
    assert recall(to_integers(net, data), fresh) > 0.98
    untrained = FloatNetwork(L, E, TRAINING, pregate=False)
    assert recall(to_integers(untrained, data), fresh) < 0.6


def test_rounding_keeps_the_chances(data: Dataset, net: FloatNetwork) -> None:
    """Chances of integers and floats on the training rows: within 0.02 on average, whatever was rounded."""
    predictor = started_for(to_integers(net, data), L, E, K)
    batch = Batch(data, np.arange(data.num_rows), None)
    with torch.no_grad():
        hidden = torch.relu(net.sums(batch.routing, batch.states))
        odds = net.odds(hidden[:, : L - 1], 1, slice(1, L), batch.own[:, 1:], None)
        told = torch.sigmoid(odds).numpy()
        after = torch.relu(net.base(batch.after) + net.place[0])
        outlook = torch.sigmoid(net.soon(after, batch.own_after)).numpy()
    gaps: list[float] = []
    soon: list[float] = []
    for forward in Batches(chained(), BatchConfig()):
        predictor.begin_forward(forward)
        for layer in range(L - 1):
            scores = predictor.predict(forward, layer, 1)
            assert scores is not None
            for key, score in zip(*scores[:2], strict=True):
                gaps.append(abs(score / UNIT - told[forward.index, layer, key % E]))
        predictor.end_forward(forward)
        soon += np.abs(predictor.forecast() / UNIT - outlook[forward.index].reshape(-1)).tolist()
    assert np.mean(gaps) < 0.02
    assert np.mean(soon) < 0.02


def test_the_loss_falls(data: Dataset, net: FloatNetwork) -> None:
    batch = Batch(data, np.arange(128), None)
    with torch.no_grad():
        learned = losses(net, batch, [1, 2], 0.0)
        untrained = losses(FloatNetwork(L, E, TRAINING, pregate=False), batch, [1, 2], 0.0)
    assert learned[0] < untrained[0] / 2
    assert learned[1] < untrained[1]


def test_the_same_seed_gives_the_same_integers(data: Dataset) -> None:
    short = Training(epochs=1, hidden=8, mixed=8, distances=2, batch=64, distances_a_step=1)
    one, other = (to_integers(train(data, short, None, lambda line: None), data) for _ in range(2))
    assert all((one[name] == other[name]).all() for name in one)
    changed = Training(epochs=1, hidden=8, mixed=8, distances=2, batch=64, distances_a_step=1, seed=1)
    third = to_integers(train(data, changed, None, lambda line: None), data)
    assert any((one[name] != third[name]).any() for name in one)


def test_a_pregate_that_is_right_is_believed() -> None:
    """Random routing, of which a pre-gate knows the next layer."""
    draw = np.random.default_rng(0)
    experts = np.stack([[draw.choice(E, K, replace=False) for _ in range(L)] for _ in range(300)]).astype(np.uint8)
    scores = np.full((300, L, 1, E), -4.0, np.float16)
    for layer in range(L - 1):
        np.put_along_axis(scores[:, layer, 0], experts[:, layer + 1].astype(int), np.float16(4), axis=1)
    scores[:, L - 1] = np.nan
    trace = memory_trace(experts, E, list(range(0, 301, 30)), [0] * 10, lookahead=scores)
    found = read_dataset(trace, range(10), 0.75)
    pregate = read_pregate(trace, 0, 300)
    assert pregate is not None
    assert pregate.shape == (300, L, 1, E)
    training = Training(epochs=6, hidden=16, mixed=8, distances=1, batch=32, lr=0.02, distances_a_step=1)
    fitted = to_integers(train(found, training, pregate, lambda line: None), found)
    assert "pregate" in fitted
    assert recall(fitted, trace) > 0.99


def test_training_begins_at_the_calibrated_pregate() -> None:
    """A pre-gate that names one right expert in two, and is sure of itself."""
    draw = np.random.default_rng(1)
    experts = np.stack([[draw.choice(E, K, replace=False) for _ in range(L)] for _ in range(400)]).astype(np.uint8)
    pregate = np.full((400, L, 2, E), 0.1, np.float16)
    for distance in (1, 2):
        for layer in range(L - distance):
            named = experts[:, layer + distance].astype(int)
            wrong = draw.random(400) < 0.5
            named[wrong] = (named[wrong] + 1) % E
            np.put_along_axis(pregate[:, layer, distance - 1], named, np.float16(0.9), axis=1)
    found = read_dataset(memory_trace(experts, E, list(range(0, 401, 40)), [0] * 10), range(10), 0.75)
    net = FloatNetwork(L, E, Training(hidden=8, mixed=8, distances=2), pregate=True)
    calibrate_pregate(net, found, pregate, 0)
    assert net.pregate is not None
    weights, bias = net.pregate.detach().numpy(), net.bias.detach().numpy()
    for distance in (1, 2):
        for target in range(distance, L):
            chance = pregate[:, target - distance, distance - 1].astype(np.float32)
            shown = pregate_logits(torch.from_numpy(chance)).numpy()
            logit, plain = weights[distance - 1, target]
            told = 1 / (1 + np.exp(-(logit * shown + plain * chance + bias[distance - 1, target])))
            chosen = found.chosen[:, target]
            for level in (0.1, 0.9):
                among = np.isclose(chance, level, atol=1e-3)
                assert told[among].mean() == pytest.approx(chosen[among].mean(), abs=0.02)
        # Nothing looks from one layer to itself or back.
        assert (weights[distance - 1, :distance] == 0).all()


def test_what_was_used_before_a_row_is_of_earlier_rows_of_its_request_alone(data: Dataset) -> None:
    row = 45
    assert data.last[39]
    assert not data.last[40]
    assert (data.shares[40] == 0).all()
    assert (data.shares[row] == data.chosen[row - 1]).all()
    kept = data.mean_routing.reshape(-1)
    for earlier in range(40, row):
        kept = kept + (data.routing[earlier] - kept) / 2
    assert np.allclose(data.sums[1, row], kept, atol=1e-6)


def test_what_comes_soon_is_of_later_rows(data: Dataset) -> None:
    told = sum(0.25 * 0.75 ** (later - 1) * data.chosen[10 + later] for later in range(1, 200))
    assert np.allclose(data.future[10], told, atol=1e-5)


def test_rank_weights_follow_the_gate() -> None:
    trace = chained(80)
    assert rank_weights(trace, 80).tolist() == [16, 16]
    gates = np.broadcast_to(np.array([0.75, 0.25], np.float16), (80, L, K)).copy()
    assert rank_weights(memory_trace(np.asarray(trace.experts), E, [0, 80], [0], weights=gates), 80).tolist() == [24, 8]


def test_rows_with_fewer_experts_are_refused() -> None:
    experts = np.full((4, L, K), 255, np.uint8)
    experts[:, :, 0] = 1
    with pytest.raises(ValueError, match="fewer than top_k"):
        read_dataset(memory_trace(experts, E, [0, 4], [0]), range(1), 0.75)


def test_forwards_of_the_trace_are_what_the_predictor_hears() -> None:
    """A guard of `recall`: one forward a token, in order."""
    some: list[Forward] = list(Batches(chained(40), BatchConfig()))
    assert [forward.index for forward in some] == list(range(40))
