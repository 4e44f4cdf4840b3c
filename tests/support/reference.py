"""The oracle of the other tests: slow, obvious, and independent of the code they test.

Cache counts without time are in `reference_cache`, exhaustive searches in `reference_exhaustive`.
`python -m tests.support.reference TRACE` prints the hit rates of a recorded trace by every reference policy.
"""

import sys
from pathlib import Path

from tests.support.reference_cache import (
    POLICIES,
    Counts,
    Event,
    Policy,
    Scope,
    batched_events,
    count_hits,
    count_hits_fast,
    count_hits_per_access,
    last_occurrences,
    libcachesim_lru,
    per_layer_capacity,
    single_accesses,
    ties_reversed,
    trace_events,
)
from tests.support.reference_exhaustive import (
    brute_force_optimum,
    cheapest_partition,
    fewest_misses,
    floor_bound,
    min_loads,
)

__all__ = [
    "POLICIES",
    "Counts",
    "Event",
    "Policy",
    "Scope",
    "batched_events",
    "brute_force_optimum",
    "cheapest_partition",
    "count_hits",
    "count_hits_fast",
    "count_hits_per_access",
    "fewest_misses",
    "floor_bound",
    "last_occurrences",
    "libcachesim_lru",
    "min_loads",
    "per_layer_capacity",
    "single_accesses",
    "ties_reversed",
    "trace_events",
]


def print_hit_rates(trace: Path, shares: tuple[float, ...] = (0.25, 0.5, 0.75)) -> None:
    """Print the hit rate of every policy on a trace at batch 1, for each residency, global and per layer."""
    from safetensors.numpy import load_file

    experts = load_file(trace)["experts"]
    num_layers = experts.shape[1]
    num_experts = int(experts.max()) + 1
    events = list(trace_events(experts))
    accesses = [layer * num_experts + expert for layer, chosen in events for expert in chosen]
    print(f"{trace.name}: {experts.shape[0]} tokens x {num_layers} layers x {num_experts} experts")
    for share in shares:
        num_slots = int(share * num_layers * num_experts)
        for name in POLICIES:
            whole = count_hits_fast(
                events,
                num_layers=num_layers,
                num_experts=num_experts,
                capacity=num_slots,
                policy=name,
                scope="global",
            )
            split = count_hits_fast(
                events,
                num_layers=num_layers,
                num_experts=num_experts,
                capacity=per_layer_capacity(num_slots, num_layers),
                policy=name,
                scope="layer",
            )
            print(
                f"  residency {share:.2f}  {name:14s}  global {whole.hit_rate:.4f} {tuple(whole)}"
                f"  layer {split.hit_rate:.4f} {tuple(split)}"
            )
        by_access = count_hits_per_access(accesses, num_slots)
        print(f"  residency {share:.2f}  lru by access   global {by_access.hit_rate:.4f}")


if __name__ == "__main__":
    print_hit_rates(Path(sys.argv[1]))
