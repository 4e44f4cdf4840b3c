"""The routing of single tokens, taken in: sums over layers and forwards, remembered use, activations."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from expertflow.compiled.arrays import block_at, history_at, network_at, sizes_at
from expertflow.compiled.compiling import bits, compiled, inner
from expertflow.network import LOG_STEPS, LOG_UNIT, RECENT, STATE_BITS, TOP, UNIT

_RECENT_KEPT, _RECENT_BITS = RECENT[0], bits(RECENT[1])
_STEP_BITS = bits(UNIT // LOG_STEPS)
_FUSED = 4
"""Experts whose embeddings are added in one pass."""


@inner
def _copy(values, to):
    """A loop: it compiles in a fraction of the time of an assignment to a slice."""
    for place in range(len(values)):
        to[place] = values[place]


@inner
def _fill(to):
    """With zeros; a loop for the same reason."""
    for place in range(len(to)):
        to[place] = 0


@inner
def learn_layer(net, table_bits, keys, layer, sums, used, hidden):
    """Take note of one token's experts at one layer: keys [K], best first. Sums, used, hidden: as of `History`."""
    width, num = net.place.shape[1], len(keys)
    # Slices: where an index might be negative, a loop is not done in vectors.
    all_layers, recent = sums[:width], sums[width : 2 * width]
    for column in range(width):
        recent[column] = (recent[column] * _RECENT_KEPT) >> _RECENT_BITS
    for first in range(0, num, _FUSED):
        # What is left over is added no times.
        second, third, fourth = min(first + 1, num - 1), min(first + 2, num - 1), min(first + 3, num - 1)
        a, b, c, d = (
            net.tables[keys[first]],
            net.tables[keys[second]],
            net.tables[keys[third]],
            net.tables[keys[fourth]],
        )
        of_a, of_b = net.rank_weights[first], net.rank_weights[second] * np.int32(second > first)
        of_c, of_d = (
            net.rank_weights[third] * np.int32(third > second),
            net.rank_weights[fourth] * np.int32(fourth > third),
        )
        for column in range(len(sums)):
            sums[column] += np.int32(of_a * a[column] + of_b * b[column] + of_c * c[column] + of_d * d[column])
    for key in keys:
        used[key] = 1.0
    place = net.place[layer + 1]
    for column in range(width):
        total = (all_layers[column] + recent[column] + place[column]) >> table_bits
        hidden[column] = min(max(total, 0), TOP)


@inner
def remember(net, table_bits, sums, used, states, use, features, hidden):
    """A forward has ended: `HistoryNetwork.after`, `own_features` and `activate` at once.

    states f8 [R, H] and use f8 [F - 1, N] are brought up to date, features [F, N] and hidden written.
    """
    num_rates, width = states.shape
    for rate in range(num_rates):
        state, made, speed = states[rate], sums[(2 + rate) * width : (3 + rate) * width], net.rates[rate]
        for column in range(width):
            new = float(made[column] << STATE_BITS)
            state[column] += np.floor((new - state[column]) * speed / UNIT)
    for feature in range(len(use)):
        share, speed = use[feature], net.own_rates[feature]
        for key in range(len(used)):
            share[key] += np.floor((used[key] * UNIT - share[key]) * speed / UNIT)
    own_features(net, use, used, features)
    for column in range(width):
        total = (_base(states, column) + net.place[0, column]) >> table_bits
        hidden[column] = min(max(total, 0), TOP)


@inner
def own_features(net, use, shares, features):
    """features [F, N]: `HistoryNetwork.own_features` of use f8 [F - 1, N] and shares f8 [N]."""
    for feature in range(len(use)):
        for key in range(len(shares)):
            features[feature, key] = net.logs[np.int64(use[feature, key]) >> _STEP_BITS]
    for key in range(len(shares)):
        features[len(use), key] = np.floor(shares[key] * LOG_UNIT)


@inner
def _base(states, column):
    """`HistoryNetwork.base`."""
    total = np.int64(0)
    for rate in range(len(states)):
        total += np.int64(states[rate, column])
    return total >> STATE_BITS


@compiled("void(i8[::1], i8[::1], i8)")
def learn(network, history, layer):
    """`learn_layer` of the network's `keys`."""
    s, net = sizes_at(network), network_at(network)
    now = history_at(history, s)
    learn_layer(net, s.table_bits, net.keys, layer, now.sums, now.used, now.hidden)


@compiled("void(i8[::1], i8[::1], f8[:,::1], f8[:,::1])")
def close(network, history, states, use):
    """`remember` of the forward that ran."""
    s, net = sizes_at(network), network_at(network)
    now = history_at(history, s)
    remember(net, s.table_bits, now.sums, now.used, states, use, now.features, now.hidden)


@compiled("void(i8[::1], i8[::1], i8[:,:,::1], b1[::1], f8[:,::1], f8[:,::1], f8[::1])")
def learn_block(network, block, keys, starts, states, use, shares):
    """Take in whole forwards of one token each, one after the other.

    keys [n, L, K], best first; starts [n]: a request begins, and what came before is forgotten. states [R, H],
    use [F - 1, N] and shares [N] are the memory, and brought up to date. Of the block activations and own features are
    written.
    """
    s, net = sizes_at(network), network_at(network)
    to = block_at(block, s)
    sums = np.empty((2 + s.R) * s.H, np.int64)
    for row in range(len(keys)):
        if starts[row]:
            for rate in range(s.R):
                _copy(net.prior[rate], states[rate])
            for feature in range(s.F - 1):
                _copy(net.frequency, use[feature])
            _fill(shares)
        if row == 0 or starts[row]:
            own_features(net, use, shares, to.before[row])
        else:
            for feature in range(s.F):
                _copy(to.after[row - 1, feature], to.before[row, feature])
        _fill(sums)
        for column in range(s.H):
            sums[column] = _base(states, column)
        _fill(shares)
        for layer in range(s.L):
            learn_layer(net, s.table_bits, keys[row, layer], layer, sums, shares, to.hidden[row, layer])
        remember(net, s.table_bits, sums, shares, states, use, to.after[row], to.hidden[row, s.L])
