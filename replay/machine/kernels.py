"""Kernels of a model's true shapes without its weights: the bytes read and the operations done are the model's.

Every kernel is a real matrix product (or several). On a GPU the routed and the shared experts of a launch are one pair
of kernels that read slots and counts from device memory (`replay.machine.slot_kernels`), elsewhere they are products
one by one. A product over weights stored in fewer bits than the machine computes in (mxfp4 and int4 experts in bf16,
anything in the CPU's float32) reads the true bytes as a narrower matrix and multiplies it with proportionally more
rows, so that bytes and operations are both true; what is left out is the unpacking. Attention is one product of its
weights' size, then two over the KV cache that read each cached value once. The router alone keeps its shape, since its
result is read: its bytes are those of the machine's numbers. Softmax, norms and rotary embeddings are left out: they
move little and belong to a stack.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from expertflow.attention import GQA
from expertflow.forward import PREFILL, Forward
from expertflow.model import ModelSpec
from replay.machine.device import Work
from replay.machine.launch_row import Row
from replay.machine.pools import SlotPool
from replay.machine.products import products
from replay.machine.rows import NUM_EXPERTS, SHARED_BLOCK, SHARED_ROWS, size_class
from replay.machine.scale import check_replayable
from replay.machine.slot_kernels import SlotKernels
from sim.specs.hardware import kv_on_grid

_SEED = 2_510_26730


class Shape(NamedTuple):
    """Of one layer's attention: token rows, cached rows read, and queries that bring the operations to the model's."""

    num_tokens: int
    rows: int
    columns: int


@dataclass(frozen=True)
class _Feed:
    """A feed-forward block on weights of `num_bytes`: gate and up [hidden, up], down [middle, hidden]."""

    hidden: int
    middle: int
    up: int
    rows_per_token: float

    @classmethod
    def of(cls, matrices: int, hidden: int, num_bytes: float, params: int, dtype: torch.dtype) -> _Feed:
        width = torch.finfo(dtype).bits // 8
        middle = max(1, int(num_bytes // (matrices * hidden * width)))
        true = params / (matrices * hidden)
        return cls(hidden, middle, middle * (matrices - 1), max(1.0, true / middle))

    @property
    def num_values(self) -> int:
        """Weights as this machine reads them."""
        return self.hidden * (self.up + self.middle)

    def rows(self, num_tokens: int) -> int:
        """Rows that bring the operations up to those of `num_tokens` tokens."""
        return max(1, round(num_tokens * self.rows_per_token))


class _Block:
    """A feed-forward block: how its weights are cut, and its activations, allocated once."""

    def __init__(self, feed: _Feed, max_tokens: int, like: torch.Tensor) -> None:
        self.feed = feed
        self.max_rows = feed.rows(max_tokens)
        self.up = like.new_empty((self.max_rows, feed.up))
        self.middle = like.new_empty((self.max_rows, feed.middle))
        self.out = like.new_empty((self.max_rows, feed.hidden))

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two matrices in a flat stretch of weights."""
        feed = self.feed
        cut = feed.hidden * feed.up
        return (
            values[:cut].view(feed.hidden, feed.up),
            values[cut : cut + feed.middle * feed.hidden].view(feed.middle, feed.hidden),
        )


class _Own(NamedTuple):
    """Weights of which each layer has its own block: values [count, num_values], and each block's two matrices."""

    block: _Block
    values: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]


