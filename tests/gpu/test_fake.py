"""The fake does what CUDA does where it matters: else nothing shown on it would mean anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.fake_cuda import COPY_NS, LATENCY_NS, FakeCuda, FakeEvent, FakeGraph, Numbers


def test_streams_are_in_order_and_beside_each_other() -> None:
    cuda = FakeCuda()
    first, second = cuda.new_stream(), cuda.new_stream()
    cuda.set_stream(first)
    ends = [cuda.enqueue(1000), cuda.enqueue(500)]
    cuda.set_stream(second)
    other = cuda.enqueue(200)
    assert ends[1] == ends[0] + 500
    assert other < ends[0]


def test_a_wait_means_what_was_recorded_by_then() -> None:
    cuda = FakeCuda()
    first, second, third = cuda.new_stream(), cuda.new_stream(), cuda.new_stream()
    event = FakeEvent(cuda, True)
    third.wait_event(event)
    assert third.free_ns == 0, "an unrecorded event is waited for by nobody"
    cuda.set_stream(first)
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
    cuda.set_stream(stream)
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
    cuda.pinned.append(range(source.data_ptr(), source.data_ptr() + 1000))
    stream = cuda.new_stream()
    cuda.memcpy(target.data_ptr(), source.data_ptr(), 1000, stream)
    assert target.eq(0).all()
    cuda.advance_to(stream.free_ns - COPY_NS)
    assert not target.eq(0).any()
    assert not target.eq(1).any()
    cuda.synchronize()
    assert target.eq(1).all()
    assert cuda.num_pageable == 0


def test_a_copy_that_is_not_pinned_blocks_the_host() -> None:
    cuda = FakeCuda()
    stream = cuda.new_stream()
    target, source = torch.zeros(1000), torch.ones(1000)
    cuda.memcpy(target.data_ptr(), source.data_ptr(), 4000, stream)
    assert cuda.true_ns >= stream.free_ns > LATENCY_NS
    assert cuda.num_pageable == 1


def test_a_graph_does_at_each_replay_what_was_captured() -> None:
    """For one call of the host; nothing is done, and no time passes, while it is captured."""
    cuda, done = FakeCuda(), []
    stream = cuda.new_stream()
    cuda.set_stream(stream)
    start, end = FakeEvent(cuda, True, True), FakeEvent(cuda, True, True)
    graph = FakeGraph(cuda)
    graph.capture_begin()
    start.record(stream)
    cuda.kernel(1000, lambda: done.append(cuda.true_ns))
    end.record(stream)
    graph.capture_end()
    assert (stream.free_ns, start.at_ns, done) == (0, None, [])
    for number in (1, 2):
        calls = cuda.calls.total()
        graph.replay()
        assert cuda.calls.total() == calls + 1
        cuda.synchronize()
        assert len(done) == number
        assert start.at_ns is not None
        assert end.at_ns == start.at_ns + 1000 == done[-1]
    assert cuda.num_unread == 2, "both events of the first replay, which nobody read"


def test_only_external_events_are_captured() -> None:
    cuda = FakeCuda()
    FakeGraph(cuda).capture_begin()
    with pytest.raises(AssertionError, match="must be external"):
        FakeEvent(cuda, True).record(cuda.default)


def test_a_number_is_seen_when_the_device_has_raised_it() -> None:
    cuda, flag = FakeCuda(), torch.zeros(1, dtype=torch.int64)
    numbers = Numbers(cuda, flag)
    cuda.kernel(5000, lambda: flag.add_(1))
    calls, looks = cuda.calls.total(), 0
    while numbers[0] < 1:
        looks += 1
    assert looks > 10
    assert cuda.calls.total() == calls
    assert cuda.true_ns >= cuda.default.free_ns


def test_clocks_drift() -> None:
    cuda = FakeCuda(drift_ppm=-50)
    start, end = FakeEvent(cuda, True), FakeEvent(cuda, True)
    stream = cuda.new_stream()
    start.record(stream)
    cuda.set_stream(stream)
    cuda.enqueue(1_000_000_000)
    end.record(stream)
    cuda.synchronize()
    assert start.elapsed_time(end) == pytest.approx(999.95, abs=1e-3)
