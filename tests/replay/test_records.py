"""What the machine reports, to the nanosecond: a scripted device ends programs and copies when and as it is told."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from expertflow.machine import GATE, LOAD, TOKEN, Record
from replay.machine.programs import REPLICAS
from replay.machine.real import RealMachine
from replay.machine.scale import scaled_model
from tests.replay.test_scale import model_of
from tests.support.scripted import CHUNKS, ScriptedDevice, chunks_of, decode, machine_on

MODEL = replace(scaled_model(model_of("qwen3-30b-a3b"), 16), num_layers=2, num_experts=8, top_k=2)
SIZES = chunks_of(MODEL)


class Bench:
    """A machine on a scripted device: `device` is told what happens, `machine` asked what it makes of it."""

    def __init__(self) -> None:
        self.device = ScriptedDevice()
        forward = decode([5], [[0, 1], [8, 9]])
        self.machine: RealMachine = machine_on(self.device, MODEL, [forward])
        self.machine.begin_forward(forward)

    def copy(self, load: int, chunk: int, after: int = 0, slot: int = 0) -> None:
        self.machine.copy(load, chunk, 3, slot, SIZES[chunk], after)

    def experts(self) -> int:
        """One expert: every such launch is of the same ring of programs."""
        return self.machine.experts(0, [0], None, False)

    def ended(self, start_ns: int, end_ns: int) -> Callable[[], None]:
        """The next program's end, for the script."""
        return partial(self.device.end_program, start_ns, end_ns)

    def copied(self, end_ns: int) -> Callable[[], None]:
        """The next copy's end, for the script."""
        return partial(self.device.end_copy, end_ns)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- copies --------------------------------------------------------------------------------------------------


def test_a_copy_on_an_idle_link_begins_when_it_is_issued(bench: Bench) -> None:
    bench.device.clock_ns = 100
    bench.copy(1, 0)
    bench.device.then(bench.copied(150))
    assert bench.machine.wait((LOAD, 1, False)) == (150, [(1, 0, 100, 150)], [])
    assert bench.device.num_blocked == 1


def test_a_copy_behind_another_begins_when_that_one_ends(bench: Bench) -> None:
    bench.device.clock_ns = 100
    bench.copy(1, 0)
    bench.copy(1, 1)
    bench.device.then(bench.copied(150), bench.copied(190))
    assert bench.machine.wait((LOAD, 1, False)) == (190, [(1, 0, 100, 150), (1, 1, 150, 190)], [])


def test_a_copy_into_a_slot_that_is_read_begins_when_its_reader_ends(bench: Bench) -> None:
    mark = bench.experts()
    bench.device.clock_ns = 100
    bench.copy(1, 0, after=mark)
    assert bench.device.copies[0].waits_for == 1
    bench.device.then(bench.ended(20, 170), bench.copied(220))
    assert bench.machine.wait((LOAD, 1, False)) == (220, [(1, 0, 170, 220)], [(mark, 20, 170)])


@pytest.mark.parametrize(
    ("issue_ns", "first_end_ns", "reader_end_ns", "start_ns"),
    [(500, 300, 400, 500), (100, 600, 400, 600), (100, 300, 700, 700)],
)
def test_the_last_of_the_three_counts(
    issue_ns: int, first_end_ns: int, reader_end_ns: int, start_ns: int, bench: Bench
) -> None:
    mark = bench.experts()
    bench.copy(1, 0)
    bench.device.clock_ns = issue_ns
    bench.copy(2, 0, after=mark, slot=1)
    bench.device.clock_ns = 0
    bench.device.then(bench.ended(10, reader_end_ns), bench.copied(first_end_ns), bench.copied(800))
    told = bench.machine.wait((LOAD, 2, False))
    assert told == (800, [(1, 0, 0, first_end_ns), (2, 0, start_ns, 800)], [(mark, 10, reader_end_ns)])


