"""How long kernels run, in whole nanoseconds: as measured where the hardware has a table of the model, else the
roofline, max(bytes / memory bandwidth, operations / peak).

Bytes of the roofline are those of weights and KV cache, activations left out; every token multiplies and adds
each weight, two operations. Knows nothing of streams, of what a launch costs, or of copies.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from expertflow.model import GQA, ModelSpec
from sim.machine.groups import GroupTimes
from sim.specs.hardware import Hardware, Stack, kv_on_grid
from sim.specs.kernel_table import KernelTable, Points


class _Reads(NamedTuple):
    """What one layer's attention reads. kv_tokens: tokens of KV. pairs: (query, key). expanded: tokens of earlier
    chunks whose compressed KV a prefill expands anew (MLA)."""

    kv_tokens: int
    pairs: int
    expanded: int
    prefill: bool


class _Rates:
    """What the GPU sustains: bytes per ns (GB/s is just that) and operations per ns."""

    def __init__(self, hardware: Hardware) -> None:
        self.bytes_per_ns = hardware.memory_gb_per_s * hardware.memory_efficiency
        self.flops_per_ns = hardware.tflops * 1000 * hardware.compute_efficiency

    def ns(self, num_bytes: float, flops: float) -> int:
        memory_ns = num_bytes / self.bytes_per_ns
        compute_ns = flops / self.flops_per_ns
        return round(memory_ns if memory_ns > compute_ns else compute_ns)


class _Matrices(dict[int, int]):
    """Time by number of tokens of kernels that read `params` weights once; filled on first use."""

    def __init__(self, rates: _Rates, params: int, num_bytes: float) -> None:
        super().__init__()
        self.rates, self.params, self.num_bytes = rates, params, num_bytes

    def __missing__(self, num_tokens: int) -> int:
        if num_tokens < 1:
            raise AssertionError(f"a kernel over {num_tokens} tokens")
        duration_ns = self[num_tokens] = self.rates.ns(self.num_bytes, 2 * self.params * num_tokens)
        return duration_ns


class _Roofline:
    """Times by the two peaks. `expert`, `shared`, `head`: ns by number of tokens or rows."""

    def __init__(self, model: ModelSpec, rates: _Rates) -> None:
        self._rates = rates
        self.expert = _Matrices(rates, model.expert_params, model.expert_bytes)
        self.shared = _Matrices(rates, model.shared_params, model.shared_params * model.weight_bits / 8)
        self.head = _Matrices(rates, model.head_params, model.head_params * model.embedding_bits / 8)
        self.groups: GroupTimes | None = None
        self.shortest_expert_ns = self.expert[1]
        self.slowdowns = (1.0, 1.0, 1.0)
        self._dense = _Matrices(rates, model.dense_params, model.dense_params * model.weight_bits / 8)
        # (weights, bytes) that attention reads in a dense layer, and with the router in an MoE layer.
        attention = (model.attention_params, model.attention_params * model.weight_bits / 8)
        router = (model.router_params, model.router_params * model.embedding_bits / 8)
        self._dense_layer = attention
        self._moe_layer = (attention[0] + router[0], attention[1] + router[1])
        self._token_bytes = model.kv_bytes_per_token_per_layer
        self._pair_flops = _pair_flops(model)
        self._expansion_flops = 2 * model.kv_up_params

    def attention_ns(self, num_tokens: int, reads: _Reads) -> int:
        """Attention and router of one MoE layer."""
        return self._layer_ns(self._moe_layer, num_tokens, reads)

    def dense_ns(self, num_tokens: int, reads: _Reads) -> int:
        """One leading dense layer."""
        return self._layer_ns(self._dense_layer, num_tokens, reads) + self._dense[num_tokens]

    def _layer_ns(self, weights: tuple[int, float], num_tokens: int, reads: _Reads) -> int:
        (params, num_bytes), (kv_tokens, pairs, expanded, prefill) = weights, reads
        kv_flops = pairs * self._pair_flops[prefill] + expanded * self._expansion_flops
        return self._rates.ns(num_bytes + kv_tokens * self._token_bytes, 2 * params * num_tokens + kv_flops)


def ns_at(points: Points, num_tokens: int) -> float:
    """Time over `num_tokens` >= 1 tokens: linear between the points. Below the first point its time; beyond the
    last the line of the last two goes on, but never falls."""
    if num_tokens < 1:
        raise AssertionError(f"a kernel over {num_tokens} tokens")
    right = bisect_right(points, num_tokens, key=lambda point: point[0])
    if right == 0 or len(points) == 1:
        return points[0][1]
    (low, low_ns), (high, high_ns) = points[right - 1 : right + 1] if right < len(points) else points[-2:]
    slope = (high_ns - low_ns) / (high - low)
    if right == len(points):
        return high_ns + max(0.0, slope) * (num_tokens - high)
    return low_ns + slope * (num_tokens - low)


class _Interpolated(dict[int, int]):
    """Whole ns by number of tokens, read from `points`, 0 if there are none; filled on first use."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def __missing__(self, num_tokens: int) -> int:
        duration_ns = self[num_tokens] = round(ns_at(self.points, num_tokens)) if self.points else 0
        return duration_ns


