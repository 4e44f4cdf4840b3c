"""Host and GPU memory are planned before they are taken; buffers lie where their plan says."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.machine.memory import (
    ALIGNMENT,
    PINNED_SHARE,
    WSL_SHARE,
    HostPlan,
    align,
    available_bytes,
    check_gpu,
    plan_arenas,
    plan_host,
)
from replay.machine.pools import HostPool, SlotPool, chunk_offsets
from sim.specs.chunks import chunk_sizes

EXPERT = 10_000_000
STRIDE = align(EXPERT)


def plan(
    budget_gb: float | None = None,
    *,
    available: int = 10**9,
    num_keys: int = 40,
    pinned: bool = True,
    wsl: bool = False,
) -> HostPlan:
    return plan_host(num_keys, EXPERT, budget_gb, pinned, available, wsl)


# -- plans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "aligned"), [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024)])
def test_align_rounds_up(size: int, aligned: int) -> None:
    assert align(size) == aligned


def test_every_expert_has_a_buffer_where_there_is_room() -> None:
    found = plan()
    assert (found.num_buffers, found.stride, found.shared, found.warnings) == (40, STRIDE, False, ())


def test_without_a_budget_a_share_of_what_is_left_is_taken() -> None:
    available = 20 * STRIDE
    assert plan(available=available).num_buffers == int(available * PINNED_SHARE) // STRIDE == 12


def test_a_budget_may_be_all_that_is_left_and_not_a_byte_more() -> None:
    available = 400_000_000
    assert plan(0.4, available=available).num_buffers == available // STRIDE
    with pytest.raises(ValueError, match=r"host_memory_gb=0\.4 .*has left \(0\.40 GB\); host_memory_gb=0\.23 would"):
        plan(0.4, available=available - 1)


def test_the_budget_that_would_fit_fits() -> None:
    with pytest.raises(ValueError) as caught:
        plan(7.0)
    remedy = re.search(r"host_memory_gb=([\d.]+) would fit", str(caught.value))
    assert remedy is not None
    assert plan(float(remedy[1])).num_buffers > 1


@pytest.mark.parametrize("pinned", [True, False])
def test_windows_pins_less_and_says_so(pinned: bool) -> None:
    available = 20 * STRIDE
    found = plan(available=available, wsl=True, pinned=pinned)
    assert found.num_buffers == int(available * (WSL_SHARE if pinned else PINNED_SHARE)) // STRIDE
    assert any("Windows" in warning for warning in found.warnings) == pinned


def test_fewer_buffers_than_experts_are_shared_with_a_warning() -> None:
    found = plan(0.1)
    assert (found.num_buffers, found.shared) == (9, True)
    assert len(found.warnings) == 1
    assert "9 of 40 experts" in found.warnings[0]
    assert "round-robin" in found.warnings[0]


@given(expert_bytes=st.integers(1, 10**9), missing=st.integers(1, 10**6))
def test_too_little_for_two_experts_names_what_suffices(expert_bytes: int, missing: int) -> None:
    """The remedy is one that can be copied: with it the plan succeeds, also for experts of a few bytes."""
    need = 2 * align(expert_bytes)
    budget = max(need - missing, 1) / 1e9
    with pytest.raises(ValueError, match="hold no two experts") as caught:
        plan_host(8, expert_bytes, budget, False, 10**12, False)
    remedy = re.search(r"give host_memory_gb=([\d.]+) or more", str(caught.value))
    assert remedy is not None
    assert need / 1e9 <= float(remedy[1]) <= 1.02 * need / 1e9
    assert plan_host(8, expert_bytes, float(remedy[1]), False, 10**12, False).num_buffers >= 2


def test_the_host_has_memory() -> None:
    assert 1 << 20 < available_bytes() < 1 << 62


@given(
    num_buffers=st.integers(1, 3000),
    stride=st.integers(1, 4000).map(lambda size: size * ALIGNMENT),
    largest=st.integers(12, 30).map(lambda power: 1 << power),
)
def test_arenas_are_powers_of_two_that_hold_every_buffer(num_buffers: int, stride: int, largest: int) -> None:
    arenas = plan_arenas(num_buffers, stride, largest)
    assert sum(count for _, count in arenas) == num_buffers
    for size, count in arenas:
        assert size & (size - 1) == 0
        assert 1 <= count <= size // stride
        assert size <= max(largest, 1 << (stride - 1).bit_length())
    # Less than a buffer is lost in a full arena, and at most one buffer too many is paid for in the last.
    wasted = sum(size - count * stride for size, count in arenas)
    assert wasted < len(arenas) * stride


def test_arenas_of_a_gibibyte_waste_little() -> None:
    arenas = plan_arenas(768, align(13_219_200))
    assert sum(size for size, _ in arenas) < 1.01 * 768 * align(13_219_200)


@pytest.mark.parametrize(
    "need",
    [
        [("slots", 12 * STRIDE), ("KV", 0)],
        [("slots", 10 * STRIDE), ("KV", 2 * STRIDE)],
    ],
)
def test_what_just_fits_is_accepted(need: list[tuple[str, int]]) -> None:
    check_gpu(need, 12 * STRIDE, STRIDE, 12)


def test_gpu_memory_that_does_not_suffice_says_what_would() -> None:
    need = [("slots", 100 * STRIDE), ("weights", 20 * STRIDE)]
    with pytest.raises(ValueError) as caught:
        check_gpu(need, 70 * STRIDE, STRIDE, 100)
    told = str(caught.value)
    for part in ("needs 1.20 GB", "slots 1.00", "weights 0.20", "free are 0.70", "50 of the 100 slots", "to 0.50"):
        assert part in told


def test_gpu_memory_without_room_for_a_slot_says_so() -> None:
    with pytest.raises(ValueError, match="not one slot would fit"):
        check_gpu([("slots", 2 * STRIDE), ("weights", 20 * STRIDE)], 20 * STRIDE, STRIDE, 2)


# -- pools ---------------------------------------------------------------------------------------------------


@given(num_bytes=st.integers(1, 1 << 24), chunk=st.integers(1 << 10, 1 << 22))
@settings(max_examples=60)
def test_chunks_lie_end_to_end(num_bytes: int, chunk: int) -> None:
    """All bytes once; begun at an address that copies like; none is empty, none much larger than was asked for."""
    sizes = chunk_sizes(num_bytes, chunk)
    offsets = chunk_offsets(sizes)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, num_bytes, len(sizes) + 1)
    for start, end, asked in zip(offsets, offsets[1:], sizes, strict=False):
        assert start < end
        assert abs(end - start - asked) < ALIGNMENT
        assert start % 8 == 0
        assert start % ALIGNMENT == 0 or min(sizes) < 4 * ALIGNMENT


def test_chunks_of_aligned_sizes_are_as_asked() -> None:
    assert chunk_offsets([4096, 4096, 100]) == [0, 4096, 8192, 8292]


def host_pool(num_buffers: int, num_keys: int = 10, expert_bytes: int = 5000) -> HostPool:
    return HostPool(HostPlan(num_keys, num_buffers, align(expert_bytes), 10**9), expert_bytes, torch.float32, False)


def test_every_key_has_its_own_host_memory() -> None:
    pool = host_pool(10)
    for key in range(10):
        pool.buffer(key)[:] = key
    assert [set(pool.buffer(key).tolist()) for key in range(10)] == [{key} for key in range(10)]
    assert {pool.buffer(key).numel() for key in range(10)} == {5000}
    assert pool.num_bytes >= 10 * align(5000)


def test_shared_host_memory_goes_round() -> None:
    pool = host_pool(3)
    assert [pool.buffer_number(key) for key in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert pool.buffer(1).data_ptr() == pool.buffer(4).data_ptr() != pool.buffer(2).data_ptr()


def test_host_memory_holds_numbers_like_weights() -> None:
    values = host_pool(2).buffer(1).view(torch.float32)
    assert torch.isfinite(values).all()
    assert 0.015 < values.std() < 0.025


def test_slots_do_not_overlap_and_words_are_the_same_memory() -> None:
    pool = SlotPool(4, 5000, torch.device("cpu"))
    assert pool.stride == 5120
    for slot in range(4):
        pool.slot(slot)[:] = slot + 1
    assert [set(pool.slot(slot).tolist()) for slot in range(4)] == [{1}, {2}, {3}, {4}]
    assert pool.bytes[:, 5000:].sum() == 0
    pool.words[2 * 5120 // 8] = -1
    assert pool.slot(2)[:9].tolist() == [255] * 8 + [3]
