"""The roofline: hand-computed times on both sides of the point where memory and compute take as long."""

from dataclasses import replace

import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from sim.machine.kernels import KernelTimes
from sim.paths import CONF
from sim.specs.hardware import Hardware, Stack, hardware_from_dict, stack_from_dict
from tests.unit.specs.test_model import TINY, TINY_MLA

ROOT = CONF


def hardware(name: str) -> Hardware:
    return hardware_from_dict(yaml.safe_load((ROOT / "hardware" / f"{name}.yaml").read_text()))


def stack(name: str) -> Stack:
    return stack_from_dict(yaml.safe_load((ROOT / "stack" / f"{name}.yaml").read_text()))


def model(name: str) -> ModelSpec:
    return model_from_dict(yaml.safe_load((ROOT / "model" / f"{name}.yaml").read_text()))


# One byte and two operations a nanosecond: 16-bit weights are balanced at two tokens.
SLOW = replace(
    hardware("a100"),
    memory_gb_per_s=1.0,
    memory_efficiency=1.0,
    tflops=0.002,
    compute_efficiency=1.0,
    link_gb_per_s=0.5,
)
BARE = Stack("bare", 0, 0)


def times(spec: ModelSpec = TINY, machine: Hardware = SLOW, software: Stack = BARE) -> KernelTimes:
    return KernelTimes(spec, machine, software)


# -- matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "expected_ns"), [(1, 768), (2, 768), (3, 1152), (100, 38_400)])
def test_an_expert_is_memory_bound_up_to_two_tokens(num_tokens: int, expected_ns: int) -> None:
    # 384 weights: 768 bytes, or 768 operations a token at two a nanosecond.
    assert times().expert_ns(num_tokens) == expected_ns


def test_efficiencies_scale_each_side() -> None:
    assert times(machine=replace(SLOW, memory_efficiency=0.5)).expert_ns(1) == 2 * 768
    assert times(machine=replace(SLOW, compute_efficiency=0.5)).expert_ns(3) == 2 * 1152


def test_fewer_bits_save_bytes_but_no_operations() -> None:
    quantised = times(replace(TINY, expert_bits=4.25))
    assert quantised.expert_ns(1) == 384  # 204 bytes, 768 operations: compute bound now
    assert times(replace(TINY, expert_bits=4.25), replace(SLOW, tflops=1.0)).expert_ns(1) == 204


@pytest.mark.parametrize(("num_tokens", "expected_ns"), [(1, 160), (2, 160), (3, 240)])
def test_the_head_is_a_matrix_of_the_vocabulary(num_tokens: int, expected_ns: int) -> None:
    assert times().head_ns(num_tokens) == expected_ns


@pytest.mark.parametrize(("num_tokens", "expected_ns"), [(1, 240), (2, 240), (3, 360)])
def test_the_shared_expert_runs_over_all_tokens(num_tokens: int, expected_ns: int) -> None:
    assert times(replace(TINY, shared_intermediate=5)).shared_ns(num_tokens) == expected_ns


def test_a_model_without_shared_experts_spends_nothing_on_them() -> None:
    assert times().shared_ns(1) == times().shared_ns(512) == 0


def test_a_kernel_over_no_tokens_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="a kernel over 0 tokens"):
        times().expert_ns(0)


# -- attention, decode ---------------------------------------------------------------------------------------

# TINY: 192 + 32 router weights = 448 bytes; 16 bytes of KV a token; 4 * 4 heads * 2 = 32 operations a pair.


@pytest.mark.parametrize(
    ("kv_lens", "expected_ns"),
    [
        ((5,), 448 + 16 * 5),  # memory: one row's projections take 224 of compute
        ((1, 4), 448 + 16 * 5),  # balanced
        ((1, 1, 3), 3 * 224 + 16 * 5),  # compute
    ],
)
def test_decode_reads_every_requests_keys(kv_lens: tuple[int, ...], expected_ns: int) -> None:
    assert times().attention_list_ns(len(kv_lens), kv_lens, False) == [expected_ns] * 3


