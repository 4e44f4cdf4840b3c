"""The Triton kernels of the device-bound machine: the one module that imports triton; `slot_kernels` launches them.

Names of the compile-time sizes: BT rows, BN columns, BK depth of a tile; HIDDEN, UP, MIDDLE widths of a feed-forward
block; HALF where `up` begins in a row of the intermediate buffer, of PITCH values. `row` is that of a launch, see
`replay.machine.rows`, on the device.
"""
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
# Triton compiles the annotations of its kernels too: only compile-time sizes have one.

import triton
import triton.language as tl

from replay.machine import rows

NUM_EXPERTS = tl.constexpr(rows.NUM_EXPERTS)
SHARED_BLOCK = tl.constexpr(rows.SHARED_BLOCK)
SHARED_ROWS = tl.constexpr(rows.SHARED_ROWS)
NUMBER = tl.constexpr(rows.NUMBER)
TOLD = tl.constexpr(rows.TOLD)
GAVE_UP = tl.constexpr(rows.GAVE_UP)
MORE = tl.constexpr(rows.MORE)
TAG_SHIFT, TAG_MASK = tl.constexpr(rows.TAG_SHIFT), tl.constexpr(rows.TAG_MASK)
SLOTS = tl.constexpr(rows.FIRST_SLOT)
"""Where the slots of the experts begin in a row; the first rows, numbers of rows and expected words follow."""


@triton.jit
def _is_head(word, end):
    """Whether a word carries the number of its launch; slots end before `end`."""
    return (word <= SHARED_ROWS) | ((word >= SLOTS) & (word < end))


@triton.jit
def _plain(word, found):
    """A word without the number of its launch: its lower half, which has a sign."""
    value = (found << TAG_SHIFT) >> TAG_SHIFT
    return tl.where(word == NUM_EXPERTS, value & TAG_MASK, value)