class _Measured:
    """Times by a table; stands where `_Roofline` does. ValueError if the table is not that of the model's shape."""

    def __init__(self, model: ModelSpec, table: KernelTable, rates: _Rates) -> None:
        for key, points, needed in (
            ("shared", table.shared, model.shared_intermediate > 0),
            ("dense", table.dense, model.num_dense_layers > 0),
        ):
            if needed != bool(points):
                have, remedy = ("has", "measure them") if needed else ("has no", "leave them out")
                raise ValueError(
                    f"hardware.kernel_ns.{model.name}.{key}={points!r}, but {model.name} {have} {key} "
                    f"{'experts' if key == 'shared' else 'layers'}; {remedy}"
                )
        self.expert = _Interpolated(table.expert)
        self.shared = _Interpolated(table.shared)
        self.head = _Interpolated(table.head)
        self.groups = GroupTimes(table.groups) if table.groups else None
        # Between points no time is below both of them, beyond the last none is below it.
        shortest = round(min(ns for _, ns in table.expert))
        self.shortest_expert_ns = shortest if self.groups is None else self.groups.shortest_ns
        self.slowdowns = (table.attention_slowdown, table.experts_slowdown, table.head_slowdown)
        self._table = table
        prefill_flops = _pair_flops(model)[1]
        self._pair_ns = prefill_flops / rates.flops_per_ns if table.prefill_kv is None else table.prefill_kv
        # The points see no context and pairs do not count it: its expansion stays the roofline's.
        self._expansion_ns = 2 * model.kv_up_params / rates.flops_per_ns

    def attention_ns(self, num_tokens: int, reads: _Reads) -> int:
        """Attention and router of one MoE layer."""
        return round(ns_at(self._table.attention, num_tokens) + self._context_ns(num_tokens, reads))

    def dense_ns(self, num_tokens: int, reads: _Reads) -> int:
        """One leading dense layer."""
        return round(ns_at(self._table.dense, num_tokens) + self._context_ns(num_tokens, reads))

    def _context_ns(self, num_tokens: int, reads: _Reads) -> float:
        """What the points lack: they hold one KV token, and one pair, for each row."""
        context_ns = (reads.kv_tokens - num_tokens) * self._table.kv
        if reads.prefill:
            context_ns += (reads.pairs - num_tokens) * self._pair_ns + reads.expanded * self._expansion_ns
        return context_ns


