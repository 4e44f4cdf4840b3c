"""Where the host's time goes: which waits and launches count, on a machine whose every time is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from expertflow.machine import GATE, LOAD, TOKEN, Record, Wait
from replay.calibration.probe import HostProbe, own_costs, without_own_costs
from replay.machine.real import RealMachine

LAYER_PAD, HEAD_PAD = 20_000, 7_000


class Clock:
    """The device's clock, as the host reads it."""

    now = 0

    def now_ns(self) -> int:
        return self.now


class Machine:
    """Answers what it is told to, when it is told to: (time at which the answer is known, record)."""

    layer_pad_ns, head_pad_ns = LAYER_PAD, HEAD_PAD

    def __init__(self) -> None:
        self.device = Clock()
        self.answers: deque[tuple[int, Record]] = deque()
        self.marks = self.launch_ns = 0

    def _launched(self) -> int:
        self.device.now += self.launch_ns
        self.marks += 1
        return self.marks

    def attention(self, layer: int) -> int:
        return self._launched()

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        return self._launched()

    def head(self) -> int:
        return self._launched()

    def wait(self, wait: Wait) -> Record:
        self.device.now, record = self.answers.popleft()
        return record


def probed() -> tuple[Machine, HostProbe]:
    machine = Machine()
    return machine, HostProbe(cast(RealMachine, machine))


def launch(probe: HostProbe, kind: str) -> int:
    if kind == "attention":
        return probe.attention(0)
    return probe.head() if kind == "head" else probe.experts(0, [1, 2], None, False)


@pytest.mark.parametrize(("kind", "wait", "sample"), [("attention", GATE, "gate_sync"), ("head", TOKEN, "token_sync")])
@pytest.mark.parametrize(("waits_from", "expected"), [(1_000, 300), (40_000, 300), (50_200, 100), (50_250, 50)])
def test_a_host_that_comes_late_is_not_taken_for_a_slow_answer(
    kind: str, wait: Any, sample: str, waits_from: int, expected: int
) -> None:
    """The kernel ended at 50,000 ns and the host knew at 50,300, or as much later as it began to wait late."""
    machine, probe = probed()
    mark = launch(probe, kind)
    machine.device.now = waits_from
    machine.answers.append((50_300, (50_300, [], [(mark, 30_000, 50_000)])))
    probe.wait((wait, mark, False))
    assert probe.samples[sample] == [expected]


@pytest.mark.parametrize(("waits_from", "expected"), [(0, 400), (9_000, 400), (9_350, 50)])
def test_the_same_holds_for_a_chunk(waits_from: int, expected: int) -> None:
    machine, probe = probed()
    probe._issued_at.append(0)
    machine.device.now = waits_from
    machine.answers.append((9_400, (9_400, [(1, 0, 0, 9_000)], [])))
    probe.wait((LOAD, 1, False))
    assert probe.samples["load_sync"] == [expected]


@pytest.mark.parametrize(("kind", "pad"), [("attention", LAYER_PAD), ("head", HEAD_PAD), ("experts", 0)])
@pytest.mark.parametrize("latency", [-400, 3_000, 25_000])
def test_a_kernel_on_an_idle_stream_starts_after_its_launch_and_what_is_not_its_own_pad(
    kind: str, pad: int, latency: int
) -> None:
    """Experts have no pad, however late they begin."""
    machine, probe = probed()
    machine.launch_ns, machine.device.now = 600, 1_000
    mark = launch(probe, kind)
    start = 1_600 + latency + pad
    machine.answers.append((start + 500, (start + 500, [], [(mark, start, start + 100)])))
    probe.wait((GATE, mark, False))
    assert probe.samples["kernel_start"] == [latency]


def test_a_launch_behind_another_tells_no_latency() -> None:
    machine, probe = probed()
    first, second = launch(probe, "experts"), launch(probe, "attention")
    machine.answers.append((99_000, (99_000, [], [(first, 5_000, 40_000), (second, 62_000, 98_000)])))
    probe.wait((GATE, second, False))
    assert probe.samples["kernel_start"] == [5_000]
    assert probe.samples["run attention"] == [36_000]
    assert probe.samples["run experts[2]"] == [35_000]


def test_what_the_probe_costs_is_known_and_subtracted() -> None:
    """No bound on time: the machine is somebody's. But what it finds on a machine that does nothing is its own."""
    own = own_costs()
    assert {
        "attention",
        "experts",
        "head",
        "issue",
        "issue_gap",
        "classify",
        "decide",
        "forward",
        "gate_sync",
        "token_sync",
        "load_sync",
        "kernel_start",
    } <= own.keys()
    assert all(cost >= 0 for name, cost in own.items() if name != "kernel_start")
    # The clock is read once more after the launch has returned.
    assert own["kernel_start"] <= 0
    values = [10_000_000.0, 20_000_000.0]
    left = without_own_costs({"attention": values, "run attention": values, "lone_copy": values})
    assert left["run attention"] == left["lone_copy"] == values
    first, second = left["attention"]
    assert second - first == 10_000_000
    assert 0 < 10_000_000 - first < 5_000_000