class Kernels:
    """All kernels of one model on one device. Work returned is launched later, by the device, in its own stream.

    max_tokens: rows of the largest forward. max_context: KV tokens of all requests of a forward together.
    """

    def __init__(
        self, model: ModelSpec, slots: SlotPool, dtype: torch.dtype, max_tokens: int, max_context: int
    ) -> None:
        check_replayable(model)
        self.model = model
        self._dtype = dtype
        self._device = slots.bytes.device
        # Traces give no weights: seeded numbers of their size. Zeros would compute faster than they do.
        self._generator = torch.Generator(device=self._device).manual_seed(_SEED)
        width = torch.finfo(dtype).bits // 8
        hidden, matrices = model.hidden_size, model.expert_matrices
        expert = _Feed.of(matrices, hidden, model.mean_expert_bytes, model.expert_params, dtype)
        if expert.num_values * width > model.mean_expert_bytes:
            raise ValueError(
                f"model {model.name}: an expert of {model.mean_expert_bytes} bytes is too small to compute "
                f"with in {dtype}; choose a smaller scale"
            )
        self._max_tokens = max_tokens
        self._products = products(self._device.type)
        self._inputs = self._random(max(expert.rows(max_tokens), max_tokens), hidden)
        self._expert = _Block(expert, max_tokens, self._inputs)
        self._slot_weights = [
            self._expert.split(slots.slot(number)[: expert.num_values * width].view(dtype))
            for number in range(slots.num_slots)
        ]
        self._shared = self._own_blocks(model.shared_params, model.num_layers)
        self._dense = self._own_blocks(model.dense_params, model.num_dense_layers)
        self._on_slots = self._slot_kernels(slots, max_tokens) if self._device.type == "cuda" else None
        self._make_attention(max_context)
        self._head_values = self._random(hidden, self._columns(model.head_params, model.embedding_bits))
        self._head_out = self._outputs(model.head_params, self._head_values)
        self._tokens = torch.zeros(max_tokens, dtype=torch.int64, device=self._device)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=self._dtype, device=self._device).mul_(0.02)

    def _columns(self, params: int, bits: float) -> int:
        """Columns of a [hidden, columns] matrix whose bytes are those of `params` weights."""
        return max(1, round(params * bits / torch.finfo(self._dtype).bits / self.model.hidden_size))

    def _outputs(self, params: int, values: torch.Tensor) -> torch.Tensor:
        """Room for the product of the largest forward with `values`, which stand for `params` weights."""
        rows = _rows(self._max_tokens, params, values)
        if rows > self._inputs.shape[0]:
            self._inputs = self._random(rows, self.model.hidden_size)
        return self._inputs.new_empty((rows, values.shape[1]))

    def _own_blocks(self, params: int, count: int) -> _Own | None:
        """Blocks that stay in GPU memory, one a layer: none would fit into a cache with the others."""
        if not params or not count:
            return None
        model = self.model
        feed = _Feed.of(model.expert_matrices, model.hidden_size, params * model.weight_bits / 8, params, self._dtype)
        block = _Block(feed, self._max_tokens, self._inputs)
        if block.max_rows > self._inputs.shape[0]:
            self._inputs = self._random(block.max_rows, model.hidden_size)
        values = self._random(count, feed.num_values)
        return _Own(block, values, [block.split(one) for one in values])

    def _slot_kernels(self, slots: SlotPool, max_tokens: int) -> SlotKernels:
        shared = None if self._shared is None else (self._shared.block.feed, self._shared.values)
        # Rows are rounded up for each expert, and the padded places of a launch are filled once before a run.
        most = max_tokens * self.model.top_k
        rows = self.rows(most) + 2 * size_class(min(self.model.num_experts, most)) * self.rows(1)
        return SlotKernels(self._expert.feed, slots, self._inputs, rows, self._dtype, shared)

    def _make_attention(self, max_context: int) -> None:
        model = self.model
        columns = self._columns(model.attention_params, model.weight_bits)
        self._attention_weights = [
            self._random(model.hidden_size, columns) for _ in range(model.num_layers + model.num_dense_layers)
        ]
        self._attention_out = self._outputs(model.attention_params, self._attention_weights[0])
        self._router = [self._random(model.hidden_size, model.num_experts) for _ in range(model.num_layers)]
        self._logits = self._inputs.new_empty((self._max_tokens, model.num_experts))
        self._values = self._inputs.new_empty((self._max_tokens, model.top_k))
        self.routing = torch.zeros((self._max_tokens, model.top_k), dtype=torch.int64, device=self._device)
        # Keys and values of a GQA cache stand one after the other; MLA reads its one latent for both.
        self._is_gqa = model.attention == GQA
        if self._is_gqa:
            self._group = model.num_heads // model.num_kv_heads
            key_width = self._value_width = model.num_kv_heads * model.head_dim
        else:
            self._group = model.num_heads
            key_width, self._value_width = model.kv_rank + model.rope_dim, model.kv_rank
        self._column_flops = 2 * (key_width + self._value_width)
        self._kv = [
            self._random(self._cached_rows(self._kv_tokens(layer, max_context)) * (2 if self._is_gqa else 1), key_width)
            for layer in range(model.num_layers)
        ]
        bits = torch.finfo(self._dtype).bits
        self._queries = self._random(key_width, math.ceil(self._group * self._max_tokens * bits / model.kv_bits))
        most, longest = self._queries.shape[1], max(cache.shape[0] for cache in self._kv)
        self._scores = self._inputs.new_empty(longest * most)
        self._attended = self._inputs.new_empty((most, self._value_width))

    def _kv_tokens(self, layer: int, max_context: int) -> int:
        model = self.model
        return min(max_context, model.window * self._max_tokens) if model.is_windowed(layer) else max_context

    def _cached_rows(self, tokens: int) -> int:
        """Rows of this machine's numbers that are as many bytes as the keys (or the latents) of `tokens`."""
        return max(1, math.ceil(tokens * self.model.kv_bits / torch.finfo(self._dtype).bits))

    def shape(self, layer: int, forward: Forward, kv_grid: int = 0) -> Shape:
        """The shape of the attention of MoE layer `layer` in `forward`.

        kv_grid: see `sim.machine.kernels.kv_on_grid`.
        """
        if forward.spans:
            return self._span_shape(layer, forward, kv_grid)
        num_tokens = len(forward.rows)
        window = self.model.window if self.model.is_windowed(layer) else None
        lens = forward.kv_lens if window is None else [min(kv_len, window) for kv_len in forward.kv_lens]
        prefill = forward.phase == PREFILL
        pairs = cached = sum(lens)
        if prefill:
            cached = max(forward.kv_lens[-1] if window is None else len(lens) + lens[0] - 1, 1)
        else:
            most = sys.maxsize if window is None else window * num_tokens
            pairs = cached = kv_on_grid(cached, kv_grid, most)
        rows = self._cached_rows(cached)
        columns = max(1, round(self._context_flops(pairs, cached - num_tokens, prefill) / (self._column_flops * rows)))
        return Shape(num_tokens, rows, columns)

    def _span_shape(self, layer: int, forward: Forward, kv_grid: int) -> Shape:
        """The same of a forward of several spans: cached rows and operations of all, each as a prompt or as decode; a
        request's cache is read once by its span."""
        window = self.model.window if self.model.is_windowed(layer) else None
        decoded = decoded_pairs = decoded_rows = cached = flops = first = 0
        for span in forward.spans:
            lens = forward.kv_lens[first : first + span.num_rows]
            first += span.num_rows
            read = lens[-1] if window is None else lens[-1] - max(0, lens[0] - window)
            pairs = sum(lens) if window is None else sum([min(kv_len, window) for kv_len in lens])
            if span.prompt:
                cached += read
                flops += self._context_flops(pairs, read - span.num_rows, True)
            else:
                decoded, decoded_pairs = decoded + read, decoded_pairs + pairs
                decoded_rows += span.num_rows
        if decoded_rows:
            most = sys.maxsize if window is None else window * decoded_rows
            on_grid = kv_on_grid(decoded, kv_grid, most)
            cached += on_grid
            flops += self._context_flops(decoded_pairs + on_grid - decoded, 0, False)
        rows = self._cached_rows(cached)
        return Shape(len(forward.rows), rows, max(1, round(flops / (self._column_flops * rows))))

    def attention(self, layer: int, shape: Shape) -> Work:
        """Attention and router of MoE layer `layer`; leading dense layers run before layer 0."""
        num_tokens, rows, columns = shape
        dense, route = (self._dense if layer == 0 else None), self._products.route
        index = layer + self.model.num_dense_layers

        def work() -> None:
            if dense is not None:
                for place, pair in enumerate(dense.pairs):
                    self._attend(place, layer, num_tokens, rows, columns)
                    self._feed(dense.block, [pair], [dense.block.feed.rows(num_tokens)])
            self._attend(index, layer, num_tokens, rows, columns)
            route(
                self._inputs[:num_tokens],
                self._router[layer],
                self._logits[:num_tokens],
                self._values[:num_tokens],
                self.routing[:num_tokens],
            )

        return work

    def _context_flops(self, pairs: int, earlier: int, prefill: bool) -> int:
        """Operations over the cache, for so many (query, key) pairs. MLA decodes on compressed keys and values;
        a prefill may as well expand those of `earlier` tokens anew, and takes what is cheaper (see
        `sim.machine.kernels`)."""
        model, compressed = self.model, pairs * self._group * self._column_flops
        if prefill and not self._is_gqa:
            flops = 2 * model.num_heads * (model.nope_dim + model.rope_dim + model.v_dim)
            return min(compressed, pairs * flops + earlier * 2 * model.kv_up_params)
        return compressed

    def _attend(self, index: int, layer: int, num_tokens: int, rows: int, columns: int) -> None:
        weights, cache = self._attention_weights[index], self._kv[layer]
        above = _rows(num_tokens, self.model.attention_params, weights)
        values = cache[rows : 2 * rows] if self._is_gqa else cache[:rows, : self._value_width]
        # More columns than a forward has queries come from an expansion: piece by piece, or memory would run out.
        self._products.attend(
            self._inputs[:above],
            weights,
            self._attention_out[:above],
            cache[:rows],
            values,
            self._queries,
            columns,
            self._scores,
            self._attended,
        )

    def _feed(self, block: _Block, weights: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: Sequence[int]) -> None:
        first, second = [pair[0] for pair in weights], [pair[1] for pair in weights]
        self._products.feed_forward(self._inputs, first, second, rows, block.up, block.middle, block.out)

    def rows(self, num_tokens: int) -> int:
        """Rows that an expert computes over for so many tokens: more where a weight has fewer bits than here."""
        return self._expert.feed.rows(num_tokens)

    def shared_rows(self, num_tokens: int) -> int:
        """Rows that the shared experts compute over for so many tokens; 0 if the model has none."""
        return 0 if self._shared is None else self._shared.block.feed.rows(num_tokens)

    def tune(self, device_ns: Callable[[Work], float], buckets: Iterable[tuple[int, int]]) -> None:
        """Choose how experts are computed by measured time, where there is a choice; before anything is captured."""
        if self._on_slots is not None:
            self._on_slots.tune(device_ns, buckets)

    def experts(self, row: Row, max_rows: int, shared: bool, check: Work | None = None) -> Work:
        """What `row` describes when the kernels run: routed experts in slots, each over its number of rows.

        max_rows: the most that any of them has. shared: whether a block of shared experts may stand in the row.
        check: runs before and after, on the same row.
        """
        if self._on_slots is not None:
            return self._on_slots.experts(row, max_rows, shared, check)
        return self._one_by_one(row, check)

    def _one_by_one(self, row: Row, check: Work | None) -> Work:
        layout, words, shared = row.layout, row.host, self._shared

        def work() -> None:
            found = words.tolist()
            num, block, shared_rows = found[NUM_EXPERTS], found[SHARED_BLOCK], found[SHARED_ROWS]
            if check is not None:
                check()
            if shared is not None and block >= 0:
                self._feed(shared.block, [shared.pairs[block]], [shared_rows])
            if num:
                weights = [self._slot_weights[slot] for slot in found[layout.slots : layout.slots + num]]
                self._feed(self._expert, weights, found[layout.counts : layout.counts + num])
            if check is not None:
                check()

        return work

    def head(self, num_rows: int) -> Work:
        """Logits of the rows that emit a token, and the greedy token of each."""

        def work() -> None:
            if num_rows:
                rows = _rows(num_rows, self.model.head_params, self._head_values)
                torch.mm(self._inputs[:rows], self._head_values, out=self._head_out[:rows])
                torch.argmax(self._head_out[:num_rows], dim=1, out=self._tokens[:num_rows])

        return work

    def host_block(self, max_tokens: int) -> _Block:
        """Room in the host's memory for the products of one routed expert over at most so many tokens."""
        return _Block(self._expert.feed, max_tokens, torch.empty(0, dtype=self._dtype))

    @property
    def activations(self) -> torch.Tensor:
        """What every kernel reads for hidden states [rows, hidden], on the device."""
        return self._inputs

    @property
    def routed_out(self) -> torch.Tensor:
        """Where the products of routed experts end [rows, hidden], on the device."""
        return self._expert.out if self._on_slots is None else self._on_slots.out

    @property
    def experts_out(self) -> torch.Tensor:
        """Outputs of routed experts launched by slot id [rows, hidden], each expert's from its first row."""
        assert self._on_slots is not None, "only a GPU launches experts by slot id"
        return self._on_slots.out

    @property
    def tokens(self) -> torch.Tensor:
        """Sampled tokens [max_tokens] int64, on the device."""
        return self._tokens


def _rows(num_tokens: int, params: int, values: torch.Tensor) -> int:
    """Rows that bring the operations of a product with `values` up to those of `num_tokens` tokens and `params`."""
    return max(num_tokens, round(num_tokens * params / values.numel()))


def kernel_bytes(model: ModelSpec, dtype: torch.dtype, max_tokens: int, max_context: int) -> Mapping[str, int]:
    """GPU memory that `Kernels` takes beside the slots, in bytes, by part; an estimate from above."""
    width = torch.finfo(dtype).bits // 8
    rows = max_tokens * max(16 / model.expert_bits, 1.0) * width / 2
    widest = max(model.expert_intermediate, model.shared_intermediate, model.dense_intermediate)
    wide = 2 * model.hidden_size + 3 * widest
    return {
        "weights": model.non_expert_bytes,
        "KV": 2 * model.kv_bytes(max_context) + max_tokens * model.num_heads * max(max_context, 1) * width,
        "activations": int(rows * wide * width * 2 + max_tokens * model.vocab_size * width),
        "workspace": 256 << 20,
    }
