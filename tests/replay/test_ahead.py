"""Experts that are launched before it is known which: when that is done, what tells them, and what lets them pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest

from expertflow.forward import DECODE, Forward, Span
from expertflow.machine import GATE, LOAD, TOKEN
from expertflow.model import ModelSpec
from replay.keys import FAULTS
from replay.machine.faults import FaultyDevice
from replay.machine.programs import REPLICAS
from replay.machine.real import RealMachine
from replay.machine.rows import GAVE_UP, NUM_EXPERTS, NUMBER, SHARED_BLOCK, SHARED_ROWS, TOLD, RowLayout, row_class
from replay.machine.scale import scaled_model
from tests.replay.test_scale import model_of
from tests.support.scripted import Launched, ScriptedDevice, chunks_of, decode, machine_on, prefill

PLAIN = replace(scaled_model(model_of("qwen3-30b-a3b"), 16), num_layers=2, num_experts=8, top_k=3)
SHARED = replace(scaled_model(model_of("deepseek-v2-lite"), 16), num_layers=2, num_experts=8, top_k=3)
DEMANDS = ((0, 1, 2), (8, 9, 10))


class Bench:
    """A machine in the midst of `forward`, on a device that launches ahead; expert k of the first four is in slot
    9 - k. Nothing ends unless a test says so."""

    def __init__(
        self,
        model: ModelSpec = PLAIN,
        forward: Forward | None = None,
        *,
        launches_ahead: bool = True,
        verify: bool = False,
    ) -> None:
        self.device = ScriptedDevice(launches_ahead=launches_ahead)
        self.forward = decode([5], DEMANDS) if forward is None else forward
        # Decode is what is captured: a run of nothing but prompts launches nothing ahead in any case.
        self.machine: RealMachine = machine_on(
            self.device, model, [self.forward, decode([5], DEMANDS)], num_slots=10, verify=verify
        )
        for key in range(4):
            for chunk, num_bytes in enumerate(chunks_of(model)):
                self.machine.copy(key + 1, chunk, key, 9 - key, num_bytes, 0)
                self.device.end_copy(0)
        self.machine.wait((LOAD, 4, False))
        self.machine.begin_forward(self.forward)

    def experts(self, keys: Sequence[int], layer: int = 0, shared: bool = False) -> int:
        """Their launch, or the word that lets it begin."""
        counts = None if self.forward.counts is None else self.forward.counts[layer]
        return self.machine.experts(layer, keys, counts, shared)

    def ended(self, start_ns: int, end_ns: int) -> Callable[[], None]:
        """The next program's end, for the script."""
        return partial(self.device.end_program, start_ns, end_ns)

    @property
    def told(self) -> int:
        """How often the row of the last launch made ahead was told."""
        return int(words_of(self.device.ahead[-1])[TOLD])

    @property
    def num_made(self) -> tuple[int, int]:
        """Launches as they were known, and those ahead."""
        return len(self.device.launches), len(self.device.ahead)


def words_of(launch: Launched) -> memoryview[int]:
    """The row of a launch, as it is now."""
    words: memoryview[int] = launch.made.program.row.words
    return words


def layout_of(launch: Launched) -> RowLayout:
    """Where what stands in it."""
    layout: RowLayout = launch.made.program.row.layout
    return layout


# -- what is launched ahead ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [PLAIN, SHARED])
def test_behind_the_attention_of_one_token_experts_are_launched_that_are_not_known_yet(model: ModelSpec) -> None:
    """With the shared ones, which the first launch of a layer may have. They have no mark: nobody may wait for them."""
    bench = Bench(model)
    assert not bench.machine.is_waiting
    assert bench.machine.attention(0) == 1
    assert bench.num_made == (1, 1)
    assert bench.machine.is_waiting
    rows, has_shared = row_class(bench.machine.kernels.rows(1)), model is SHARED
    (launch,) = bench.device.ahead
    assert launch.made.program in bench.machine.programs._rings[4, rows, has_shared].programs
    assert launch.waits
    # Attention comes first on the stream.
    assert [one.made.words is None for one in bench.device.programs] == [False, True]
    assert launch.made.program.mark == 0


