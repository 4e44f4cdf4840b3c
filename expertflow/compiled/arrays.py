"""Which arrays compiled functions share, packed by those who own them and unpacked inside (`compiling.packed`).

Shape letters as in `network`; A and B are numbers of quads, and widths filled up, as `products.by_quads` has them.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from expertflow.compiled.compiling import array_at, inner
from expertflow.compiled.products import COLUMNS, QUAD


class Network(NamedTuple):
    """What was fitted, and room for one token's experts. Numbers in float64 are whole.

    tables i2 [N, (2 + R)·H], rank_weights i4 [K], place i8 [L + 1, H], prior f8 [R, H], frequency f8 [N], rates f8 [R],
    own_rates f8 [F - 1], logs f8 (`network.LOGS`); mix i1 [L, A · B · 4] (`by_quads`), mix_scale and mix_bias f8 [L, M]
    and [D, L, M], out i1 [L, A · B · 4], out_scale and bias f8 [L, E] and [D, L, E], own f8 [D, L, F, E], pregate
    f8 [D, L, 2], pregate_odds f8; forecast i1 [A · B · 4], forecast_scale and forecast_bias f8 [N], forecast_own
    f8 [F, N]; codes u2 (`network.CODES`); keys i8 [K].
    """

    tables: Any
    rank_weights: Any
    place: Any
    prior: Any
    frequency: Any
    rates: Any
    own_rates: Any
    logs: Any
    mix: Any
    mix_scale: Any
    mix_bias: Any
    out: Any
    out_scale: Any
    bias: Any
    own: Any
    pregate: Any
    pregate_odds: Any
    forecast: Any
    forecast_scale: Any
    forecast_bias: Any
    forecast_own: Any
    codes: Any
    keys: Any


class Sizes(NamedTuple):
    """What the shapes of a network's arrays do not say at the place where they are needed."""

    L: int
    E: int
    K: int
    H: int
    M: int
    D: int
    R: int
    F: int
    table_bits: int
    num_logs: int
    num_pregate_odds: int
    num_codes: int


@inner
def sizes_at(shared):
    """The `Sizes` that a packed network begins with."""
    return Sizes(
        shared[0],
        shared[1],
        shared[2],
        shared[3],
        shared[4],
        shared[5],
        shared[6],
        shared[7],
        shared[8],
        shared[9],
        shared[10],
        shared[11],
    )


@inner
def quads(size):
    """How many quads hold `size` values."""
    return (size + QUAD - 1) // QUAD


@inner
def filled(size):
    """Columns that hold `size` of them."""
    return (size + COLUMNS - 1) // COLUMNS * COLUMNS


@inner
def network_at(shared):
    """The network behind `packed(*sizes, *network)`."""
    s = sizes_at(shared)
    num_keys, at = s.L * s.E, shared[12:]
    return Network(
        array_at(at[0], (num_keys, (2 + s.R) * s.H), np.int16),
        array_at(at[1], (s.K,), np.int32),
        array_at(at[2], (s.L + 1, s.H), np.int64),
        array_at(at[3], (s.R, s.H), np.float64),
        array_at(at[4], (num_keys,), np.float64),
        array_at(at[5], (s.R,), np.float64),
        array_at(at[6], (s.F - 1,), np.float64),
        array_at(at[7], (s.num_logs,), np.float64),
        array_at(at[8], (s.L, quads(s.H) * filled(s.M) * QUAD), np.int8),
        array_at(at[9], (s.L, s.M), np.float64),
        array_at(at[10], (s.D, s.L, s.M), np.float64),
        array_at(at[11], (s.L, quads(s.M) * filled(s.E) * QUAD), np.int8),
        array_at(at[12], (s.L, s.E), np.float64),
        array_at(at[13], (s.D, s.L, s.E), np.float64),
        array_at(at[14], (s.D, s.L, s.F, s.E), np.float64),
        array_at(at[15], (s.D, s.L, 2), np.float64),
        array_at(at[16], (s.num_pregate_odds,), np.float64),
        array_at(at[17], (quads(s.H) * filled(num_keys) * QUAD,), np.int8),
        array_at(at[18], (num_keys,), np.float64),
        array_at(at[19], (num_keys,), np.float64),
        array_at(at[20], (s.F, num_keys), np.float64),
        array_at(at[21], (s.num_codes,), np.uint16),
        array_at(at[22], (s.K,), np.int64),
    )


