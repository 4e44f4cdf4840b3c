"""How local a routing is: the correlations that a family is fitted to, and the figures that a person reads.

Shapes: T tokens, L layers, K top-k, E experts, R requests; `experts` [T,L,K], `request_start` [R+1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.assumed.latent import Floats, correlation
from traces.stats import activation, check_routing, layer_onehot, reuse

LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TENTH = 0.1

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Locality:
    """By layer. popularity: correlation of an expert's scores at tokens of two requests, [L]. lags: at tokens of one
    request so far apart, [lags, L]. depth: with one expert of the layer before, [L−1]. NaN where the routing is too
    short to tell.
    """

    popularity: Floats
    lags: Floats
    depth: Floats


def measure(experts: Integers, request_start: Integers, num_experts: int) -> Locality:
    """The locality of a routing; ValueError for what is no routing."""
    share = experts.shape[2] / num_experts
    return Locality(
        popularity=correlation(_across_requests(experts, request_start, num_experts), share),
        lags=correlation(reuse(experts, request_start, num_experts, LAGS), share),
        depth=correlation(_down_the_layers(experts, request_start, num_experts), share),
    )


def _down_the_layers(experts: Integers, request_start: Integers, num_experts: int) -> Floats:
    """How often an expert's best predecessor in the layer before is followed by it, as an overlap at even use, [L−1].

    The predecessor is chosen on every second request, by how far the two come together more often than by chance, and
    judged on the others: as a share of what is possible beyond chance. NaN with one request.
    """
    ids = check_routing(experts, request_start, num_experts)
    share, found = ids.shape[2] / num_experts, np.full(ids.shape[1] - 1, np.nan)
    request = np.repeat(np.arange(len(request_start) - 1), np.diff(request_start))
    chosen_on, each = request % 2 == 0, np.arange(num_experts)
    if chosen_on.all():
        return found
    before = layer_onehot(ids[:, 0], num_experts)
    for layer in range(1, ids.shape[1]):
        hot = layer_onehot(ids[:, layer], num_experts)
        together, chance, _ = _met(before[chosen_on], hot[chosen_on])
        predecessor = ((together - chance) / np.sqrt(chance + 1)).argmax(axis=0)
        together, chance, most = (table[predecessor, each].sum() for table in _met(before[~chosen_on], hot[~chosen_on]))
        found[layer - 1] = share + (1 - share) * (together - chance) / max(most - chance, 1e-9)
        before = hot
    return found


def _met(before: npt.NDArray[np.float32], hot: npt.NDArray[np.float32]) -> tuple[Floats, Floats, Floats]:
    """How often each expert f of a layer and e of the next were chosen by one token, [f, e]: seen, by chance, and at
    most. Counts below 2^24 are whole in float32, in whatever order they are summed."""
    used_before, used = before.sum(axis=0, dtype=np.float64), hot.sum(axis=0, dtype=np.float64)
    together = (before.T @ hot).astype(np.float64)
    return together, np.outer(used_before, used) / len(hot), np.minimum.outer(used_before, used)


def _across_requests(experts: Integers, request_start: Integers, num_experts: int) -> Floats:
    """Mean over pairs of requests of the share of a token's experts that a token of the other chose, [L]; NaN with one
    request. Pairs within a request would count its subject as popularity."""
    ids = check_routing(experts, request_start, num_experts)
    num_layers = ids.shape[1]
    lengths = np.diff(request_start)
    if (lengths > 0).sum() < 2:
        return np.full(num_layers, np.nan)
    starts, lengths = np.asarray(request_start)[:-1][lengths > 0], lengths[lengths > 0]
    found = np.empty(num_layers)
    for layer in range(num_layers):
        hot = layer_onehot(ids[:, layer], num_experts)
        rate = np.add.reduceat(hot, starts, axis=0, dtype=np.float64) / lengths[:, None]
        total = rate.sum(axis=0)
        num_pairs = len(rate) * (len(rate) - 1)
        mean_size = total.sum() / len(rate)
        found[layer] = (np.sum(total * total) - np.sum(rate * rate)) / num_pairs / max(mean_size, 1e-9)
    return found


def share_of_top_tenth(experts: Integers, request_start: Integers, num_experts: int) -> float:
    """Share of a layer's choices that go to its most chosen tenth of experts, mean over layers; a tenth that is no
    whole number is interpolated."""
    chosen = -np.sort(-activation(experts, request_start, num_experts), axis=1)
    reached = np.cumsum(chosen, axis=1) / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-300)
    edges = np.arange(num_experts + 1)
    return float(np.mean([np.interp(TENTH * num_experts, edges, [0.0, *row]) for row in reached]))


def beyond_chance(experts: Integers, request_start: Integers, num_experts: int, lag: int) -> float:
    """(o − c)/(1 − c) of the overlap o of a token's experts with those `lag` tokens before, where c = K/E: mean over
    layers."""
    chance = experts.shape[2] / num_experts
    seen = reuse(experts, request_start, num_experts, (lag,))[0]
    return float(np.mean((seen - chance) / (1 - chance)))
