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
def learn_layer(net, table_bits, keys, layer, history_sums, used, hidden):
    """Take note of one token's experts at one layer: keys [K], best first. Sums, used [N] and hidden as of `History`."""
    width, num, sums = net.place.shape[1], len(keys), history_sums
    for column in range(width, 2 * width):
        sums[column] = (sums[column] * _RECENT_KEPT) >> _RECENT_BITS
    for first in range(0, num, _FUSED):
        # What is left over is added no times.
        second, third, fourth = min(first + 1, num - 1), min(first + 2, num - 1), min(first + 3, num - 1)
        a, b, c, d = net.tables[keys[first]], net.tables[keys[second]], net.tables[keys[third]], net.tables[keys[fourth]]
        of_a, of_b = net.rank_weights[first], net.rank_weights[second] * np.int32(second > first)
        of_c, of_d = (
            net.rank_weights[third] * np.int32(third > second),
            net.rank_weights[fourth] * np.int32(fourth > third),
        )
        for column in range(len(sums)):
            sums[column] += np.int32(of_a * a[column] + of_b * b[column] + of_c * c[column] + of_d * d[column])
    for key in keys:
        used[key] = 1.0
    for column in range(width):
        total = (sums[column] + sums[width + column] + net.place[layer + 1, column]) >> table_bits
        hidden[column] = min(max(total, 0), TOP)


@inner
def remember(net, table_bits, history_sums, used, states, use, features, hidden):
    """A forward has ended: `HistoryNetwork.after`, `own_features` and `activate` at once.

    states f8 [R, H] and use f8 [F - 1, N] are brought up to date, features [F, N] and hidden written.
    """
    num_rates, width = states.shape
    for rate in range(num_rates):
        for column in range(width):
            new = float(history_sums[(2 + rate) * width + column] << STATE_BITS)
            old = states[rate, column]
            states[rate, column] = old + np.floor((new - old) * net.rates[rate] / UNIT)
    for feature in range(len(use)):
        for key in range(len(used)):
            old = use[feature, key]
            use[feature, key] = old + np.floor((used[key] * UNIT - old) * net.own_rates[feature] / UNIT)
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
            states[:] = net.prior
            use[:] = net.frequency
            shares[:] = 0
        if row == 0 or starts[row]:
            own_features(net, use, shares, to.before[row])
        else:
            to.before[row] = to.after[row - 1]
        sums[:] = 0
        for column in range(s.H):
            sums[column] = _base(states, column)
        shares[:] = 0
        for layer in range(s.L):
            learn_layer(net, s.table_bits, keys[row, layer], layer, sums, shares, to.hidden[row, layer])
        remember(net, s.table_bits, sums, shares, states, use, to.after[row], to.hidden[row, s.L])
