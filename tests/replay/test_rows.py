"""What stands in the row of a launch of experts when it is enqueued, word by word, and what kernels make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from expertflow.model import ModelSpec
from replay.machine.programs import REPLICAS
from replay.machine.real import RealMachine
from replay.machine.rows import GAVE_UP, NUM_EXPERTS, NUMBER, SHARED_BLOCK, SHARED_ROWS, TOLD, RowLayout
from replay.machine.scale import scaled_model
from tests.replay.test_scale import model_of
from tests.support.scripted import ScriptedDevice, chunks_of, decode, machine_on

COUNTED = 8
"""Experts of a layer: key 8 is the first of layer 1."""
HEAD = [2, -1, 0, 0, 0, 0]
"""How the row of a launch of two experts begins that nothing is checked in and that nobody is told of."""


def model(name: str) -> ModelSpec:
    """Two layers of eight experts, of which each token takes three."""
    return replace(scaled_model(model_of(name), 16), num_layers=2, num_experts=COUNTED, top_k=3)


def opened(name: str, num_tokens: int, *, verify: bool = False) -> tuple[RealMachine, ScriptedDevice]:
    """A machine in the midst of a forward; expert k is in slot 15 - k."""
    device = ScriptedDevice()
    counts = None if num_tokens == 1 else [dict.fromkeys(range(COUNTED), num_tokens) for _ in range(2)]
    every = list(range(COUNTED))
    forward = decode([9] * num_tokens, [every, [COUNTED + key for key in every]], counts)
    machine = machine_on(device, model(name), [forward], verify=verify)
    for key in range(16):
        for chunk, num_bytes in enumerate(chunks_of(machine.kernels.model)):
            machine.copy(key + 1, chunk, key, 15 - key, num_bytes, 0)
            device.end_copy(0)
    machine.begin_forward(forward)
    return machine, device


def row_of(device: ScriptedDevice) -> list[int]:
    """The words of the last launch, as they were when it was enqueued."""
    return device.launches[-1].words


def read(device: ScriptedDevice) -> tuple[list[int], list[int], list[int], list[int]]:
    """Of the last launch (experts, shared block and its rows; slots, first rows and counts of the experts there are).

    What stands in the places of a larger capacity is left from earlier launches.
    """
    words, layout = row_of(device), device.launches[-1].made.program.row.layout
    places = range(words[NUM_EXPERTS])
    return (
        words[:3],
        *([words[first + place] for place in places] for first in (layout.slots, layout.first, layout.counts)),
    )  # type: ignore[return-value]


def plain(slots: Sequence[int], rows: int, block: int = -1, shared_rows: int = 0) -> tuple[list[int], ...]:
    """The same for `slots` with one token each, of so many rows."""
    num = len(slots)
    return [num, block, shared_rows], [*slots], [rows * place for place in range(num)], [rows] * num


# -- the layout ----------------------------------------------------------------------------------------------


def test_words_have_their_places() -> None:
    assert (NUM_EXPERTS, SHARED_BLOCK, SHARED_ROWS, NUMBER, TOLD, GAVE_UP) == (0, 1, 2, 3, 4, 5)
    layout = RowLayout(4, 6)
    assert (layout.slots, layout.first, layout.counts, layout.expected, layout.num_words) == (6, 10, 14, 18, 42)
    assert RowLayout(1).num_words == 9
    assert RowLayout(1).expected == 9


# -- batch 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "capacity"), [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_experts_of_one_token_by_slot(num: int, capacity: int) -> None:
    """There is room for the three that a token chooses, however few of them are launched."""
    machine, device = opened("qwen3-30b-a3b", 1)
    # In bfloat16 weights half as wide as float32: two rows a token bring the operations to the model's.
    assert machine.kernels.rows(1) == 2
    machine.experts(1, [COUNTED + key for key in range(num)], None, False)
    assert read(device) == plain([7 - key for key in range(num)], rows=2)
    row = device.launches[-1].made.program.row
    assert row.layout.capacity == capacity
    # Counts stand for the whole capacity: the next launch may have more experts, and writes none.
    assert row_of(device)[row.layout.first :] == [*(2 * place for place in range(capacity)), *[2] * capacity]


def test_the_slot_is_that_of_the_last_load() -> None:
    machine, device = opened("qwen3-30b-a3b", 1)
    machine.copy(99, 0, 5, 2, chunks_of(machine.kernels.model)[0], 0)
    machine.experts(0, [5, 4], None, False)
    assert row_of(device)[6:8] == [2, 11]


def test_a_model_without_shared_experts_has_no_block() -> None:
    machine, device = opened("qwen3-30b-a3b", 1)
    machine.experts(1, [8], None, False)
    assert row_of(device)[SHARED_BLOCK : SHARED_ROWS + 1] == [-1, 0]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_the_shared_block_is_the_layers_and_has_the_forwards_rows(num_tokens: int, layer: int) -> None:
    machine, device = opened("deepseek-v2-lite", num_tokens)
    shared_rows = machine.kernels.shared_rows(num_tokens)
    assert shared_rows >= 2 * num_tokens
    counts = None if num_tokens == 1 else {COUNTED * layer: 1}
    machine.experts(layer, [COUNTED * layer], counts, True)
    assert row_of(device)[:3] == [1, layer, shared_rows]
    # A later group of the same layer goes without.
    machine.experts(layer, [COUNTED * layer], counts, False)
    assert row_of(device)[:3] == [1, -1, shared_rows]


def test_shared_experts_run_alone() -> None:
    machine, device = opened("deepseek-v2-lite", 1)
    kernels = machine.kernels
    machine.experts(1, [], None, True)
    assert read(device) == plain([], rows=kernels.rows(1), block=1, shared_rows=kernels.shared_rows(1))
    assert kernels._shared is not None
    shared, routed = kernels._shared.block.out.fill_(7.0), kernels._expert.out.fill_(7.0)
    device.launches[-1].made.work()
    assert (shared[: kernels.shared_rows(1)] != 7.0).all()
    assert (routed == 7.0).all()


# -- counts, written where they are needed -------------------------------------------------------------------


def test_experts_of_a_batch_have_their_own_rows_one_behind_the_other() -> None:
    machine, device = opened("qwen3-30b-a3b", 4)
    machine.experts(0, [6, 0, 3], {0: 4, 3: 1, 6: 2, 7: 4}, False)
    assert read(device) == ([3, -1, 0], [9, 15, 12], [0, 4, 12], [4, 8, 2])


def test_narrow_weights_have_proportionally_more_rows() -> None:
    """4.25 bits in float32: 7.5 rows a token, rounded for all tokens of an expert together, at least one."""
    machine, device = opened("gpt-oss-20b", 4)
    rows = machine.kernels.rows
    assert [rows(count) for count in (1, 2, 4)] == [round(count * rows(1000) / 1000) for count in (1, 2, 4)]
    machine.experts(0, [1, 2], {1: 1, 2: 4}, False)
    # Room for four: in the places behind the two stands what was launched before the run, of one token each.
    first, counts = [0, rows(1), 2 * rows(1), 3 * rows(1)], [rows(1), rows(4), rows(1), rows(1)]
    assert row_of(device)[RowLayout(4).first :] == first + counts
    assert rows(4) > 4 * 7


def launched_again(machine: RealMachine, device: ScriptedDevice, *, counts: dict[int, int] | None) -> list[int]:
    """The row of the next launch of the same program, after all others of its ring."""
    seen: list[int] = []
    for number in range(REPLICAS):
        device.end_program(0, 0)
        machine.experts(0, [0, 1], counts, False)
        seen = row_of(device)
        assert (device.launches[-1].made is device.launches[0].made) == (number == REPLICAS - 1)
    return seen


def test_counts_of_one_token_are_written_once() -> None:
    """They are the same for any experts: a word that somebody else has changed stays. So do the slots behind."""
    machine, device = opened("qwen3-30b-a3b", 1)
    machine.experts(0, [5, 6], None, False)
    row = device.launches[0].made.program.row
    assert row.plain
    row.words[row.layout.counts] = 77
    assert launched_again(machine, device, counts=None) == [*HEAD, 15, 14, 2, 3, 0, 2, 4, 6, 77, 2, 2, 2]


def test_counts_of_a_batch_are_written_each_time_and_those_of_one_token_after_them_again() -> None:
    machine, device = opened("qwen3-30b-a3b", 4)
    machine.experts(0, [5, 6], None, False)
    row = device.launches[0].made.program.row
    row.words[row.layout.counts] = 77
    assert launched_again(machine, device, counts={0: 2, 1: 1}) == [*HEAD, 15, 14, 2, 3, 0, 4, 4, 6, 4, 2, 2, 2]
    assert not row.plain
    row.words[row.layout.counts] = 77
    device.launches[:] = device.launches[-1:]
    assert launched_again(machine, device, counts={0: 1, 1: 2}) == [*HEAD, 15, 14, 2, 3, 0, 2, 4, 6, 2, 4, 2, 2]
    device.launches[:] = device.launches[-1:]
    assert launched_again(machine, device, counts=None) == [*HEAD, 15, 14, 2, 3, 0, 2, 4, 6, 2, 2, 2, 2]
    assert row.plain


def test_counts_of_one_token_are_written_for_as_many_as_fit() -> None:
    """Behind a batch a launch of three leaves no count of the batch to the next one of four."""
    machine, device = opened("qwen3-30b-a3b", 4)
    for keys, counts in (([0, 1, 2, 3], dict.fromkeys(range(4), 2)), ([0, 1, 2], None), ([0, 1, 2, 3], None)):
        for _ in range(REPLICAS):
            machine.experts(0, keys, counts, False)
            device.end_program(0, 0)
    assert read(device) == plain([15, 14, 13, 12], rows=2)


def test_a_row_under_way_is_not_written() -> None:
    """The kernels of the first launch have yet to read it."""
    machine, device = opened("qwen3-30b-a3b", 1)
    machine.experts(0, [5], None, False)
    first = device.launches[0].made.program.row.host
    for key in range(1, REPLICAS):
        machine.experts(0, [key % COUNTED], None, False)
        assert first.tolist() == device.launches[0].words
    seen = []
    device.then(lambda: seen.append(first.tolist()), lambda: device.end_program(0, 5))
    machine.experts(0, [7], None, False)
    assert seen == [device.launches[0].words]
    assert first.tolist() == device.launches[-1].words != seen[0]


def test_by_rows_programs_are_told_apart() -> None:
    """Few rows are one size, up to 16 the next, which is doubled on; the same number of experts may run in any."""
    machine, device = opened("qwen3-30b-a3b", 16)
    rings = [ring for ring in machine.programs._rings if ring[0] == 4]
    assert rings == [(4, rows, False) for rows in (4, 16, 32)]
    made = []
    for count in (2, 8, 9, 16):
        machine.experts(0, [0], {0: count}, False)
        made.append(device.launches[-1].made)
        assert row_of(device)[RowLayout(4).counts] == 2 * count
    places = [[one.program for one in made].index(one.program) for one in made]
    assert places == [0, 1, 2, 3]
    assert made[0].program in machine.programs._rings[rings[0]].programs
    assert made[1].program in machine.programs._rings[rings[1]].programs
    assert {made[2].program, made[3].program} <= set(machine.programs._rings[rings[2]].programs)


# -- what is checked -----------------------------------------------------------------------------------------


def test_a_verified_launch_says_what_its_slots_must_hold() -> None:
    machine, device = opened("qwen3-30b-a3b", 1, verify=True)
    machine.experts(0, [2, 4], None, False)
    machine.experts(0, [4], None, False)
    first, second = (launch.words for launch in device.launches)
    assert (first[NUMBER], second[NUMBER]) == (0, 1)
    # A tag for each chunk, by its host buffer (one each here), and the load that brought it.
    two, four = ([word for chunk in range(3) for word in ((key + 1) * (1 << 20) + chunk, key + 1)] for key in (2, 4))
    # Of the four that there is room for, the others are not looked at; nothing was ever written there.
    assert first[RowLayout(4).expected :] == two + four + [0] * 12
    assert second[RowLayout(4).expected :] == four + [0] * 18


def test_the_kernels_of_a_row_read_the_slots_it_names() -> None:
    """Through the program that a launch runs: an expert of zeros gives zeros, over the rows counted and no others."""
    machine, device = opened("qwen3-30b-a3b", 4)
    kernels = machine.kernels
    machine.slots.slot(12).view(torch.uint8).zero_()
    out = kernels._expert.out
    machine.experts(0, [3], {3: 2}, False)
    out.fill_(7.0)
    device.launches[-1].made.work()
    assert (out[:4] == 0).all()
    assert (out[4:] == 7.0).all()
    machine.experts(0, [3, 2], {3: 2, 2: 4}, False)
    out.fill_(7.0)
    device.launches[-1].made.work()
    assert (out[:8] != 0).any()
    assert (out[:8] != 7.0).all()
