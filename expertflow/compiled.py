"""What runs between two layers, compiled with numba: the fitted parts import this module only where they are used.

Whole numbers only, so that the numpy twins of these functions (`HistoryNetwork`, `Forest`) give the same to the bit.
ImportError where numba is missing or does not fit the installed numpy. Shape letters as in `network` and `forest`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba  # type: ignore[import-untyped, import-not-found, unused-ignore]
import numpy as np
import numpy.typing as npt
from numba.core import cgutils  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numba.extending import intrinsic  # type: ignore[import-untyped, import-not-found, unused-ignore]

from expertflow.forest import LEAF_ONE
from expertflow.network import LOG_STEPS, LOG_UNIT, RECENT, SPAN, STATE_BITS, TOP, UNIT
from expertflow.units import SCORE_ONE
from expertflow.view import ABSENT, RESIDENT


def _compile(types: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for `types` now, and keep the result beside the source or in the user's cache folder."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(types, cache=True)(function)
        except (RuntimeError, OSError):
            # Nowhere to keep it, or no room: compiled anew by each process.
            return numba.njit(types)(function)

    return decorate


def _as_pointer(_context, address):
    """An address as the pointer that `numba.carray` takes."""

    def convert(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), convert


_pointer: Any = intrinsic(_as_pointer)
carray: Any = numba.carray  # type: ignore[attr-defined, unused-ignore]


def packed(*values: npt.NDArray[Any] | int) -> npt.NDArray[np.int64]:
    """Whole numbers, and the addresses of arrays in C order, as one argument: each array that is an argument of its own
    costs a call 0.1 us. Who calls keeps the arrays alive, and in place."""
    return np.array([value if isinstance(value, int) else value.ctypes.data for value in values], np.int64)


def _bits(power: int) -> int:
    """log2 of a power of two: what divides here is shifted."""
    if power < 1 or power & (power - 1):
        raise AssertionError(f"{power} is no power of two")
    return power.bit_length() - 1


# The compiler takes module level numbers for constants. It keeps what it has made by this file's date: who changes one
# of those that are imported changes this file too.
_RECENT_KEPT, _RECENT_BITS = RECENT[0], _bits(RECENT[1])
_UNIT_BITS, _LOG_BITS, _STEP_BITS = _bits(UNIT), _bits(LOG_UNIT), _bits(UNIT // LOG_STEPS)
_SCORE_PER_LEAF = SCORE_ONE // LEAF_ONE
# Types of what `_find` takes first: activations, a network, its features, a pre-gate, two tables.
_WEIGHTS = "i1[:,:,::1], i4[:,::1], i4[:,:,::1], i1[:,:,::1], i4[:,::1], i4[:,:,::1], i4[:,:,:,::1], i4[:,:,::1]"
_NETWORK = f"i4[::1], {_WEIGHTS}, f8[:,:,::1], f4[:,:], i4[::1], i4[::1]"
# What a view lets nobody write.
_STATES = "Array(u1, 1, 'C', True)"
# What `_take` writes to and reads by key.
_WORTHS = f"{_STATES}, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1]"


@_compile("void(i2[:,::1], i4[::1], i8[::1], i8[::1], i8[::1], f8[::1], i8, i4[::1])")
def learn(tables, rank_weights, keys, place, sums, used, table_bits, hidden):
    """Take note of one token's experts at one layer.

    tables [N, (2 + R)·H], rank_weights [K], keys [K], best first. sums [(2 + R)·H], over all layers, over recent
    layers, one per rate, grow by the embedding; used [N] becomes 1 at the keys; hidden [H] becomes the activations,
    0 … 127, of the first two of the sums and `place` [H].
    """
    width = len(hidden)
    for column in range(width, 2 * width):
        sums[column] = (sums[column] * _RECENT_KEPT) >> _RECENT_BITS
    made = np.zeros(len(sums), np.int32)
    for rank in range(len(keys)):
        key, weight = keys[rank], rank_weights[rank]
        used[key] = 1.0
        row = tables[key]
        for column in range(len(made)):
            made[column] += weight * np.int32(row[column])
    for column in range(len(sums)):
        sums[column] += made[column]
    for column in range(width):
        total = (sums[column] + sums[width + column] + place[column]) >> table_bits
        hidden[column] = min(max(total, 0), TOP)


@_compile("void(i4[::1], i1[:,::1], i8[::1], i4[::1])")
def _multiply(values, weights, active, total):
    """total [M] becomes values [H] @ weights [H, M]; active: room for H + 1 indices. Four rows a pass: total stays in
    registers for as long."""
    total[:] = 0
    count = 0
    for row in range(len(values)):
        active[count] = row
        # Rectified: many are 0. No branch, nothing to mispredict.
        count += values[row] != 0
    for start in range(0, count - 3, 4):
        a, b, c, d = active[start], active[start + 1], active[start + 2], active[start + 3]
        for column in range(len(total)):
            total[column] += (
                values[a] * np.int32(weights[a, column])
                + values[b] * np.int32(weights[b, column])
                + values[c] * np.int32(weights[c, column])
                + values[d] * np.int32(weights[d, column])
            )
    for start in range(count - count % 4, count):
        a = active[start]
        for column in range(len(total)):
            total[column] += values[a] * np.int32(weights[a, column])


@_compile(f"void(i4[::1], {_WEIGHTS}, f8[:,:,::1], i8, i8, i8[::1], i4[::1], i4[::1], i8[::1])")
def _weigh(
    hidden,
    mix,
    mix_scale,
    mix_bias,
    out,
    out_scale,
    bias,
    own,
    pregate_weights,
    features,
    target,
    ahead,
    active,
    mixed,
    odds,
    total,
):
    """total [E] becomes the log-odds of the experts of layer `target`, seen from distance ahead + 1, without pre-gate.
    Arguments as in `look`; active [max(H, M) + 1], mixed [M], odds [E]: room."""
    num_experts = len(total)
    _multiply(hidden, mix[target], active, mixed)
    for row in range(len(mixed)):
        scaled = (np.int64(mixed[row] + mix_bias[ahead, target, row]) * mix_scale[target, row]) >> _UNIT_BITS
        mixed[row] = min(max(scaled, 0), TOP)
    _multiply(mixed, out[target], active, odds)
    total[:] = 0
    for feature in range(own.shape[1]):
        for expert in range(num_experts):
            total[expert] += np.int64(features[feature, target, expert]) * own[ahead, feature, target, expert]
    for expert in range(num_experts):
        scaled = (np.int64(odds[expert]) * out_scale[target, expert]) >> _UNIT_BITS
        total[expert] = (total[expert] >> _LOG_BITS) + scaled + bias[ahead, target, expert]


@_compile(f"b1({_NETWORK}, i8, i8, b1, i8[::1], i4[::1], i4[::1], i8[::1])")
def _find(
    hidden,
    mix,
    mix_scale,
    mix_bias,
    out,
    out_scale,
    bias,
    own,
    pregate_weights,
    features,
    pregate,
    pregate_odds,
    chances,
    target,
    ahead,
    gated,
    active,
    mixed,
    odds,
    chance,
):
    """chance [E] becomes the chances in 2^-16 of the experts of layer `target`, seen from distance ahead + 1; False:
    there is no pre-gate for it. Arguments as in `look`; active [max(H, M) + 1], mixed [M], odds [E]: room."""
    num_experts = len(chance)
    log_steps, span = len(pregate_odds) - 1, len(chances) // 2
    if gated:
        if ahead >= len(pregate):
            return False
        for expert in range(num_experts):
            if np.isnan(pregate[ahead, expert]):
                return False
    _weigh(
        hidden,
        mix,
        mix_scale,
        mix_bias,
        out,
        out_scale,
        bias,
        own,
        pregate_weights,
        features,
        target,
        ahead,
        active,
        mixed,
        odds,
        chance,
    )
    for expert in range(num_experts):
        total = chance[expert]
        if gated:
            level = min(max(np.int64(np.floor(np.float64(pregate[ahead, expert]) * log_steps)), 0), log_steps)
            weighed = np.int64(pregate_odds[level]) * pregate_weights[ahead, target, 0]
            total += (weighed + level * pregate_weights[ahead, target, 1]) >> _LOG_BITS
        chance[expert] = chances[min(max(total, -span), span) + span]
    return True


@_compile(f"i8({_NETWORK}, i8, i8, b1, i8[:,::1], i8[:,:,::1])")
def look(
    hidden,
    mix,
    mix_scale,
    mix_bias,
    out,
    out_scale,
    bias,
    own,
    pregate_weights,
    features,
    pregate,
    pregate_odds,
    chances,
    first,
    seen,
    gated,
    chance,
    ranked,
):
    """Chances of the experts of layers first + seen, first + seen + 1, … at distances seen + 1, …, and their order.

    hidden [H], mix [L, H, M], mix_scale [L, M], mix_bias [D, L, M], out [L, M, E], out_scale [L, E], bias [D, L, E],
    own [D, F, L, E], features [F, L, E], chances and pregate_odds (`network.CHANCES`, `PREGATE_ODDS`). gated: whether
    a pre-gate's chances [any, E], by distance, are added with pregate_weights [D, L, 2]; where it ends, or is not a
    number, the answer ends too. chance [reach, E] becomes the chances in 2^-16; ranked [reach, 2, E] the keys, best
    first, the lower on a tie, and their chances. Returns how many distances were answered.
    """
    reach, num_experts = chance.shape
    num_mixed = mix.shape[2]
    active = np.empty(max(len(hidden), num_mixed) + 1, np.int64)
    mixed, odds = np.empty(num_mixed, np.int32), np.empty(num_experts, np.int32)
    for step in range(reach):
        target = first + seen + step
        if not _find(
            hidden,
            mix,
            mix_scale,
            mix_bias,
            out,
            out_scale,
            bias,
            own,
            pregate_weights,
            features,
            pregate,
            pregate_odds,
            chances,
            target,
            seen + step,
            gated,
            active,
            mixed,
            odds,
            chance[step],
        ):
            return step
        for expert in range(num_experts):
            found = chance[step, expert]
            # Insertion from the end, in the order of the experts: a later one does not pass its equal.
            place = expert
            while place > 0 and ranked[step, 1, place - 1] < found:
                ranked[step, 0, place] = ranked[step, 0, place - 1]
                ranked[step, 1, place] = ranked[step, 1, place - 1]
                place -= 1
            ranked[step, 0, place], ranked[step, 1, place] = target * num_experts + expert, found
    return reach


@_compile("i8(i8[::1], i8, i8[::1])")
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


@_compile(f"UniTuple(i8, 3)(i8, i8, i8, i8[::1], {_WORTHS}, i8[::1], i8)")
def _take(begin, limit, num_kept, order, residency, soon, chance, worth, bar, held, wants, num_wants):
    """The chances [E] of one layer, whose first key is `begin`, have been written to `chance`: what a selection by
    threshold wants of the num_kept best, and what `Outlook.predicted` makes of it.

    order [E]: room. wants, from num_wants on, becomes the keys wanted and absent, best first, the lower on a tie.
    Returns how many wants there are now, how many keys were selected, and how many of these are resident.
    """
    num_experts = len(order)
    for key in range(begin, begin + num_experts):
        worth[key] = max(soon[key], chance[key])
        held[key] = worth[key] | bar[key]
    count = min(_select(chance[begin : begin + num_experts], limit, order), num_kept)
    num_there = 0
    for key in begin + order[:count]:
        if residency[key] == ABSENT:
            wants[num_wants] = key
            num_wants += 1
        num_there += residency[key] == RESIDENT
    return num_wants, count, num_there


@_compile(
    f"UniTuple(i8, 4)(i2[:,::1], i4[::1], i8[::1], i8[::1], i8[::1], f8[::1], i8, {_NETWORK}, i8, i8, b1, i8, "
    f"i8[::1], {_STATES}, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1])"
)
def decide(
    tables,
    rank_weights,
    keys,
    place,
    sums,
    used,
    table_bits,
    hidden,
    mix,
    mix_scale,
    mix_bias,
    out,
    out_scale,
    bias,
    own,
    pregate_weights,
    features,
    pregate,
    pregate_odds,
    chances,
    first,
    reach,
    gated,
    num_kept,
    thresholds,
    residency,
    soon,
    chance,
    worth,
    bar,
    held,
    wants,
):
    """One decision: `learn` of keys [K] (none: known already), `look` at the layers first … first + reach - 1, what a
    selection by thresholds [any, by distance] wants of the num_kept best, and what `Outlook.predicted` makes of it.

    residency, soon, chance, worth, bar, held [N], by key: chance, worth and held are written for the layers answered.
    wants [at least reach · E] becomes the keys wanted and absent, nearer layers first, best first, the lower on a tie.
    Returns how many those are, how many layers were answered, how many keys were selected, and whether all that was
    selected two layers ahead is resident, and something was.
    """
    if len(keys):
        learn(tables, rank_weights, keys, place, sums, used, table_bits, hidden)
    num_experts, num_mixed = out.shape[2], mix.shape[2]
    active = np.empty(max(len(hidden), num_mixed) + 1, np.int64)
    mixed, odds = np.empty(num_mixed, np.int32), np.empty(num_experts, np.int32)
    order = np.empty(num_experts, np.int64)
    num_wants = num_selected = overfetched = 0
    for ahead in range(reach):
        begin = (first + ahead) * num_experts
        found = chance[begin : begin + num_experts]
        if not _find(
            hidden,
            mix,
            mix_scale,
            mix_bias,
            out,
            out_scale,
            bias,
            own,
            pregate_weights,
            features,
            pregate,
            pregate_odds,
            chances,
            first + ahead,
            ahead,
            gated,
            active,
            mixed,
            odds,
            found,
        ):
            return num_wants, ahead, num_selected, overfetched
        num_wants, count, num_there = _take(
            begin, thresholds[ahead + 1], num_kept, order, residency, soon, chance, worth, bar, held, wants, num_wants
        )
        num_selected += count
        overfetched |= ahead == 1 and count > 0 and num_there == count
    return num_wants, reach, num_selected, overfetched


@_compile("UniTuple(i8, 3)(i8[::1], i8[::1], i8, i8, i8)")
def decide_scored(shared, block, row, source, reach):
    """`decide` where the log-odds stand already in `block` (`score_block`).

    shared: as of `settle`. block: num_kept; addresses of scored [any, L, at least D, E], chances, thresholds [any, by
    distance], order [E] and wants [D · E]; the third length of scored, that of chances. The targets are those behind
    `source`, from the first layer after the last. Returns how many are wanted, how many keys were selected, and whether
    all that was selected two layers ahead is resident, and something was.
    """
    num_layers, num_experts = shared[7], shared[8]
    num_keys = num_layers * num_experts
    soon, chance = carray(_pointer(shared[0]), num_keys, np.int64), carray(_pointer(shared[1]), num_keys, np.int64)
    worth, bar = carray(_pointer(shared[2]), num_keys, np.int64), carray(_pointer(shared[3]), num_keys, np.int64)
    held, residency = carray(_pointer(shared[4]), num_keys, np.int64), carray(_pointer(shared[5]), num_keys, np.uint8)
    num_kept, depth, size = block[0], block[6], block[7]
    scored = carray(_pointer(block[1]), (row + 1, num_layers, depth, num_experts), np.int16)
    chances = carray(_pointer(block[2]), size, np.int32)
    thresholds = carray(_pointer(block[3]), num_layers + 1, np.int64)
    order = carray(_pointer(block[4]), num_experts, np.int64)
    wants = carray(_pointer(block[5]), reach * num_experts, np.int64)
    first = (source + 1) % num_layers
    num_wants = num_selected = overfetched = 0
    for ahead in range(reach):
        begin = (first + ahead) * num_experts
        odds = scored[row, source, ahead]
        for expert in range(num_experts):
            chance[begin + expert] = chances[odds[expert] + size // 2]
        num_wants, count, num_there = _take(
            begin, thresholds[ahead + 1], num_kept, order, residency, soon, chance, worth, bar, held, wants, num_wants
        )
        num_selected += count
        overfetched |= ahead == 1 and count > 0 and num_there == count
    return num_wants, num_selected, overfetched


@_compile("void(i8[::1], i8, i8, i8)")
def settle(shared, num_demanded, layer, used):
    """A layer has run that demanded the first num_demanded keys: `Outlook.layer_end`, where soon is up to date.

    shared: addresses of soon, chance, worth, bar, held, residency [N] and keys [any]; L and E.
    """
    num_experts = shared[8]
    num_keys = shared[7] * num_experts
    soon, worth = carray(_pointer(shared[0]), num_keys, np.int64), carray(_pointer(shared[2]), num_keys, np.int64)
    bar, held = carray(_pointer(shared[3]), num_keys, np.int64), carray(_pointer(shared[4]), num_keys, np.int64)
    residency, keys = carray(_pointer(shared[5]), num_keys, np.uint8), carray(_pointer(shared[6]), num_keys, np.int64)
    first = layer * num_experts
    for key in range(first, first + num_experts):
        worth[key] = soon[key]
    for key in keys[:num_demanded]:
        worth[key] = max(worth[key], used)
        if residency[key] == RESIDENT:
            bar[key] = 0
    for key in range(first, first + num_experts):
        held[key] = worth[key] | bar[key]


@_compile("void(f8[:,::1], f8[:,::1], f8[::1], i8[::1], f8[::1], f8[::1], f8[::1], i8[::1], i8, f8[:,::1], i4[::1])")
def close(states, use, used, sums, rates, own_rates, logs, place, table_bits, features, hidden):
    """A forward has ended: `HistoryNetwork.after`, `own_features` and `activate` at once.

    states [R, H] and use [F - 1, N] are brought up to date; used [N], sums [(2 + R)·H]; rates [R] and own_rates
    [F - 1] in 2^-16; logs (`network.LOGS`), place [H]. features [F, N] and hidden [H] are written.
    """
    unit = float(1 << _UNIT_BITS)
    num_rates, width = states.shape
    for rate in range(num_rates):
        for column in range(width):
            new = float(sums[(2 + rate) * width + column] << STATE_BITS)
            old = states[rate, column]
            states[rate, column] = old + np.floor((new - old) * rates[rate] / unit)
    num_keys = len(used)
    for feature in range(len(own_rates)):
        for key in range(num_keys):
            old = use[feature, key]
            new = old + np.floor((used[key] * unit - old) * own_rates[feature] / unit)
            use[feature, key] = new
            features[feature, key] = logs[np.int64(new) >> _STEP_BITS]
    for key in range(num_keys):
        features[len(own_rates), key] = np.floor(used[key] * (1 << _LOG_BITS))
    for column in range(width):
        total = np.int64(0)
        for rate in range(num_rates):
            total += np.int64(states[rate, column])
        total = ((total >> STATE_BITS) + place[column]) >> table_bits
        hidden[column] = min(max(total, 0), TOP)


@_compile(
    "void(i8[:,:,::1], b1[::1], i2[:,::1], i4[::1], i8[:,::1], i8, f8[:,::1], f8[::1], f8[::1], f8[::1], f8[::1], "
    "f8[:,::1], f8[:,::1], f8[::1], i4[:,:,::1], f8[:,:,::1], f8[:,:,::1])"
)
def learn_block(
    keys,
    starts,
    tables,
    rank_weights,
    place,
    table_bits,
    prior,
    frequency,
    rates,
    own_rates,
    logs,
    states,
    use,
    shares,
    hidden,
    before,
    after,
):
    """`learn` and `close` of whole forwards of one token each, one after the other.

    keys [n, L, K], best first; starts [n]: a request begins, and what came before is forgotten (prior [R, H], frequency
    [N]). states [R, H], use [F - 1, N] and shares [N] are the memory, and brought up to date. hidden [n, L + 1, H]
    becomes the activations after each layer and after the forward; before and after [n, F, N] the own features.
    """
    num_layers = keys.shape[1]
    num_rates, width = states.shape
    num_use, num_keys = use.shape
    sums = np.empty((2 + num_rates) * width, np.int64)
    for row in range(len(keys)):
        if starts[row]:
            states[:] = prior
            use[:] = frequency
            shares[:] = 0
        if row == 0 or starts[row]:
            for feature in range(num_use):
                for key in range(num_keys):
                    before[row, feature, key] = logs[np.int64(use[feature, key]) >> _STEP_BITS]
            for key in range(num_keys):
                before[row, num_use, key] = np.floor(shares[key] * (1 << _LOG_BITS))
        else:
            before[row] = after[row - 1]
        sums[:] = 0
        for column in range(width):
            total = np.int64(0)
            for rate in range(num_rates):
                total += np.int64(states[rate, column])
            sums[column] = total >> STATE_BITS
        shares[:] = 0
        for layer in range(num_layers):
            learn(
                tables, rank_weights, keys[row, layer], place[layer + 1], sums, shares, table_bits, hidden[row, layer]
            )
        close(
            states, use, shares, sums, rates, own_rates, logs, place[0], table_bits, after[row], hidden[row, num_layers]
        )


@_compile(f"void(i4[:,:,::1], {_WEIGHTS}, f8[:,:,:,::1], f8[:,:,:,::1], i8, i8, i8, i2[:,:,:,::1])")
def score_block(
    hidden,
    mix,
    mix_scale,
    mix_bias,
    out,
    out_scale,
    bias,
    own,
    pregate_weights,
    before,
    after,
    ahead,
    start,
    stop,
    scored,
):
    """scored [n, L, D, E], in rows start … stop - 1, becomes the log-odds at distance ahead + 1, as far as chances
    differ, of what `learn_block` wrote, by the layer that they are seen from; from the last layer they are of the next
    forward's layers. Where a forward's layers end, nothing is written. before and after [n, F, L, E].

    Layer by layer, so that its weights stay in the cache.
    """
    num_layers, num_experts = scored.shape[1], scored.shape[3]
    num_mixed = mix.shape[2]
    active = np.empty(max(hidden.shape[2], num_mixed) + 1, np.int64)
    mixed, odds = np.empty(num_mixed, np.int32), np.empty(num_experts, np.int32)
    total = np.empty(num_experts, np.int64)
    for target in range(ahead, num_layers):
        source = target - 1 - ahead
        for row in range(start, stop):
            _weigh(
                hidden[row, source],
                mix,
                mix_scale,
                mix_bias,
                out,
                out_scale,
                bias,
                own,
                pregate_weights,
                after[row] if source < 0 else before[row],
                target,
                ahead,
                active,
                mixed,
                odds,
                total,
            )
            for expert in range(num_experts):
                scored[row, source, ahead, expert] = min(max(total[expert], -SPAN), SPAN)


@_compile("void(i4[::1], i1[:,::1], i8[::1], i8[::1], i8[:,::1], f8[:,::1], i4[::1], i8[::1])")
def forecast(hidden, weights, scale, bias, own, features, chances, found):
    """found [N]: `HistoryNetwork.forecast` of hidden [H] and features [F, N]; weights [H, N], own [F, N]."""
    odds = np.empty(len(found), np.int32)
    _multiply(hidden, weights, np.empty(len(hidden) + 1, np.int64), odds)
    span = len(chances) // 2
    for key in range(len(found)):
        remembered = np.int64(0)
        for feature in range(len(own)):
            remembered += np.int64(features[feature, key]) * own[feature, key]
        total = ((odds[key] * scale[key]) >> _UNIT_BITS) + bias[key] + (remembered >> _LOG_BITS)
        found[key] = chances[min(max(total, -span), span) + span]


@_compile("void(i4[:,::1], i4[::1], i1[:,::1], i4[::1], i2[::1], i8[::1])")
def evaluate_forest(nodes, roots, leaves, table, features, out):
    """out [E] becomes the calibrated pre-gate plus the mean leaf of the trees at `roots`, clipped to 0 … 2^16."""
    num_experts = leaves.shape[1]
    total = np.zeros(num_experts, np.int32)
    for root in roots:
        node = root
        while node >= 0:
            node = nodes[node, 2] if features[nodes[node, 0]] <= nodes[node, 1] else nodes[node, 3]
        leaf = leaves[~node]
        for expert in range(num_experts):
            total[expert] += leaf[expert]
    for expert in range(num_experts):
        chance = min(max(features[expert], 0), table.shape[0] - 1)
        # A floor division of whole numbers is the same on every machine.
        score = table[chance] + (total[expert] * _SCORE_PER_LEAF) // len(roots)
        out[expert] = min(max(score, 0), SCORE_ONE)