def test_a_reader_that_was_read_already_is_not_waited_for(bench: Bench) -> None:
    mark, gate = bench.experts(), bench.machine.attention(0)
    bench.device.then(bench.ended(10, 50), bench.ended(50, 90))
    assert bench.machine.wait((GATE, gate, False)) == (90, [], [(mark, 10, 50), (gate, 50, 90)])
    bench.copy(1, 0, after=mark)
    assert bench.device.copies[0].waits_for == 0
    bench.device.then(bench.copied(120))
    assert bench.machine.wait((LOAD, 1, False)) == (120, [(1, 0, 90, 120)], [])


def test_a_reader_that_was_read_ahead_while_the_copy_waited_still_counts(bench: Bench) -> None:
    """Read while the host waits for something else, reported, and the start is its end all the same."""
    mark = bench.experts()
    bench.copy(1, 0, after=mark)
    gate = bench.machine.attention(0)
    bench.device.then(bench.ended(10, 200), bench.ended(200, 230))
    assert bench.machine.wait((GATE, gate, True)) == (230, [], [(mark, 10, 200), (gate, 200, 230)])
    bench.device.then(bench.copied(260))
    assert bench.machine.wait((LOAD, 1, False)) == (260, [(1, 0, 200, 260)], [])


def test_a_reader_that_is_unread_when_its_copy_is_over_is_read_then(bench: Bench) -> None:
    """Both ended before the host looked: nothing was read while it waited."""
    mark, later = bench.experts(), bench.experts()
    bench.copy(1, 0, after=mark)
    bench.device.end_program(10, 170)
    bench.device.end_copy(220)
    assert bench.machine.wait((LOAD, 1, False)) == (220, [(1, 0, 170, 220)], [(mark, 10, 170)])
    assert bench.device.num_blocked == 0
    assert later == mark + 1


def test_a_copy_waits_for_that_launch_though_the_program_is_launched_again(bench: Bench) -> None:
    first = bench.experts()
    bench.copy(1, 0, after=first)
    others = [bench.experts() for _ in range(REPLICAS - 1)]
    bench.device.then(bench.ended(10, 40))
    again = bench.experts()
    launches = bench.device.launches
    assert launches[0].made.program is launches[REPLICAS].made.program
    assert bench.device.copies[0].waits_for == 1
    # Nothing but the first launch has ended: the copy may go.
    bench.device.then(bench.copied(70))
    assert bench.machine.wait((LOAD, 1, False)) == (70, [(1, 0, 40, 70)], [(first, 10, 40)])
    bench.copy(2, 0, after=again)
    assert bench.device.copies[0].waits_for == REPLICAS + 1
    for number, mark in enumerate([*others, again]):
        bench.device.then(bench.ended(100 + 10 * number, 110 + 10 * number))
        assert mark == number + 2
    bench.device.then(bench.copied(400))
    told = bench.machine.wait((LOAD, 2, False))
    assert told[1] == [(2, 0, 110 + 10 * (REPLICAS - 1), 400)]
    assert [mark for mark, _, _ in told[2]] == [*others, again]


def test_copies_may_wait_for_the_same_reader_and_nothing_is_kept_of_them(bench: Bench) -> None:
    """What is kept by mark would grow with the run."""
    mark = bench.experts()
    bench.copy(1, 0, after=mark)
    bench.copy(2, 0, after=mark, slot=1)
    bench.device.then(bench.ended(10, 40), bench.copied(70))
    assert bench.machine.wait((LOAD, 1, False)) == (70, [(1, 0, 40, 70)], [(mark, 10, 40)])
    bench.copy(3, 0, after=mark, slot=2)
    bench.device.then(bench.copied(90), bench.copied(95))
    assert bench.machine.wait((LOAD, 3, False)) == (95, [(2, 0, 70, 90), (3, 0, 90, 95)], [])
    machine = bench.machine
    assert not machine._wanted_ends
    assert not machine._loads
    assert not machine._chunks
    assert not machine._open


