"""How long kernels run, in whole nanoseconds: as measured where the hardware has a table of the model, else the
roofline, max(bytes / memory bandwidth, operations / peak).

Bytes of the roofline are those of weights and KV cache, activations left out; every token multiplies and adds
each weight, two operations. Knows nothing of streams, of what a launch costs, or of copies.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from expertflow.attention import LINEAR, NONE, entries_at_most
from expertflow.forward import Span
from expertflow.layers import DENSE, MOE
from expertflow.model import ModelSpec
from sim.machine.groups import GroupTimes
from sim.machine.reads import Reads, decode_reads, most_read, prefill_reads, span_reads, together
from sim.specs.hardware import Hardware, Stack, kv_on_grid
from sim.specs.kernel_table import KernelTable, Points


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
    """Times by the two peaks. `expert`, `shared`, `head`: ns by number of tokens or rows; an expert's is that of one of
    mean size, `by_key` each one's own, None where all are alike."""

    def __init__(self, model: ModelSpec, rates: _Rates) -> None:
        self._rates = rates
        self.expert = _Matrices(rates, model.expert_params, model.mean_expert_bytes)
        self.shared = _Matrices(rates, model.shared_params, model.shared_params * model.weight_bits / 8)
        self.head = _Matrices(rates, model.head_params, model.head_params * model.embedding_bits / 8)
        self.groups: GroupTimes | None = None
        self.by_key: list[_Matrices] | None = None
        self.shortest_expert_ns = self.expert[1]
        if model.bytes_by_key is not None:
            kinds = {size: _Matrices(rates, model.expert_params, size) for size in set(model.bytes_by_key)}
            self.by_key = [kinds[size] for size in model.bytes_by_key]
            self.shortest_expert_ns = kinds[min(kinds)][1]
        self.slowdowns = (1.0, 1.0, 1.0)
        self._dense = _Matrices(rates, model.dense_params, model.dense_params * model.weight_bits / 8)
        self._router = (model.router_params, model.router_params * model.embedding_bits / 8)
        self._mixers = {kind: _Mixer(model, kind) for kind in model.num_of}

    def attention_ns(self, kind: str, num_tokens: int, reads: Sequence[Reads]) -> int:
        """Attention and router of one MoE layer."""
        return self._layer_ns(kind, self._router, num_tokens, reads)

    def dense_ns(self, kind: str, num_tokens: int, reads: Sequence[Reads]) -> int:
        """One dense layer."""
        return self.bare_ns(kind, num_tokens, reads) + self._dense[num_tokens]

    def bare_ns(self, kind: str, num_tokens: int, reads: Sequence[Reads]) -> int:
        """Attention alone."""
        return self._layer_ns(kind, (0, 0.0), num_tokens, reads)

    def _layer_ns(self, kind: str, more: tuple[int, float], num_tokens: int, reads: Sequence[Reads]) -> int:
        mixer = self._mixers[kind]
        params, num_bytes = mixer.params + more[0], mixer.num_bytes + more[1]
        flops = 2 * params * num_tokens
        for one in reads:
            num_bytes += one.entries * mixer.entry_bytes + one.index_keys * mixer.index_key_bytes
            num_bytes += one.requests * mixer.state_bytes
            flops += mixer.context_flops(one) + one.index_pairs * mixer.index_flops
        return self._rates.ns(num_bytes, flops + num_tokens * mixer.state_flops)


