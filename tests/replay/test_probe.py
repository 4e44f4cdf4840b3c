"""Where the host's time goes: which waits and launches count, on a machine whose every time is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertflow.machine import GATE, LOAD, TOKEN, Record, Wait
from replay.calibration import probe as probe_module
from replay.calibration.probe import HostProbe, own_costs, without_own_costs
from replay.machine.device import Program
from replay.machine.launch_row import Row
from replay.machine.real import RealMachine
from replay.machine.scale import scaled_model
from tests.replay.test_scale import model_of
from tests.support.scripted import CHUNKS, ScriptedDevice, chunks_of, decode, machine_on

LAYER_PAD, HEAD_PAD = 20_000, 7_000


class Clock:
    """The device's clock, as the host reads it."""

    now = 0

    def now_ns(self) -> int:
        return self.now


class Machine:
    """Answers what it is told to, when it is told to: (time at which the answer is known, record)."""

    layer_pad_ns, head_pad_ns = LAYER_PAD, HEAD_PAD
    launches_ahead = is_waiting = False

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
    probe._issued_at.append((0, 1))
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


MODEL = replace(scaled_model(model_of("qwen3-30b-a3b"), 16), num_layers=2, num_experts=8, top_k=2)
LAUNCH, AHEAD, TELL = 5_000, 7_000, 300
STACK_PAD = 3_000
"""Before attention, by the stack of a scripted machine."""


class TimedDevice(ScriptedDevice):
    """One on which a launch takes the host `LAUNCH`, and one ahead `AHEAD`. Host and device have one clock."""

    is_timed = False

    def launch(self, program: Program) -> None:
        super().launch(program)
        if self.is_timed:
            self.clock_ns += AHEAD if len(self.ahead) > self.num_ahead else LAUNCH
        self.num_ahead = len(self.ahead)

    num_ahead = 0


def timed(
    monkeypatch: pytest.MonkeyPatch, kv_lens: Sequence[int], counts: list[dict[int, int]] | None = None
) -> tuple[TimedDevice, HostProbe]:
    """A probe of a machine that launches ahead, at the first attention of a forward. Telling a row takes `TELL`."""
    device = TimedDevice(launches_ahead=True)
    forward = decode(kv_lens, [[0, 1], [8, 9]], counts)
    machine = machine_on(device, MODEL, [forward])
    device.is_timed = machine.launches_ahead
    tell = Row.tell

    def telling(row: Row) -> None:
        tell(row)
        device.clock_ns += TELL

    monkeypatch.setattr(Row, "tell", telling)
    monkeypatch.setattr(probe_module, "time", SimpleNamespace(perf_counter_ns=device.now_ns))
    probe = HostProbe(machine)
    probe.begin_forward(forward)
    device.clock_ns += 40
    return device, probe


def sampled(probe: HostProbe) -> dict[str, list[float]]:
    """Without what nobody asks for."""
    return {name: values for name, values in probe.samples.items() if not name.startswith("from ")}


def known_at(device: TimedDevice, now_ns: int) -> None:
    """The host can see the end of a gated program then."""
    device.clock_ns = now_ns
    device.raise_number()


