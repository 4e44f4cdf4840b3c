"""What a layer costs the host: the calls that a driver gets are counted exactly, times are only printed."""

from __future__ import annotations

import pytest

from replay import bench_host
from replay.bench_host import BARS_US, main, measure
from replay.host_times import HostTimes, _first_after

WORDS = ["trace.num_tokens=6", "trace.num_requests=1"]


def test_without_copies_a_layer_is_two_launches_and_four_times() -> None:
    run = HostTimes([*WORDS, "+policy=lru", "residency=1.0", "start=resident"], counting=True)
    forwards = run.num_layers // 24
    assert (run.num_layers, run.num_chunks) == (6 * 24, 0)
    # Attention and experts of each layer, and the head.
    assert run.calls["launch"] == 2 * run.num_layers + forwards
    # Start and end of each; what more there is belongs to the clock, whose base is renewed now and then.
    assert 2 * run.calls["launch"] <= run.calls["elapsed_time"] <= 2 * run.calls["launch"] + 2 * forwards + 8
    assert run.calls["copy"] == 0
    assert len(run.launched_ns) == run.num_layers


def test_a_chunk_is_one_copy_and_one_event() -> None:
    run = HostTimes([*WORDS, "+policy=lru", "residency=0.5"], counting=True)
    assert run.num_chunks > 100
    assert run.calls["copy"] == run.num_chunks
    assert run.num_chunks <= run.calls["record"] <= run.num_chunks + run.num_layers // 24 + 8


def test_what_the_host_computes_is_neither_copied_nor_launched() -> None:
    """One program adds its results to the GPU's in each layer that has any."""
    words = [*WORDS, "+policy=lru", "residency=0.5", "+host=server", "+policy/place=cheaper"]
    run = HostTimes(words, counting=True)
    assert run.calls["copy"] == run.num_chunks == 0
    assert run.num_tasks == run.num_layers
    assert run.calls["launch"] <= 3 * run.num_layers + run.num_layers // 24


@pytest.mark.slow
def test_the_policys_own_code_is_told_apart() -> None:
    run = HostTimes([*WORDS, "+policy=lru", "residency=1.0", "start=resident"], timed_policy=True)
    assert 0 < run.policy_ns < run.total_ns


def test_a_launch_is_timed_from_the_last_number_seen_before_it() -> None:
    assert _first_after([10, 20, 90], [25, 95, 99]) == [5, 5, 9]


@pytest.mark.slow
def test_it_prints_each_bar_and_says_whether_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--tokens", "4", "--repeat", "1"])
    out = capsys.readouterr().out
    assert code == (1 if "missed" in out else 0)
    assert out.count("holds") + out.count("missed") == len(BARS_US) == 3
    assert "driver calls a chunk: copy 1.00" in out


@pytest.mark.slow
def test_what_is_measured_is_of_the_words_given() -> None:
    found = measure(WORDS, 1)
    assert set(found) == {*BARS_US, "a host task", "calls a layer-step", "calls a chunk"}
    assert found["calls a chunk"]["copy"] == pytest.approx(1.0)


def test_a_trace_that_is_not_there_is_a_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.safetensors"]) == 2
    assert "nowhere.safetensors" in capsys.readouterr().err


def test_a_recordings_short_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(bench_host, "measure", lambda words, repeat: asked.append(words))
    monkeypatch.setattr(bench_host, "_print", lambda found: True)
    assert main(["gpt-oss-20b-twin", "--tokens", "4"]) == 0
    assert asked == [["trace.path=gpt-oss-20b-twin", "max_tokens=4"]]
