"""The fake does what CUDA does where it matters: else nothing shown on it would mean anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.replay_cuda.fake_cuda import COPY_NS, LATENCY_NS, FakeCuda, FakeEvent


def test_streams_are_in_order_and_beside_each_other() -> None:
    cuda = FakeCuda()
    first, second = cuda.new_stream(), cuda.new_stream()
    with cuda.stream(first):
        ends = [cuda.enqueue(1000), cuda.enqueue(500)]
    with cuda.stream(second):
        other = cuda.enqueue(200)
    assert ends[1] == ends[0] + 500
    assert other < ends[0]


def test_a_wait_means_what_was_recorded_by_then() -> None:
    cuda = FakeCuda()
    first, second, third = cuda.new_stream(), cuda.new_stream(), cuda.new_stream()
    event = FakeEvent(cuda, True)
    third.wait_event(event)
    assert third.free_ns == 0, "an unrecorded event is waited for by nobody"
    with cuda.stream(first):
        end = cuda.enqueue(100_000)
    event.record(first)
    second.wait_event(event)
    event.record(third)
    assert second.free_ns == end
    assert event.at_ns is not None
    assert event.at_ns < end
    assert cuda.num_spoiled == 1


def test_events_are_asked_in_vain_before_they_happen() -> None:
    cuda = FakeCuda()
    stream = cuda.new_stream()
    start, end, never = (FakeEvent(cuda, True) for _ in range(3))
    assert never.query()
    start.record(stream)
    with cuda.stream(stream):
        cuda.enqueue(1_234_567)
    end.record(stream)
    assert not end.query()
    with pytest.raises(RuntimeError, match="must be completed"):
        start.elapsed_time(end)
    with pytest.raises(ValueError, match="must be recorded"):
        start.elapsed_time(never)
    while not end.query():
        pass
    assert start.elapsed_time(end) == float(np.float32(1.234567)) != 1.234567
    assert end.elapsed_time(start) == -float(np.float32(1.234567))


def test_copies_spoil_first_and_fill_last() -> None:
    cuda = FakeCuda()
    target, source = torch.zeros(1000, dtype=torch.uint8), torch.ones(1000, dtype=torch.uint8)
    cuda.pinned.add(source.untyped_storage().data_ptr())
    stream = cuda.new_stream()
    with cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    assert target.eq(0).all()
    cuda.advance_to(stream.free_ns - COPY_NS)
    assert not target.eq(0).any()
    assert not target.eq(1).any()
    cuda.synchronize()
    assert target.eq(1).all()


def test_a_copy_that_is_not_pinned_blocks_the_host() -> None:
    cuda = FakeCuda()
    stream = cuda.new_stream()
    target, source = torch.zeros(1000), torch.ones(1000)
    with cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    assert cuda.true_ns >= stream.free_ns > LATENCY_NS
    assert cuda.num_pageable == 1


def test_nothing_is_computed_out_of_turn() -> None:
    cuda = FakeCuda()
    with pytest.raises(AssertionError, match="before its turn"), cuda.stream(cuda.new_stream()):
        torch.ones(3)


def test_clocks_drift() -> None:
    cuda = FakeCuda(drift_ppm=-50)
    start, end = FakeEvent(cuda, True), FakeEvent(cuda, True)
    stream = cuda.new_stream()
    start.record(stream)
    with cuda.stream(stream):
        cuda.enqueue(1_000_000_000)
    end.record(stream)
    cuda.synchronize()
    assert start.elapsed_time(end) == pytest.approx(999.95, abs=1e-3)
