"""How likely experts are, by what was learned: of one forward, or of a block of them."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from expertflow.compiled.arrays import block_at, filled, history_at, network_at, quads, sizes_at
from expertflow.compiled.compiling import compiled, inner
from expertflow.compiled.products import multiply, multiply_four
from expertflow.network import CODE_GAP, LOG_STEPS, LOG_UNIT, NUM_OWN, SPAN, TOP, UNIT

_ROWS = 4
"""Forwards whose products are made together."""
assert NUM_OWN == 4, "own features are written out"


@inner
def chance_of(code):
    """The chance in 2^-16 that stands for it (`network.CODES`)."""
    return np.int64(code) + (code > CODE_GAP)


@inner
def code_of(net, odds):
    """The code of a chance by its log-odds, a whole number in floating point."""
    return net.codes[np.int64(min(max(odds, -SPAN), SPAN)) + SPAN]


@inner
def mix(net, sums, target, ahead, mixed):
    """mixed u1 [M]: activations of layer `target`, seen from distance ahead + 1, of the products `sums` with `mix`."""
    bias, scale = net.mix_bias[ahead, target], net.mix_scale[target]
    for unit in range(len(scale)):
        scaled = np.floor((sums[unit] + bias[unit]) * scale[unit] / UNIT)
        mixed[unit] = np.int32(min(max(scaled, 0.0), float(TOP)))


@inner
def add_up(net, sums, features, target, ahead, odds):
    """odds f8 [E]: log-odds of the experts of layer `target`, seen from distance ahead + 1, without pre-gate, of the
    products `sums` with `out` and own features [F, N]."""
    own = net.own[ahead, target]
    begin, end = target * len(odds), (target + 1) * len(odds)
    # One loop over slices: an index that might be negative, or a loop within, and it is not done in vectors.
    a, b, c, d = features[0, begin:end], features[1, begin:end], features[2, begin:end], features[3, begin:end]
    of_a, of_b, of_c, of_d = own[0], own[1], own[2], own[3]
    scale, bias = net.out_scale[target], net.bias[ahead, target]
    for expert in range(len(odds)):
        seen = a[expert] * of_a[expert] + b[expert] * of_b[expert] + c[expert] * of_c[expert] + d[expert] * of_d[expert]
        mixed = np.floor(sums[expert] * scale[expert] / UNIT)
        odds[expert] = np.floor(seen / LOG_UNIT) + mixed + bias[expert]


@inner
def add_pregate(net, chances, target, ahead, odds):
    """odds [E] grow by what a pre-gate's chances [E] say (`HistoryNetwork.pregate_odds`)."""
    of_odds, of_level = net.pregate[ahead, target, 0], net.pregate[ahead, target, 1]
    for expert in range(len(odds)):
        level = min(max(np.floor(np.float64(chances[expert]) * LOG_STEPS), 0.0), float(LOG_STEPS))
        odds[expert] += np.floor((net.pregate_odds[np.int64(level)] * of_odds + level * of_level) / LOG_UNIT)


@inner
def answers(pregate, ahead):
    """Whether there is a pre-gate f4 [any, E], by distance, for distance ahead + 1."""
    if ahead >= len(pregate):
        return False
    for chance in pregate[ahead]:  # noqa: SIM110  (a loop compiles in a tenth of the time)
        if np.isnan(chance):
            return False
    return True


@inner
def score(net, hidden, features, pregate, gated, target, ahead, room, chance):
    """chance i8 [E]: of the experts of layer `target`, seen from distance ahead + 1, at the forward that runs.

    hidden: quads; pregate f4 [any, E]; gated: it is added. room: as of `room_for`.
    """
    mix_sums, mixed, out_sums, odds = room
    multiply(hidden, net.mix[target], mix_sums[0])
    mix(net, mix_sums[0], target, ahead, mixed[0].view(np.uint8))
    multiply(mixed[0], net.out[target], out_sums[0])
    add_up(net, out_sums[0], features, target, ahead, odds)
    if gated:
        add_pregate(net, pregate[ahead], target, ahead, odds)
    for expert in range(len(odds)):
        chance[expert] = chance_of(code_of(net, odds[expert]))


@inner
def room_for(s):
    """Room for the products of `_ROWS` forwards, their activations in quads, and the log-odds of one."""
    return (
        np.empty((_ROWS, filled(s.M)), np.int32),
        np.zeros((_ROWS, quads(s.M)), np.int32),
        np.empty((_ROWS, filled(s.E)), np.int32),
        np.empty(s.E, np.float64),
    )