def test_a_copy_that_ended_before_the_host_says_it_was_issued_takes_no_time(bench: Bench) -> None:
    """The host's clock is less exact than events; what is reported is in order all the same."""
    bench.device.clock_ns = 100
    bench.copy(1, 0)
    bench.copy(2, 0, slot=1)
    bench.device.then(bench.copied(90), bench.copied(85))
    assert bench.machine.wait((LOAD, 2, False)) == (100, [(1, 0, 90, 90), (2, 0, 90, 90)], [])


def test_a_load_is_there_with_its_last_chunk_or_a_wait_ends_with_the_next(bench: Bench) -> None:
    for chunk in range(CHUNKS):
        bench.copy(1, chunk)
    bench.device.then(bench.copied(10))
    assert bench.machine.wait((LOAD, 1, True)) == (10, [(1, 0, 0, 10)], [])
    bench.device.then(bench.copied(20), bench.copied(30))
    assert bench.machine.wait((LOAD, 1, False)) == (30, [(1, 1, 10, 20), (1, 2, 20, 30)], [])
    assert not bench.device.script


def test_a_chunk_is_copied_from_its_place_to_its_place(bench: Bench) -> None:
    """Whole experts land in the slots they were sent to, and nowhere else."""
    machine = bench.machine
    source = machine.host.buffer(3)
    for chunk in range(CHUNKS):
        bench.copy(1, chunk, slot=2)
        bench.device.end_copy(10 * chunk)
        end = sum(SIZES[: chunk + 1]) if chunk + 1 == CHUNKS else sum(SIZES[: chunk + 1]) // 512 * 512
        assert (machine.slots.slot(2)[:end] == source[:end]).all()
        assert machine.slots.slot(2)[end:].sum() == 0
    assert machine.slots.slot(1).sum() == machine.slots.slot(3).sum() == 0


def test_a_record_is_never_before_what_it_reports_nor_before_the_last_one(bench: Bench) -> None:
    """Whatever the host's clock says meanwhile."""
    bench.copy(1, 0)
    bench.device.end_copy(50)
    bench.device.clock_ns = 20
    assert bench.machine.wait((LOAD, 1, False)) == (50, [(1, 0, 0, 50)], [])
    gate = bench.machine.attention(0)
    bench.device.end_program(60, 80)
    bench.device.clock_ns = 20
    assert bench.machine.wait((GATE, gate, False)) == (80, [], [(gate, 60, 80)])
    bench.device.clock_ns = 90
    bench.copy(2, 0)
    bench.device.end_copy(95)
    bench.device.clock_ns = 120
    assert bench.machine.wait((LOAD, 2, False)) == (120, [(2, 0, 90, 95)], [])
    bench.device.clock_ns = 100
    bench.copy(3, 0)
    bench.device.end_copy(110)
    assert bench.machine.wait((LOAD, 3, False)) == (120, [(3, 0, 100, 110)], [])


# -- marks ---------------------------------------------------------------------------------------------------


def test_marks_read_while_the_host_waits_are_reported_once_and_in_order(bench: Bench) -> None:
    marks = [bench.experts() for _ in range(3)]
    bench.copy(1, 0)
    gate = bench.machine.attention(0)
    bench.device.then(bench.ended(0, 10), bench.ended(10, 25), bench.copied(30))
    assert bench.machine.wait((GATE, gate, True)) == (30, [(1, 0, 0, 30)], [(1, 0, 10), (2, 10, 25)])
    bench.device.then(bench.ended(25, 40), bench.ended(40, 55))
    assert bench.machine.wait((GATE, gate, True)) == (55, [], [(3, 25, 40), (4, 40, 55)])
    assert marks == [1, 2, 3]
    assert gate == 4


def test_of_a_gate_nothing_is_reported_before_its_number_is_seen(bench: Bench) -> None:
    """Its kernels have ended, a chunk wakes the host, the routing is still on its way: the host does not know it."""
    bench.copy(1, 0)
    gate = bench.machine.attention(0)
    bench.device.late_numbers = True
    bench.device.then(bench.ended(0, 10), lambda: None, bench.copied(30))
    assert bench.machine.wait((GATE, gate, True)) == (30, [(1, 0, 0, 30)], [])
    bench.device.then(bench.device.raise_number)
    assert bench.machine.wait((GATE, gate, True)) == (30, [], [(gate, 0, 10)])


