"""The contract between the runtime and a machine (simulated or real).

A machine has one compute stream and one copy stream, each first in, first out. The runtime enqueues work,
then yields a `Wait`; the machine blocks (or lets simulated time pass) and answers with a `Record`. Everything
the runtime learns of time comes from records: feeding a stored list of records to the same policy gives the
same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from expertflow.forward import Forward

# What a wait is for.
GATE = 0  # end of the attention + router kernel, then the routing read back by the host
TOKEN = 1  # end of the head, then the sampled tokens read back by the host
LOAD = 2  # last chunk of the named load
HOST = 3  # results of the named host task, in GPU memory

Wait = tuple[int, int, bool]
"""(kind, mark or load id or host task, drain): resume at what is named; with `drain` at the next chunk's end if that
comes sooner."""

Chunk = tuple[int, int, int, int]
"""(load id, chunk index, start_ns, end_ns) on the copy stream."""

Mark = tuple[int, int, int]
"""(mark id, start_ns, end_ns) of one launched group of kernels on the compute stream."""

Record = tuple[int, Sequence[Chunk], Sequence[Mark]]
"""(now_ns, chunks ended by now, marks ended by now), both in stream order, each reported once."""


HostResult = tuple[int, int, int, int]
"""(host task, key, start_ns, end_ns) of one expert that the host has computed. The results of a task come back
together: its last expert ends when they are in GPU memory."""


Read = tuple[int, int, int, int]
"""(key, chunk index, start_ns, end_ns) of one chunk read from storage into host memory."""


class Costs(NamedTuple):
    """What experts that are missing would cost, each by itself and on resources that nobody else uses, in ns.

    copy_ns: of one expert, over the link. link_wait_ns: until the link has done what it was given. gpu_ns, host_ns: of
    each expert's products, on the GPU and on the host. round_trip_ns: of the activations to the host and of the results
    back, once a layer. stretch: how much longer copies and products on the host take while both read the host's memory,
    1 or more.
    """

    copy_ns: int
    link_wait_ns: int
    gpu_ns: Sequence[int]
    host_ns: Sequence[int]
    round_trip_ns: int
    stretch: float


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


class HostMachine(Machine, Protocol):
    """A machine that computes experts on its host, too, where they lie. One at a time, first in, first out."""

    def estimate(self, tokens: Sequence[int]) -> Costs:
        """What experts over so many tokens each would cost, by what has been enqueued so far."""

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        """Enqueue experts of the layer whose routing was read, over so many tokens each; returns the host task, a
        positive int."""

    def host_ended(self) -> Sequence[HostResult]:
        """A part of the last record: the experts that the host had computed by then, in order, each reported once."""


class StorageMachine(Machine, Protocol):
    """A machine whose experts lie on storage: a third stream, first in, first out, which reads into host memory.

    The runtime copies a chunk once it has seen the end of its read.
    """

    def read(self, key: int, chunk: int, room: int, num_bytes: int) -> None:
        """Enqueue the read of one chunk of `key` into its place in `room` of host memory."""

    def reads_ended(self) -> Sequence[Read]:
        """A part of the last record: the reads that had ended by then, in order, each reported once. They do not
        overlap: each starts when it was issued, or when the one before it ended."""
