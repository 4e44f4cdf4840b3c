"""Was a run bound by its host? Read from what crossed between machine and runtime, so no prediction enters.

Some host work is between two kernels by nature: seeing the routing, sorting the demand, launching the experts. A
simulation charges it and the device waits for it in any engine. *Late* is the host beyond that:

- it finds the routing, the tokens, an awaited expert that has landed or, on the way to it, a link that has run dry more
  than `SEEN_NS` after that, while the compute stream had nothing to do: it was still deciding, or in some call;
- attention or head, which are launched while experts run, start later behind them than the stack's pad and
  `LAUNCH_GAP_NS`: what it had to do took longer than the experts did.

A row is *host-bound* where the lateness is a larger share of its time than the bar of its TPOT error: a smaller one
cannot make it miss the bar alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from expertflow.machine import HOST, LOAD, TOKEN, Chunk, HostResult, Mark, Record, Wait

SEEN_NS = 10_000
"""A host that polls sees a number that a kernel raises within 5 us of its end (H200); as much again is margin."""
LAUNCH_GAP_NS = 3_000
"""Two graphs in a row are 1.2-1.4 us apart (H200); twice that is margin."""

Tape = Sequence[tuple[Wait, Record]]
"""What was waited for and what was answered, in order."""


def late_ns(tape: Tape, layer_pad_ns: float, head_pad_ns: float, results: Sequence[HostResult] = ()) -> int:
    """How long the compute stream waited for a late host. The pads are the stack's, as long as they really last.
    results: what the host has computed, whose finding may be late as well."""
    marks = [mark for _, record in tape for mark in record[2]]
    return _found_late(tape, marks, results) + _launched_late(tape, marks, layer_pad_ns, head_pad_ns)


def _found_late(tape: Tape, marks: Sequence[Mark], results: Sequence[HostResult]) -> int:
    starts = [start for _, start, _ in marks]
    chunks = [chunk for _, record in tape for chunk in record[1]]
    landed = {load: end for load, _, _, end in chunks}
    back = {task: end for task, _, _, end in results}
    seen = late = 0
    for (kind, ident, _), (now, ended, ended_marks) in tape:
        seen += len(ended)
        following = chunks[seen][2] if seen < len(chunks) else None
        if kind == LOAD:
            there = _idle_from(ident, now, ended, landed, following)
        elif kind == HOST:
            # A wake for a chunk finds them on their way still.
            there = back[ident] if ident in back and back[ident] <= now else None
        else:
            there = next((end for mark, _, end in ended_marks if mark == ident), None)
        if there is None:
            continue
        # What was launched before and still runs hides the host.
        before = bisect_right(starts, now) - 1
        busy_until = marks[before][2] if before >= 0 else there
        late += max(0, now - max(there, busy_until) - SEEN_NS)
    return late


def _idle_from(
    load: int, now: int, ended: Sequence[Chunk], landed: Mapping[int, int], following: int | None
) -> int | None:
    """The time since when a link or a device has waited for the host, which waits for `load` and resumes at `now`.

    It is the time at which the load landed, or at which the link had nothing left to copy; None if neither. following:
    when the next chunk starts.
    """
    for one, _, _, end in ended:
        if one == load and end == landed[load]:
            return end
    return ended[-1][3] if ended and following is not None and following > now else None


def _launched_late(tape: Tape, marks: Sequence[Mark], layer_pad_ns: float, head_pad_ns: float) -> int:
    kinds = {wait[1]: wait[0] for wait, _ in tape if wait[0] not in (LOAD, HOST)}
    heads = {ident for ident, kind in kinds.items() if kind == TOKEN}
    late = 0
    for (before, _, free_ns), (mark, start_ns, _) in pairwise(marks):
        # The first attention of a forward follows the tokens: nothing hides that launch.
        if mark in kinds and before not in heads:
            pad = head_pad_ns if mark in heads else layer_pad_ns
            late += max(0, start_ns - free_ns - round(pad) - LAUNCH_GAP_NS)
    return late