@pytest.mark.parametrize("kind", [GATE, TOKEN])
def test_a_number_that_is_late_is_waited_for(kind: int, bench: Bench) -> None:
    mark = bench.machine.head() if kind == TOKEN else bench.machine.attention(1)
    bench.device.late_numbers = True
    bench.device.then(bench.ended(5, 10), lambda: None, bench.device.raise_number)
    assert bench.machine.wait((kind, mark, False)) == (10, [], [(mark, 5, 10)])
    assert not bench.device.script
    assert bench.device.num_blocked == 1


def test_a_number_that_is_early_does_not_do_for_the_end(bench: Bench) -> None:
    """The number is in the host's memory before the event says that it has happened."""
    mark = bench.machine.attention(0)
    bench.device.late_numbers = True
    bench.device.then(bench.device.raise_number, bench.ended(5, 10))
    assert bench.machine.wait((GATE, mark, False)) == (10, [], [(mark, 5, 10)])


def test_marks_whose_times_overlap_by_rounding_follow_one_another(bench: Bench) -> None:
    for _ in range(2):
        bench.experts()
    gate = bench.machine.attention(0)
    bench.device.then(bench.ended(0, 100), bench.ended(99, 140), bench.ended(139, 138))
    assert bench.machine.wait((GATE, gate, False)) == (140, [], [(1, 0, 100), (2, 100, 140), (gate, 140, 140)])


# -- programs that are launched again ------------------------------------------------------------------------


def test_a_ring_that_wraps_waits_once_for_the_oldest(bench: Bench) -> None:
    for _ in range(REPLICAS):
        bench.experts()
    assert (bench.machine.num_read_first, bench.device.num_blocked) == (0, 0)
    bench.device.then(bench.ended(10, 20))
    last = bench.experts()
    assert (bench.machine.num_read_first, bench.device.num_blocked) == (1, 1)
    assert not bench.device.script
    gate = bench.machine.attention(0)
    bench.device.then(*(bench.ended(30 * number, 30 * number + 20) for number in range(1, REPLICAS + 2)))
    _, _, marks = bench.machine.wait((GATE, gate, False))
    # Each with its own times, the first with those of its own launch and not of the one that overwrote it.
    assert marks == [(1, 10, 20), *((number + 1, 30 * number, 30 * number + 20) for number in range(1, REPLICAS + 2))]
    assert marks[REPLICAS][0] == last == REPLICAS + 1


def test_a_ring_that_wraps_waits_for_nothing_that_has_ended(bench: Bench) -> None:
    for number in range(REPLICAS):
        bench.experts()
        bench.device.end_program(10 * number, 10 * number + 10)
    bench.experts()
    assert (bench.machine.num_read_first, bench.device.num_blocked) == (1, 0)
    # Only the one that was in the way was read: the others are not due.
    bench.experts()
    assert (bench.machine.num_read_first, bench.device.num_blocked) == (2, 0)


def test_a_gate_launched_again_before_it_was_read_is_read_first(bench: Bench) -> None:
    first = bench.machine.attention(0)
    bench.device.then(bench.ended(0, 10))
    second = bench.machine.attention(0)
    assert bench.machine.num_read_first == 1
    bench.device.then(bench.ended(30, 50))
    assert bench.machine.wait((GATE, second, False)) == (50, [], [(first, 0, 10), (second, 30, 50)])
    third = bench.machine.attention(0)
    assert bench.machine.num_read_first == 1
    bench.device.then(bench.ended(60, 70))
    assert bench.machine.wait((GATE, third, False)) == (70, [], [(third, 60, 70)])


def test_what_is_read_to_make_room_takes_all_before_it_along(bench: Bench) -> None:
    """A stream ends in order: what stands before the awaited launch has ended too, and is reported before it."""
    attention = bench.machine.attention(0)
    for _ in range(REPLICAS):
        bench.experts()
    bench.device.then(bench.ended(0, 10), bench.ended(10, 30))
    bench.experts()
    bench.copy(1, 0)
    bench.device.then(bench.copied(60))
    assert bench.machine.wait((LOAD, 1, False)) == (60, [(1, 0, 30, 60)], [(attention, 0, 10), (2, 10, 30)])


