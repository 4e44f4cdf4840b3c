"""The numbers of a run under stable names: what `metrics.json` holds, the same in both worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expertflow.runtime import Runtime

SCHEMA = 1


def _percentiles_ms(values_ns: Sequence[int]) -> dict[str, float | None]:
    if not len(values_ns):
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    array = np.asarray(values_ns, dtype=np.int64)
    # Nearest rank: a percentile is a time that occurred, and the same on every machine.
    p50, p95, p99 = (int(x) / 1e6 for x in np.percentile(array, [50, 95, 99], method="inverted_cdf"))
    return {"mean": int(array.sum()) / len(array) / 1e6, "p50": p50, "p95": p95, "p99": p99}


def _horizon(reach_counts: Sequence[int]) -> dict[str, float | int | None]:
    total = sum(reach_counts)
    if not total:
        return {"mean": None, "min": None, "max": None}
    used = [reach for reach, count in enumerate(reach_counts) if count]
    mean = sum(reach * count for reach, count in enumerate(reach_counts)) / total
    return {"mean": mean, "min": used[0], "max": used[-1]}


def collect_metrics(runtime: Runtime) -> dict[str, Any]:
    """Metrics of a finished run, without the part before the end of the warm-up. Times in ns unless named.

    prefetch: requested = entered the queue; useful = landed before its demand; late = demanded in flight;
    wasted = issued and never demanded by the end of the run (slots still holding it count); dropped = left the
    queue without being issued. link.utilisation = busy / elapsed. num_host, host_stall_ns, host and
    prefetch.dropped_by_reason.became_host are there only where the policy's place may answer anything but the GPU;
    speculation only where drafted tokens were verified;
    storage_stall_ns and storage only where experts lie on storage: reads begun and their bytes, copies to the GPU whose
    expert was in host memory (host_hits) and for which it was read (host_misses), experts that left host memory, and
    reads of which nothing was ever copied (unused).
    """
    journal, queue = runtime.journal, runtime.queue
    c = runtime.counters if journal.before is None else runtime.counters.minus(journal.before)
    dropped = {
        "replaced": c.dropped_replaced,
        "passed": c.dropped_passed,
        "refused": c.dropped_refused,
        "became_demand": c.dropped_became_demand,
    }
    metrics: dict[str, Any] = {
        "num_tokens": journal.num_tokens,
        "num_forwards": c.num_forwards,
        "elapsed_ns": c.elapsed_ns,
        "compute_ns": c.compute_ns,
        "stall_ns": c.stall_ns,
        "late_stall_ns": c.late_stall_ns,
        "miss_stall_ns": c.miss_stall_ns,
        "overhead_ns": c.overhead_ns,
        "num_accesses": c.num_accesses,
        "num_hits": c.num_hits,
        "num_late": c.num_late,
        "num_misses": c.num_misses,
        "num_evictions": c.num_evictions,
        "num_streamed_layers": c.num_streamed_layers,
        "prefetch": {
            "requested": c.prefetch_requested,
            "issued": c.prefetch_issued,
            "useful": c.prefetch_useful,
            "late": c.prefetch_late,
            "wasted": c.prefetch_evicted_unused + queue.num_fresh,
            "redundant": None,
            "dropped": sum(dropped.values()),
            "dropped_by_reason": dropped,
        },
        "bytes": {"demand": c.demand_bytes, "prefetch": c.prefetch_bytes},
        "link": {"busy_ns": c.link_busy_ns, "utilisation": c.link_busy_ns / c.elapsed_ns if c.elapsed_ns else 0.0},
        "tpot_ms": _percentiles_ms(journal.gaps_ns),
        "ttft_ms": _percentiles_ms(journal.first_token_ns),
        "tokens_per_s": journal.num_tokens * 1e9 / c.elapsed_ns if c.elapsed_ns else 0.0,
        "horizon": _horizon(runtime.policy.reach_counts),
    }
    if journal.num_drafted:
        num_steps, num_accepted = journal.num_verified, journal.num_accepted
        metrics["speculation"] = {
            "num_steps": num_steps,
            "num_drafted": journal.num_drafted,
            "num_accepted": num_accepted,
            "accepted_per_step": num_accepted / num_steps,
            "tokens_per_step": (num_steps + num_accepted) / num_steps,
        }
    if runtime.policy.places:
        dropped["became_host"] = c.dropped_became_host
        metrics["prefetch"]["dropped"] += c.dropped_became_host
        busy = c.host_busy_ns
        metrics |= {"num_host": c.num_host, "host_stall_ns": c.host_stall_ns}
        metrics["host"] = {"busy_ns": busy, "utilisation": busy / c.elapsed_ns if c.elapsed_ns else 0.0}
    if runtime.tier is not None:
        busy = c.storage_busy_ns
        metrics["storage_stall_ns"] = c.storage_stall_ns
        metrics["storage"] = {
            "reads": c.num_reads,
            "bytes": c.read_bytes,
            "host_hits": c.host_hits,
            "host_misses": c.host_misses,
            "host_evictions": c.host_evictions,
            "unused": c.reads_in_vain + runtime.tier.memory.num_fresh,
            "busy_ns": busy,
            "utilisation": busy / c.elapsed_ns if c.elapsed_ns else 0.0,
        }
    return metrics