@triton.jit
def _num_missing(word, found, tag):
    """How many words of the launch with this tag have not come yet."""
    # Sums of 32 bits take one instruction across a warp.
    num_experts = tl.sum(tl.where(word == NUM_EXPERTS, found & TAG_MASK, 0).to(tl.int32), axis=0)
    return tl.sum((_is_head(word, num_experts + SLOTS) & ((found >> TAG_SHIFT) < tag)).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_words", "capacity", "most_polls"])
def stage(source, target, num_words, capacity, most_polls, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Wait until the host has written this launch into its row, then copy it from pinned memory. One program.

    The n-th launch takes words that carry n or more; the device's own word TOLD counts the launches that have begun.
    All words that change with each launch are looked at together, since a look at the host's memory takes a microsecond
    and more. Where the host says MORE, the others are read as well, after its number was found: that is written last.
    All reads are volatile: no cache answers them with what the host has replaced. A host that does not come for
    `most_polls` looks is told of it in GAVE_UP, and nothing is computed: a GPU must not wait for ever.
    """
    launch = tl.load(target + TOLD) + 1
    tag = launch & TAG_MASK
    word = tl.arange(0, HEAD)
    end = capacity + SLOTS
    head = word < end
    found = tl.load(source + word, mask=head, other=0, volatile=True)
    missing = _num_missing(word, found, tag)
    polls = launch * 0
    while (missing > 0) & (polls < most_polls):
        found = tl.load(source + word, mask=head, other=0, volatile=True)
        missing = _num_missing(word, found, tag)
        polls += 1
    if tl.sum(((word == NUM_EXPERTS) & ((found & MORE) != 0)).to(tl.int32), axis=0) > 0:
        tl.debug_barrier()
        for start in range(0, num_words, BLOCK):
            each = start + tl.arange(0, BLOCK)
            value = tl.load(source + each, mask=each < num_words, other=0, volatile=True)
            value = tl.where(_is_head(each, end), _plain(each, value), value)
            tl.store(target + each, value, mask=each < num_words)
    else:
        tl.store(target + word, _plain(word, found), mask=head & _is_head(word, end))
    tl.debug_barrier()
    tl.store(target + TOLD, launch)
    if missing > 0:
        tl.store(target + NUM_EXPERTS, launch * 0)
        tl.store(target + SHARED_BLOCK, launch * 0 - 1)
        tl.store(source + GAVE_UP, launch)


@triton.jit
def task(row, most_inputs, most_rows, HAS_SHARED: tl.constexpr):
    """What this program's expert is: (routed, slot or block, first row, number of rows), no rows for none.

    The second axis of the grid is the row's capacity, which is no compile-time size: one program serves them all. With
    shared experts it is one more, and they are the last. Slots are 64 bits: times the stride they pass 2^31 in a large
    pool. Rows end where the inputs and the outputs do, as a slice of a tensor would.
    """
    expert = tl.program_id(1)
    capacity = tl.num_programs(1)
    if HAS_SHARED:
        capacity = capacity - 1
    routed = expert < capacity
    if HAS_SHARED:
        slot = tl.load(row + tl.where(routed, SLOTS + expert, SHARED_BLOCK))
        count = tl.load(row + tl.where(routed, SLOTS + 2 * capacity + expert, SHARED_ROWS))
        first = tl.where(routed, tl.load(row + tl.where(routed, SLOTS + capacity + expert, SHARED_BLOCK)), 0)
        active = tl.where(routed, expert < tl.load(row + NUM_EXPERTS), slot >= 0)
        # The outputs of the shared experts have as many rows as the inputs.
        count = tl.minimum(count, tl.where(routed, most_rows - first, most_inputs))
    else:
        slot = tl.load(row + SLOTS + expert)
        count = tl.load(row + SLOTS + 2 * capacity + expert)
        first = tl.load(row + SLOTS + capacity + expert)
        active = expert < tl.load(row + NUM_EXPERTS)
        count = tl.minimum(count, most_rows - first)
    count = tl.where(active, tl.minimum(count, most_inputs), 0)
    return routed, slot, first, count.to(tl.int32)


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
    PITCH: tl.constexpr,
    SHARED_UP: tl.constexpr,
    SHARED_MIDDLE: tl.constexpr,
    SHARED_HALF: tl.constexpr,
    SHARED_PITCH: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y[first + t, n] = sum over k of x[t, k] * weights[n, k]. Programs: column tiles, experts, row tiles.

    pool, shared: weights, of which slot or block i begins at i * stride; x [most_inputs, HIDDEN]; y [most_rows, PITCH].
    Any number of rows is computed, whatever row tiles the grid has.
    """
    routed, slot, first, count = task(row, most_inputs, most_rows, HAS_SHARED)
    if HAS_SHARED:
        # Chosen, not branched over: two loops would take twice the shared memory.
        weights = tl.where(routed, pool + slot * stride, shared + slot * shared_stride)
        width = tl.where(routed, UP, SHARED_UP)
        middle = tl.where(routed, MIDDLE, SHARED_MIDDLE)
        half = tl.where(routed, HALF, SHARED_HALF)
        pitch = tl.where(routed, PITCH, SHARED_PITCH)
        out = tl.where(routed, y, shared_y) + first * pitch
    else:
        weights, width, middle, half, pitch = pool + slot * stride, UP, MIDDLE, HALF, PITCH
        out = y + first * PITCH
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN < width:
        for first_row in range(tl.program_id(2) * BT, count, tl.num_programs(2) * BT):
            t = first_row + tl.arange(0, BT)
            total = tl.zeros((BT, BN), tl.float32)
            for start in range(0, HIDDEN, BK):
                k = start + tl.arange(0, BK)
                left = tl.load(
                    x + t[:, None] * HIDDEN + k[None, :], mask=(t[:, None] < count) & (k[None, :] < HIDDEN), other=0.0
                )
                right = tl.load(
                    weights + n[None, :] * HIDDEN + k[:, None],
                    mask=(n[None, :] < width) & (k[:, None] < HIDDEN),
                    other=0.0,
                )
                total = tl.dot(left, right, total, input_precision="ieee")
            column = tl.where(n < middle, n, n + (half - middle))
            tl.store(
                out + t[:, None] * pitch + column[None, :],
                total.to(y.dtype.element_ty),
                mask=(t[:, None] < count) & (n[None, :] < width),
            )


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
    PITCH: tl.constexpr,
    SHARED_UP: tl.constexpr,
    SHARED_MIDDLE: tl.constexpr,
    SHARED_HALF: tl.constexpr,
    SHARED_PITCH: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[first + t, n] = sum over k of act(y[first + t])[k] * weights[k, n]. Programs and slots as in `up`."""
    routed, slot, first, count = task(row, most_inputs, most_rows, HAS_SHARED)
    if HAS_SHARED:
        weights = tl.where(
            routed, pool + slot * stride + UP * HIDDEN, shared + slot * shared_stride + SHARED_UP * HIDDEN
        )
        middle = tl.where(routed, MIDDLE, SHARED_MIDDLE)
        half = tl.where(routed, HALF, SHARED_HALF)
        pitch = tl.where(routed, PITCH, SHARED_PITCH)
        values = tl.where(routed, y, shared_y) + first * pitch
        target = tl.where(routed, out, shared_out) + first * HIDDEN
    else:
        weights, middle, half, pitch = pool + slot * stride + UP * HIDDEN, MIDDLE, HALF, PITCH
        values, target = y + first * PITCH, out + first * HIDDEN
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    for first_row in range(tl.program_id(2) * BT, count, tl.num_programs(2) * BT):
        t = first_row + tl.arange(0, BT)
        total = tl.zeros((BT, BN), tl.float32)
        for start in range(0, middle, BK):
            k = start + tl.arange(0, BK)
            # Up to half: values beyond middle are 0, and a mask that ends at 16 values leaves the reads whole.
            inside = (t[:, None] < count) & (k[None, :] < half)
            place = values + t[:, None] * pitch + k[None, :]
            left = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            if UP > MIDDLE:
                left = left * tl.sigmoid(left) * tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
            else:
                left = tl.maximum(left, 0.0)
            right = tl.load(
                weights + k[:, None] * HIDDEN + n[None, :],
                mask=(k[:, None] < middle) & (n[None, :] < HIDDEN),
                other=0.0,
            )
            total = tl.dot(left.to(right.dtype), right, total, input_precision="ieee")
        tl.store(
            target + t[:, None] * HIDDEN + n[None, :],
            total.to(out.dtype.element_ty),
            mask=(t[:, None] < count) & (n[None, :] < HIDDEN),
        )


@triton.jit(do_not_specialize=["num_words"])
def gate(source, words, num_words, counter, flag, BLOCK: tl.constexpr):
    """Copy words to pinned memory, then raise the counter and write its new number to the pinned flag. One program.

    A host that reads the number reads the words: each thread's stores come before the barrier; after it one thread
    adds to the counter, in device memory, with acquire-release order for the whole system, which makes all that the
    block stored visible to the host first; the flag's store takes its value from that addition, so it comes after.
    No read-modify-write touches host memory: CUDA forbids it beside the host where `hostNativeAtomicSupported` is 0,
    as over PCIe (CCCL, cuda::atomic, "Concurrency Restrictions"); an aligned store of 8 bytes arrives whole.
    """
    for start in range(0, num_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(words + word, tl.load(source + word, mask=word < num_words, other=0), mask=word < num_words)
    # Triton of before 3.8 orders an atomic only after the stores of its own thread (its pull request 10816).
    tl.debug_barrier()
    number = tl.atomic_add(counter, 1, sem="acq_rel", scope="sys") + 1
    tl.store(flag, number)


@triton.jit
def check(row, words, within, wrong, first_bad, words_per_slot, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Compare WORDS words of each expert's slot, at `within`, with the row's. As many programs as the row has room.

    wrong[0] grows by the number that differ; first_bad[0] becomes the least number of a launch where any does.
    """
    expert = tl.program_id(0)
    if expert < tl.load(row + NUM_EXPERTS):
        slot = tl.load(row + SLOTS + expert)
        word = tl.arange(0, BLOCK)
        inside = word < WORDS
        place = tl.load(within + word, mask=inside, other=0)
        found = tl.load(words + slot * words_per_slot + place, mask=inside, other=0)
        wanted = tl.load(row + SLOTS + 3 * tl.num_programs(0) + expert * WORDS + word, mask=inside, other=0)
        num_wrong = tl.sum((found != wanted).to(tl.int64), axis=0)
        if num_wrong > 0:
            tl.atomic_add(wrong, num_wrong)
            tl.atomic_min(first_bad, tl.load(row + NUMBER))