# -- any order -----------------------------------------------------------------------------------------------


class Chance:
    """A machine under random orders, beside a ledger of what has happened: the records must be the ledger's."""

    def __init__(self, seed: int) -> None:
        self.bench, self.rng = Bench(), random.Random(seed)
        self.device, self.machine = self.bench.device, self.bench.machine
        self.device.step = self.step
        self.marks: list[tuple[int, int, int]] = []
        self.chunks: list[tuple[int, int, int, int]] = []
        self.ends: dict[int, int] = {0: 0}
        self.issued: list[tuple[int, int, int, int]] = []
        self.num_loads = self.num_marks = self.compute_end_ns = self.link_end_ns = 0
        self.told: list[Record] = []

    def step(self) -> None:
        """One thing happens on the device."""
        device, rng = self.device, self.rng
        device.clock_ns += rng.randrange(1, 50)
        free = device.copies and device.copies[0].waits_for not in {one.number for one in device.programs}
        if free and (not device.programs or rng.random() < 0.5):
            load, chunk, issue_ns, after = self.issued[len(self.chunks)]
            start_ns = max(issue_ns, self.link_end_ns, self.ends[after])
            self.link_end_ns = max(device.clock_ns, start_ns)
            self.chunks.append((load, chunk, start_ns, self.link_end_ns))
            device.end_copy(self.link_end_ns)
        elif device.programs:
            start_ns = rng.randrange(self.compute_end_ns, device.clock_ns + 1)
            self.compute_end_ns = device.clock_ns
            mark = len(self.marks) + 1
            self.ends[mark] = device.clock_ns
            self.marks.append((mark, start_ns, device.clock_ns))
            device.end_program(start_ns, device.clock_ns)

    def launch(self) -> None:
        self.num_marks = self.bench.experts()

    def copies(self) -> None:
        """A load of several chunks, after any launch so far: read, unread or under way; or after none."""
        self.num_loads += 1
        after = self.rng.choice([0, self.rng.randint(0, self.num_marks), self.num_marks])
        for chunk in range(CHUNKS):
            self.device.clock_ns += self.rng.randrange(5)
            wanted = 0 if chunk else after
            self.bench.copy(self.num_loads, chunk, wanted, self.num_loads % 3)
            self.issued.append((self.num_loads, chunk, self.device.clock_ns, wanted))

    def wait(self) -> None:
        drain = self.rng.random() < 0.5
        under_way = {load for load, *_ in self.issued[sum(len(told[1]) for told in self.told) :]}
        if under_way and self.rng.random() < 0.5:
            self.told.append(self.machine.wait((LOAD, self.rng.choice(sorted(under_way)), drain)))
            return
        self.num_marks = gate = self.machine.attention(self.rng.randrange(2))
        while gate not in [mark for told in self.told for mark, _, _ in told[2]]:
            self.told.append(self.machine.wait((GATE, gate, drain)))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_is_reported_once_in_order_with_its_own_times(seed: int) -> None:
    chance = Chance(seed)
    for _ in range(150):
        often = [chance.step] * 4
        chance.rng.choice([chance.launch, chance.launch, chance.copies, chance.wait, *often])()
    while chance.device.copies or chance.device.programs:
        chance.step()
    last = chance.machine.attention(0)
    chance.told.append(chance.machine.wait((GATE, last, False)))
    assert [chunk for told in chance.told for chunk in told[1]] == chance.chunks
    assert [mark for told in chance.told for mark in told[2]] == chance.marks
    assert len(chance.chunks) == len(chance.issued) == CHUNKS * chance.num_loads > 0
    assert len(chance.marks) == last
    now_ns = 0
    for told in chance.told:
        assert now_ns <= told[0]
        now_ns = told[0]
        assert all(end_ns <= now_ns for *_, end_ns in [*told[1], *told[2]])
