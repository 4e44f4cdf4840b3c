"""Which of the likely experts are wanted, and what that makes of the eviction's arrays."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from expertflow.compiled.arrays import choice_at, history_at, network_at, sizes_at
from expertflow.compiled.compiling import compiled, inner
from expertflow.compiled.learning import learn_layer
from expertflow.compiled.scoring import answers, chance_of, room_for, score
from expertflow.view import ABSENT, RESIDENT


@inner
def _select(chance, limit, order):
    """How many of the chances [E] are at least `limit`; order [E] begins with these experts, best first, the lower on a
    tie."""
    count = 0
    for expert in range(len(chance)):
        likely = chance[expert]
        if likely >= limit:
            place = count
            while place > 0 and chance[order[place - 1]] < likely:
                order[place] = order[place - 1]
                place -= 1
            order[place] = expert
            count += 1
    return count


@inner
def _take(by, begin, limit, num_kept, num_wants):
    """The chances of one layer, whose first key is `begin`, have been written to `chance`: what a selection by
    threshold wants of the num_kept best, and what `Outlook.predicted` makes of it.

    wants, from num_wants on, becomes the keys wanted and absent, best first, the lower on a tie. Returns how many wants
    there are now, how many keys were selected, and how many of these are resident.
    """
    num_experts = len(by.order)
    for key in range(begin, begin + num_experts):
        by.worth[key] = max(by.soon[key], by.chance[key])
        by.held[key] = by.worth[key] | by.bar[key]
    count = min(_select(by.chance[begin : begin + num_experts], limit, by.order), num_kept)
    num_there = 0
    for place in range(count):
        key = begin + by.order[place]
        if by.residency[key] == ABSENT:
            by.wants[num_wants] = key
            num_wants += 1
        num_there += by.residency[key] == RESIDENT
    return num_wants, count, num_there


@compiled("UniTuple(i8, 4)(i8[::1], i8[::1], i8[::1], f4[:,::1], b1, i8, i8, b1)")
def decide(network, history, choice, pregate, gated, layer, reach, is_new):
    """One decision behind `layer`: `learn` where its routing is_new (the network's `keys`), then, for the layers at
    distances 1 … reach, what a selection by thresholds wants of the num_kept best, and what `Outlook.predicted` makes
    of it.

    pregate, gated: as of `look`. Returns how many are wanted (`wants`: nearer layers first, best first, the lower on a
    tie), how many layers were answered, how many keys were selected, and whether all that was selected two layers ahead
    is resident, and something was.
    """
    s, net, by, num_kept = sizes_at(network), network_at(network), choice_at(choice), choice[3]
    now, room = history_at(history, s), room_for(s)
    if is_new:
        learn_layer(net, s.table_bits, net.keys, layer, now.sums, now.used, now.hidden)
    num_wants = num_selected = overfetched = 0
    first = (layer + 1) % s.L
    for ahead in range(reach):
        if gated and not answers(pregate, ahead):
            return num_wants, ahead, num_selected, overfetched
        target = first + ahead
        begin = target * s.E
        found = by.chance[begin : begin + s.E]
        score(net, now.hidden.view(np.int32), now.features, pregate, gated, target, ahead, room, found)
        num_wants, count, num_there = _take(by, begin, by.thresholds[ahead + 1], num_kept, num_wants)
        num_selected += count
        overfetched |= ahead == 1 and count > 0 and num_there == count
    return num_wants, reach, num_selected, overfetched


@compiled("UniTuple(i8, 4)(i8[::1], i8, i8, i8)")
def decide_scored(choice, row, layer, reach):
    """`decide` where the scores of forward `row` stand already in its block, as far as `reach`."""
    by, num_layers, num_experts, num_kept = choice_at(choice), choice[0], choice[1], choice[3]
    reach = min(reach, by.known[row, layer])
    num_wants = num_selected = overfetched = 0
    first = (layer + 1) % num_layers
    for ahead in range(reach):
        begin = (first + ahead) * num_experts
        codes = by.scores[row, layer, ahead]
        for expert in range(num_experts):
            by.chance[begin + expert] = chance_of(codes[expert])
        num_wants, count, num_there = _take(by, begin, by.thresholds[ahead + 1], num_kept, num_wants)
        num_selected += count
        overfetched |= ahead == 1 and count > 0 and num_there == count
    return num_wants, reach, num_selected, overfetched


@compiled("void(i8[::1], i8, i8, i8)")
def settle(choice, num_demanded, layer, used):
    """A layer has run that demanded the first num_demanded keys: `Outlook.layer_end`, where soon is up to date."""
    by, num_experts = choice_at(choice), choice[1]
    first = layer * num_experts
    for key in range(first, first + num_experts):
        by.worth[key] = by.soon[key]
    for key in by.keys[:num_demanded]:
        by.worth[key] = max(by.worth[key], used)
        if by.residency[key] == RESIDENT:
            by.bar[key] = 0
    for key in range(first, first + num_experts):
        by.held[key] = by.worth[key] | by.bar[key]
