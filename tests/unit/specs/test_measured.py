"""Measured kernel times: read between the points to the nanosecond, and refused where they make no sense."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest

from expertflow.model import ModelSpec
from sim.machine.kernels import KernelTimes, ns_at
from sim.specs.hardware import Hardware, Stack, hardware_from_dict, stack_from_dict, unsourced
from sim.specs.kernel_table import KernelTable
from tests.unit.specs.test_hardware import raw
from tests.unit.specs.test_kernels import BARE, SLOW
from tests.unit.specs.test_model import TINY, TINY_MLA

TABLE: dict[str, Any] = {
    "expert": [[1, 1000], [3, 1200], [7, 2000]],
    "head": [[1, 500], [2, 700]],
    "attention": [[1, 3000], [4, 3300]],
    "kv": 0.5,
}
SHARED = {"shared": [[1, 80]]}
DENSE = {"dense": [[1, 4000], [2, 5000]]}


def machine(model: str = "tiny", **changes: Any) -> Hardware:
    """`SLOW` (a byte and two operations a nanosecond) with a table, as read from a file."""
    return hardware_from_dict({**asdict(SLOW), "kernel_ns": {model: {**TABLE, **changes}}})


def times(spec: ModelSpec = TINY, **changes: Any) -> KernelTimes:
    """Times of `spec` by the table."""
    return KernelTimes(spec, machine(**changes), BARE)


# -- between, below and beyond the points ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "expected_ns"),
    [(1, 1000), (2, 1100), (3, 1200), (4, 1400), (6, 1800), (7, 2000), (8, 2200), (107, 22_000)],
)
def test_an_expert_takes_what_lies_on_the_line(num_tokens: int, expected_ns: int) -> None:
    assert times().expert_ns(num_tokens) == expected_ns


def test_below_the_first_point_its_time_holds() -> None:
    late = times(expert=[[4, 1000], [5, 1300]])
    assert [late.expert_ns(count) for count in (1, 3, 4, 5)] == [1000, 1000, 1000, 1300]


def test_beyond_the_last_point_time_never_falls() -> None:
    falling = times(expert=[[1, 1000], [3, 1200], [5, 1100]])
    assert [falling.expert_ns(count) for count in (3, 4, 5, 6, 100)] == [1200, 1150, 1100, 1100, 1100]


def test_one_point_is_a_constant() -> None:
    assert [times(head=[[2, 70]]).head_ns(rows) for rows in (1, 2, 3)] == [70, 70, 70]


def test_times_are_whole_and_rounded_once() -> None:
    kernels = times(expert=[[1, 10.4], [4, 11.4]])
    found = [kernels.expert_ns(count) for count in (1, 2, 3, 4)]
    assert found == [10, 11, 11, 11]  # 10.4, 10.73, 11.07, 11.4
    # 3000.3 + 0.3 of one more KV token: rounded together.
    together = times(attention=[[1, 3000.3]], kv=0.3).attention_list_ns(1, (2,), False)
    assert together == [3001] * 3
    assert {type(value) for value in (*found, *together)} == {int}


def test_no_tokens_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="a kernel over 0 tokens"):
        times().expert_ns(0)
    with pytest.raises(AssertionError, match="a kernel over 0 tokens"):
        ns_at(((1, 5.0),), 0)


def test_the_shortest_expert_need_not_be_that_of_one_token() -> None:
    assert times().shortest_expert_ns == 1000
    assert times(expert=[[1, 1000], [2, 900], [3, 1100]]).shortest_expert_ns == 900
    assert KernelTimes(TINY, SLOW, BARE).shortest_expert_ns == 768


# -- attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_lens", "expected_ns"),
    [((1,), 3000), ((2,), 3000), ((3,), 3001), ((1001,), 3500), ((1, 1), 3100), ((1, 101), 3150)],
)
def test_decode_adds_each_kv_token_beyond_one_a_row(kv_lens: tuple[int, ...], expected_ns: int) -> None:
    # Half a nanosecond is rounded to even: 3000.5 to 3000.
    assert times().attention_list_ns(len(kv_lens), kv_lens, False) == [expected_ns] * 3


@pytest.mark.parametrize(("kv_len", "short_ns", "full_ns"), [(3, 3020, 3020), (4, 3030, 3030), (5, 3030, 3040)])
def test_windowed_layers_read_at_most_their_window(kv_len: int, short_ns: int, full_ns: int) -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"), kv=10)
    assert kernels.attention_list_ns(1, (kv_len,), False) == [short_ns, full_ns, short_ns]
    assert kernels.attention_ns(0, 1, kv_len) == short_ns


def test_leading_dense_layers_count_into_the_first_and_read_all_their_keys() -> None:
    spec = replace(TINY, num_dense_layers=2, dense_intermediate=7, window=4, attention_pattern="ffwww")
    kernels = times(spec, kv=10, **DENSE)
    assert kernels.attention_list_ns(1, (6,), False) == [3030 + 2 * (4000 + 50), 3030, 3030]
    assert kernels.attention_list_ns(2, (6, 1), False)[0] == 3100 + 30 + 2 * (5000 + 50)


def test_prefill_adds_its_pairs_as_the_roofline_counts_them() -> None:
    # Rows 4, 5, 6: 3200 for three rows, three more keys, 15 - 3 pairs of 32 operations at two a nanosecond.
    assert times(kv=10).attention_list_ns(3, (4, 5, 6), True) == [3200 + 30 + 12 * 16] * 3


def test_prefill_adds_its_pairs_as_measured() -> None:
    assert times(kv=10, prefill_kv=2.5).attention_list_ns(3, (4, 5, 6), True) == [3200 + 30 + 30] * 3
    assert times(kv=10, prefill_kv=0).attention_list_ns(3, (4, 5, 6), True) == [3200 + 30] * 3


def test_a_windowed_prefill_takes_the_keys_and_pairs_that_its_rows_see() -> None:
    kernels = times(replace(TINY, window=4, attention_pattern="wf"), kv=10, prefill_kv=2)
    # Rows 5, 6, 7: six keys and 12 pairs within the window, seven and 18 without.
    assert kernels.attention_list_ns(3, (5, 6, 7), True) == [3200 + 30 + 18, 3200 + 40 + 30, 3200 + 30 + 18]


@pytest.mark.parametrize("prefill_kv", [None, 5.0])
def test_latent_attention_expands_its_context_anew(prefill_kv: float | None) -> None:
    kernels = KernelTimes(replace(TINY_MLA, kv_rank=20), machine(kv=10, prefill_kv=prefill_kv), BARE)
    # 40 rows after 8 tokens; 1140 - 40 pairs of 32 operations or 5 ns; 8 tokens through 280 weights.
    pair_ns = 16 if prefill_kv is None else 5
    attention_ns = 3300 + 36 * 100
    assert kernels.attention_list_ns(40, range(9, 49), True) == [attention_ns + 80 + 1100 * pair_ns + 280 * 8] * 3


@pytest.mark.parametrize("prefill_kv", [None, 4.0])
def test_few_rows_of_latent_attention_stay_on_the_compressed_cache(prefill_kv: float | None) -> None:
    kernels = KernelTimes(TINY_MLA, machine(kv=10, prefill_kv=prefill_kv), BARE)
    # Two rows after 8 tokens; 19 - 2 pairs of 28 operations, or of 28 / 32 of what an expanded pair takes.
    pair_ns = 14 if prefill_kv is None else 3.5
    assert kernels.attention_list_ns(2, (9, 10), True) == [round(3100 + 80 + 17 * pair_ns)] * 3


def test_one_row_of_one_token_costs_the_same_in_prefill_and_in_decode() -> None:
    assert times().attention_list_ns(1, (1,), True) == times().attention_list_ns(1, (1,), False) == [3000] * 3


# -- which model ----------------------------------------------------------------------------------------------


def test_other_models_keep_the_roofline() -> None:
    other = KernelTimes(TINY, machine(model="another"), BARE)
    plain = KernelTimes(TINY, SLOW, BARE)
    for kernels in (other, plain):
        assert (kernels.expert_ns(3), kernels.head_ns(1), kernels.attention_ns(0, 1, 5)) == (1152, 160, 528)


def test_a_whole_resident_layer_is_made_of_measured_times() -> None:
    spec = replace(TINY, shared_intermediate=5)
    kernels = KernelTimes(spec, machine(**SHARED), Stack("some", 100, 0))
    assert kernels.resident_layer_ns(1, 21) == 100 + 3010 + 2 * 1000 + 80


def test_kernels_know_how_much_a_busy_link_slows_them() -> None:
    slowed = times(attention_slowdown=1.2, experts_slowdown=1.5, head_slowdown=100)
    assert slowed.slowdowns == (1.2, 1.5, 100)
    assert times().slowdowns == KernelTimes(TINY, SLOW, BARE).slowdowns == (1.0, 1.0, 1.0)


def test_without_shared_experts_they_take_no_time() -> None:
    assert times().shared_ns(1) == times().shared_ns(50) == 0


@pytest.mark.parametrize(
    ("shape", "tables", "message"),
    [
        ({"shared_intermediate": 5}, {}, r"kernel_ns\.tiny\.shared=\(\), but tiny has shared experts; measure them"),
        ({}, SHARED, r"tiny\.shared=\(\(1, 80\.0\),\), but tiny has no shared experts; leave them out"),
        ({"num_dense_layers": 1, "dense_intermediate": 7}, {}, r"tiny\.dense=\(\), but tiny has dense layers; measure"),
        ({}, DENSE, r"tiny\.dense=.*, but tiny has no dense layers; leave them out"),
    ],
)
def test_a_table_of_another_shape_is_refused(shape: dict[str, Any], tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        times(replace(TINY, **shape), **tables)
    assert len(caught.value.args) == 1


# -- reading and refusing -------------------------------------------------------------------------------------


def test_points_may_be_lists_or_tuples_and_a_resolved_machine_is_read_again() -> None:
    found = machine(expert=((1, 1000), (3, 1200), (7, 2000)))
    assert found == machine()
    assert found.kernel_ns["tiny"].expert == ((1, 1000.0), (3, 1200.0), (7, 2000.0))
    assert hardware_from_dict(asdict(found)) == found
    assert replace(found, name="copy").kernel_ns == found.kernel_ns


def test_machines_with_other_tables_are_other_machines() -> None:
    assert machine() != machine(kv=0.6)
    assert machine() != SLOW
    assert hash(machine()) == hash(machine(kv=0.6)) == hash(SLOW)  # tables may differ under one hash


def test_only_what_is_given_needs_an_origin() -> None:
    sourced = raw("hardware", "a100")
    assert unsourced(hardware_from_dict(sourced)) == []
    sourced["kernel_ns"] = {"tiny": TABLE}
    assert unsourced(hardware_from_dict(sourced)) == ["kernel_ns"]
    sourced["sources"]["kernel_ns"] = "measured"
    assert unsourced(hardware_from_dict(sourced)) == []
    bare = {"name": "bare", "layer_overhead_ns": 0, "head_overhead_ns": 0}
    assert unsourced(stack_from_dict({**bare, "observe_ns": 1})) == [
        "layer_overhead_ns",
        "head_overhead_ns",
        "observe_ns",
    ]


NAN, INF = math.nan, math.inf
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"expert": []}, r"hardware\.kernel_ns\.tiny\.expert=\(\) has no points; give at least one \[tokens, ns\]"),
    ({"head": []}, r"tiny\.head=\(\) has no points"),
    ({"attention": []}, r"tiny\.attention=\(\) has no points"),
    ({"expert": [[2, 5], [2, 6]]}, r"tiny\.expert\[2 tokens\] follows 2 tokens; tokens must rise and be at least 1"),
    ({"expert": [[0, 5]]}, r"expert\[0 tokens\] follows 0 tokens"),
    ({"head": [[1, NAN]]}, r"head\[1 tokens\]=nan is outside \[1, 1e\+12\]; give nanoseconds as measured"),
    ({"head": [[1, INF]]}, r"head\[1 tokens\]=inf is outside"),
    ({"head": [[1, 0.9]]}, r"head\[1 tokens\]=0\.9 is outside"),
    ({"shared": [[1, 0]]}, r"shared\[1 tokens\]=0\.0 is outside"),
    ({"dense": [[1, -1]]}, r"dense\[1 tokens\]=-1\.0 is outside"),
    ({"expert": [[1.5, 5]]}, r"tiny\.expert: \[1\.5, 5\] must be a point \[tokens, ns\] with whole tokens"),
    ({"expert": [[True, 5]]}, r"\[True, 5\] must be a point"),
    ({"expert": [[1, True]]}, r"\[1, True\] must be a point"),
    ({"expert": [[1, 5, 6]]}, r"\[1, 5, 6\] must be a point"),
    ({"expert": [1, 5]}, r"tiny\.expert: 1 must be a point"),
    ({"expert": 5}, r"tiny\.expert=5 must be a list of points \[tokens, ns\]"),
    ({"expert": [[1, 10**400]]}, r"kernel_ns\.tiny\.expert holds a number of more than 300 digits"),
    ({"kv": -0.1}, r"tiny\.kv=-0\.1 is outside \[0, 1e\+12\] ns; give ns per token of KV"),
    ({"kv": NAN}, r"tiny\.kv=nan is outside"),
    ({"kv": INF}, r"tiny\.kv=inf is outside"),
    ({"kv": "1"}, r"tiny\.kv='1' must be a number"),
    ({"prefill_kv": -1}, r"tiny\.prefill_kv=-1 is outside \[0, 1e\+12\] ns; give ns per \(query, key\) pair"),
    ({"prefill_kv": NAN}, r"tiny\.prefill_kv=nan is outside"),
    ({"prefill_kv": "1"}, r"tiny\.prefill_kv='1' must be ns per \(query, key\) pair, or be left out"),
    ({"prefill_kv": True}, r"tiny\.prefill_kv=True must be ns"),
    ({"attention_slowdown": 0.9}, r"tiny\.attention_slowdown=0\.9 is outside \[1, 100\]; measure both with the host"),
    ({"experts_slowdown": 100.1}, r"tiny\.experts_slowdown=100\.1 is outside \[1, 100\]"),
    ({"head_slowdown": NAN}, r"tiny\.head_slowdown=nan is outside"),
    ({"head_slowdown": "2"}, r"tiny\.head_slowdown='2' must be a number"),
    ({"experts": [[1, 5]]}, r"tiny\.experts is no key \(did you mean hardware\.kernel_ns\.tiny\.expert"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_table_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        machine(**changes)
    assert len(caught.value.args) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["expert", "head", "attention", "kv"])
def test_a_table_that_is_needed_is_not_assumed(name: str) -> None:
    rest = {key: value for key, value in TABLE.items() if key != name}
    with pytest.raises(ValueError, match=rf"kernel_ns\.tiny lacks {name}; measure all, or leave the model out"):
        hardware_from_dict({**asdict(SLOW), "kernel_ns": {"tiny": rest}})


@pytest.mark.parametrize(
    ("kernel_ns", "message"),
    [
        ([TABLE], r"kernel_ns=\[.*\] must map the name of a model to its tables"),
        (None, r"kernel_ns=null must be a mapping"),
        ({"": TABLE}, r"kernel_ns: '' must be the name of a model"),
        ({7: TABLE}, r"kernel_ns: 7 must be the name of a model"),
        ({"tiny": [1]}, r"kernel_ns\.tiny=\[1\] must map expert, head, attention and so on"),
    ],
)
def test_what_is_no_mapping_of_models_is_refused(kernel_ns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hardware_from_dict({**asdict(SLOW), "kernel_ns": kernel_ns})


def test_a_machine_made_in_code_takes_tables_and_no_plain_mapping() -> None:
    table = KernelTable(expert=((1, 5.0),), head=((1, 6.0),), attention=((1, 7.0),), kv=0.0)
    assert KernelTimes(TINY, replace(SLOW, kernel_ns={"tiny": table}), BARE).expert_ns(9) == 5
    with pytest.raises(ValueError, match=r"kernel_ns\.tiny=.* must be a KernelTable"):
        replace(SLOW, kernel_ns={"tiny": TABLE})


@pytest.mark.parametrize("key", ["classify_ns", "observe_ns", "forward_ns", "group_ns", "copy_start_ns", "release_ns"])
def test_host_costs_of_a_stack_are_whole_and_bounded(key: str) -> None:
    bare = {"name": "bare", "layer_overhead_ns": 0, "head_overhead_ns": 0}
    assert getattr(stack_from_dict(bare), key) == 0
    assert getattr(stack_from_dict({**bare, key: 10**9}), key) == 10**9
    for value, message in ((-1, "is outside"), (10**9 + 1, "is outside"), (1.5, "must be a whole number")):
        with pytest.raises(ValueError, match=rf"stack\.{key}={value}.*{message}"):
            stack_from_dict({**bare, key: value})


def test_a_release_is_told_whole_and_not_beside_what_is_solved_without_it() -> None:
    bare = {"name": "bare", "layer_overhead_ns": 0, "head_overhead_ns": 0}
    assert stack_from_dict({**bare, "release_ns": 5, "release_latency_ns": 7}).release_latency_ns == 7
    with pytest.raises(ValueError, match=r"stack\.release_latency_ns=7 follows a release.*give both, or neither"):
        stack_from_dict({**bare, "release_latency_ns": 7})
    with pytest.raises(ValueError, match=r"stack\.resident_tpot_ms=3 is solved.*release_ns is 0; give one of the two"):
        stack_from_dict({**bare, "release_ns": 5, "resident_tpot_ms": 3.0})
