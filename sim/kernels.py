"""How long kernels run: the roofline, max(bytes / memory bandwidth, operations / peak), in whole nanoseconds.

Bytes are those of weights and KV cache, activations left out; every token multiplies and adds each weight,
two operations. Knows nothing of streams, of what a launch costs, or of copies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

from expertflow.model import GQA, ModelSpec
from sim.hardware import Hardware, Stack


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


class KernelTimes:
    """Durations of one model's kernels on one GPU. Lists returned are shared: do not change them."""

    def __init__(self, model: ModelSpec, hardware: Hardware, stack: Stack) -> None:
        self.model = model
        self.stack = stack
        self._rates = rates = _Rates(hardware)
        self._expert = _Matrices(rates, model.expert_params, model.expert_bytes)
        self._shared = _Matrices(rates, model.shared_params, model.shared_params * model.weight_bits / 8)
        self._dense = _Matrices(rates, model.dense_params, model.dense_params * model.weight_bits / 8)
        self._head = _Matrices(rates, model.head_params, model.head_params * model.embedding_bits / 8)
        # (weights, bytes) that attention reads in a dense layer, and with the router in an MoE layer.
        attention = (model.attention_params, model.attention_params * model.weight_bits / 8)
        router = (model.router_params, model.router_params * model.embedding_bits / 8)
        self._dense_layer = attention
        self._moe_layer = (attention[0] + router[0], attention[1] + router[1])
        self._token_bytes = model.kv_bytes_per_token_per_layer
        self._decode_pair_flops, self._prefill_pair_flops = _pair_flops(model)
        self._window = model.window or sys.maxsize
        # Bounded, so that memory does not grow with the trace.
        self._decode = lru_cache(maxsize=4096)(self._decode_list)

    def expert_ns(self, num_tokens: int) -> int:
        """One routed expert over the tokens routed to it."""
        return self._expert[num_tokens]

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
        return self._decode(num_tokens, kv_tokens, windowed)[layer]

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
            return self._decode(1, kv_len, kv_len if kv_len < window else window)
        return self._decode(num_tokens, sum(kv_lens), sum(min(kv_len, window) for kv_len in kv_lens))

    def resident_layer_ns(self, layer: int, kv_tokens: int) -> int:
        """A whole MoE layer for one decoded token, all experts resident, the stack's overhead included."""
        experts_ns = self.model.top_k * self.expert_ns(1) + self.shared_ns(1)
        return self.stack.layer_overhead_ns + self.attention_ns(layer, 1, kv_tokens) + experts_ns

    def _decode_list(self, num_tokens: int, full: int, windowed: int) -> list[int]:
        """Every row reads its own request's keys: as many tokens as there are (query, key) pairs."""
        flops = self._decode_pair_flops
        return self._spread(num_tokens, (full, full * flops), (windowed, windowed * flops))

    def _prefill_list(self, num_tokens: int, kv_lens: Sequence[int]) -> list[int]:
        """All rows read one request's keys, once; the pairs are a causal triangle, later a trapezoid."""
        first, last, window = kv_lens[0], kv_lens[-1], self._window
        flops = self._prefill_pair_flops
        # MLA expands the compressed KV of earlier chunks anew; that of its own rows is in the projections.
        context_flops = 2 * self.model.kv_up_params * (last - num_tokens)
        full = (last, sum(kv_lens) * flops + context_flops)
        pairs = sum(min(kv_len, window) for kv_len in kv_lens)
        windowed = (last - max(0, first - window), pairs * flops)
        return self._spread(num_tokens, full, windowed)

    def _spread(self, num_tokens: int, full: tuple[int, int], windowed: tuple[int, int]) -> list[int]:
        """Times of all layers, given (KV tokens read, operations on them) of a full and a windowed layer."""
        model = self.model
        times = [self._layer_ns(self._moe_layer, num_tokens, full)] * model.num_layers
        if model.window:
            windowed_ns = self._layer_ns(self._moe_layer, num_tokens, windowed)
            times[:: model.window_every] = [windowed_ns] * -(-model.num_layers // model.window_every)
        if model.num_dense_layers:
            dense_ns = self._layer_ns(self._dense_layer, num_tokens, full) + self._dense[num_tokens]
            times[0] += model.num_dense_layers * dense_ns
        return times

    def _layer_ns(self, weights: tuple[int, float], num_tokens: int, kv: tuple[int, int]) -> int:
        (params, num_bytes), (kv_tokens, kv_flops) = weights, kv
        return self._rates.ns(num_bytes + kv_tokens * self._token_bytes, 2 * params * num_tokens + kv_flops)


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
