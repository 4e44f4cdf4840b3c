"""What is counted during a run: plain integers, so that two runs compare to the nanosecond."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Counters:
    """Running totals since the start of the run; times in ns. `minus` gives the part after a warm-up."""

    compute_ns: int = 0
    late_stall_ns: int = 0
    miss_stall_ns: int = 0
    host_stall_ns: int = 0
    storage_stall_ns: int = 0
    overhead_ns: int = 0
    elapsed_ns: int = 0
    link_busy_ns: int = 0
    host_busy_ns: int = 0
    storage_busy_ns: int = 0
    num_forwards: int = 0
    num_accesses: int = 0
    num_hits: int = 0
    num_late: int = 0
    num_misses: int = 0
    num_host: int = 0
    num_evictions: int = 0
    num_streamed_layers: int = 0
    prefetch_requested: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_evicted_unused: int = 0
    dropped_replaced: int = 0
    dropped_passed: int = 0
    dropped_refused: int = 0
    dropped_became_demand: int = 0
    dropped_became_host: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    num_reads: int = 0
    read_bytes: int = 0
    reads_in_vain: int = 0
    host_hits: int = 0
    host_misses: int = 0
    host_evictions: int = 0

    @property
    def stall_ns(self) -> int:
        """Late, miss, host and storage stall together."""
        return self.late_stall_ns + self.miss_stall_ns + self.host_stall_ns + self.storage_stall_ns

    def copy(self) -> Counters:
        """A snapshot."""
        return Counters(**asdict(self))

    def minus(self, earlier: Counters) -> Counters:
        """Field by field difference to an earlier snapshot of the same run."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})
