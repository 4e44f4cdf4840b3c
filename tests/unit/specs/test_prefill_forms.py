"""Prefill of compressed KV: the cheaper of two forms, on the cache as it is or on keys and values expanded from it."""

from __future__ import annotations

import pytest

from sim.machine.kernels import KernelTimes
from sim.paths import config_files
from tests.unit.specs.test_kernels import hardware, model, stack

H100 = hardware("h100")
FLOPS_PER_NS = H100.tflops * 1000 * H100.compute_efficiency
COMPRESSED = sorted(name for name in config_files("model") if name != "auto" and model(name).attention == "mla")


def kernels_of(name: str) -> KernelTimes:
    """Times of a shipped model on an H100."""
    return KernelTimes(model(name), H100, stack("eager"))


def prefill_ns(kernels: KernelTimes, context: int, rows: int) -> int:
    """Attention of all layers over the last `rows` of `context` tokens."""
    return sum(kernels.attention_list_ns(rows, range(context - rows + 1, context + 1), True))


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("context", [1, 2049, 16_384, 100_000])
def test_a_row_of_a_prompt_takes_as_long_as_one_that_is_decoded(name: str, context: int) -> None:
    kernels = kernels_of(name)
    assert prefill_ns(kernels, context, 1) == sum(kernels.attention_list_ns(1, (context,), False))


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("context", [2048, 16_384, 100_000])
def test_more_rows_never_take_less(name: str, context: int) -> None:
    kernels = kernels_of(name)
    times = [prefill_ns(kernels, context, rows) for rows in (1, 2, 8, 31, 128, 512, 1024, 2048)]
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
@pytest.mark.parametrize(("context", "rows"), [(16_384, 512), (100_000, 512), (100_000, 2048)])
def test_layers_with_an_indexer_run_on_the_compressed_cache(name: str, context: int, rows: int) -> None:
    """The sum of operations by hand: each row's `index_top_k` pairs of the compressed form, and nothing expanded."""
    spec = model(name)
    pair = 2 * spec.num_heads * (2 * spec.kv_rank + spec.rope_dim)
    scores = sum(range(context - rows + 1, context + 1)) * 2 * spec.index_heads * spec.index_dim
    one = 2 * spec.mixer_params("i") * rows + rows * spec.index_top_k * pair + scores
    feeds = spec.num_layers * spec.router_params + spec.num_dense_layers * spec.dense_params
    expected_ns = (len(spec.layers) * one + 2 * feeds * rows) / FLOPS_PER_NS
    found_ns = prefill_ns(kernels_of(name), context, rows)
    # Some of a model's layers may take another's choice, and score nothing.
    assert found_ns == pytest.approx(expected_ns, rel=0.01) or spec.num_of.keys() != {"i"}
    assert found_ns < expected_ns * 1.01


def test_a_short_prompt_computes_all_pairs_under_a_mask_whatever_was_chosen() -> None:
    """512 rows after 2560: all causal pairs on expanded keys are fewer operations than 2048 each on compressed ones."""
    spec, context, rows = model("deepseek-v3.2"), 3072, 512
    pairs = sum(range(context - rows + 1, context + 1))
    heads = spec.num_heads
    masked = pairs * 2 * heads * (spec.nope_dim + spec.rope_dim + spec.v_dim) + (context - rows) * 2 * spec.kv_up_params
    sparse = rows * spec.index_top_k * 2 * heads * (2 * spec.kv_rank + spec.rope_dim)
    assert masked < sparse
    scores = pairs * 2 * spec.index_heads * spec.index_dim
    last = (2 * (spec.mixer_params("i") + spec.router_params) * rows + masked + scores) / FLOPS_PER_NS
    found = kernels_of("deepseek-v3.2").attention_list_ns(rows, range(context - rows + 1, context + 1), True)
    assert found[-1] == round(last)


@pytest.mark.parametrize(("context", "rows"), [(512, 512), (1024, 512), (4096, 512), (100_000, 512)])
def test_a_chunk_of_a_prompt_is_expanded(context: int, rows: int) -> None:
    spec = model("deepseek-v3")
    pairs = sum(range(context - rows + 1, context + 1))
    flops = 2 * (spec.attention_params + spec.router_params) * rows + (context - rows) * 2 * spec.kv_up_params
    flops += pairs * 2 * spec.num_heads * (spec.nope_dim + spec.rope_dim + spec.v_dim)
    found = kernels_of("deepseek-v3").attention_list_ns(rows, range(context - rows + 1, context + 1), True)
    assert found[-1] == round(flops / FLOPS_PER_NS)