class KernelTimes:
    """Durations of one model's kernels on one GPU. Lists returned are shared: do not change them.

    groups: times of experts launched at once, None if they take as long as one by one. slowdowns: factors on
    attention, experts and head beside a busy link.
    """

    def __init__(self, model: ModelSpec, hardware: Hardware, stack: Stack) -> None:
        self.model = model
        self.stack = stack
        rates, table = _Rates(hardware), hardware.kernel_ns.get(model.name)
        times = _Roofline(model, rates) if table is None else _Measured(model, table, rates)
        self._times: _Roofline | _Measured = times
        self._expert: dict[int, int] = times.expert
        self._shared: dict[int, int] = times.shared
        self._head: dict[int, int] = times.head
        self.groups = times.groups
        self.slowdowns = times.slowdowns
        self.shortest_expert_ns = times.shortest_expert_ns
        self._kv_grid = stack.kv_grid
        self._window = model.window or sys.maxsize
        # Bounded, so that memory does not grow with the trace.
        self._decode = lru_cache(maxsize=4096)(self._decode_list)

    def expert_ns(self, num_tokens: int) -> int:
        """One routed expert by itself, over the tokens routed to it."""
        return self._expert[num_tokens]

    def experts_ns(self, tokens: Sequence[int]) -> int:
        """One launch of routed experts over so many tokens each: a group, or one by one where none was measured."""
        if self.groups is not None:
            return self.groups.ns(len(tokens), sum(tokens))
        expert_ns = self._expert
        return sum([expert_ns[count] for count in tokens])

    def shared_ns(self, num_tokens: int) -> int:
        """One layer's shared experts over all tokens of the forward; 0 if the model has none."""
        return self._shared[num_tokens]

    def head_ns(self, num_tokens: int) -> int:
        """The head over the rows that need logits: one per request."""
        return self._head[num_tokens]

    def attention_ns(self, layer: int, num_tokens: int, kv_tokens: int) -> int:
        """Attention, norms and router of MoE layer `layer` in a decode forward of `num_tokens` requests.

        kv_tokens: summed KV length of the requests. A windowed layer takes at most a window of each, which is
        exact if all requests or none exceed it; `attention_list_ns` is exact always.
        """
        windowed = min(kv_tokens, self._window * num_tokens)
        return self._decode_at(num_tokens, kv_tokens, windowed)[layer]

    def attention_list_ns(self, num_tokens: int, kv_lens: Sequence[int], prefill: bool) -> list[int]:
        """The same for every MoE layer [L]; leading dense layers count into the first.

        kv_lens [num_tokens]: KV length of each row's request up to and including the row. In a decode forward
        each row is its own request; in a prefill the rows are consecutive tokens of one, attention is causal.
        """
        if len(kv_lens) != num_tokens:
            raise AssertionError(f"{len(kv_lens)} KV lengths for {num_tokens} rows")
        if prefill:
            return self._prefill_list(num_tokens, kv_lens)
        window = self._window
        if num_tokens == 1:
            kv_len = kv_lens[0]
            return self._decode_at(1, kv_len, kv_len if kv_len < window else window)
        return self._decode_at(num_tokens, sum(kv_lens), sum(min(kv_len, window) for kv_len in kv_lens))

    def resident_layer_ns(self, layer: int, kv_tokens: int) -> int:
        """A whole MoE layer for one decoded token, all experts resident, the stack's overhead included."""
        experts_ns = self.experts_ns([1] * self.model.top_k) + self.shared_ns(1)
        return self.stack.layer_overhead_ns + self.attention_ns(layer, 1, kv_tokens) + experts_ns

    def _decode_at(self, num_tokens: int, full: int, windowed: int) -> list[int]:
        """Times of all layers, given the KV tokens that a full and a windowed layer need."""
        grid = self._kv_grid
        if grid:
            full = kv_on_grid(full, grid)
            windowed = kv_on_grid(windowed, grid, self._window * num_tokens)
        return self._decode(num_tokens, full, windowed)

    def _decode_list(self, num_tokens: int, full: int, windowed: int) -> list[int]:
        """Every row reads its own request's keys: as many tokens as there are (query, key) pairs."""
        return self._spread(num_tokens, _Reads(full, full, 0, False), _Reads(windowed, windowed, 0, False))

    def _prefill_list(self, num_tokens: int, kv_lens: Sequence[int]) -> list[int]:
        """All rows read one request's keys, once; the pairs are a causal triangle, later a trapezoid."""
        first, last, window = kv_lens[0], kv_lens[-1], self._window
        # MLA expands the compressed KV of earlier chunks anew; that of its own rows is in the projections.
        full = _Reads(last, sum(kv_lens), last - num_tokens, True)
        pairs = sum(min(kv_len, window) for kv_len in kv_lens)
        windowed = _Reads(last - max(0, first - window), pairs, 0, True)
        return self._spread(num_tokens, full, windowed)

    def _spread(self, num_tokens: int, full: _Reads, windowed: _Reads) -> list[int]:
        """Times of all layers, given what a full and a windowed layer read."""
        model = self.model
        times = [self._times.attention_ns(num_tokens, full)] * model.num_layers
        if model.window:
            windowed_ns = self._times.attention_ns(num_tokens, windowed)
            times[:: model.window_every] = [windowed_ns] * -(-model.num_layers // model.window_every)
        if model.num_dense_layers:
            times[0] += model.num_dense_layers * self._times.dense_ns(num_tokens, full)
        return times


def _pair_flops(model: ModelSpec) -> tuple[int, int]:
    """Operations per (query, key) pair, all heads, in decode and in prefill: scores and weighted values.

    MLA decodes on the compressed KV with the expansion folded into the projections (DeepSeek-V2, arXiv
    2405.04434, section 2.1) and prefills on expanded keys and values.
    """
    if model.attention == GQA:
        flops = 4 * model.num_heads * model.head_dim
        return flops, flops
    decode = 2 * model.num_heads * (2 * model.kv_rank + model.rope_dim)
    return decode, 2 * model.num_heads * (model.nope_dim + model.rope_dim + model.v_dim)