@compiled("i8(i8[::1], i8[::1], f4[:,::1], b1, i8, i8, i8[:,::1], i8[:,:,::1])")
def look(network, history, pregate, gated, first, seen, chance, ranked):
    """Chances of the experts of layers first + seen, first + seen + 1, … at distances seen + 1, …, and their order.

    gated: whether a pre-gate's chances [any, E], by distance, are added; where it ends, or is not a number, the answer
    ends too. chance [reach, E] becomes the chances in 2^-16; ranked [reach, 2, E] the keys, best first, the lower on a
    tie, and their chances. Returns how many distances were answered.
    """
    s, net = sizes_at(network), network_at(network)
    now, room = history_at(history, s), room_for(s)
    for step in range(len(chance)):
        target, ahead = first + seen + step, seen + step
        if gated and not answers(pregate, ahead):
            return step
        score(net, now.hidden.view(np.int32), now.features, pregate, gated, target, ahead, room, chance[step])
        for expert in range(s.E):
            found = chance[step, expert]
            # Insertion from the end, in the order of the experts: a later one does not pass its equal.
            place = expert
            while place > 0 and ranked[step, 1, place - 1] < found:
                ranked[step, 0, place] = ranked[step, 0, place - 1]
                ranked[step, 1, place] = ranked[step, 1, place - 1]
                place -= 1
            ranked[step, 0, place], ranked[step, 1, place] = target * s.E + expert, found
    return len(chance)


@compiled("void(i8[::1], i8[::1], i8, i8, i8)")
def score_block(network, block, ahead, start, stop):
    """The scores of the forwards start … stop - 1 of a block that `learn_block` wrote, at distance ahead + 1; from the
    last layer they are of the next forward's layers. Where a forward's layers end, nothing is written.

    Layer by layer, so that its weights stay in the cache.
    """
    s, net = sizes_at(network), network_at(network)
    of = block_at(block, s)
    hidden = of.hidden.view(np.int32)
    mix_sums, mixed, out_sums, odds = room_for(s)
    for target in range(ahead, s.L):
        # Of -1, the last: what is known after the forward.
        source = target - 1 - ahead
        for first in range(start, stop, _ROWS):
            b, c, d = min(first + 1, stop - 1), min(first + 2, stop - 1), min(first + 3, stop - 1)
            multiply_four(
                hidden[first, source],
                hidden[b, source],
                hidden[c, source],
                hidden[d, source],
                net.mix[target],
                mix_sums,
            )
            for row in range(_ROWS):
                mix(net, mix_sums[row], target, ahead, mixed[row].view(np.uint8))
            multiply_four(mixed[0], mixed[1], mixed[2], mixed[3], net.out[target], out_sums)
            for row in range(min(_ROWS, stop - first)):
                features = of.after[first + row] if source < 0 else of.before[first + row]
                add_up(net, out_sums[row], features, target, ahead, odds)
                if source >= 0 and ahead < of.pregate.shape[2]:
                    add_pregate(net, of.pregate[first + row, source, ahead], target, ahead, odds)
                scores = of.scores[first + row, source, ahead]
                for expert in range(s.E):
                    scores[expert] = code_of(net, odds[expert])


@inner
def foresee(net, sums, features, codes):
    """codes u2 [N]: `HistoryNetwork.forecast` of the products `sums` with `forecast` and own features [F, N]."""
    own = net.forecast_own
    a, b, c, d = features[0], features[1], features[2], features[3]
    of_a, of_b, of_c, of_d = own[0], own[1], own[2], own[3]
    scale, bias = net.forecast_scale, net.forecast_bias
    for key in range(len(codes)):
        seen = a[key] * of_a[key] + b[key] * of_b[key] + c[key] * of_c[key] + d[key] * of_d[key]
        mixed = np.floor(sums[key] * scale[key] / UNIT)
        codes[key] = code_of(net, np.floor(seen / LOG_UNIT) + mixed + bias[key])


@compiled("void(i8[::1], i8[::1], u2[::1])")
def forecast(network, history, codes):
    """`foresee` for the forward that has ended."""
    s, net = sizes_at(network), network_at(network)
    now = history_at(history, s)
    sums = np.empty(filled(s.L * s.E), np.int32)
    multiply(now.hidden.view(np.int32), net.forecast, sums)
    foresee(net, sums, now.features, codes)


@compiled("void(i8[::1], i8[::1], i8)")
def forecast_block(network, block, num):
    """`foresee` for the first forwards of a block that `learn_block` wrote."""
    s, net = sizes_at(network), network_at(network)
    of = block_at(block, s)
    hidden = of.hidden.view(np.int32)
    sums = np.empty((_ROWS, filled(s.L * s.E)), np.int32)
    codes = np.empty(s.L * s.E, np.uint16)
    for first in range(0, num, _ROWS):
        b, c, d = min(first + 1, num - 1), min(first + 2, num - 1), min(first + 3, num - 1)
        multiply_four(hidden[first, s.L], hidden[b, s.L], hidden[c, s.L], hidden[d, s.L], net.forecast, sums)
        for row in range(min(_ROWS, num - first)):
            foresee(net, sums[row], of.after[first + row], codes)
            for layer in range(s.L):
                scores = of.scores[first + row, layer, s.D]
                for expert in range(s.E):
                    scores[expert] = codes[layer * s.E + expert]