@pytest.mark.parametrize(("kv_len", "windowed"), [(3, 3), (4, 4), (5, 4), (100, 4)])
def test_windowed_layers_read_at_most_their_window(kv_len: int, windowed: int) -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"))
    short, full = 448 + 16 * windowed, 448 + 16 * kv_len
    assert kernels.attention_list_ns(1, (kv_len,), False) == [short, full, short]


def test_a_window_clips_each_request_on_its_own() -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"))
    assert kernels.attention_list_ns(2, (3, 10), False) == [448 + 16 * 7, 448 + 16 * 13, 448 + 16 * 7]


@pytest.mark.parametrize("kv_lens", [(2, 3), (10, 10), (4, 4)])
def test_the_sum_is_enough_where_all_requests_or_none_exceed_the_window(kv_lens: tuple[int, int]) -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"))
    by_layer = [kernels.attention_ns(layer, 2, sum(kv_lens)) for layer in range(3)]
    assert by_layer == kernels.attention_list_ns(2, kv_lens, False)


def test_where_only_some_exceed_it_the_sum_gives_an_upper_bound() -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"))
    assert kernels.attention_ns(0, 2, 13) == 448 + 16 * 8 > kernels.attention_list_ns(2, (3, 10), False)[0]


def test_leading_dense_layers_count_into_the_first() -> None:
    kernels = times(replace(TINY, num_dense_layers=2, dense_intermediate=7))
    # Each: attention without a router (384 bytes and KV), then 168 weights.
    dense_ns = (384 + 16 * 5) + 336
    assert kernels.attention_list_ns(1, (5,), False) == [448 + 80 + 2 * dense_ns, 448 + 80, 448 + 80]


def test_latent_attention_decodes_on_the_compressed_cache() -> None:
    # 202 + 32 weights; 8 bytes a token; 2 * 2 heads * (2*3 + 1) = 28 operations a pair.
    assert times(TINY_MLA).attention_ns(1, 1, 10) == 468 + 80
    starved = replace(SLOW, tflops=0.0001)
    assert times(TINY_MLA, starved).attention_ns(1, 1, 10) == (2 * 234 + 28 * 10) * 10


# -- attention, prefill --------------------------------------------------------------------------------------


def test_prefill_scores_the_causal_triangle_and_reads_the_keys_once() -> None:
    # 3 rows: 1 + 2 + 3 pairs. Compute (3*448 + 6*32) / 2 = 768 against 448 + 3*16 bytes.
    assert times().attention_list_ns(3, (1, 2, 3), True) == [768] * 3
    assert times(machine=replace(SLOW, tflops=1.0)).attention_list_ns(3, (1, 2, 3), True) == [448 + 48] * 3


