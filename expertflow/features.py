"""What the forest is shown of a forward, a layer and a distance: one integer vector, alike in fitting and running.

Columns (E experts): the pre-gate's chances of the target layer [E] in 1/4096, or where no pre-gate reaches (the target
is in the next forward) what the target layer chose in this one; the shares of the forward's tokens that chose each
expert of the last four layers [4·E], oldest first, in 1/256, before a forward's first layers the last ones of the
forward before; token ids hashed into 64 counts; Dist/k² of the token embeddings in 1/64; tokens k; source layer;
distance. The inputs are those of arXiv 2510.26730, their form our own choice. Knows nothing of traces: forwards bring
their rows with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.diversity import embedding_distance
from expertflow.forward import KnownForward

Ints = npt.NDArray[np.int64]
Small = npt.NDArray[np.int16]
Chances = npt.NDArray[np.floating[Any]]

CHANCE_ONE = 1 << 12
"""Chances in features."""
SHARE_ONE = 1 << 8
SPREAD_ONE = 1 << 6
LAYERS_BACK = 4
NUM_HASHES = 64
_HASH = 2654435761
_LARGEST = 32767


def num_features(num_experts: int) -> int:
    """Length F of the vector."""
    return (1 + LAYERS_BACK) * num_experts + NUM_HASHES + 4


def hashed(token_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Token ids as numbers 0 … 63: the upper bits of Knuth's multiplicative hash of 32 bits."""
    mixed = (np.asarray(token_ids).astype(np.uint64) * np.uint64(_HASH)) & np.uint64(0xFFFFFFFF)
    return (mixed >> np.uint64(26)).astype(np.int64)


def hashed_counts(token_ids: npt.NDArray[Any]) -> Small:
    """Token ids [k] as counts [64] of their hashes."""
    return np.minimum(np.bincount(hashed(token_ids), minlength=NUM_HASHES), _LARGEST).astype(np.int16)


def union_chance(chances: Chances) -> Chances:
    """Chance [E] that any row picks an expert, from chances [rows, E]."""
    united: Chances = chances[0]
    if len(chances) > 1:
        united = 1.0 - np.prod(1.0 - chances.astype(np.float64), axis=0)
    return united


def write_features(
    out: Small, shares: Small, chance: Chances | None, layer: int, distance: int, num_layers: int, num_experts: int
) -> None:
    """What depends on layer and distance, into vectors [..., F], of one forward or of many.

    shares [..., (4 + L)·E]: the last four layers of the forward before, then this one's. chance [..., E]: of the
    pre-gate; None where the target is in the next forward.
    """
    L, E = num_layers, num_experts
    if chance is None:
        assert layer + distance >= L
        first = (LAYERS_BACK + layer + distance - L) * E
        np.multiply(shares[..., first : first + E], CHANCE_ONE // SHARE_ONE, out=out[..., :E])
    else:
        np.rint(chance * np.float32(CHANCE_ONE), out=out[..., :E], casting="unsafe")
    out[..., E : (1 + LAYERS_BACK) * E] = shares[..., (layer + 1) * E : (layer + 1 + LAYERS_BACK) * E]
    out[..., -2] = layer
    out[..., -1] = distance


class ForwardFeatures:
    """Features of one forward after the other, as their routing becomes known.

    A request's first forward has none before it. In a batch the forward before is whatever ran before.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.L, self.E = num_layers, num_experts
        self.vector: Small = np.zeros(num_features(num_experts), np.int16)
        """What `fill` returned last; overwritten by the next call."""
        self._shares: Small = np.zeros((LAYERS_BACK + num_layers) * num_experts, np.int16)
        self._hashes, self._numbers = self.vector[-NUM_HASHES - 4 : -4], self.vector[-4:]
        self._num_known = num_layers

    def begin(self, forward: KnownForward) -> None:
        """A forward begins: what is known of its tokens."""
        before = self._shares[self.L * self.E :].copy()
        self._shares[:] = 0
        # Another request's last layers say nothing.
        if len(forward.requests_started) < len(forward.requests):
            self._shares[: LAYERS_BACK * self.E] = before
            self._shares[: max(LAYERS_BACK - self.L, 0) * self.E] = 0
        self._num_known = 0
        k, recorded = forward.num_tokens, forward.recorded
        ids = None if recorded is None else recorded.token_ids(forward.rows)
        self._hashes[:] = 0 if ids is None else hashed_counts(ids)
        spread = 0.0
        if k > 1 and recorded is not None and (vectors := recorded.embedding(forward.rows)) is not None:
            spread = SPREAD_ONE * embedding_distance(vectors) / k**2
        self._numbers[0] = min(round(spread), _LARGEST)
        self._numbers[1] = min(k, _LARGEST)

    def know(self, forward: KnownForward, layer: int) -> None:
        """The routing of the layers up to `layer` has become known."""
        while self._num_known <= layer:
            at, k = self._num_known, forward.num_tokens
            # A key is layer * E + expert: shares of all layers are one array, after those of the forward before.
            first = LAYERS_BACK * self.E
            counts = None if forward.counts is None else forward.counts[at]
            for key in forward.demands[at]:
                self._shares[first + key] = SHARE_ONE if counts is None else SHARE_ONE * counts[key] // k
            self._num_known += 1

    def pregate(self, forward: KnownForward, layer: int, distance: int) -> Chances | None:
        """The recorded pre-gate's chance [E] that any row picks an expert; None where nothing is recorded."""
        if forward.recorded is None or layer + distance >= self.L:
            return None
        recorded = forward.recorded.lookahead(forward.rows, layer)
        if recorded is None or distance > recorded.shape[1]:
            return None
        united = union_chance(recorded[:, distance - 1])
        # A NaN makes every sum one.
        return united if united.sum() >= 0 else None

    def fill(self, chance: Chances | None, layer: int, distance: int) -> Small:
        """The vector [F] for layer `layer`, which is known; chance [E] of the pre-gate, None past the last layer."""
        write_features(self.vector, self._shares, chance, layer, distance, self.L, self.E)
        return self.vector
