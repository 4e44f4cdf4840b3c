"""KV lengths on a grid of captured kernels: rounded up in decode, bounded by windows, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.job.configure import configure
from sim.machine.kernels import KernelTimes
from sim.machine.run import run_floor, run_policy
from sim.machine.simulated import HostCosts
from sim.specs.hardware import Stack, kv_on_grid, stack_from_dict, unsourced
from sim.specs.kernel_table import KernelTable
from tests.support.workloads import HARDWARE, memory_trace, model_of, policy_for, workload
from tests.unit.specs.test_kernels import SLOW, times
from tests.unit.specs.test_measured import machine
from tests.unit.specs.test_model import TINY

WINDOWED = replace(TINY, window=4, attention_pattern="wf")


def on_grid(grid: int) -> Stack:
    """A stack of nothing but a grid."""
    return Stack("grid", 0, 0, kv_grid=grid)


@pytest.mark.parametrize(
    ("kv_tokens", "grid", "expected"), [(5, 0, 5), (5, 1, 5), (1, 4, 4), (4, 4, 4), (5, 4, 8), (8, 4, 8), (9, 4, 12)]
)
def test_tokens_are_rounded_up_to_a_multiple(kv_tokens: int, grid: int, expected: int) -> None:
    assert kv_on_grid(kv_tokens, grid) == expected


@pytest.mark.parametrize(("most", "expected"), [(5, 5), (7, 7), (8, 8), (9, 8)])
def test_never_above_the_most_that_a_layer_reads(most: int, expected: int) -> None:
    assert kv_on_grid(5, 4, most) == expected


# TINY reads 448 bytes of weights and 16 a token, a nanosecond each.


@pytest.mark.parametrize(("kv_len", "read"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_decode_reads_as_many_tokens_as_its_kernel_was_captured_for(kv_len: int, read: int) -> None:
    assert times(software=on_grid(4)).attention_list_ns(1, (kv_len,), False) == [448 + 16 * read] * 3


def test_the_tokens_of_all_rows_are_rounded_together() -> None:
    assert times(software=on_grid(4)).attention_list_ns(2, (1, 4), False) == [448 + 16 * 8] * 3


@pytest.mark.parametrize(
    ("kv_lens", "grid", "windowed", "full"),
    [((3,), 2, 4, 4), ((3,), 3, 3, 3), ((3,), 8, 4, 8), ((100,), 3, 4, 102), ((3, 10), 4, 8, 16), ((3, 10), 10, 8, 20)],
)
def test_windowed_layers_are_rounded_within_their_windows(
    kv_lens: tuple[int, ...], grid: int, windowed: int, full: int
) -> None:
    kernels = times(WINDOWED, software=on_grid(grid))
    expected = [448 + 16 * tokens for tokens in (windowed, full, windowed)]
    assert kernels.attention_list_ns(len(kv_lens), kv_lens, False) == expected


def test_the_sum_alone_is_rounded_likewise() -> None:
    kernels = times(WINDOWED, software=on_grid(3))
    assert [kernels.attention_ns(layer, 2, 13) for layer in range(2)] == [448 + 16 * 8, 448 + 16 * 15]


def test_dense_layers_read_what_full_layers_read() -> None:
    spec = replace(WINDOWED, num_dense_layers=1, dense_intermediate=7)
    # 384 bytes of attention and 336 of the dense layer.
    assert times(spec, software=on_grid(8)).attention_list_ns(1, (5,), False)[0] == 448 + 16 * 4 + 384 + 16 * 8 + 336


def test_measured_times_are_taken_at_the_grid() -> None:
    kernels = KernelTimes(TINY, machine(kv=10), on_grid(8))
    assert kernels.attention_list_ns(1, (5,), False) == [3000 + 7 * 10] * 3


@pytest.mark.parametrize("kv_lens", [(1, 2, 3), (5, 6, 7)])
def test_a_prefill_is_not_rounded(kv_lens: tuple[int, ...]) -> None:
    plain, grid = (times(WINDOWED, software=on_grid(size)) for size in (0, 64))
    assert grid.attention_list_ns(3, kv_lens, True) == plain.attention_list_ns(3, kv_lens, True)


def test_lengths_of_one_captured_kernel_share_their_times() -> None:
    kernels = times(software=on_grid(64))
    assert len({id(kernels.attention_list_ns(1, (kv_len,), False)) for kv_len in range(1, 65)}) == 1


def test_a_run_reads_as_many_tokens_more() -> None:
    """Three tokens of one request on two layers: 4 + 4 + 4 tokens of KV in place of 1 + 2 + 3."""
    table = KernelTable(expert=((1, 5000.0),), head=((1, 1.0),), attention=((1, 1.0),), kv=1000.0)
    experts = np.array([[[0], [0]], [[1], [1]], [[2], [2]]], np.uint8)
    work = workload(memory_trace(experts, 4, [0, 3], [0]), model_of(2, 4, 1), 8, start="resident")
    work = replace(work, hardware=replace(HARDWARE, kernel_ns={work.model.name: table}))
    grid = replace(work, stack=on_grid(4))
    plain, found = (run_policy(one, *policy_for(one, "lru")) for one in (work, grid))
    assert found["compute_ns"] - plain["compute_ns"] == 2 * 6 * 1000
    assert run_floor(grid).serial_ns - run_floor(work).serial_ns == 2 * 6 * 1000


# -- the key --------------------------------------------------------------------------------------------------


def test_no_grid_is_the_default_and_needs_no_origin() -> None:
    bare: dict[str, Any] = {"name": "bare", "layer_overhead_ns": 0, "head_overhead_ns": 0}
    assert stack_from_dict(bare).kv_grid == 0
    assert "kv_grid" not in unsourced(stack_from_dict(bare))
    assert "kv_grid" in unsourced(stack_from_dict({**bare, "kv_grid": 64}))
    for value, message in (
        (-1, r"is outside \[0, 1e\+06\] tokens; give whole tokens"),
        (1.5, "must be a whole number"),
    ):
        with pytest.raises(ValueError, match=rf"stack\.kv_grid={value}.*{message}"):
            stack_from_dict({**bare, "kv_grid": value})


def test_a_command_line_takes_a_grid() -> None:
    cfg = configure(["+hardware=a100", "+policy=lru", "stack=graph", "+stack.kv_grid=256"])
    assert stack_from_dict(cfg["stack"]).kv_grid == 256


def test_a_grid_alone_needs_no_other_machine() -> None:
    assert not HostCosts.of(SLOW, on_grid(64)).host_bound