def test_what_is_launched_ahead_is_told_apart_from_what_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock by the way: attention 40 to 5,040, ahead to 12,040; the routing at 30,250. Told from 30,310 to
    30,610, ahead to 37,610. Decided by 37,690, and the copy issued then; it is over at 50,000."""
    device, probe = timed(monkeypatch, [5])
    device.late_numbers = True
    gate = probe.attention(0)
    assert device.clock_ns == 40 + LAUNCH + AHEAD
    device.then(
        # Behind the return of attention's own launch, not behind that of the other.
        partial(device.end_program, 40 + LAUNCH + 2_500 + STACK_PAD, 30_000),
        partial(known_at, device, 30_250),
    )
    probe.wait((GATE, gate, False))
    device.clock_ns += 60
    first = probe.experts(0, [0], None, True)
    assert device.clock_ns == 30_310 + TELL + AHEAD
    device.clock_ns += 80
    probe.decided((), 0.0)
    for chunk, num_bytes in enumerate(chunks_of(MODEL)):
        probe.copy(1, chunk, 1, 1, num_bytes, 0)
    assert device.clock_ns == 37_690
    device.then(
        partial(device.end_program, 30_610 + 1_500, 34_000),
        *[partial(device.end_copy, end_ns) for end_ns in (50_000, 51_000, 52_000)],
    )
    _, chunks, marks = probe.wait((LOAD, 1, False))
    assert (len(chunks), [mark for mark, _, _ in marks]) == (CHUNKS, [first])
    device.clock_ns += 90
    # The last of the layer: nothing is launched ahead behind it.
    probe.experts(0, [1], None, False)
    assert device.clock_ns == 52_090 + TELL
    assert sampled(probe) == {
        "forward": [40],
        "attention": [LAUNCH],
        "ahead": [AHEAD, AHEAD],
        "kernel_start": [2_500],
        "run attention": [30_000 - 40 - LAUNCH - 2_500 - STACK_PAD],
        "gate_sync": [250],
        "classify": [60],
        "release": [TELL, TELL],
        "release_start": [1_500],
        "run experts_shared[1]": [34_000 - 32_110],
        "decide": [80],
        "issue": [0] * CHUNKS,
        "issue_gap": [0] * CHUNKS,
        "lone_copy": [50_000 - 37_690],
        # Of the two behind it, the last is the shorter one.
        "chunk": [1_000],
        "observe": [90],
    }


def test_experts_told_behind_others_tell_no_start_and_what_is_let_pass_is_a_part_of_the_launch_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, probe = timed(monkeypatch, [5])
    probe.attention(0)
    probe.experts(0, [0], None, True)
    mark = probe.head()
    device.then(*[partial(device.end_program, 20_000 + 100 * at, 20_050 + 100 * at) for at in range(4)])
    probe.wait((TOKEN, mark, False))
    found = sampled(probe)
    assert (found["release"], found["ahead"], found["head"]) == ([TELL], [AHEAD, AHEAD], [TELL + LAUNCH])
    # Attention alone was launched on an idle stream.
    assert found["kernel_start"] == [20_000 - 40 - LAUNCH - STACK_PAD]
    assert "release_start" not in found


def test_experts_of_two_tokens_are_launched_and_nothing_is_told_or_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    device, probe = timed(monkeypatch, [5, 6], [{0: 2, 1: 2}, {8: 2, 9: 2}])
    gate = probe.attention(0)
    device.then(partial(device.end_program, 20_000, 30_000))
    probe.wait((GATE, gate, False))
    first = probe.experts(0, [0, 1], {0: 2, 1: 2}, True)
    # The row is told by the launch itself.
    assert device.clock_ns == 30_000 + TELL + LAUNCH
    gate = probe.attention(1)
    device.then(partial(device.end_program, 37_000, 40_000), partial(device.end_program, 45_000, 50_000))
    marks = probe.wait((GATE, gate, False))[2]
    assert [mark for mark, _, _ in marks] == [first, gate]
    found = sampled(probe)
    assert (found["attention"], found["experts"]) == ([LAUNCH, LAUNCH], [TELL + LAUNCH])
    assert found["kernel_start"] == [20_000 - 40 - LAUNCH - STACK_PAD, 37_000 - 30_000 - TELL - LAUNCH]
    assert not {"ahead", "release", "release_start"} & found.keys()


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
        "release",
        "release_start",
    } <= own.keys()
    assert all(cost >= 0 for name, cost in own.items() if name not in ("kernel_start", "release_start"))
    # The clock is read once more after the launch has returned.
    assert own["kernel_start"] == own["release_start"] <= 0
    # Telling experts to begin is wrapped as their launch is.
    assert own["release"] == own["experts"]
    values = [10_000_000.0, 20_000_000.0]
    names = ("attention", "run attention", "lone_copy", "release")
    left = without_own_costs(dict.fromkeys(names, values) | {"release_start": [-5_000_000.0]})
    # Below 0 where kernels begin before the host is back: that stays.
    assert -5_000_000 <= left["release_start"][0] < 0
    assert 0 < values[0] - left["release"][0] < 5_000_000
    assert left["run attention"] == left["lone_copy"] == values
    first, second = left["attention"]
    assert second - first == 10_000_000
    assert 0 < 10_000_000 - first < 5_000_000
