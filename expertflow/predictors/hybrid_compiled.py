"""The fitted network laid out for the compiled functions, for forwards of one token: the same integers as numpy's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.forward import KnownForward
from expertflow.network import (
    CHANCES,
    LOGS,
    NUM_OWN,
    OWN_SHIFTS,
    PREGATE_ODDS,
    SHIFTS,
    SPAN,
    Flags,
    Floats,
    HistoryNetwork,
    Ints,
    Memory,
    rates_of,
)
from expertflow.parts import Prediction, Step, Worths

Odds = npt.NDArray[np.int16]

NOTHING: Ints = np.zeros(0, np.int64)
GROUP = 8
"""Forwards that are scored together."""


def arrays_hash(arrays: Iterable[npt.NDArray[Any]]) -> str:
    """Hash of types, shapes and values."""
    told = hashlib.sha256()
    for array in arrays:
        told.update(f"{array.dtype.str} {array.shape}".encode())
        told.update(np.ascontiguousarray(array).data)
    return told.hexdigest()


class CompiledNetwork:
    """Weights in the types of `expertflow.compiled`, and room for what its functions write.

    num_kept: how many of the best are scored. hidden [H]: activations after the last layer that was learned, or after
    the forward. All arrays of `learn` and `decide` that belong to a forward (sums, used, features) stay the history's.
    """

    def __init__(self, net: HistoryNetwork, functions: Any, num_kept: int) -> None:
        self.functions = functions
        self.net = net
        self.num_kept = num_kept
        self.tables, self.rank_weights = net.tables.astype(np.int16), net.rank_weights.astype(np.int32)
        self.place, self.table_bits = net.place.astype(np.int64), int(net.unit).bit_length() - 1
        self.places = list(self.place)
        self.weights = (
            net.mix.astype(np.int8),
            net.mix_scale.astype(np.int32),
            net.mix_bias.astype(np.int32),
            net.out.astype(np.int8),
            net.out_scale.astype(np.int32),
            net.bias.astype(np.int32),
            net.own_by_feature.astype(np.int32),
            np.zeros((1, 1, 1), np.int32) if net.pregate is None else net.pregate.astype(np.int32),
        )
        self.forecast_weights = (
            net.forecast_weights.astype(np.int8),
            net.forecast_scale.astype(np.int64),
            net.forecast_bias.astype(np.int64),
            net.forecast_own.astype(np.int64),
        )
        self.rates = (rates_of(SHIFTS, 1), rates_of(OWN_SHIFTS, 1))
        self.scales = PREGATE_ODDS.astype(np.int32), CHANCES.astype(np.int32)
        self.no_pregate = np.zeros((0, net.E), np.float32)
        self.hidden = np.zeros(net.H, np.int32)
        self.ranked = np.zeros((net.D, 2, net.E), np.int64)
        self.keys: Ints = np.zeros(len(self.rank_weights), np.int64)
        self.wants: Ints = np.zeros(net.D * net.E, np.int64)
        self.one_want = self.wants.data
        self.decided_by: tuple[npt.NDArray[Any], ...] = ()
        self.shared: Ints = NOTHING
        """The same for the functions that take addresses (`compiled.settle`)."""

    @property
    def hash(self) -> str:
        """Of all that scores depend on beside the forwards and the code."""
        told = (self.tables, self.rank_weights, self.place, self.net.prior, self.net.frequency, *self.rates, LOGS)
        return f"{self.table_bits} {arrays_hash([*told, *self.weights, *self.forecast_weights])}"

    def pregate(self, forward: KnownForward, layer: int) -> npt.NDArray[np.float32] | None:
        """Chances [any, E] by distance that are to be added, empty where none are recorded; None: none are added."""
        if self.net.pregate is None or layer == self.net.L - 1:
            return None
        recorded = None if forward.recorded is None else forward.recorded.lookahead(forward.rows, layer)
        return self.no_pregate if recorded is None else recorded[0]

    def learn(self, keys: Sequence[int], layer: int, sums: Ints, used: Floats) -> None:
        """The experts of one token at one layer, best first, have become known."""
        self.keys[:] = keys
        self.functions.learn(
            self.tables, self.rank_weights, self.keys, self.places[layer + 1], sums, used, self.table_bits, self.hidden
        )

    def close(self, memory: Memory, used: Floats, sums: Ints, features: Floats) -> None:
        """A forward has ended; memory and features are brought up to date in place, which nobody else holds."""
        self.functions.close(
            memory.states,
            memory.use.reshape(NUM_OWN - 1, -1),
            used,
            sums,
            *self.rates,
            LOGS,
            self.place[0],
            self.table_bits,
            features.reshape(NUM_OWN, -1),
            self.hidden,
        )
        memory.shares = used.reshape(self.net.L, self.net.E)

    def forecast(self, features: Floats) -> Ints:
        """Chances [N] of use in the next forwards, as `HistoryNetwork.forecast`; features [F, L, E]."""
        return self.forecast_of(self.hidden, features.reshape(NUM_OWN, -1))

    def forecast_of(self, hidden: npt.NDArray[np.int32], features: Floats) -> Ints:
        """The same of activations after a forward [H] and features [F, N]."""
        found: Ints = np.empty(self.net.L * self.net.E, np.int64)
        self.functions.forecast(hidden, *self.forecast_weights, features, self.scales[1], found)
        return found

    def look(
        self, features: Floats, pregate: npt.NDArray[np.float32] | None, layer: int, seen: int, chance: Ints
    ) -> list[Prediction | None]:
        """Predictions at distances seen + 1 … seen + len(chance) from `layer`; chance [any, E] is written.

        pregate: as `pregate` says.
        """
        ranked = self.ranked[: len(chance)]
        told = pregate if pregate is not None else self.no_pregate
        found = self.functions.look(
            self.hidden,
            *self.weights,
            features,
            told,
            *self.scales,
            (layer + 1) % self.net.L,
            seen,
            pregate is not None,
            chance,
            ranked,
        )
        made: list[Prediction | None] = [
            Prediction(keys, scores, chance[row])
            for row, (keys, scores) in enumerate(ranked[:found, :, : self.num_kept].tolist())
        ]
        return made + [None] * (len(chance) - found)

    def decide_by(self, thresholds: Ints, residency: memoryview, worths: Worths) -> None:
        """Bind what `decide` reads and writes beside the network."""
        states = np.frombuffer(residency, np.uint8)
        self.decided_by = (thresholds, states, worths.soon, worths.chance, worths.worth, worths.bar, worths.held)
        self.shared = self.functions.packed(
            worths.soon, worths.chance, worths.worth, worths.bar, worths.held, states, 0, self.net.L, self.net.E
        )

    def decide(
        self,
        keys: Sequence[int] | None,
        layer: int,
        sums: Ints,
        used: Floats,
        features: Floats,
        pregate: npt.NDArray[np.float32] | None,
        reach: int,
    ) -> Step:
        """`learn` of keys (None: known already), then one decision for distances 1 … reach."""
        if keys is None:
            new = NOTHING
        else:
            new = self.keys
            new[:] = keys
        told = pregate if pregate is not None else self.no_pregate
        num_wants, num_found, num_selected, overfetched = self.functions.decide(
            self.tables,
            self.rank_weights,
            new,
            self.places[layer + 1],
            sums,
            used,
            self.table_bits,
            self.hidden,
            *self.weights,
            features,
            told,
            *self.scales,
            (layer + 1) % self.net.L,
            reach,
            pregate is not None,
            self.num_kept,
            *self.decided_by,
            self.wants,
        )
        wants = self.one_want[:num_wants].tolist() if num_wants else []
        return wants, num_selected, num_found, bool(overfetched)


def chances_of(odds: Odds) -> Ints:
    """Chances in 2^-16 of log-odds within the span in which they differ."""
    return CHANCES[odds + SPAN]


class CompiledBlock:
    """Forwards of one token each, taken in together; a distance is scored for `GROUP` of them when it is first asked
    for: enough to read a layer's weights once for many, and few enough that little is scored which nobody asks for.

    hidden [n, L + 1, H]: activations after each layer and after the forward; before and after [n, F, N]: own features.
    """

    def __init__(self, network: CompiledNetwork) -> None:
        self.network = network
        net = self.net = network.net
        self.fixed = (
            network.tables,
            network.rank_weights,
            network.place,
            network.table_bits,
            net.prior,
            net.frequency.reshape(-1),
            *network.rates,
            LOGS,
        )
        self.reach: list[int] = []
        """Distances 1 … reach are scored, by group."""
        self._make_room(0)

    def _make_room(self, num: int) -> None:
        net = self.net
        self.hidden = np.zeros((num, net.L + 1, net.H), np.int32)
        self.before, self.after = (np.zeros((num, NUM_OWN, net.L * net.E)) for _ in range(2))
        self.features = tuple(of.reshape(num, NUM_OWN, net.L, net.E) for of in (self.before, self.after))
        """The same, as `score_block` sees them."""
        self.scored = ScoredForwards(self.network, np.zeros((num, net.L, net.D, net.E), np.int16))

    def take(self, keys: Ints, starts: Flags, memory: Memory) -> None:
        """Take in forwards: keys [n, L, K], best first; starts [n]: a request begins. memory is brought up to date in
        place."""
        if len(keys) != len(self.hidden):
            self._make_room(len(keys))
        self.reach = [0] * -(-len(keys) // GROUP)
        self.network.functions.learn_block(
            keys,
            starts,
            *self.fixed,
            memory.states,
            memory.use.reshape(NUM_OWN - 1, -1),
            memory.shares.reshape(-1),
            self.hidden,
            self.before,
            self.after,
        )

    def forecast(self, row: int) -> Ints:
        """Chances [N] of use in the next forwards, after forward `row`."""
        return self.network.forecast_of(self.hidden[row, -1], self.after[row])

    def score(self, reach: int, row: int) -> ScoredForwards:
        """Score all distances up to `reach` that are not, for the forwards of the group of `row` at least."""
        network, group = self.network, row // GROUP
        start, stop = group * GROUP, min((group + 1) * GROUP, len(self.hidden))
        for ahead in range(self.reach[group], reach):
            network.functions.score_block(
                self.hidden, *network.weights, *self.features, ahead, start, stop, self.scored.odds
            )
        self.reach[group] = max(reach, self.reach[group])
        return self.scored

    def chances(self, distance: int, start: int, stop: int) -> Ints:
        """As `AnnouncedBlock` asks."""
        for row in range(start - start % GROUP, stop, GROUP):
            self.score(distance, row)
        return self.scored.chances(distance, start, stop)


class ScoredForwards:
    """odds [n, L, at least D, E]: log-odds by forward, layer from which they are seen, and distance, of the experts
    there."""

    def __init__(self, network: CompiledNetwork, odds: Odds) -> None:
        self.network = network
        self.odds = odds
        self._order: Ints = np.zeros(network.net.E, np.int64)
        self._packed: Ints = NOTHING

    def chances(self, distance: int, start: int, stop: int) -> Ints:
        """Chances [stop - start, L, E] of forwards start … stop - 1."""
        return chances_of(self.odds[start:stop, :, distance - 1])

    @property
    def packed(self) -> Ints:
        """What `compiled.decide_scored` takes of it."""
        network = self.network
        if not len(self._packed):
            chances = network.scales[1]
            self._packed = network.functions.packed(
                network.num_kept,
                self.odds,
                chances,
                network.decided_by[0],
                self._order,
                network.wants,
                self.odds.shape[2],
                len(chances),
            )
        return self._packed