class _Mixer:
    """Weights, bytes and operations of the attention of layers of one kind.

    A linear layer reads and writes each request's state, and does four operations a value and token: it takes in a
    key and value, and answers a query, as a product and a sum each (arXiv 2006.16236, equations 16 to 20). An
    indexer's score is a product of the width of its keys for each of its heads (DeepSeek-V3.2).
    """

    def __init__(self, model: ModelSpec, kind: str) -> None:
        found = model.projections(kind)
        self.params = model.mixer_params(kind)
        self.num_bytes = self.params * model.weight_bits / 8
        self.entry_bytes = model.entry_bytes(kind)
        self.pair_flops = (0, 0) if found is None else (found.pair_flops(False), found.pair_flops(True))
        self.expansion_flops = 0 if found is None else 2 * found.kv_up_params
        self.index_key_bytes = model.index_key_bytes
        self.index_flops = 2 * model.index_heads * model.index_dim
        is_linear = kind == LINEAR
        self.state_bytes = 2 * model.state_bytes if is_linear else 0
        self.state_flops = 4 * model.linear_state if is_linear else 0

    def context_flops(self, reads: Reads) -> int:
        """Operations over the cache. A prefill takes the cheaper of two forms: on the cache as it is, as decode does,
        or on keys and values expanded from it, which pays where many rows share the expansion. Engines choose so by
        the number of rows, and the sparse kernels of an indexer run on the compressed KV alone."""
        flops = reads.pairs * self.pair_flops[False]
        if not reads.prefill or not self.expansion_flops:
            return flops
        return min(flops, reads.expanded_pairs * self.pair_flops[True] + reads.expanded * self.expansion_flops)


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
        self.by_key: list[_Matrices] | None = None
        # Between points no time is below both of them, beyond the last none is below it.
        shortest = round(min(ns for _, ns in table.expert))
        self.shortest_expert_ns = shortest if self.groups is None else self.groups.shortest_ns
        self.slowdowns = (table.attention_slowdown, table.experts_slowdown, table.head_slowdown)
        self._table = table
        self._pair_ns, self._latent_ns, self._expansion_ns, self._index_ns = {}, {}, {}, {}
        for kind in model.num_of:
            found = model.projections(kind)
            if found is None:
                continue
            pair_ns = found.pair_flops(True) / rates.flops_per_ns if table.prefill_kv is None else table.prefill_kv
            self._pair_ns[kind] = pair_ns
            # Measured on many rows, which are expanded; a pair of the compressed form has so many more operations.
            self._latent_ns[kind] = pair_ns * found.pair_flops(False) / found.pair_flops(True)
            # The points see no context and pairs do not count it: its expansion stays the roofline's.
            self._expansion_ns[kind] = 2 * found.kv_up_params / rates.flops_per_ns
            # An index key takes as long as its share of a KV token's bytes.
            self._index_ns[kind] = table.kv * model.index_key_bytes / model.entry_bytes(kind)

    def attention_ns(self, kind: str, num_tokens: int, reads: Sequence[Reads]) -> int:
        """Attention and router of one MoE layer."""
        return round(ns_at(self._table.attention, num_tokens) + sum([self._context_ns(kind, one) for one in reads]))

    def dense_ns(self, kind: str, num_tokens: int, reads: Sequence[Reads]) -> int:
        """One dense layer."""
        return round(ns_at(self._table.dense, num_tokens) + sum([self._context_ns(kind, one) for one in reads]))

    def bare_ns(self, kind: str, num_tokens: int, reads: Sequence[Reads]) -> int:
        """Attention alone: with the router's time, which was not measured apart."""
        return self.attention_ns(kind, num_tokens, reads)

    def _context_ns(self, kind: str, reads: Reads) -> float:
        """What the points lack: they hold one KV token, and one pair, for each row. In decode a cached entry's time
        holds its first pair; a verify step has more."""
        if kind in (LINEAR, NONE):
            return 0.0
        rows = reads.rows
        context_ns = (reads.entries - rows) * self._table.kv + reads.index_keys * self._index_ns[kind]
        if reads.prefill:
            expanded_ns = (reads.expanded_pairs - rows) * self._pair_ns[kind]
            expanded_ns += reads.expanded * self._expansion_ns[kind]
            context_ns += min((reads.pairs - rows) * self._latent_ns[kind], expanded_ns)
        elif reads.pairs > reads.entries:
            context_ns += (reads.pairs - reads.entries) * self._latent_ns[kind]
        return context_ns


