"""How long a copy from host to GPU memory takes: `t0 + bytes / bandwidth(bytes)` per chunk.

Knows nothing of queues or order: one copy at a time, on an otherwise free link.
"""

from __future__ import annotations

from sim.specs.chunks import DEFAULT_CHUNK_BYTES, check_chunk, chunk_sizes
from sim.specs.curves import bandwidth_at
from sim.specs.hardware import PAGEABLE, PINNED, Curve, Hardware


class Link:
    """The host-to-device copy engine of one GPU, in integer nanoseconds.

    memory: `pinned` follows the hardware's curve; `pageable` its single rate, with the same t0.
    chunk_bytes: the largest single copy, where a method is not told another.
    slowdown: factor on the transfer time, not on t0, of a copy that starts while a kernel runs.
    """

    def __init__(self, hardware: Hardware, memory: str = PINNED, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        if memory not in (PINNED, PAGEABLE):
            raise ValueError(f"link memory={memory!r} is unknown; choose {PINNED} or {PAGEABLE}")
        check_chunk(chunk_bytes)
        self.memory = memory
        self.chunk_bytes = chunk_bytes
        self.latency_ns = hardware.link_latency_ns
        self.slowdown = hardware.link_slowdown
        rate = hardware.link_gb_per_s if memory == PINNED else hardware.pageable_gb_per_s
        self._curve: Curve = rate if isinstance(rate, tuple) else ((1, rate),)
        # Chunks of one expert have two sizes at most, so this stays small and saves the logarithms.
        self._known_ns: dict[tuple[int, bool], int] = {}

    def chunk_ns(self, num_bytes: int, busy: bool) -> int:
        """Device time of one copy of `num_bytes`; `busy`: a kernel runs when it starts."""
        known = self._known_ns.get((num_bytes, busy))
        if known is not None:
            return known
        if num_bytes < 1:
            raise AssertionError(f"a chunk of {num_bytes} bytes")
        transfer_ns = num_bytes / bandwidth_at(self._curve, num_bytes)
        duration_ns = self.latency_ns + round(transfer_ns * (self.slowdown if busy else 1.0))
        self._known_ns[num_bytes, busy] = duration_ns
        return duration_ns

    def fastest_load_ns(self, expert_bytes: int, chunk_bytes: int | None = None) -> int:
        """No schedule loads an expert faster: its chunks back to back on an idle GPU. For bounds."""
        sizes = chunk_sizes(expert_bytes, self.chunk_bytes if chunk_bytes is None else chunk_bytes)
        return sum(self.chunk_ns(size, False) for size in sizes)
