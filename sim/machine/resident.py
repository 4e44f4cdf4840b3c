"""The time of a run whose experts are all in GPU memory, in closed form: what its kernels and its host take.

One request at a time, and a policy that decides nothing. Then nothing overlaps but the launch of a layer's experts with
the launch behind it, and what a stack adds on the compute stream lengthens every token by just that: a token takes
A + L * layer_overhead_ns + head_overhead_ns, where A is what is summed here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sim.machine.kernels import KernelTimes
from sim.machine.simulated import HostCosts
from traces.trace import Trace, blocks


class ResidentTime(NamedTuple):
    """Of all decoded tokens of a run together: how many there are, and the ns between them, the stack's overheads on
    the compute stream left out."""

    num_tokens: int
    total_ns: int

    @property
    def tpot_ms(self) -> float:
        """Mean time between two tokens, ms."""
        return self.total_ns / self.num_tokens / 1e6


def resident_time(trace: Trace, num_rows: int, kernels: KernelTimes, costs: HostCosts) -> ResidentTime:
    """The first `num_rows` rows of `trace`, decoded one a forward; prompts are left out, as TPOT leaves them out.

    In order: the host prepares the forward and launches; per layer attention and router run, the routing is read back
    and classified, the experts are launched and run, behind them what follows, whose launch they hide if they last
    longer; the head runs and the tokens are read back.
    """
    num_layers = kernels.model.num_layers
    kv_lens, counts = _kv_lens(trace, num_rows), _expert_counts(trace, num_rows)
    num_tokens = sum(kv_lens.values())
    launch_ns = costs.launch_ns + costs.launch_latency_ns
    # Once a token: the wake for the one before, the begin, the first launch, and the head.
    token_ns = costs.observe_ns + costs.forward_ns + launch_ns
    token_ns += kernels.head_ns(1) + costs.group_ns + costs.token_sync_ns
    total = num_tokens * token_ns
    total += sum(num * sum(kernels.attention_list_ns(1, (kv_len,), False)) for kv_len, num in kv_lens.items())
    layer_ns = costs.group_ns + costs.gate_sync_ns + costs.classify_ns + launch_ns
    total += num_tokens * num_layers * layer_ns
    for count, num in counts.items():
        experts_ns = kernels.experts_ns([1] * count) + kernels.shared_ns(1) + costs.group_ns
        total += num * max(costs.launch_ns, experts_ns)
    if num_rows and not int(trace.prompt_len[0]):
        # The run's first forward follows no tokens.
        total -= costs.observe_ns
    return ResidentTime(num_tokens, total)


def _decoded(trace: Trace, num_rows: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Of the first rows: which are decoded [n], and the KV length of each [n]."""
    starts = np.asarray(trace.request_start, np.int64)
    request = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[:num_rows]
    place = np.arange(num_rows) - starts[request]
    context = np.zeros(len(starts) - 1, np.int64) if trace.context_len is None else trace.context_len.astype(np.int64)
    return place >= np.asarray(trace.prompt_len, np.int64)[request], context[request] + place + 1


def _kv_lens(trace: Trace, num_rows: int) -> dict[int, int]:
    """KV lengths of the decoded rows, each with how often it occurs."""
    decoded, kv_lens = _decoded(trace, num_rows)
    found, counts = np.unique(kv_lens[decoded], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _expert_counts(trace: Trace, num_rows: int) -> dict[int, int]:
    """Numbers of experts that a decoded row has in a layer, each with how often it occurs."""
    decoded, _ = _decoded(trace, num_rows)
    if trace.padding < trace.num_experts:
        return {trace.top_k: int(decoded.sum()) * trace.num_layers}
    totals = np.zeros(trace.top_k + 1, np.int64)
    for start, block in blocks(trace.experts):
        if start >= num_rows:
            break
        rows = block[: num_rows - start][decoded[start : start + len(block)]]
        totals += np.bincount((rows != trace.padding).sum(axis=-1).ravel(), minlength=trace.top_k + 1)
    return {count: int(num) for count, num in enumerate(totals.tolist()) if num}
