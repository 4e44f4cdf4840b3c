"""A stack's overheads on the compute stream, solved from the time between tokens with every expert in GPU memory.

That is one figure which whoever runs the model knows (1000 over tokens per second), and the two overheads are what
nobody has measured. It is taken for the mean time between two decoded tokens of the run's trace, one request at a time
(batch_size=1), nothing copied and nothing decided: `sim.machine.resident` says what kernels and host take of it. The
rest is shared by the L MoE layers and the head in equal parts, as the shipped stacks have it:

    layer_overhead_ns = floor((tpot - kernels and host) / (L + 1)),    head_overhead_ns = the rest
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from expertflow.model import ModelSpec
from sim.job.setup import Workload
from sim.machine.kernels import KernelTimes
from sim.machine.resident import ResidentTime, resident_time
from sim.machine.simulated import HostCosts
from sim.specs.hardware import MOST_NS, Hardware, Stack
from traces.trace import Trace

KEY = "stack.resident_tpot_ms"


@dataclass(frozen=True)
class _Asked:
    """What the time with all experts resident depends on."""

    trace_sha256: str
    num_rows: int
    model: ModelSpec
    hardware: Hardware
    stack: Stack
    trace: Trace = field(compare=False)


@lru_cache(maxsize=16)
def _time(asked: _Asked) -> ResidentTime:
    """The same for the run and for those beside it: worked out once."""
    kernels = KernelTimes(asked.model, asked.hardware, asked.stack)
    return resident_time(asked.trace, asked.num_rows, kernels, HostCosts.of(asked.hardware, asked.stack))


def solved_stack(work: Workload) -> tuple[Stack, dict[str, Any]]:
    """The stack of `work` with the overheads that its `resident_tpot_ms` leaves, and what the metrics say of that; the
    stack as it is, and nothing, where it has none.

    ValueError, one line, for a time that kernels and host alone exceed, and for a trace without decoded tokens.
    """
    asked_ms, model = work.stack.resident_tpot_ms, work.model
    if asked_ms is None:
        return work.stack, {}
    told, bare = f"{KEY}={asked_ms:g}", replace(work.stack, resident_tpot_ms=None)
    found = _time(_Asked(work.trace_sha256, work.batches.num_tokens, model, work.hardware, bare, work.trace))
    if not found.num_tokens:
        raise ValueError(f"{told} is of decoded tokens, and the trace {work.trace.name} has none; leave it out")
    rest_ns = round(asked_ms * 1e6 - found.total_ns / found.num_tokens)
    if rest_ns < 0:
        raise ValueError(
            f"{told} is less than kernels and host of {model.name} take on {work.hardware.name} with all experts in "
            f"GPU memory; give at least {math.ceil(found.tpot_ms * 1e3) / 1e3:.3f}"
        )
    layer_ns = rest_ns // (model.num_layers + 1)
    head_ns = rest_ns - model.num_layers * layer_ns
    if head_ns > MOST_NS:
        raise ValueError(f"{told} leaves {head_ns / 1e9:.3g} s of overhead a layer, more than 1 s; give milliseconds")
    return replace(bare, layer_overhead_ns=layer_ns, head_overhead_ns=head_ns), {
        "stack_solved": {
            "resident_tpot_ms": asked_ms,
            "kernels_and_host_ms": found.tpot_ms,
            "layer_overhead_ns": layer_ns,
            "head_overhead_ns": head_ns,
            "num_tokens": found.num_tokens,
        }
    }
