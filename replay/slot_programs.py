"""The Triton kernels of the device-bound machine: the one module that imports triton; `slot_kernels` launches them.

Names of the compile-time sizes: BT rows, BN columns, BK depth of a tile; HIDDEN, UP, MIDDLE widths of a feed-forward
block; HALF where `up` begins in a row of the intermediate buffer, of PITCH values. A launch is a row of `RowLayout`.
"""
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
# Triton reads the annotations of its kernels: they stay objects, not strings.

from typing import Any

import triton
import triton.language as tl

from replay.rows import RowLayout

COUNT = tl.constexpr(RowLayout.COUNT)
SHARED_BLOCK = tl.constexpr(RowLayout.SHARED_BLOCK)
SHARED_ROWS = tl.constexpr(RowLayout.SHARED_ROWS)
LAUNCH = tl.constexpr(RowLayout.LAUNCH)
SLOTS = tl.constexpr(RowLayout.SLOTS)


@triton.jit
def stage(source: Any, target: Any, num_words: Any, BLOCK: tl.constexpr) -> None:
    """Copy `num_words` 64-bit words from pinned memory to the device. One program."""
    for start in range(0, num_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(target + word, tl.load(source + word, mask=word < num_words, other=0), mask=word < num_words)


@triton.jit
def _up_tile(x: Any, weights: Any, y: Any, rows: Any, HIDDEN: tl.constexpr, UP: tl.constexpr, MIDDLE: tl.constexpr,
             HALF: tl.constexpr, PITCH: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr) -> None:  # fmt: skip
    """y[t, n] = sum over k of x[t, k] * weights[n, k], of the rows and columns of this program."""
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BT, BN), tl.float32)
    for start in range(0, HIDDEN, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + t[:, None] * HIDDEN + k[None, :],
                       mask=(t[:, None] < rows) & (k[None, :] < HIDDEN), other=0.0)  # fmt: skip
        right = tl.load(weights + n[None, :] * HIDDEN + k[:, None],
                        mask=(n[None, :] < UP) & (k[:, None] < HIDDEN), other=0.0)  # fmt: skip
        total = tl.dot(left, right, total, input_precision="ieee")
    column = tl.where(n < MIDDLE, n, n + (HALF - MIDDLE))
    tl.store(y + t[:, None] * PITCH + column[None, :], total.to(y.dtype.element_ty),
             mask=(t[:, None] < rows) & (n[None, :] < UP))  # fmt: skip


@triton.jit
def up(row: Any, x: Any, pool: Any, y: Any, shared: Any, shared_y: Any, stride: Any, shared_stride: Any,
       CAPACITY: tl.constexpr, HAS_SHARED: tl.constexpr, HIDDEN: tl.constexpr,
       UP: tl.constexpr, MIDDLE: tl.constexpr, HALF: tl.constexpr, PITCH: tl.constexpr,
       SHARED_UP: tl.constexpr, SHARED_MIDDLE: tl.constexpr, SHARED_HALF: tl.constexpr, SHARED_PITCH: tl.constexpr,
       BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr) -> None:  # fmt: skip
    """Gate and up products. Programs: column tiles, experts (the shared ones are number CAPACITY), row tiles.

    pool, shared: weights, of which slot or block i begins at i * stride; x [rows, HIDDEN]; y [rows, PITCH].
    """
    expert = tl.program_id(1)
    first_row = tl.program_id(2) * BT
    first_column = tl.program_id(0) * BN
    if expert < CAPACITY:
        number = tl.load(row + COUNT)
        # 64-bit words: a slot's number times the stride passes 2^31 in a large pool.
        slot = tl.load(row + SLOTS + expert)
        first = tl.load(row + SLOTS + CAPACITY + expert)
        rows = tl.load(row + SLOTS + 2 * CAPACITY + expert)
        if (expert < number) & (first_row < rows) & (first_column < UP):
            _up_tile(x, pool + slot * stride, y + first * PITCH, rows, HIDDEN, UP, MIDDLE, HALF, PITCH, BT, BN, BK)
    else:
        if HAS_SHARED:
            block = tl.load(row + SHARED_BLOCK)
            shared_rows = tl.load(row + SHARED_ROWS)
            if (block >= 0) & (first_row < shared_rows) & (first_column < SHARED_UP):
                _up_tile(x, shared + block * shared_stride, shared_y, shared_rows, HIDDEN, SHARED_UP, SHARED_MIDDLE,
                         SHARED_HALF, SHARED_PITCH, BT, BN, BK)  # fmt: skip


