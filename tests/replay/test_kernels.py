"""The replay's kernels read the bytes and do the operations that the simulator charges for, model by model.

Counted at the matrix products themselves, against the roofline of `sim.machine.kernels`, whose times are replaced by
its own bytes and operations. Widths are rounded to whole columns: at these scales that is a few per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import replay.machine.kernels
import sim.machine.kernels
from expertflow.attention import MLA
from expertflow.forward import DECODE, PREFILL, Forward
from expertflow.model import ModelSpec
from replay.machine.kernels import Kernels
from replay.machine.launch_row import Row
from replay.machine.pools import SlotPool
from replay.machine.products import Products, attend, feed_forward, products, route
from replay.machine.rows import NUM_EXPERTS, SHARED_BLOCK, SHARED_ROWS, RowLayout
from replay.machine.scale import scaled_model
from sim.job.configure import configure
from sim.machine.kernels import KernelTimes
from sim.specs.hardware import hardware_from_dict, stack_from_dict
from tests.replay.test_scale import REPLAYED, model_of

MAX_TOKENS, MAX_CONTEXT = 48, 700
ROUNDED = 0.06
"""Of the expected figure, what whole columns and rows may be off."""


class Counter:
    """Stands in for `torch.mm`: weights and cached values read, operations done."""

    def __init__(self, kernels: Kernels) -> None:
        self.num_bytes = self.flops = 0
        self._true = torch.mm
        self._queries = kernels._queries.data_ptr()
        self._caches = {cache.data_ptr() for cache in kernels._kv}
        self._latents = 0

    def __call__(self, left: torch.Tensor, right: torch.Tensor, **more: Any) -> torch.Tensor:
        self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        if left.data_ptr() in self._caches:
            self.num_bytes += left.numel() * left.element_size()
            self._latents = left.data_ptr()
        # The latents of MLA serve as keys and as values: they are read once.
        if right.data_ptr() not in (self._queries, self._latents):
            self.num_bytes += right.numel() * right.element_size()
        return self._true(left, right, **more)


class Bench:
    """Kernels of one model beside the simulator's figures for it."""

    def __init__(self, model: ModelSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.monkeypatch = monkeypatch
        # Compiled, the products would not be seen: test_compiled_products_compute_the_same holds the two together.
        monkeypatch.setattr(replay.machine.kernels, "products", lambda _: Products(feed_forward, attend, route))
        self.kernels = Kernels(
            model, SlotPool(2, model.mean_expert_bytes, torch.device("cpu")), dtype, MAX_TOKENS, MAX_CONTEXT
        )
        self.router_excess = model.router_params * (torch.finfo(dtype).bits - model.embedding_bits) / 8

    def counted(self, work: Callable[[], None]) -> Counter:
        counter = Counter(self.kernels)
        with self.monkeypatch.context() as patched:
            patched.setattr(torch, "mm", counter)
            work()
        return counter

    def expected(self, ask: Callable[[KernelTimes], int]) -> tuple[int, int]:
        """(bytes, operations) of what `ask` asks the simulator for."""
        found = []
        for number in (0, 1):
            with self.monkeypatch.context() as patched:
                patched.setattr(sim.machine.kernels._Rates, "ns", lambda _, *pair, number=number: round(pair[number]))
                found.append(ask(KernelTimes(self.model, A100, FOUND)))
        return found[0], found[1]

    def agree(
        self, work: Callable[[], None], ask: Callable[[KernelTimes], int], excess: float = 0.0, rounded: float = ROUNDED
    ) -> None:
        counter = self.counted(work)
        num_bytes, flops = self.expected(ask)
        assert counter.num_bytes - excess == pytest.approx(num_bytes, rel=rounded)
        assert counter.flops == pytest.approx(flops, rel=rounded)


_CFG = configure(["+hardware=a100", "+policy=lru", "stack=found"])
A100, FOUND = hardware_from_dict(_CFG["hardware"]), stack_from_dict(_CFG["stack"])


def small(name: str, scale: int = 16) -> ModelSpec:
    """Few layers: each kind of layer once."""
    return replace(scaled_model(model_of(name), scale), num_layers=2)


def forward(phase: str, kv_lens: Sequence[int]) -> Forward:
    """Of one request (prefill) or as many as rows (decode)."""
    requests = (0,) if phase == PREFILL else tuple(range(len(kv_lens)))
    return Forward(0, phase, range(len(kv_lens)), requests, tuple(kv_lens), [], [], None)


@pytest.fixture(
    params=[(name, 16, torch.float32) for name in REPLAYED] + [(name, 8, torch.bfloat16) for name in REPLAYED],
    ids=lambda given: f"{given[0]}-{given[1]}-{str(given[2])[6:]}",
)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """In the numbers of a CPU, and in those of a GPU."""
    name, scale, dtype = request.param
    return Bench(small(name, scale), dtype, monkeypatch)


def attention(bench: Bench, phase: str, kv_lens: Sequence[int], rounded: float = ROUNDED) -> None:
    given = forward(phase, kv_lens)
    for layer in range(bench.model.num_layers):
        bench.agree(
            bench.kernels.attention(layer, bench.kernels.shape(layer, given)),
            lambda times, layer=layer: times.attention_list_ns(len(kv_lens), kv_lens, phase == PREFILL)[layer],
            bench.router_excess,
            rounded,
        )


def test_attention_of_one_token(bench: Bench) -> None:
    """Beyond the window, below it, and leading dense layers in the first."""
    for kv_len in (400, 50):
        attention(bench, DECODE, [kv_len])


def test_attention_of_a_batch(bench: Bench) -> None:
    attention(bench, DECODE, [200, 30, 400, 1])


def test_attention_of_a_prompt(bench: Bench) -> None:
    """Its first chunk, and one that follows others."""
    attention(bench, PREFILL, range(1, 41))
    attention(bench, PREFILL, range(301, 341), 0.1)


def described(
    kernels: Kernels, slots: Sequence[int], tokens: Sequence[int], shared_block: int = -1, shared_tokens: int = 0
) -> Row:
    """The row of one launch of experts in `slots`, over so many tokens each."""
    row = Row(RowLayout(len(slots)), torch.device("cpu"))
    words, layout, first = row.words, row.layout, 0
    words[NUM_EXPERTS], words[SHARED_BLOCK] = len(slots), shared_block
    words[SHARED_ROWS] = kernels.shared_rows(shared_tokens) if shared_tokens else 0
    for place, (slot, count) in enumerate(zip(slots, tokens, strict=True)):
        words[layout.slots + place] = slot
        words[layout.first + place] = first
        words[layout.counts + place] = kernels.rows(count)
        first += kernels.rows(count)
    return row


def test_experts(bench: Bench) -> None:
    for tokens in ([1, 1], [7, 40], [2, 1]):
        row = described(bench.kernels, [0, 1], tokens)
        bench.agree(
            bench.kernels.experts(row, bench.kernels.rows(40), False),
            lambda times, tokens=tokens: sum(map(times.expert_ns, tokens)),
            rounded=0.1,
        )


def test_shared_experts(bench: Bench) -> None:
    for num_tokens in (1, 33):
        row = described(bench.kernels, [], [], 1, num_tokens)
        work = bench.kernels.experts(row, 1, True)
        if bench.model.shared_intermediate:
            bench.agree(work, lambda times, rows=num_tokens: times.shared_ns(rows))
        else:
            assert bench.counted(work).flops == 0


def test_head(bench: Bench) -> None:
    for num_rows in (1, 5):
        bench.agree(bench.kernels.head(num_rows), lambda times, rows=num_rows: times.head_ns(rows))
    assert bench.counted(bench.kernels.head(0)).flops == 0


def test_experts_of_two_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(replace(small("mixtral-8x7b"), expert_matrices=2), torch.float32, monkeypatch)
    test_experts(bench)


def test_a_narrow_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qwen3-30b-a3b", "deepseek-v3"):
        bench = Bench(replace(small(name), kv_bits=8.0), torch.bfloat16, monkeypatch)
        attention(bench, DECODE, [401])
        attention(bench, PREFILL, range(301, 341), 0.1)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "deepseek-v2-lite"])
