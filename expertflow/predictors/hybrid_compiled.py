"""The fitted network laid out for the compiled functions, for forwards of one token: the same integers as numpy's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.forward import KnownForward
from expertflow.network import (
    CODES,
    LOGS,
    NUM_OWN,
    OWN_SHIFTS,
    PREGATE_ODDS,
    SHIFTS,
    Floats,
    HistoryNetwork,
    Ints,
    Memory,
    chances_of_codes,
    rates_of,
)
from expertflow.parts import Prediction, Step, Worths

Codes = npt.NDArray[np.uint16]
Pregate = npt.NDArray[np.float32]

NOTHING: Ints = np.zeros(0, np.int64)


def arrays_hash(arrays: Iterable[npt.NDArray[Any]]) -> str:
    """Hash of types, shapes and values."""
    told = hashlib.sha256()
    for array in arrays:
        told.update(f"{array.dtype.str} {array.shape}".encode())
        told.update(np.ascontiguousarray(array).data)
    return told.hexdigest()


class CompiledNetwork:
    """Weights in the types of `expertflow.compiled`, and room for what its functions write.

    num_kept: how many of the best are scored. hidden [at least H]: activations after the last layer that was learned,
    or after the forward. What belongs to a forward (sums, used, own features) stays the history's.
    """

    def __init__(self, net: HistoryNetwork, functions: Any, num_kept: int) -> None:
        self.functions = functions
        self.net = net
        self.num_kept = num_kept
        num_keys, table_bits = net.L * net.E, int(net.unit).bit_length() - 1
        self.hidden = np.zeros(functions.padded(net.H, functions.QUAD), np.uint8)
        self.keys: Ints = np.zeros(len(net.rank_weights), np.int64)
        self.sizes = functions.Sizes(
            net.L,
            net.E,
            len(self.keys),
            net.H,
            net.M,
            net.D,
            len(SHIFTS),
            NUM_OWN,
            table_bits,
            len(LOGS),
            len(PREGATE_ODDS),
            len(CODES),
        )
        self.fitted: tuple[npt.NDArray[Any], ...] = functions.Network(
            tables=net.tables.astype(np.int16),
            rank_weights=net.rank_weights.astype(np.int32),
            place=net.place.astype(np.int64),
            prior=np.ascontiguousarray(net.prior),
            frequency=net.frequency.reshape(num_keys),
            rates=rates_of(SHIFTS, 1),
            own_rates=rates_of(OWN_SHIFTS, 1),
            logs=LOGS,
            mix=functions.by_quads(net.mix),
            mix_scale=np.ascontiguousarray(net.mix_scale),
            mix_bias=net.mix_bias.astype(np.float64, "C"),
            out=functions.by_quads(net.out),
            out_scale=np.ascontiguousarray(net.out_scale),
            bias=np.ascontiguousarray(net.bias),
            own=np.ascontiguousarray(net.own_by_feature.swapaxes(1, 2)),
            pregate=np.zeros((net.D, net.L, 2)) if net.pregate is None else np.ascontiguousarray(net.pregate),
            pregate_odds=PREGATE_ODDS,
            forecast=functions.by_quads(net.forecast_weights),
            forecast_scale=net.forecast_scale,
            forecast_bias=net.forecast_bias,
            forecast_own=np.ascontiguousarray(net.forecast_own),
            codes=CODES,
            keys=self.keys,
        )
        self.packed: Ints = functions.packed(*self.sizes, *self.fitted)
        self.no_pregate: Pregate = np.zeros((0, net.E), np.float32)
        self.codes: Codes = np.zeros(num_keys, np.uint16)
        self.ranked = np.zeros((net.D, 2, net.E), np.int64)
        self.order, self.wants = np.zeros(net.E, np.int64), np.zeros(net.D * net.E, np.int64)
        self.one_want = self.wants.data
        self.decided_by: tuple[npt.NDArray[Any], ...] = ()
        self.choice: Ints = NOTHING
        """What decides, packed (`compiled.Choice`)."""

    @property
    def hash(self) -> str:
        """Of all that scores depend on beside the forwards and the code."""
        return f"{self.sizes} {arrays_hash(self.fitted[:-1])}"

    def pregate(self, forward: KnownForward, layer: int) -> Pregate | None:
        """Chances [any, E] by distance that are to be added, empty where none are recorded; None: none are added."""
        if self.net.pregate is None or layer == self.net.L - 1:
            return None
        recorded = None if forward.recorded is None else forward.recorded.lookahead(forward.rows, layer)
        return self.no_pregate if recorded is None else np.ascontiguousarray(recorded[0])

    def pack_history(self, sums: Ints, used: Floats, features: Floats) -> Ints:
        """For all that takes a history: sums [(2 + R)·H], used [N] and own features [F, L, E] of the forward that runs,
        which stay where they are."""
        packed: Ints = self.functions.packed(*self.functions.History(sums, used, features, self.hidden))
        return packed

    def learn(self, keys: Sequence[int], layer: int, history: Ints) -> None:
        """The experts of one token at one layer, best first, have become known."""
        self.keys[:] = keys
        self.functions.learn(self.packed, history, layer)

    def close(self, history: Ints, memory: Memory, used: Floats) -> None:
        """A forward has ended; memory and features are brought up to date in place, which nobody else holds."""
        self.functions.close(self.packed, history, memory.states, memory.use.reshape(NUM_OWN - 1, -1))
        memory.shares = used.reshape(self.net.L, self.net.E)

    def forecast(self, history: Ints) -> Ints:
        """Chances [N] of use in the next forwards, as `HistoryNetwork.forecast`."""
        self.functions.forecast(self.packed, history, self.codes)
        return chances_of_codes(self.codes)

    def look(
        self, history: Ints, pregate: Pregate | None, layer: int, seen: int, chance: Ints
    ) -> list[Prediction | None]:
        """Predictions at distances seen + 1 … seen + len(chance) from `layer`; chance [any, E] is written.

        pregate: as `pregate` says.
        """
        ranked = self.ranked[: len(chance)]
        gated = pregate is not None
        told = self.no_pregate if pregate is None else pregate
        first = (layer + 1) % self.net.L
        found = self.functions.look(self.packed, history, told, gated, first, seen, chance, ranked)
        made: list[Prediction | None] = [
            Prediction(keys, scores, chance[row])
            for row, (keys, scores) in enumerate(ranked[:found, :, : self.num_kept].tolist())
        ]
        return made + [None] * (len(chance) - found)

    def decide_by(self, thresholds: Ints, residency: memoryview, worths: Worths) -> None:
        """Bind what decisions read and write beside the network."""
        states = np.frombuffer(residency, np.uint8)
        self.decided_by = (*worths, states, NOTHING, thresholds, self.order, self.wants)
        self.choice = self.choice_of(NOTHING, NOTHING)

    def choice_of(self, scores: npt.NDArray[Any], known: Ints) -> Ints:
        """What decides, for a block with these scores [n, L, D + 1, E] and known [n, L]."""
        net, num = self.net, len(known)
        arrays = self.functions.Choice(*self.decided_by, scores, known)
        packed: Ints = self.functions.packed(net.L, net.E, net.D, self.num_kept, num, *arrays)
        return packed

    def decide(
        self, keys: Sequence[int] | None, layer: int, history: Ints, pregate: Pregate | None, reach: int
    ) -> Step:
        """`learn` of keys (None: known already), then one decision for distances 1 … reach."""
        if keys is not None:
            self.keys[:] = keys
        told = self.no_pregate if pregate is None else pregate
        num_wants, num_found, num_selected, overfetched = self.functions.decide(
            self.packed, history, self.choice, told, pregate is not None, layer, reach, keys is not None
        )
        wants = self.one_want[:num_wants].tolist() if num_wants else []
        return wants, num_selected, num_found, bool(overfetched)
