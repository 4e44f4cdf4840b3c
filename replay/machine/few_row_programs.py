"""Triton kernels for experts that compute over few rows, as in decode: ordinary cores multiply.

A tensor core multiplies 16 rows at once, for which the tiles of `slot_programs` are few and large; with 1 to 4 rows the
weights are all that takes time, and many small programs ask for them at once. A throw-away pair of such kernels took
12 us for one expert of gpt-oss-20b on an H200, and 21 for four (`slot_programs`: 21 and 30; results/LOG.md).

Names and arguments as in `slot_programs`; BT is the most rows that a program computes at a time, 1 or 4. Here `up` also
applies the activation: y holds `middle` values a row, HALF apart, in float32, since values of two bytes one by one
could not be read ahead of their use. Sums are kept by thread until all is read.
"""
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
# Triton compiles the annotations of its kernels too: only compile-time sizes have one.

import triton
import triton.language as tl

from replay.machine.slot_programs import task


@triton.jit
def _row(values, k, inside):
    """values[k] where inside, else 0, in float32. k and inside: [1, BK] or [BK, 1], as the weights beside them lie."""
    return tl.load(values + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _eights(tile, BN: tl.constexpr, BK: tl.constexpr):
    """Sums of eight neighbours each along the second axis: one thread has read them."""
    return tl.sum(tl.reshape(tile, (BN, BK // 8, 8)), axis=2)


@triton.jit
def _folded(tile, BK: tl.constexpr, BN: tl.constexpr, HELD: tl.constexpr):
    """Sums of every HELD-th row of [BK, BN], which one thread has read: [HELD, BN]."""
    return tl.sum(tl.reshape(tile, (BK // HELD, HELD, BN)), axis=0)


@triton.jit
def _keep_activated(out, gates, ups, inside, GATED: tl.constexpr):
    """Store silu(gate) * up of the sums over the second axis; where there is no gate, the first sum above 0."""
    gate = tl.sum(gates, axis=1)
    value = gate * tl.sigmoid(gate) * tl.sum(ups, axis=1) if GATED else tl.maximum(gate, 0.0)
    tl.store(out, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keep(out, totals, inside):
    """Store the sums over the first axis."""
    tl.store(out, tl.sum(totals, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["most_inputs", "most_rows"])
def up(
    row,
    x,
    pool,
    y,
    shared,
    shared_y,
    stride,
    shared_stride,
    most_inputs,
    most_rows,
    HAS_SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    UP: tl.constexpr,
    MIDDLE: tl.constexpr,
    HALF: tl.constexpr,
    SHARED_UP: tl.constexpr,
    SHARED_MIDDLE: tl.constexpr,
    SHARED_HALF: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[first + t, n] = act(sum over k of x[t, k] * weights[n, k], the same of row middle + n)."""
    GATED: tl.constexpr = UP > MIDDLE
    routed, slot, first, count = task(row, most_inputs, most_rows, HAS_SHARED)
    if HAS_SHARED:
        weights = tl.where(routed, pool + slot * stride, shared + slot * shared_stride)
        middle = tl.where(routed, MIDDLE, SHARED_MIDDLE)
        pitch = tl.where(routed, HALF, SHARED_HALF)
        out = tl.where(routed, y, shared_y) + first * pitch
    else:
        weights, middle, pitch = pool + slot * stride, MIDDLE, HALF
        out = y + first * HALF
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN < middle:
        for t in range(tl.program_id(2) * BT, count, tl.num_programs(2) * BT):
            rows = x + t * HIDDEN
            gate0 = tl.zeros((BN, BK // 8), tl.float32)
            up0 = gate0
            if BT > 1:
                gate1, gate2, gate3 = gate0, gate0, gate0
                up1, up2, up3 = gate0, gate0, gate0
            for start in tl.range(0, HIDDEN, BK, num_stages=STAGES):
                k = start + tl.arange(0, BK)[None, :]
                here = k < HIDDEN
                inside = (n[:, None] < middle) & here
                place = weights + n[:, None] * HIDDEN + k
                gates = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                if GATED:
                    ups = tl.load(place + middle * HIDDEN, mask=inside, other=0.0).to(tl.float32)
                value = _row(rows, k, here)
                gate0 += _eights(gates * value, BN, BK)
                if GATED:
                    up0 += _eights(ups * value, BN, BK)
                if BT > 1:
                    value = _row(rows + HIDDEN, k, here & (t + 1 < count))
                    gate1 += _eights(gates * value, BN, BK)
                    if GATED:
                        up1 += _eights(ups * value, BN, BK)
                    value = _row(rows + 2 * HIDDEN, k, here & (t + 2 < count))
                    gate2 += _eights(gates * value, BN, BK)
                    if GATED:
                        up2 += _eights(ups * value, BN, BK)
                    value = _row(rows + 3 * HIDDEN, k, here & (t + 3 < count))
                    gate3 += _eights(gates * value, BN, BK)
                    if GATED:
                        up3 += _eights(ups * value, BN, BK)
            target = out + t * pitch + n
            _keep_activated(target, gate0, up0, n < middle, GATED)
            if BT > 1:
                _keep_activated(target + pitch, gate1, up1, (n < middle) & (t + 1 < count), GATED)
                _keep_activated(target + 2 * pitch, gate2, up2, (n < middle) & (t + 2 < count), GATED)
                _keep_activated(target + 3 * pitch, gate3, up3, (n < middle) & (t + 3 < count), GATED)


@triton.jit(do_not_specialize=["most_inputs", "most_rows"])
def down(
    row,
    y,
    pool,
    out,
    shared_y,
    shared,
    shared_out,
    stride,
    shared_stride,
    most_inputs,
    most_rows,
    HAS_SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    UP: tl.constexpr,
    MIDDLE: tl.constexpr,
    HALF: tl.constexpr,
    SHARED_UP: tl.constexpr,
    SHARED_MIDDLE: tl.constexpr,
    SHARED_HALF: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
):
    """out[first + t, n] = sum over k of y[first + t, k] * weights[k, n], of what `up` left there."""
    routed, slot, first, count = task(row, most_inputs, most_rows, HAS_SHARED)
    if HAS_SHARED:
        weights = tl.where(
            routed, pool + slot * stride + UP * HIDDEN, shared + slot * shared_stride + SHARED_UP * HIDDEN
        )
        middle = tl.where(routed, MIDDLE, SHARED_MIDDLE)
        pitch = tl.where(routed, HALF, SHARED_HALF)
        values = tl.where(routed, y, shared_y) + first * pitch
        target = tl.where(routed, out, shared_out) + first * HIDDEN
    else:
        weights, middle, pitch = pool + slot * stride + UP * HIDDEN, MIDDLE, HALF
        values, target = y + first * HALF, out + first * HIDDEN
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    for t in range(tl.program_id(2) * BT, count, tl.num_programs(2) * BT):
        rows = values + t * pitch
        total0 = tl.zeros((HELD, BN), tl.float32)
        if BT > 1:
            total1, total2, total3 = total0, total0, total0
        for start in tl.range(0, middle, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)[:, None]
            here = k < middle
            tile = tl.load(weights + k * HIDDEN + n[None, :], mask=here & (n[None, :] < HIDDEN), other=0.0)
            tile = tile.to(tl.float32)
            total0 += _folded(tile * _row(rows, k, here), BK, BN, HELD)
            if BT > 1:
                total1 += _folded(tile * _row(rows + pitch, k, here & (t + 1 < count)), BK, BN, HELD)
                total2 += _folded(tile * _row(rows + 2 * pitch, k, here & (t + 2 < count)), BK, BN, HELD)
                total3 += _folded(tile * _row(rows + 3 * pitch, k, here & (t + 3 < count)), BK, BN, HELD)
        place, inside = target + t * HIDDEN + n, n < HIDDEN
        _keep(place, total0, inside)
        if BT > 1:
            _keep(place + HIDDEN, total1, inside & (t + 1 < count))
            _keep(place + 2 * HIDDEN, total2, inside & (t + 2 < count))
            _keep(place + 3 * HIDDEN, total3, inside & (t + 3 < count))