class History(NamedTuple):
    """The forward that runs: sums i8 [(2 + R)·H], over all layers, over recent layers, one per rate; used f8 [N], 1 at
    the experts used; own features f8 [F, N]; activations u1 [4 · A], filled up with zeros."""

    sums: Any
    used: Any
    features: Any
    hidden: Any


@inner
def history_at(shared, s):
    """The history behind `packed(*history)`, for a network of these sizes."""
    num_keys = s.L * s.E
    return History(
        array_at(shared[0], ((2 + s.R) * s.H,), np.int64),
        array_at(shared[1], (num_keys,), np.float64),
        array_at(shared[2], (s.F, num_keys), np.float64),
        array_at(shared[3], (quads(s.H) * QUAD,), np.uint8),
    )


class Block(NamedTuple):
    """n forwards of one token each: activations u1 [n, L + 1, 4 · A] after each layer and after the forward; own
    features i2 [n, F, N] before and after it; the recorded pre-gate's chances f4 [n, L, P, E], of which those of known
    i8 [n, L] distances are numbers; scores u2 [n, L, D + 1, E] (`network.CODES`): by the layer that they are seen from
    and by distance, and last the forecast.
    """

    hidden: Any
    before: Any
    after: Any
    pregate: Any
    known: Any
    scores: Any


@inner
def block_at(shared, s):
    """The block behind `packed(n, P, *block)`, for a network of these sizes."""
    num, num_ahead, num_keys = shared[0], shared[1], s.L * s.E
    return Block(
        array_at(shared[2], (num, s.L + 1, quads(s.H) * QUAD), np.uint8),
        array_at(shared[3], (num, s.F, num_keys), np.int16),
        array_at(shared[4], (num, s.F, num_keys), np.int16),
        array_at(shared[5], (num, s.L, num_ahead, s.E), np.float32),
        array_at(shared[6], (num, s.L), np.int64),
        array_at(shared[7], (num, s.L, s.D + 1, s.E), np.uint16),
    )


class Choice(NamedTuple):
    """What decides, by key [N] unless it says otherwise: soon, chance, worth, bar and held i8 (`parts.Worths`);
    residency u1; keys i8 [E], which begins with those that a layer demanded; thresholds i8 [L + 1] by distance; order
    i8 [E]: room; wants i8 [D · E]: what is wanted and absent. For a block also its scores and known.
    """

    soon: Any
    chance: Any
    worth: Any
    bar: Any
    held: Any
    residency: Any
    keys: Any
    thresholds: Any
    order: Any
    wants: Any
    scores: Any
    known: Any


@inner
def choice_at(shared):
    """The choice behind `packed(L, E, D, num_kept, n, *choice)`; for what is not used any number will do."""
    num_layers, num_experts, depth, num, at = shared[0], shared[1], shared[2], shared[4], shared[5:]
    num_keys = num_layers * num_experts
    return Choice(
        array_at(at[0], (num_keys,), np.int64),
        array_at(at[1], (num_keys,), np.int64),
        array_at(at[2], (num_keys,), np.int64),
        array_at(at[3], (num_keys,), np.int64),
        array_at(at[4], (num_keys,), np.int64),
        array_at(at[5], (num_keys,), np.uint8),
        array_at(at[6], (num_experts,), np.int64),
        array_at(at[7], (num_layers + 1,), np.int64),
        array_at(at[8], (num_experts,), np.int64),
        array_at(at[9], (depth * num_experts,), np.int64),
        array_at(at[10], (num, num_layers, depth + 1, num_experts), np.uint16),
        array_at(at[11], (num, num_layers), np.int64),
    )