def test_routing_and_tokens_are_numbers_that_a_host_can_use(name: str) -> None:
    """top_k different experts for each row; a token of the head's width for each row that emits one."""
    model = small(name)
    kernels = Kernels(model, SlotPool(2, model.mean_expert_bytes, torch.device("cpu")), torch.float32, 8, 100)
    kernels.attention(1, kernels.shape(1, forward(DECODE, [5, 6, 7])))()
    chosen = kernels.routing[:3].tolist()
    assert all(len(set(row)) == model.top_k and 0 <= min(row) <= max(row) < model.num_experts for row in chosen)
    kernels.head(2)()
    assert 0 < kernels.tokens[:2].max() < model.vocab_size
    assert kernels.tokens[2:].tolist() == [0] * 6


def test_an_expert_reads_its_own_slot() -> None:
    model = small("gpt-oss-20b")
    slots = SlotPool(3, model.mean_expert_bytes, torch.device("cpu"))
    kernels = Kernels(model, slots, torch.float32, 2, 10)
    out = kernels._expert.out
    for slot in range(3):
        slots.slot(slot).view(torch.uint8)[: model.mean_expert_bytes // 4 * 4].view(torch.float32).fill_(0.01 * slot)
    # Made once; what its row says when it runs is what it reads.
    row = described(kernels, [0], [1])
    work = kernels.experts(row, 1, False)
    work()
    assert out[0].abs().max() == 0
    row.words[row.layout.slots] = 2
    work()
    assert out[0].abs().max() > 0


def test_an_expert_too_small_to_compute_with_is_refused() -> None:
    model = scaled_model(model_of("gpt-oss-20b"), 1024)
    with pytest.raises(ValueError, match="choose a smaller scale"):
        Kernels(model, SlotPool(2, model.mean_expert_bytes, torch.device("cpu")), torch.float32, 1, 1)


def test_mla_prefill_is_counted_on_expanded_keys() -> None:
    """The test above would not see a mistake that both sides share: this one knows the figure."""
    model = small("deepseek-v3")
    assert model.attention == MLA
    kernels = Kernels(model, SlotPool(2, model.mean_expert_bytes, torch.device("cpu")), torch.float32, 8, 64)
    pair = 2 * model.num_heads * (model.nope_dim + model.rope_dim + model.v_dim)
    up = 2 * model.kv_rank * model.num_heads * (model.nope_dim + model.v_dim)
    assert kernels._context_flops(36, 0, True) == 36 * pair
    assert kernels._context_flops(3600, 10, True) == 3600 * pair + 10 * up
    # Few rows behind a long context: on the compressed keys, as decode.
    compressed = 2 * model.num_heads * (2 * model.kv_rank + model.rope_dim)
    assert kernels._context_flops(1000, 999, True) == kernels._context_flops(1000, 999, False) == 1000 * compressed


@pytest.mark.parametrize("gated", [True, False])
def test_compiled_products_compute_the_same(gated: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs, up = drawn(6, 8), (10 if gated else 5)
    blocks = [(drawn(8, up), drawn(5, 8)) for _ in range(3)]
    weights, keys, values, queries, router = drawn(8, 7), drawn(9, 4), drawn(9, 3), drawn(4, 2), drawn(8, 6)
    results = []
    for made in (Products(feed_forward, attend, route), products("cpu")):
        buffers = [
            torch.zeros(6, up),
            torch.zeros(6, 5),
            torch.zeros(6, 8),
            torch.zeros(6, 7),
            torch.zeros(18),
            torch.zeros(2, 3),
            torch.zeros(6, 6),
            torch.zeros(6, 2),
        ]
        routing = torch.zeros(6, 2, dtype=torch.int64)
        for _ in range(3):
            made.feed_forward(inputs, [one for one, _ in blocks], [two for _, two in blocks], [6, 1, 3], *buffers[:3])
            made.attend(inputs, weights, buffers[3], keys, values, queries, 5, *buffers[4:6])
            made.route(inputs, router, buffers[6], buffers[7], routing)
        results.append([*buffers, routing])
    assert products("cuda").feed_forward is feed_forward
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)
        assert plain.abs().sum() > 0
