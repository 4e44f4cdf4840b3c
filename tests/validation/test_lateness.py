"""How late a host was, from tapes made by hand. Times in us here, in ns on the tape."""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.machine import GATE, LOAD, TOKEN, Record, Wait
from replay.lateness import LAUNCH_GAP_NS, SEEN_NS, late_ns

SEEN, GAP = SEEN_NS // 1000, LAUNCH_GAP_NS // 1000


def answered(kind: int, ident: int, now: int, marks: Sequence[tuple[int, int, int]] = (),
             chunks: Sequence[tuple[int, int, int, int]] = ()) -> tuple[Wait, Record]:  # fmt: skip
    """A wait and its record, us in, ns out."""
    return (kind, ident, True), (
        1000 * now,
        [(load, chunk, 1000 * start, 1000 * end) for load, chunk, start, end in chunks],
        [(mark, 1000 * start, 1000 * end) for mark, start, end in marks],
    )


def forward(known: int = 100 + SEEN, attention: int = 150 + GAP, head: int = 250 + GAP, told: int = 300 + SEEN,
            pad: int = 0) -> list[tuple[Wait, Record]]:  # fmt: skip
    """Two layers and a head. Attention 1 ends at 100, its experts (2) at 150, attention 3 at 200, its experts (4) at
    250, the head (5) at 300; each default is as late as a host may be for nothing."""
    return [
        answered(GATE, 1, known, [(1, 0, 100)]),
        answered(GATE, 3, 200 + SEEN, [(2, known + 5, 150), (3, attention + pad, 200)]),
        answered(TOKEN, 5, told, [(4, 220, 250), (5, head + pad, 300)]),
    ]


def test_a_host_that_the_device_hides_is_not_late() -> None:
    assert late_ns(forward(), 0, 0) == 0


def test_one_us_more_at_each_place_is_late_by_one_us() -> None:
    assert late_ns(forward(known=101 + SEEN), 0, 0) == 1000
    assert late_ns(forward(attention=151 + GAP), 0, 0) == 1000
    assert late_ns(forward(head=251 + GAP), 0, 0) == 1000
    assert late_ns(forward(told=301 + SEEN), 0, 0) == 1000
    assert late_ns(forward(103 + SEEN, 152 + GAP, 253 + GAP, 307 + SEEN), 0, 0) == 15_000


def test_the_stacks_pad_is_no_lateness() -> None:
    assert late_ns(forward(pad=7), 7000, 7000) == 0
    assert late_ns(forward(pad=7), 6000, 7000) == 1000
    assert late_ns(forward(pad=7), 7000, 4000) == 3000


def test_the_first_launch_of_a_forward_is_hidden_by_nothing() -> None:
    later = answered(GATE, 6, 900 + SEEN, [(6, 800, 900)])
    assert late_ns([*forward(), later], 0, 0) == 0


def landing(now: int, last: int = 400) -> list[tuple[Wait, Record]]:
    """After a gate at 100 and experts from 105 to 130: load 9, in two chunks, lands at `last`."""
    return [
        answered(GATE, 1, 102, [(1, 0, 100)]),
        answered(LOAD, 9, 310, [(2, 105, 130)], [(9, 0, 100, 250)]),
        answered(LOAD, 9, now, [], [(8, 0, 250, 260), (9, 1, 260, last)]),
        answered(GATE, 4, 600 + SEEN, [(3, now + 10, now + 30), (4, now + 30, 600)]),
    ]


def test_an_expert_that_has_landed_and_is_not_seen_is_late() -> None:
    assert late_ns(landing(400 + SEEN), 0, 0) == 0
    assert late_ns(landing(425 + SEEN), 0, 0) == 25_000


def test_a_landing_is_not_late_while_a_kernel_runs() -> None:
    """Landed at 110; the experts before it run until 130, which hides the host so long."""
    assert late_ns(landing(425 + SEEN, last=110), 0, 0) == (425 - 130) * 1000
    assert late_ns(landing(129, last=110)[:3], 0, 0) == 0
    # Of a load that comes in chunks only the last counts: the first was found 60 late, for nothing.
    assert late_ns(landing(400)[:3], 0, 0) == 0


def test_nothing_is_never_late() -> None:
    assert late_ns([], 0, 0) == 0