class KernelTimes:
    """Durations of one model's kernels on one GPU. Lists returned are shared: do not change them.

    groups: times of experts launched at once, None if they take as long as one by one. slowdowns: factors on
    attention, experts and head beside a busy link. Experts of unlike sizes read each its own bytes; a measured table
    knows one size, and gives all the same time.
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
        self._by_key = times.by_key
        self.slowdowns = times.slowdowns
        self.shortest_expert_ns = times.shortest_expert_ns
        self._kv_grid = stack.kv_grid
        self._kinds = tuple(model.num_of)
        bounds = [entries_at_most(model, kind) for kind in self._kinds]
        self._bounds = [sys.maxsize if bound is None else bound for bound in bounds]
        self._moe_kinds = model.moe_attention
        self._between = _between(model)
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

    @property
    def knows_sizes(self) -> bool:
        """Whether experts take unlike times over as many tokens, since their sizes differ."""
        return self._by_key is not None

    def one_ns(self, key: int, num_tokens: int) -> int:
        """The expert `key` by itself, by its own bytes."""
        return self._expert[num_tokens] if self._by_key is None else self._by_key[key][num_tokens]

    def keys_ns(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        """One launch of the experts `keys` over so many tokens each, by their own bytes."""
        if self._by_key is None:
            return self.experts_ns(tokens)
        return sum([self._by_key[key][count] for key, count in zip(keys, tokens, strict=True)])

    def shared_ns(self, num_tokens: int) -> int:
        """One layer's shared experts over all tokens of the forward; 0 if the model has none."""
        return self._shared[num_tokens]

    def head_ns(self, num_tokens: int) -> int:
        """The head over the rows that need logits: one per request."""
        return self._head[num_tokens]

    def attention_ns(self, layer: int, num_tokens: int, kv_tokens: int) -> int:
        """Attention, norms and router of MoE layer `layer` in a decode forward of `num_tokens` requests.

        kv_tokens: summed KV length of the requests. A layer that reads less than all takes the most that so many
        requests can read of it together. If they are equally long that is exact for full, windowed and indexed layers;
        for chunked ones, which start anew, and those whose entries stand for several tokens it stays an upper bound.
        `attention_list_ns` is exact always.
        """
        entries, index = zip(*(most_read(self.model, kind, num_tokens, kv_tokens) for kind in self._kinds), strict=True)
        return self._decode_at(num_tokens, entries, index)[layer]

    def attention_list_ns(self, num_tokens: int, kv_lens: Sequence[int], prefill: bool) -> list[int]:
        """The same for every MoE layer [L]; a layer without routed experts counts into the next that has some, those
        behind the last into it.

        kv_lens [num_tokens]: KV length of each row's request up to and including the row. In a decode forward
        each row is its own request; in a prefill the rows are consecutive tokens of one, attention is causal.
        """
        if len(kv_lens) != num_tokens:
            raise AssertionError(f"{len(kv_lens)} KV lengths for {num_tokens} rows")
        if prefill:
            return self._spread(num_tokens, [(prefill_reads(self.model, kind, kv_lens),) for kind in self._kinds])
        reads = [decode_reads(self.model, kind, kv_lens) for kind in self._kinds]
        return self._decode_at(num_tokens, *zip(*reads, strict=True))

    def attention_spans_ns(self, kv_lens: Sequence[int], spans: Sequence[Span]) -> list[int]:
        """The same of a forward whose rows are `spans` [L]: weights are read once for all rows, a request's cached keys
        once for its span, and bytes and operations of all spans are added up, as those of a batch are."""
        return self._spread(
            len(kv_lens), [self._span_reads(index, kv_lens, spans) for index in range(len(self._kinds))]
        )

    def _span_reads(self, index: int, kv_lens: Sequence[int], spans: Sequence[Span]) -> list[Reads]:
        """What a layer of one kind reads: of all decoded rows together, then of each prompt."""
        kind, first = self._kinds[index], 0
        decoded: list[Reads] = []
        prompts: list[Reads] = []
        for span in spans:
            lens = kv_lens[first : first + span.num_rows]
            (prompts if span.prompt else decoded).append(span_reads(self.model, kind, lens, span.prompt))
            first += span.num_rows
        if not decoded:
            return prompts
        all_decoded, grid = together(decoded), self._kv_grid
        if grid:
            entries = kv_on_grid(all_decoded.entries, grid, self._bounds[index] * all_decoded.rows)
            keys = kv_on_grid(all_decoded.index_keys, grid)
            more = (entries - all_decoded.entries, keys - all_decoded.index_keys)
            pairs, index_pairs = all_decoded.pairs + more[0], all_decoded.index_pairs + more[1]
            all_decoded = all_decoded._replace(entries=entries, pairs=pairs, index_keys=keys, index_pairs=index_pairs)
        return [all_decoded, *prompts]

    def resident_layer_ns(self, layer: int, kv_tokens: int) -> int:
        """A whole MoE layer for one decoded token, all experts resident, the stack's overhead included."""
        experts_ns = self.experts_ns([1] * self.model.top_k) + self.shared_ns(1)
        return self.stack.layer_overhead_ns + self.attention_ns(layer, 1, kv_tokens) + experts_ns

    def _decode_at(self, num_tokens: int, entries: tuple[int, ...], index: tuple[int, ...]) -> list[int]:
        """Times of all layers, given the cached entries and the index keys that a layer of each kind needs."""
        grid = self._kv_grid
        if grid:
            pairs = zip(entries, self._bounds, strict=True)
            entries = tuple(kv_on_grid(need, grid, bound * num_tokens) for need, bound in pairs)
            index = tuple(kv_on_grid(need, grid) for need in index)
        return self._decode(num_tokens, entries, index)

    def _decode_list(self, num_tokens: int, entries: tuple[int, ...], index: tuple[int, ...]) -> list[int]:
        """Every row reads its own request's keys: as many entries as there are (query, key) pairs."""
        return self._spread(
            num_tokens,
            [
                (Reads(need, need, 0, need, keys, keys, num_tokens, False, num_tokens),)
                for need, keys in zip(entries, index, strict=True)
            ],
        )

    def _spread(self, num_tokens: int, reads: Sequence[Sequence[Reads]]) -> list[int]:
        """Times of all layers, given what a layer of each kind reads, of some rows after the other."""
        times, by_kind = self._times, dict(zip(self._kinds, reads, strict=True))
        moe_ns = {kind: times.attention_ns(kind, num_tokens, by_kind[kind]) for kind in set(self._moe_kinds)}
        found = [moe_ns[kind] for kind in self._moe_kinds]
        for at, kind, feed, count in self._between:
            one_ns = times.dense_ns if feed == DENSE else times.bare_ns
            found[at] += count * one_ns(kind, num_tokens, by_kind[kind])
        return found


def _between(model: ModelSpec) -> list[tuple[int, str, str, int]]:
    """Layers without routed experts: into which MoE layer they count, kinds of attention and block, and how many."""
    counts: Counter[tuple[int, str, str]] = Counter()
    at = 0
    for attention, feed in model.layers:
        if feed == MOE:
            at += 1
        else:
            counts[min(at, model.num_layers - 1), attention, feed] += 1
    return [(*key, count) for key, count in counts.items()]