def test_a_later_chunk_also_attends_to_the_earlier_ones() -> None:
    assert times().attention_list_ns(3, (4, 5, 6), True) == [(3 * 448 + 15 * 32) // 2] * 3


def test_doubling_a_long_prompt_nearly_quadruples_the_quadratic_term() -> None:
    kernels = times()

    def quadratic_ns(num_tokens: int) -> int:
        kv_lens = range(1, num_tokens + 1)
        return kernels.attention_list_ns(num_tokens, kv_lens, True)[0] - 224 * num_tokens

    assert quadratic_ns(1000) == 16 * 1000 * 1001 // 2
    assert quadratic_ns(2000) / quadratic_ns(1000) == pytest.approx(4, rel=0.001)


def test_a_windowed_prefill_reads_the_keys_that_its_rows_see() -> None:
    windowed = replace(TINY, window=4, attention_pattern="wf")
    # Rows 5, 6, 7 see tokens 2..7: six keys, four pairs each.
    reads = times(windowed, replace(SLOW, tflops=1.0)).attention_list_ns(3, (5, 6, 7), True)
    assert reads == [448 + 16 * 6, 448 + 16 * 7, 448 + 16 * 6]
    scores = times(windowed).attention_list_ns(3, (5, 6, 7), True)
    assert scores == [672 + 16 * 12, 672 + 16 * 18, 672 + 16 * 12]


def test_one_row_costs_the_same_in_prefill_and_in_decode() -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"))
    assert kernels.attention_list_ns(1, (9,), True) == kernels.attention_list_ns(1, (9,), False)


def test_latent_attention_prefills_on_expanded_keys_and_expands_its_context_anew() -> None:
    # Rows 9 to 28: 370 pairs, 2 * 2 heads * (2 + 1 + 5) = 32 operations each; 8 earlier tokens through 20 * 2 * 7
    # = 280 weights. On the compressed cache a pair takes 2 * 2 * (40 + 1) = 164.
    starved, wide = replace(SLOW, tflops=0.0001), replace(TINY_MLA, kv_rank=20)
    operations = 2 * (wide.attention_params + 32) * 20 + 370 * 32 + 2 * 280 * 8
    assert times(wide, starved).attention_list_ns(20, range(9, 29), True) == [operations * 10] * 3


def test_rows_and_lengths_must_agree() -> None:
    with pytest.raises(AssertionError, match="2 KV lengths for 3 rows"):
        times().attention_list_ns(3, (1, 2), False)


# -- whole layers --------------------------------------------------------------------------------------------


def test_repeated_questions_get_the_same_answer_from_bounded_memory() -> None:
    kernels = times()
    first = kernels.attention_list_ns(1, (1,), False)
    assert kernels.attention_list_ns(1, [1], False) is first
    for kv_len in range(1, 5001):
        kernels.attention_list_ns(1, (kv_len,), False)
    assert kernels._decode.cache_info().currsize == 4096
    assert kernels.attention_list_ns(1, (1,), False) == first


def test_a_resident_layer_is_overhead_attention_shared_and_top_k_experts() -> None:
    spec = replace(TINY, shared_intermediate=5)
    layer_ns = times(spec, software=Stack("some", 1000, 0)).resident_layer_ns(1, 5)
    assert layer_ns == 1000 + (448 + 80) + 240 + 2 * 768


def test_stacks_differ_by_their_overhead_alone() -> None:
    spec, machine = model("olmoe-1b-7b"), hardware("a100")
    eager = KernelTimes(spec, machine, stack("eager")).resident_layer_ns(3, 1000)
    graph = KernelTimes(spec, machine, stack("graph")).resident_layer_ns(3, 1000)
    assert eager - graph == 1_000_000 - 20_000


def test_every_model_gets_whole_positive_times_on_every_machine() -> None:
    for path in sorted((ROOT / "hardware").glob("*.yaml")):
        machine = hardware(path.stem)
        for spec_path in sorted((ROOT / "model").glob("*.yaml")):
            if spec_path.stem == "auto":
                continue
            spec = model(spec_path.stem)
            kernels = KernelTimes(spec, machine, stack("graph"))
            decode = kernels.attention_list_ns(1, (4096,), False)
            prefill = kernels.attention_list_ns(512, range(1, 513), True)
            assert len(decode) == len(prefill) == spec.num_layers
            every = [*decode, *prefill, kernels.expert_ns(1), kernels.expert_ns(512), kernels.head_ns(1)]
            assert all(type(value) is int and value > 0 for value in every), (path.stem, spec.name)


def test_gpt_oss_alternates_starting_with_the_window() -> None:
    kernels = KernelTimes(model("gpt-oss-20b"), hardware("a100"), stack("graph"))
    decode = kernels.attention_list_ns(1, (8192,), False)
    assert decode[0::2] == [decode[0]] * 12
    assert decode[1::2] == [decode[1]] * 12
    assert decode[0] < decode[1]


def test_a_mixtral_expert_takes_about_as_long_on_a_4090_as_was_measured() -> None:
    # GitHub efeslab/fiddler#7: 0.59 ms at batch 1 in eager PyTorch, launches included.
    kernels = KernelTimes(model("mixtral-8x7b"), hardware("rtx4090"), stack("eager"))
    assert 0.6 * 0.59 < kernels.expert_ns(1) / 1e6 < 0.59