@triton.jit
def _down_tile(y: Any, weights: Any, out: Any, rows: Any, HIDDEN: tl.constexpr, MIDDLE: tl.constexpr,
               HALF: tl.constexpr, PITCH: tl.constexpr, GATED: tl.constexpr,
               BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr) -> None:  # fmt: skip
    """out[t, n] = sum over k of act(y[t])[k] * weights[k, n], of the rows and columns of this program."""
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BT, BN), tl.float32)
    for start in range(0, MIDDLE, BK):
        k = start + tl.arange(0, BK)
        inside = (t[:, None] < rows) & (k[None, :] < MIDDLE)
        place = y + t[:, None] * PITCH + k[None, :]
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            value = value * tl.sigmoid(value) * tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        else:
            value = tl.maximum(value, 0.0)
        right = tl.load(weights + k[:, None] * HIDDEN + n[None, :],
                        mask=(k[:, None] < MIDDLE) & (n[None, :] < HIDDEN), other=0.0)  # fmt: skip
        total = tl.dot(value.to(right.dtype), right, total, input_precision="ieee")
    tl.store(out + t[:, None] * HIDDEN + n[None, :], total.to(out.dtype.element_ty),
             mask=(t[:, None] < rows) & (n[None, :] < HIDDEN))  # fmt: skip


@triton.jit
def down(row: Any, y: Any, pool: Any, out: Any, shared_y: Any, shared: Any, shared_out: Any, stride: Any,
         shared_stride: Any, CAPACITY: tl.constexpr, HAS_SHARED: tl.constexpr, HIDDEN: tl.constexpr,
         UP: tl.constexpr, MIDDLE: tl.constexpr, HALF: tl.constexpr, PITCH: tl.constexpr,
         SHARED_UP: tl.constexpr, SHARED_MIDDLE: tl.constexpr, SHARED_HALF: tl.constexpr, SHARED_PITCH: tl.constexpr,
         BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr) -> None:  # fmt: skip
    """Activation and down product: out[first + t] of every expert. Programs and slots as in `up`."""
    expert = tl.program_id(1)
    first_row = tl.program_id(2) * BT
    if expert < CAPACITY:
        number = tl.load(row + COUNT)
        slot = tl.load(row + SLOTS + expert)
        first = tl.load(row + SLOTS + CAPACITY + expert)
        rows = tl.load(row + SLOTS + 2 * CAPACITY + expert)
        if (expert < number) & (first_row < rows):
            _down_tile(y + first * PITCH, pool + slot * stride + UP * HIDDEN, out + first * HIDDEN, rows, HIDDEN,
                       MIDDLE, HALF, PITCH, UP > MIDDLE, BT, BN, BK)  # fmt: skip
    else:
        if HAS_SHARED:
            block = tl.load(row + SHARED_BLOCK)
            shared_rows = tl.load(row + SHARED_ROWS)
            if (block >= 0) & (first_row < shared_rows):
                _down_tile(shared_y, shared + block * shared_stride + SHARED_UP * HIDDEN, shared_out, shared_rows,
                           HIDDEN, SHARED_MIDDLE, SHARED_HALF, SHARED_PITCH, SHARED_UP > SHARED_MIDDLE,
                           BT, BN, BK)  # fmt: skip


@triton.jit
def gate(source: Any, words: Any, num_words: Any, counter: Any, flag: Any, BLOCK: tl.constexpr) -> None:
    """Copy words to pinned memory, then raise the counter and write its new number to the pinned flag. One program.

    A host that reads the number reads the words: each thread's stores come before the barrier; after it one thread
    adds to the counter, in device memory, with acquire-release order for the whole system, which makes all that the
    block stored visible to the host first; the flag's store takes its value from that addition, so it comes after.
    No read-modify-write touches host memory: over PCIe the host would not see it as one access, a store it does.
    """
    for start in range(0, num_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(words + word, tl.load(source + word, mask=word < num_words, other=0), mask=word < num_words)
    # Triton of before 3.8 orders an atomic only after the stores of its own thread (its pull request 10816).
    tl.debug_barrier()
    number = tl.atomic_add(counter, 1, sem="acq_rel", scope="sys") + 1
    tl.store(flag, number)


@triton.jit
def check(row: Any, words: Any, within: Any, wrong: Any, first_bad: Any, words_per_slot: Any, CAPACITY: tl.constexpr,
          WORDS: tl.constexpr, BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Compare WORDS words of each expert's slot, at `within`, with the row's. One program an expert.

    wrong[0] grows by the number that differ; first_bad[0] becomes the least number of a launch where any does.
    """
    expert = tl.program_id(0)
    if expert < tl.load(row + COUNT):
        slot = tl.load(row + SLOTS + expert)
        word = tl.arange(0, BLOCK)
        inside = word < WORDS
        place = tl.load(within + word, mask=inside, other=0)
        found = tl.load(words + slot * words_per_slot + place, mask=inside, other=0)
        wanted = tl.load(row + SLOTS + 3 * CAPACITY + expert * WORDS + word, mask=inside, other=0)
        num_wrong = tl.sum((found != wanted).to(tl.int64), axis=0)
        if num_wrong > 0:
            tl.atomic_add(wrong, num_wrong)
            tl.atomic_min(first_bad, tl.load(row + LAUNCH))
