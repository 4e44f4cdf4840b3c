"""The contract between the runtime and a machine (simulated or real).

A machine has one compute stream and one copy stream, each first in, first out. The runtime enqueues work,
then yields a `Wait`; the machine blocks (or lets simulated time pass) and answers with a `Record`. Everything
the runtime learns of time comes from records: feeding a stored list of records to the same policy gives the
same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from expertflow.forward import Forward

# What a wait is for.
GATE = 0  # end of the attention + router kernel, then the routing read back by the host
TOKEN = 1  # end of the head, then the sampled tokens read back by the host
LOAD = 2  # last chunk of the named load

Wait = tuple[int, int, bool]
"""(kind, mark or load id, drain): resume at what is named; with `drain` at the next chunk's end if sooner."""

Chunk = tuple[int, int, int, int]
"""(load id, chunk index, start_ns, end_ns) on the copy stream."""

Mark = tuple[int, int, int]
"""(mark id, start_ns, end_ns) of one launched group of kernels on the compute stream."""

Record = tuple[int, Sequence[Chunk], Sequence[Mark]]
"""(now_ns, chunks ended by now, marks ended by now), both in stream order, each reported once."""


class Machine(Protocol):
    """One GPU, its host and the link between them. Marks are positive ints in launch order; 0 = no mark."""

    def begin_forward(self, forward: Forward) -> None:
        """Called before anything of `forward` is launched."""

    def attention(self, layer: int) -> int:
        """Enqueue attention + router of MoE layer `layer` (and what the stack adds); returns its mark."""

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        """Enqueue routed experts back to back, the shared expert first if `shared`; returns one mark."""

    def head(self) -> int:
        """Enqueue the head and sampling; returns the mark."""

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        """Enqueue one host-to-device chunk; it starts no earlier than the end of mark `after`."""

    def decided(self, wants: Sequence[int], effort: float) -> None:
        """The policy has just decided on `wants`: a simulated host is charged for it, a real one has spent it.

        effort: host time of the decision, in multiples of one that looks rows up in a table (`parts.Effort`). Not
        called where the policy had nothing to decide.
        """