def test_experts_that_are_launched_ahead_are_told_to_begin_and_not_launched() -> None:
    bench = Bench(SHARED)
    bench.machine.attention(0)
    (launch,) = bench.device.ahead
    told, layout = bench.told, layout_of(launch)
    mark = bench.experts([2, 0, 1], shared=True)
    assert (mark, bench.num_made, bench.machine.is_waiting) == (2, (1, 1), False)
    words = words_of(launch)
    assert words[TOLD] == told + 1
    assert not launch.waits
    assert words[GAVE_UP] == 0
    assert (words[NUM_EXPERTS], words[SHARED_BLOCK]) == (3, 0)
    assert words[SHARED_ROWS] == bench.machine.kernels.shared_rows(1) > 0
    assert words[layout.slots : layout.slots + 3].tolist() == [7, 9, 8]
    rows = bench.machine.kernels.rows(1)
    assert words[layout.first : layout.first + 4].tolist() == [0, rows, 2 * rows, 3 * rows]
    assert words[layout.counts : layout.counts + 4].tolist() == [rows] * 4


def test_the_row_is_whole_when_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that waits begins at the last word of the description: nothing that kernels read is written behind it."""
    bench = Bench(verify=True)
    bench.machine.attention(0)
    (launch,) = bench.device.ahead
    row = launch.made.program.row
    seen: list[list[int]] = []
    describe = type(row).describe
    monkeypatch.setattr(
        type(row), "describe", lambda row, *given: describe(row, *given) or seen.append(row.host.tolist())
    )
    bench.experts([1], shared=True)
    bench.experts([0, 2])
    there = [row.host.tolist(), bench.device.ahead[1].made.program.row.host.tolist()]
    # But for the host's own count.
    for words in (*seen, *there):
        words[TOLD] = 0
    assert seen == there


def test_a_told_launch_says_what_its_slots_must_hold() -> None:
    bench = Bench(verify=True)
    bench.machine.attention(0)
    bench.experts([2], shared=True)
    bench.experts([0, 1])
    first, second = (words_of(launch) for launch in bench.device.ahead)
    assert (first[NUMBER], second[NUMBER]) == (0, 1)
    # A tag for each chunk, by its host buffer (one each here), and the load that brought it.
    tags = [[word for chunk in range(3) for word in ((key + 1) * (1 << 20) + chunk, key + 1)] for key in range(3)]
    at = RowLayout(4).expected
    assert first[at : at + 6].tolist() == tags[2]
    assert second[at : at + 12].tolist() == tags[0] + tags[1]


@pytest.mark.parametrize("model", [PLAIN, SHARED])
@pytest.mark.parametrize(
    "groups",
    [[[0, 1, 2]], [[0, 1], [2]], [[2], [0, 1]], [[0], [1], [2]], [[], [0, 1, 2]], [[], [0, 1], [2]]],
)
def test_while_experts_of_the_layer_are_missing_the_next_are_launched_ahead(
    groups: list[list[int]], model: ModelSpec
) -> None:
    """And none after the last. An empty group is that of the shared experts alone."""
    bench = Bench(model)
    bench.machine.attention(0)
    launched = [bench.device.ahead[0]]
    for place, keys in enumerate(groups):
        waiting = bench.device.ahead[-1]
        told = bench.told
        assert bench.experts(keys, shared=place == 0) == place + 2
        assert words_of(waiting)[TOLD] == told + 1
        assert words_of(waiting)[NUM_EXPERTS] == len(keys)
        assert words_of(waiting)[SHARED_BLOCK] == (0 if place == 0 else -1)
        is_last = place == len(groups) - 1
        assert bench.num_made == (1, place + 2 - is_last)
        assert bench.machine.is_waiting != is_last
        if not is_last:
            launched.append(bench.device.ahead[-1])
    # Only the first may have shared experts; each is another program, whose row nobody reads yet.
    rows, has_shared = row_class(bench.machine.kernels.rows(1)), model is SHARED
    rings = bench.machine.programs._rings
    for place, launch in enumerate(launched):
        assert launch.made.program in rings[4, rows, has_shared and place == 0].programs
    assert len({launch.made.program for launch in launched}) == len(launched)


def test_each_layer_begins_anew() -> None:
    bench = Bench(forward=decode([5], [[0, 1, 2], [8]]))
    bench.machine.attention(0)
    bench.experts([0, 1, 2], 0, True)
    bench.machine.attention(1)
    assert (bench.num_made, bench.machine.is_waiting) == ((2, 2), True)
    assert bench.experts([8], 1, True) == 4
    assert (bench.num_made, bench.machine.is_waiting) == ((2, 2), False)
    assert bench.machine.head() == 5
    assert bench.num_made == (3, 2)


def prompt_of_one_row() -> Forward:
    """The end of a prompt whose chunk before it held all the others."""
    return prefill(5, 6, DEMANDS, [dict.fromkeys(keys, 1) for keys in DEMANDS])


def prompt_row_among_decode() -> Forward:
    """A forward that is called decode, and whose only row is of a prompt."""
    counts = [dict.fromkeys(keys, 1) for keys in DEMANDS]
    demands = [list(keys) for keys in DEMANDS]
    return Forward(0, DECODE, range(1), (0,), (5,), demands, [], counts, spans=(Span(0, 1, True, 1, 1),))


def two_tokens() -> Forward:
    """A batch of two."""
    return decode([5, 6], DEMANDS, [dict.fromkeys(keys, 2) for keys in DEMANDS])


@pytest.mark.parametrize("make", [two_tokens, prompt_of_one_row, prompt_row_among_decode])
def test_forwards_of_several_tokens_or_of_a_prompt_launch_nothing_ahead(make: Callable[[], Forward]) -> None:
    bench = Bench(forward=make())
    bench.machine.attention(0)
    assert (bench.num_made, bench.machine.is_waiting) == ((1, 0), False)
    bench.experts([0], shared=True)
    # Whoever launches them tells them: where their launch begins by waiting, it never waits long.
    assert (bench.num_made, bench.machine.is_waiting) == ((2, 0), False)
    assert not any(launch.waits for launch in bench.device.programs)
    bench.experts([1, 2])
    assert bench.num_made == (3, 0)
    bench.machine.attention(1)
    bench.machine.head()
    assert bench.num_made == (5, 0)


def test_a_forward_of_one_token_after_one_of_two_launches_ahead_and_the_other_way_round() -> None:
    bench = Bench(forward=two_tokens())
    one, two = decode([5], DEMANDS), bench.forward
    for forward, num_ahead in ((two, 0), (one, 1), (two, 1), (one, 2)):
        bench.forward = forward
        bench.machine.begin_forward(forward)
        bench.machine.attention(0)
        assert len(bench.device.ahead) == num_ahead
        bench.experts([0, 1, 2], shared=True)
        mark = bench.machine.head()
        bench.device.then(*[bench.ended(0, 0) for _ in range(3)])
        bench.machine.wait((TOKEN, mark, False))


def test_a_device_that_cannot_launches_nothing_ahead() -> None:
    bench = Bench(launches_ahead=False)
    assert not bench.machine.launches_ahead
    bench.machine.attention(0)
    bench.experts([0], shared=True)
    bench.experts([1, 2])
    assert (bench.num_made, bench.machine.is_waiting) == ((3, 0), False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_strikes_in_front_of_kernels_needs_them_launched_as_they_are_known(fault: str) -> None:
    device = FaultyDevice(ScriptedDevice(launches_ahead=True), fault, 1)
    assert device.launches_ahead == (fault != "early_reuse")
    assert not FaultyDevice(ScriptedDevice(), fault, 1).launches_ahead


# -- what the machine makes of it ----------------------------------------------------------------------------


def test_a_launch_that_was_told_is_reported_as_any_other() -> None:
    bench = Bench()
    gate = bench.machine.attention(0)
    bench.device.then(bench.ended(10, 50))
    assert bench.machine.wait((GATE, gate, False)) == (50, [], [(gate, 10, 50)])
    first = bench.experts([0], shared=True)
    second = bench.experts([1, 2])
    later = bench.machine.attention(1)
    assert (first, second, later) == (2, 3, 4)
    bench.device.then(bench.ended(60, 70), bench.ended(70, 95), bench.ended(95, 120))
    marks = [(first, 60, 70), (second, 70, 95), (later, 95, 120)]
    assert bench.machine.wait((GATE, later, False)) == (120, [], marks)


def test_a_copy_waits_for_a_reader_that_was_launched_ahead() -> None:
    bench = Bench()
    bench.machine.attention(0)
    mark = bench.experts([0, 1, 2], shared=True)
    bench.machine.copy(9, 0, 3, 7, chunks_of(PLAIN)[0], mark)
    # Attention was the first launch on the stream, they the second.
    assert bench.device.copies[0].waits_for == 2
    bench.device.then(bench.ended(10, 50), bench.ended(60, 90), partial(bench.device.end_copy, 140))
    told = bench.machine.wait((LOAD, 9, False))
    assert told == (140, [(9, 0, 90, 140)], [(1, 10, 50), (mark, 60, 90)])


def test_a_program_is_not_launched_ahead_before_its_last_launch_is_read() -> None:
    """Of eight launches in a layer each is of another program; the ninth has to wait for the times of the first."""
    model = replace(PLAIN, num_experts=16, top_k=REPLICAS)
    demands = [list(range(REPLICAS)), list(range(16, 16 + REPLICAS))]
    bench = Bench(model, decode([5], demands))
    bench.machine.attention(0)
    for key in demands[0]:
        bench.experts([key], shared=key == 0)
    assert bench.num_made == (1, REPLICAS)
    assert bench.machine.num_read_first == 0
    bench.device.then(bench.ended(10, 50), bench.ended(60, 70))
    bench.machine.attention(1)
    assert bench.machine.num_read_first == 1
    assert bench.num_made == (2, REPLICAS + 1)
    assert bench.device.ahead[-1].made is bench.device.ahead[0].made
    assert len(bench.device.programs) == REPLICAS + 1
    # What was read is reported, and what waits is not taken for ended, though its program ended before.
    bench.device.then(*[bench.ended(70 + key, 71 + key) for key in range(REPLICAS - 1)], bench.ended(90, 99))
    marks = bench.machine.wait((GATE, REPLICAS + 2, False))[2]
    assert [mark for mark, _, _ in marks] == list(range(1, REPLICAS + 3))
    assert bench.device.ahead[-1].waits


# -- what lets them pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "head"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_gated_launch_lets_pass_what_waits_without_any_experts(kind: str, begun: bool) -> None:
    """Behind it, the launch would wait for ever. The row may hold what was launched before the run."""
    bench = Bench(SHARED)
    bench.machine.attention(0)
    mark = 1
    if begun:
        mark = bench.experts([0], shared=True)
    waiting, told, made = bench.device.ahead[-1], bench.told, bench.num_made
    assert words_of(waiting)[NUM_EXPERTS] > 0
    seen: list[tuple[int, ...]] = []
    launch = bench.device.launch

    def launching(program: object) -> None:
        words = words_of(waiting)
        seen.append((words[NUM_EXPERTS], words[SHARED_BLOCK], words[TOLD] - told))
        launch(program)  # type: ignore[arg-type]

    bench.device.launch = launching  # type: ignore[method-assign]
    # It has no mark.
    assert (bench.machine.attention(1) if kind == "attention" else bench.machine.head()) == mark + 1
    # Before the launch, not after it.
    assert seen[0] == (0, -1, 1)
    assert not waiting.waits
    is_attention = kind == "attention"
    assert bench.num_made == (made[0] + 1, made[1] + is_attention)
    assert bench.machine.is_waiting == is_attention
    num_before = 1 + begun
    bench.device.then(*[bench.ended(10 * place, 10 * place + 9) for place in range(num_before + 2)])
    record = bench.machine.wait((GATE if is_attention else TOKEN, mark + 1, False))
    assert [one for one, _, _ in record[2]] == list(range(1, mark + 2))
    assert waiting.words[:2] == [0, -1]


def test_nothing_is_told_where_nothing_waits() -> None:
    bench = Bench()
    bench.machine.attention(0)
    bench.experts([0, 1, 2], shared=True)
    told = bench.told
    bench.machine.head()
    bench.machine.close()
    assert bench.told == told


def test_a_machine_that_is_closed_leaves_nothing_waiting() -> None:
    bench = Bench(SHARED)
    bench.machine.attention(0)
    bench.experts([0], shared=True)
    (_, waiting), told = bench.device.ahead, bench.told
    bench.machine.close()
    assert (bench.told, bench.machine.is_waiting, waiting.waits) == (told + 1, False, False)
    assert words_of(waiting)[:2].tolist() == [0, -1]
    # Once is enough.
    bench.machine.close()
    assert bench.told == told + 1
    for _ in range(3):
        bench.device.end_program(0, 0)
    bench.machine.finish()


# -- the end of a run ----------------------------------------------------------------------------------------


def test_a_run_ends_when_the_device_has() -> None:
    bench = Bench()
    calls: list[str] = []
    bench.device.synchronize = lambda: calls.append("synchronize")  # type: ignore[method-assign]
    bench.machine.finish()
    assert calls == ["synchronize"]


@pytest.mark.parametrize("place", [0, REPLICAS - 1])
def test_kernels_that_gave_up_waiting_are_told_of_at_the_end(place: int) -> None:
    """Whichever they were, and though they gave up only while the end was waited for."""
    bench = Bench(SHARED)
    for ring in bench.machine.programs._rings.values():
        row = ring.programs[place].row
        synchronize = bench.device.synchronize

        def giving_up(words: memoryview[int] = row.words, whole: Callable[[], None] = synchronize) -> None:
            whole()
            words[GAVE_UP] = 3

        bench.machine.finish()
        bench.device.synchronize = giving_up  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"gave up waiting for it.*run it again without stopping it") as error:
            bench.machine.finish()
        assert "\n" not in str(error.value)
        bench.device.synchronize = synchronize  # type: ignore[method-assign]
        row.words[GAVE_UP] = 0
