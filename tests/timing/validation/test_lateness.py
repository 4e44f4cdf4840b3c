"""How late a host was, from tapes made by hand. Times in us here, in ns on the tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from expertflow.machine import GATE, HOST, LOAD, TOKEN, Machine, Record, Wait
from expertflow.runtime import Runtime
from replay.drive import BlockingMachine, drive
from replay.validation.lateness import LAUNCH_GAP_NS, SEEN_NS, late_ns
from replay.validation.verdict import BARS
from sim.job.configure import configure
from sim.job.forwards import forwards_for
from sim.job.setup import load_chunks, make_policy, make_trace, make_workload, run_config
from sim.machine.host_bound import machine_for
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine

SEEN, GAP = SEEN_NS // 1000, LAUNCH_GAP_NS // 1000


def answered(
    kind: int,
    ident: int,
    now: int,
    marks: Sequence[tuple[int, int, int]] = (),
    chunks: Sequence[tuple[int, int, int, int]] = (),
) -> tuple[Wait, Record]:
    """A wait and its record, us in, ns out."""
    return (kind, ident, True), (
        1000 * now,
        [(load, chunk, 1000 * start, 1000 * end) for load, chunk, start, end in chunks],
        [(mark, 1000 * start, 1000 * end) for mark, start, end in marks],
    )


def forward(
    known: int = 100 + SEEN, attention: int = 150 + GAP, head: int = 250 + GAP, told: int = 300 + SEEN, pad: int = 0
) -> list[tuple[Wait, Record]]:
    """Two layers and a head. Attention 1 ends at 100, its experts (2) at 150, attention 3 at 200, its experts (4) at
    250, the head (5) at 300; each default is as late as a host may be for nothing."""
    return [
        answered(GATE, 1, known, [(1, 0, 100)]),
        answered(GATE, 3, 200 + SEEN, [(2, known + 5, 150), (3, attention + pad, 200)]),
        answered(TOKEN, 5, told, [(4, 220, 250), (5, head + pad, 300)]),
    ]


def test_a_host_that_the_device_hides_is_not_late() -> None:
    assert late_ns(forward(), 0, 0) == 0


def test_one_us_more_at_each_place_is_late_by_one_us() -> None:
    assert late_ns(forward(known=101 + SEEN), 0, 0) == 1000
    assert late_ns(forward(attention=151 + GAP), 0, 0) == 1000
    assert late_ns(forward(head=251 + GAP), 0, 0) == 1000
    assert late_ns(forward(told=301 + SEEN), 0, 0) == 1000
    assert late_ns(forward(103 + SEEN, 152 + GAP, 253 + GAP, 307 + SEEN), 0, 0) == 15_000


def test_the_stacks_pad_is_no_lateness() -> None:
    assert late_ns(forward(pad=7), 7000, 7000) == 0
    assert late_ns(forward(pad=7), 6000, 7000) == 1000
    assert late_ns(forward(pad=7), 7000, 4000) == 3000


def test_the_first_launch_of_a_forward_is_hidden_by_nothing() -> None:
    later = answered(GATE, 6, 900 + SEEN, [(6, 800, 900)])
    assert late_ns([*forward(), later], 0, 0) == 0


def landing(now: int, last: int = 400) -> list[tuple[Wait, Record]]:
    """After a gate at 100 and experts from 105 to 130: load 9, in two chunks, lands at `last`."""
    return [
        answered(GATE, 1, 102, [(1, 0, 100)]),
        answered(LOAD, 9, 310, [(2, 105, 130)], [(9, 0, 100, 250)]),
        answered(LOAD, 9, now, [], [(8, 0, 250, 260), (9, 1, 260, last)]),
        answered(GATE, 4, 600 + SEEN, [(3, now + 10, now + 30), (4, now + 30, 600)]),
    ]


def test_an_expert_that_has_landed_and_is_not_seen_is_late() -> None:
    assert late_ns(landing(400 + SEEN), 0, 0) == 0
    assert late_ns(landing(425 + SEEN), 0, 0) == 25_000


def test_a_landing_is_not_late_while_a_kernel_runs() -> None:
    """Landed at 110; the experts before it run until 130, which hides the host so long."""
    assert late_ns(landing(425 + SEEN, last=110), 0, 0) == (425 - 130) * 1000
    assert late_ns(landing(129, last=110)[:3], 0, 0) == 0
    # Of a load that comes in chunks only the last counts: the first was found 60 late, for nothing.
    assert late_ns(landing(400)[:3], 0, 0) == 0


def drying(now: int, following: int) -> list[tuple[Wait, Record]]:
    """The first chunk of load 9 ends at 250, is found at `now`, and the second starts at `following`."""
    return [
        answered(GATE, 1, 102, [(1, 0, 100)]),
        answered(LOAD, 9, now, [(2, 105, 130)], [(9, 0, 100, 250)]),
        answered(LOAD, 9, following + 100, [], [(9, 1, following, following + 100)]),
    ]


def test_a_link_that_runs_dry_for_want_of_its_host_is_late() -> None:
    assert late_ns(drying(250 + SEEN, 251 + SEEN), 0, 0) == 0
    assert late_ns(drying(280 + SEEN, 281 + SEEN), 0, 0) == 30_000
    # The next chunk had been issued in time: nobody waited for the host.
    assert late_ns(drying(280 + SEEN, 250), 0, 0) == 0


def test_results_of_the_host_that_are_found_late() -> None:
    """Task 1, whose number is that of a mark as well, is back at 150; nothing runs from 130 on."""
    results = [(1, 8, 105_000, 140_000), (1, 9, 140_000, 150_000)]

    def tape(now: int) -> list[tuple[Wait, Record]]:
        return [answered(GATE, 1, 102, [(1, 0, 100)]), answered(HOST, 1, now, [(2, 105, 130)])]

    assert late_ns(tape(150 + SEEN), 0, 0, results) == 0
    assert late_ns(tape(157 + SEEN), 0, 0, results) == 7000
    # A wake for a chunk, before they are back, and a task that never came back, are no one's lateness.
    assert late_ns(tape(149), 0, 0, results) == 0
    assert late_ns(tape(500), 0, 0) == 0


class Blocking:
    """The simulated machine as one that is waited for, with a tape."""

    def __init__(self, machine: SimMachine) -> None:
        self._machine = machine
        self.tape: list[tuple[Wait, Record]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    def wait(self, wait: Wait) -> Record:
        """As SimPy would: time passes to the wake."""
        now, chunks, marks = self._machine.record(self._machine.wake_ns(wait))
        self.tape.append((wait, (now, list(chunks), list(marks))))
        return now, chunks, marks


def simulated(policy_name: str, stack: str, decide_ns: int) -> tuple[float, int]:
    """(share of the time for which the device waited for a late host, elapsed ns) of 32 tokens on an H200."""
    cfg = configure(
        [
            "+hardware=h200",
            f"+policy={policy_name}",
            f"stack={stack}",
            "compare=none",
            "residency=0.5",
            "trace.num_tokens=32",
            "trace.num_requests=1",
            f"hardware.decide_ns={decide_ns}",
        ]
    )
    work = make_workload(cfg, make_trace(cfg["trace"]))
    policy, transfer = make_policy(cfg["policy"], work, 0)
    chunk_bytes, hardware = load_chunks(work), work.hardware
    kernels, costs = KernelTimes(work.model, hardware, work.stack), HostCosts.of(hardware, work.stack)
    machine = machine_for(kernels, Link(hardware), costs, chunk_bytes)
    blocking = Blocking(machine)
    config = run_config(work, transfer, chunk_bytes)
    runtime = Runtime(config, cast(Machine, blocking), policy, forwards_for(policy, work))
    drive(runtime, cast(BlockingMachine, blocking))
    late = late_ns(blocking.tape, work.stack.layer_overhead_ns, work.stack.head_overhead_ns)
    return late / runtime.counters.elapsed_ns, runtime.counters.elapsed_ns


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("stack", ["graph", "eager"])
def test_decisions_that_the_device_hides_bind_no_simulated_run(stack: str) -> None:
    for policy, decide_ns in (("lru", 400_000), ("fixed_1", 0), ("fixed_1", 20_000)):
        assert simulated(policy, stack, decide_ns)[0] < 0.005


SLOW = [("graph", 100_000), ("graph", 400_000), ("eager", 400_000)]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(("stack", "decide_ns"), SLOW)
def test_decisions_that_outlast_the_device_bind_a_simulated_run(stack: str, decide_ns: int) -> None:
    assert BARS["cuda"].late is not None
    assert simulated("fixed_1", stack, decide_ns)[0] > BARS["cuda"].late


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(("stack", "decide_ns"), SLOW)
def test_a_late_host_is_late_by_what_it_is_charged(stack: str, decide_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the simulator charges for slow decisions, beyond hidden ones, is what the tape says more of its host; each
    single lateness is judged less a margin, which is left out here."""
    monkeypatch.setattr("replay.validation.lateness.SEEN_NS", 0)
    monkeypatch.setattr("replay.validation.lateness.LAUNCH_GAP_NS", 0)
    share, elapsed_ns = simulated("fixed_1", stack, decide_ns)
    free_share, free_ns = simulated("fixed_1", stack, 0)
    assert share * elapsed_ns - free_share * free_ns == pytest.approx(elapsed_ns - free_ns, rel=0.15)


def test_nothing_is_never_late() -> None:
    assert late_ns([], 0, 0) == 0
