"""What is in the slots before a run begins, and what of it never leaves. Once a run; acts on no policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from expertflow.slots import Slots


def fill(
    slots: Slots, initial: Sequence[int], stays: Collection[int], num_pinned: int, needs_all: bool
) -> tuple[list[int], frozenset[int]]:
    """Put `initial`, best first, into `slots` as far as they fit, without those that stay on the host: the keys that
    found a slot, and those of them that never leave: of the first `num_pinned`.

    needs_all: ValueError unless all of them fit. ValueError where what never leaves has left no slot for an expert that
    would have to be copied.
    """
    wanted = [key for key in initial if key not in stays] if stays else initial
    placed = slots.fill(wanted)
    if needs_all and len(placed) < len(wanted):
        others = " that do not stay on the host" if stays else ""
        raise ValueError(
            f"the start needs room for {len(wanted)} experts{others}, and {len(placed)} find a slot; raise residency, "
            "choose an eviction whose cache is not split by layer, or start=popular"
        )
    pinned = set(initial[:num_pinned])
    fixed = frozenset(key for key in placed if key in pinned)
    if fixed:
        _check_room(slots, stays, fixed)
    return placed, fixed


def _check_room(slots: Slots, stays: Collection[int], fixed: Collection[int]) -> None:
    for pool in range(len(slots.free)):
        if slots.is_blocked(pool, stays, fixed):
            raise ValueError(
                f"start pins experts into {slots.all_room}, and none is left to copy another into; "
                "give policy.transfer.staging_slots=1 or more, or a place that keeps the others on the host"
            )
