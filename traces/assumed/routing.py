"""Makes routing of a family for a topology.

The score of expert e in layer l at token t of a request is

    √popularity · b[l,e] + u_t[l,e],      u_t[l] = √(1−depth²) · v_t[l] + depth · u_t[l−1][order_l],   u_t[0] = v_t[0]

with b and v normal: v_t = √request · a + √slow · s_t + √fast · f_t + √fresh · n_t, where a is drawn once a request,
s and f forget half of themselves in `SLOW` and `FAST` tokens, and n is new with each token. `order_l` is a random order
of the experts: each follows one of the layer before, whose choice thus tells of it, two layers on less, and so on.
All is of unit variance, so that the shares are the correlations of the scores of one expert at two tokens, and over
layers, whatever the number of layers, experts and top-k. The K best are chosen, best first.

Each request has a random stream of its own (PCG64), and nothing but draws, element by element arithmetic and a stable
sort is used: same seed, same bytes, and the first requests are the same however many follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from traces.assumed.families import FAST, SLOW, Family

AT_ONCE = 1 << 20
"""Scores that are made side by side."""

Floats = npt.NDArray[np.float64]


class Topology(NamedTuple):
    """MoE layers, experts of each, and how many of them a token takes."""

    num_layers: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.num_layers}x{self.num_experts} top {self.top_k}"


def make_routing(family: Family, topology: Topology, lengths: Sequence[int], seed: int) -> npt.NDArray[np.integer]:
    """Experts [T,L,K], best first, uint8 or uint16, of requests of these lengths, one after the other."""
    num_layers, num_experts, top_k = topology
    rng = _stream(seed, 0)
    bias = np.sqrt(family.popularity) * rng.standard_normal((num_layers, num_experts))
    orders = np.argsort(rng.random((num_layers, num_experts)), axis=1, kind="stable")
    experts = np.empty((sum(lengths), num_layers, top_k), np.uint8 if num_experts <= 255 else np.uint16)
    first = 0
    for number, length in enumerate(lengths):
        request = _Request(family, (num_layers, num_experts), _stream(seed, number + 1))
        block = max(1, AT_ONCE // (num_layers * num_experts))
        for start in range(0, length, block):
            scores = request.scores(min(block, length - start))
            _down_the_layers(scores, orders, family.depth)
            scores += bias
            ranked = np.argsort(-scores, axis=2, kind="stable")[:, :, :top_k]
            experts[first + start : first + start + len(ranked)] = ranked
        first += length
    return experts


def _stream(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))


class _Request:
    """What a request's scores are made of, from token to token."""

    def __init__(self, family: Family, shape: tuple[int, int], rng: np.random.Generator) -> None:
        self._family, self._shape, self._rng = family, shape, rng
        self._fixed = np.sqrt(family.request) * rng.standard_normal(shape)
        self._slow, self._fast = rng.standard_normal(shape), rng.standard_normal(shape)

    def scores(self, num_tokens: int) -> Floats:
        """v of the next tokens, [tokens, L, E]."""
        family, rng = self._family, self._rng
        found: Floats = np.sqrt(family.fresh) * rng.standard_normal((num_tokens, *self._shape))
        found += self._fixed
        for row in found:
            row += np.sqrt(family.slow) * self._slow + np.sqrt(family.fast) * self._fast
            self._slow = _later(self._slow, SLOW, rng)
            self._fast = _later(self._fast, FAST, rng)
        return found


def _later(state: Floats, half_life: float, rng: np.random.Generator) -> Floats:
    kept = 0.5 ** (1 / half_life)
    later: Floats = kept * state + np.sqrt(1 - kept * kept) * rng.standard_normal(state.shape)
    return later


def _down_the_layers(scores: Floats, orders: npt.NDArray[np.intp], depth: float) -> None:
    """Let each layer of `scores` [tokens, L, E] follow the one before, in place."""
    own = np.sqrt(1 - depth * depth)
    for layer in range(1, scores.shape[1]):
        scores[:, layer] *= own
        scores[:, layer] += depth * scores[:, layer - 1][:, orders[layer]]
