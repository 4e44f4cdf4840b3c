"""What is prepared before a run: sizes, rings, shapes on the grid, pads; and that a run needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertflow.forward import PREFILL, Forward
from replay.machine.kernels import Kernels
from replay.machine.pools import SlotPool
from replay.machine.programs import (
    DEFAULT_KV_GRID,
    PROGRAM_BYTES,
    PROMPT_REPLICAS,
    REPLICAS,
    Ring,
    capacity_for,
)
from replay.machine.real import RealMachine
from replay.machine.rig import Rig
from replay.machine.rows import row_class, row_classes, size_class
from replay.machine.scale import scaled_model
from replay.run import needs_of
from tests.replay.test_scale import model_of
from tests.support.commands import tiny_trace
from tests.support.replays import SMALL, TINY, Case
from tests.support.scripted import Made, ScriptedDevice, decode, machine_on, prefill

WINDOW = 128
PLAIN = replace(scaled_model(model_of("qwen3-30b-a3b"), 16), num_layers=2, num_experts=8, top_k=3)
WINDOWED = replace(scaled_model(model_of("gpt-oss-20b"), 16), num_layers=4, num_experts=8, top_k=3)
SHARED = replace(scaled_model(model_of("deepseek-v2-lite"), 16), num_layers=2, num_experts=8, top_k=3)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 24)


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "least", "size"),
    [
        (0, 1, 1),
        (1, 1, 1),
        (2, 1, 2),
        (3, 1, 4),
        (4, 1, 4),
        (5, 1, 8),
        (64, 1, 64),
        (65, 1, 128),
        (0, 16, 16),
        (1, 16, 16),
        (16, 16, 16),
        (17, 16, 32),
        (32, 16, 32),
        (33, 16, 64),
        (1 << 20, 16, 1 << 20),
    ],
)
def test_sizes_are_powers_of_two(count: int, least: int, size: int) -> None:
    assert size_class(count, least) == size


@pytest.mark.parametrize(
    ("num_experts", "top_k", "capacity"),
    [
        # What one token chooses has room always: also where none of it is resident, or one.
        (0, 1, 1),
        (1, 1, 1),
        (0, 4, 4),
        (1, 4, 4),
        (4, 4, 4),
        (0, 6, 8),
        (3, 6, 8),
        (6, 6, 8),
        # What a batch demands beyond that goes by powers of two.
        (2, 1, 2),
        (5, 4, 8),
        (8, 6, 8),
        (9, 6, 16),
        (64, 8, 64),
        (65, 8, 128),
    ],
)
def test_there_is_room_for_what_a_token_chooses_and_beyond_it_for_a_power_of_two(
    num_experts: int, top_k: int, capacity: int
) -> None:
    assert capacity_for(num_experts, top_k) == capacity


def test_a_ring_is_taken_in_turn() -> None:
    device = ScriptedDevice()
    programs = [device.program(lambda: None) for _ in range(3)]
    ring = Ring(programs)
    assert [programs.index(ring.take()) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


# -- what is made --------------------------------------------------------------------------------------------


def gated(device: ScriptedDevice) -> list[Made]:
    """Programs of attention and head."""
    return [made for made in device.made if made.words is not None]


def rings(machine: RealMachine) -> dict[tuple[int, int, bool], int]:
    """Programs for experts, by capacity, rows and whether shared ones run with them."""
    return {key: len(ring.programs) for key, ring in machine.programs._rings.items()}


def test_attention_of_each_layer_and_shape_and_the_head_are_captured_with_their_pads() -> None:
    device = ScriptedDevice()
    machine_on(device, PLAIN, [decode([5]), decode([6]), decode([300])])
    found = [(made.pad_ns, made.captured, made.program.row) for made in gated(device)]
    # Two layers; KV lengths of one and of two steps of the grid; one head.
    assert sorted(found) == sorted([(3_000, True, None)] * 4 + [(5_000, True, None)])


def test_experts_of_one_token_are_captured_without_pad_or_gate_in_one_size() -> None:
    """Three, two, or one of them that is resident: the program is of the same size."""
    device = ScriptedDevice()
    machine = machine_on(device, PLAIN, [decode([5], [[0, 1, 2], [8, 9]])])
    assert rings(machine) == {(4, 4, False): REPLICAS}
    taken = {machine.programs.experts(num, 1, 0) for num in (0, 1, 2, 3) for _ in range(REPLICAS)}
    assert taken == set(machine.programs._rings[4, 4, False].programs)
    made = [made for made in device.made if made.program.row is not None]
    assert {(one.pad_ns, one.words, one.captured) for one in made} == {(0, None, True)}
    assert len(made) == REPLICAS
    assert machine.programs.num_prepared == len(device.made) == REPLICAS + 2 + 1


@pytest.mark.parametrize(("top_k", "sizes"), [(1, (1, 2, 4, 8)), (2, (2, 4, 8)), (3, (4, 8))])
def test_a_batch_brings_every_size_of_more_rows_and_more_experts(top_k: int, sizes: tuple[int, ...]) -> None:
    """From what one token chooses up to the most."""
    counts = [{0: 9, 1: 1}, dict.fromkeys(range(8, 13), 2)]
    model = replace(PLAIN, top_k=top_k)
    machine = machine_on(ScriptedDevice(), model, [decode([5] * 12, [[0, 1], [*range(8, 13)]], counts)])
    assert machine.kernels.rows(9) == 18
    assert set(rings(machine)) == {(experts, rows, False) for experts in sizes for rows in (4, 16, 32)}


@pytest.mark.parametrize(
    ("first", "last", "classes"),
    [(1, 1, [1]), (1, 5, [1, 4, 16]), (2, 4, [4]), (4, 33, [4, 16, 32, 64]), (16, 16, [16]), (100, 100, [128])],
)
def test_classes_of_rows_are_few_rows_then_doublings_of_16(first: int, last: int, classes: list[int]) -> None:
    assert row_classes(first, last) == classes
    assert row_class(last) == classes[-1] >= last


def test_shared_experts_double_the_sizes_and_run_alone_in_the_smallest() -> None:
    """Two tokens: routed experts over the rows of one, the shared ones over those of one and of both."""
    demands = [[0, 1, 2, 3, 4], [8, 9, 10]]
    counts = [dict.fromkeys(keys, 1) for keys in demands]
    machine = machine_on(ScriptedDevice(), SHARED, [decode([5, 6], demands, counts)])
    rows, shared_rows = machine.kernels.rows, machine.kernels.shared_rows
    assert (rows(1), shared_rows(1), shared_rows(2)) == (2, 2, 4)
    assert set(rings(machine)) == {(experts, 4, shared) for experts in (4, 8) for shared in (False, True)}
    alone = machine.programs.experts(0, 1, shared_rows(2))
    assert alone in machine.programs._rings[4, 4, True].programs
    assert alone not in machine.programs._rings[4, 4, False].programs


def test_without_shared_experts_there_is_one_kind_whatever_the_runtime_says_of_the_layer() -> None:
    machine = machine_on(ScriptedDevice(), PLAIN, [decode([5])])
    machine.begin_forward(decode([5]))
    machine.experts(0, [], None, shared=True)
    assert set(rings(machine)) == {(4, 4, False)}


def test_shared_experts_of_many_rows_are_launched_with_kernels_of_many_rows() -> None:
    """Twelve tokens, a few of which chose the same expert: the kernels of few rows would read the shared weights again
    for every four rows."""
    demands = [[0, 1, 2], [8, 9]]
    counts = [dict.fromkeys(keys, 1) for keys in demands]
    device = ScriptedDevice()
    machine = machine_on(device, SHARED, [decode([5]), decode([5] * 12, demands, counts)])
    assert machine.kernels.shared_rows(12) == 24
    assert set(rings(machine)) == {(4, 4, False), *((4, rows, True) for rows in (4, 16, 32))}
    found = machine.programs._rings
    for tokens, rows in ((1, 4), (2, 4), (3, 16), (8, 16), (9, 32), (12, 32)):
        assert machine.programs.experts(3, 1, machine.kernels.shared_rows(tokens)) in found[4, rows, True].programs
    # What follows without them is launched as small as it is.
    assert machine.programs.experts(3, 1, 0) in found[4, 4, False].programs
    # And a forward launches so.
    machine.begin_forward(decode([5] * 12, demands, counts))
    machine.experts(0, [0], {0: 1}, shared=True)
    machine.experts(0, [1, 2], {1: 1, 2: 1}, shared=False)
    first, second = (launch.made.program for launch in device.launches[-2:])
    assert first in found[4, 32, True].programs
    assert second in found[4, 4, False].programs


@pytest.mark.parametrize("captures", [True, False])
def test_a_head_is_made_for_each_number_of_rows_that_emit(captures: bool) -> None:
    device = ScriptedDevice(captures)
    asking = [decode([5]), decode([5, 6, 7], counts=[{0: 3}, {0: 3}]), prefill(1, 5, [[0], [8]], [{0: 4}, {8: 4}])]
    machine = machine_on(device, PLAIN, asking)
    assert sorted(machine.programs._heads) == [0, 1, 3]
    words = machine.programs._heads
    made = {one.program: one for one in device.made}
    for rows, program in words.items():
        source, target = made[program].words or (None, None)
        assert source is not None
        assert target is not None
        assert source.shape == target.shape == (rows,)


def test_all_is_launched_once_before_the_run_and_nothing_of_that_counts() -> None:
    device = ScriptedDevice()
    seen: list[Made] = []
    run = device._run
    device._run = lambda made: seen.append(made) or run(made)  # type: ignore[method-assign, func-returns-value]
    forward = decode([5], [[0, 1, 2], [8]])
    machine = machine_on(device, PLAIN, [forward], verify=True)
    assert set(seen) == set(device.made)
    assert len(seen) == len(device.made) == machine.programs.num_prepared
    assert machine.num_read_first == 0
    assert machine.programs.num_unprepared == 0
    # The gates of that time are behind the run: its first wait is for one more.
    assert device.numbers[0] == len(gated(device)) == machine._number
    machine.begin_forward(forward)
    assert machine.attention(0) == 1
    assert machine._number == len(gated(device)) + 1
    stamps = machine.stamps
    assert stamps is not None
    stamps.collect()
    assert (stamps.num_wrong, stamps.num_executions, stamps.num_checks) == (0, 0, 0)


def test_what_earlier_runs_left_in_the_slots_is_no_wrong_stamp() -> None:
    device = ScriptedDevice()
    forward = decode([5], [[0, 1, 2], [8]])
    machine = machine_on(device, PLAIN, [forward], verify=True)
    stamps = machine.stamps
    assert stamps is not None
    machine.slots.bytes.fill_(1)
    device.auto = True
    # Whatever the slots hold is not what rows of no load say.
    machine.programs.prepare([forward], 4)
    assert stamps._wrong.item() > 0
    machine.prepare([forward])
    stamps.collect()
    assert (stamps.num_wrong, stamps._first_bad.item()) == (0, 1 << 62)


def test_a_machine_that_does_not_capture_launches_one_of_each_size() -> None:
    device = ScriptedDevice(captures=False)
    machine = machine_on(device, PLAIN, [decode([5]), decode([6])])
    assert not any(made.captured for made in device.made if made.program.row is not None)
    assert len(device.made) == REPLICAS + 2 + 1
    assert machine.programs.kv_grid == 0
    # Attention is made anew for each forward, with its own length.
    machine.begin_forward(decode([7]))
    assert len(device.made) == REPLICAS + 2 + 1 + 2


# -- shapes on a grid ----------------------------------------------------------------------------------------


def shape(kernels: Kernels, layer: int, kv_lens: Sequence[int], grid: int = 0) -> Any:
    return kernels.shape(layer, decode(kv_lens), grid)


@pytest.mark.parametrize(
    ("kv_lens", "grid", "full", "windowed"),
    [
        ([1], 256, [256], [128]),
        ([256], 256, [256], [128]),
        ([257], 256, [512], [128]),
        ([1], 64, [64], [64]),
        ([100], 64, [128], [128]),
        ([300], 48, [336], [128]),
        # A batch is rounded together, a windowed layer up to a window for each row at most.
        ([100, 200], 256, [256, 256], [128, 128]),
        ([10, 10], 256, [128, 128], [128, 128]),
        ([20, 30, 300], 64, [128, 128, 128], [64, 64, 64]),
        ([120, 130, 300], 512, [300, 300, 424], [128, 128, 128]),
        ([100, 200], 0, [100, 200], [100, 128]),
    ],
)
def test_a_shape_is_that_of_lengths_on_the_grid(
    kv_lens: list[int], grid: int, full: list[int], windowed: list[int]
) -> None:
    """Of all rows together: the same work as `full` (no window) and `windowed` have without a grid."""
    kernels = Kernels(WINDOWED, SlotPool(2, WINDOWED.mean_expert_bytes, torch.device("cpu")), torch.float32, 4, 2048)
    assert [WINDOWED.is_windowed(layer) for layer in range(2)] == [True, False]
    assert WINDOWED.window == WINDOW
    assert shape(kernels, 1, kv_lens, grid) == shape(kernels, 1, full)
    assert shape(kernels, 0, kv_lens, grid) == shape(kernels, 0, windowed)
    assert shape(kernels, 1, kv_lens, grid).num_tokens == len(kv_lens)


def test_a_prompt_has_no_grid() -> None:
    kernels = Kernels(WINDOWED, SlotPool(2, WINDOWED.mean_expert_bytes, torch.device("cpu")), torch.float32, 40, 2048)
    prompt = prefill(10, 45, [[0], [8]], [{0: 35}, {8: 35}])
    for layer in (0, 1):
        assert kernels.shape(layer, prompt, 256) == kernels.shape(layer, prompt)


def test_forwards_of_one_step_of_the_grid_share_their_programs() -> None:
    """Windowed layers, once their window is full, share one for all lengths."""
    device = ScriptedDevice()
    forwards = [decode([length]) for length in range(1, 700)]
    machine = machine_on(device, WINDOWED, forwards, kv_grid=100)
    # Two layers of each kind: 7 steps of full attention; 100 and 128 of the windowed.
    assert len(machine.programs._by_shape) == 2 * 7 + 2 * 2
    assert machine.programs.kv_grid == 100
    made = [machine.programs.attention(decode([length])) for length in (101, 200, 201)]
    assert made[0] == made[1]
    assert [one is two for one, two in zip(made[1], made[2], strict=True)] == [True, False, True, False]
    assert machine.programs.num_unprepared == 0


def test_a_stack_without_a_grid_is_captured_on_the_default_one() -> None:
    machine = machine_on(ScriptedDevice(), PLAIN, [decode([length]) for length in (1, 256, 257)])
    assert machine.programs.kv_grid == DEFAULT_KV_GRID == 256
    assert len(machine.programs._by_shape) == 2 * 2


def test_a_stacks_grid_holds_without_capturing_as_well() -> None:
    machine = machine_on(ScriptedDevice(captures=False), PLAIN, [decode([1])], kv_grid=100)
    device = machine.device
    assert isinstance(device, ScriptedDevice)
    machine.begin_forward(decode([101]))
    made = device.made[-1]
    counted = machine.kernels.shape(1, decode([200]))
    assert machine.kernels.shape(1, decode([101]), machine.programs.kv_grid) == counted
    assert not made.captured


# -- whole runs ----------------------------------------------------------------------------------------------

RUNS = [
    (TINY, "+policy=lru residency=0.3"),
    (TINY, "+policy=adaptive residency=0.3 batch_size=4"),
    (TINY, "+policy=fixed_2 residency=0.3 chunk_mib=0.4"),
    (SMALL, "+policy=lru trace.num_tokens=8 residency=0.25"),
]


def captured_run(
    words: Sequence[str], device: ScriptedDevice, monkeypatch: pytest.MonkeyPatch, free_bytes: int | None = None
) -> tuple[RealMachine, list[int], Any]:
    """(the machine, programs made when the clock starts and at the end, what the stamps said) of a whole run.

    free_bytes: memory that the device has left once buffers and weights are there; None: as much as is needed.
    """
    case = Case.of(*words)
    rig = Rig(device, case.work.model, needs_of(case.work, *case.policy()))
    monkeypatch.setattr(device, "free_bytes", lambda: free_bytes)
    machines: list[RealMachine] = []
    whole = rig.machine
    monkeypatch.setattr(rig, "machine", lambda *given: machines.append(whole(*given)) or machines[0])
    num_made: list[int] = []
    monkeypatch.setattr(device, "restart_clock", lambda: num_made.append(len(device.made)))
    _, found = case.replay(rig, verify=True)
    num_made.append(len(device.made))
    return machines[0], num_made, found


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "words"), RUNS)
def test_a_run_of_decode_forwards_launches_what_was_prepared_and_nothing_else(
    shape: Sequence[str], words: str, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = [f"trace.path={trace}"] if shape is TINY else []
    device = ScriptedDevice()
    machine, num_made, found = captured_run([*shape, *words.split(), *path], device, monkeypatch)
    assert machine.programs.num_unprepared == 0
    assert num_made[0] == num_made[1] == machine.programs.num_prepared
    assert all(made.captured for made in device.made)
    assert (found.num_wrong, found.num_executions > 0) == (0, True)
    assert device.num_blocked == 0


def prompt_words(folder: Path) -> list[str]:
    """A run of requests whose prompts of 15 tokens come in chunks of 6, 6 and 3."""
    path = tiny_trace(folder / "prompts.safetensors", 40, prompt=15)
    return [*TINY, "+policy=lru", f"trace.path={path}", "prefill_chunk=6", "residency=0.3"]


def prompts_of(words: Sequence[str]) -> list[Forward]:
    forwards = list(Case.of(*words).work.batches)
    prompts = [forward for forward in forwards if forward.phase == PREFILL]
    assert 0 < len(prompts) < len(forwards)
    return prompts


def captured_by_bucket(machine: RealMachine, device: ScriptedDevice) -> dict[tuple[int, int, bool], list[bool]]:
    made = {one.program: one.captured for one in device.made}
    return {key: [made[program] for program in ring.programs] for key, ring in machine.programs._rings.items()}


@pytest.mark.slow
def test_prompts_are_captured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = prompt_words(tmp_path)
    prompts_of(words)
    device = ScriptedDevice()
    machine, num_made, found = captured_run(words, device, monkeypatch)
    assert machine.programs.num_unprepared == 0
    assert num_made[0] == num_made[1] == machine.programs.num_prepared
    assert all(made.captured for made in device.made)
    # Of sizes that decode has there are as many as ever, of those that only a prompt has a few.
    rows = row_class(machine.kernels.rows(1))
    by_bucket = captured_by_bucket(machine, device)
    assert {size for size, _, _ in by_bucket} == {2, 4, 8}
    assert {key: len(each) for key, each in by_bucket.items()} == {
        key: REPLICAS if key == (2, rows, False) else PROMPT_REPLICAS for key in by_bucket
    }
    assert (found.num_wrong, found.num_executions > 0) == (0, True)
    assert device.num_blocked == 0


@pytest.mark.slow
@pytest.mark.parametrize("free", [True, False], ids=["memory", "programs"])
def test_the_shortest_prompts_are_captured_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    """Room for experts and for attention of one shape, four layers: the chunks of three tokens are what it is for."""
    words = prompt_words(tmp_path)
    whole, _, _ = captured_run(words, ScriptedDevice(), monkeypatch)
    num_experts = sum(len(ring.programs) for ring in whole.programs._rings.values()) - REPLICAS
    shapes = {whole.programs._shapes(forward): len(forward.rows) for forward in prompts_of(words)}
    assert sorted(shapes.values()) == [3, 6, 6]
    device = ScriptedDevice()
    room = num_experts + 4 + 3
    if not free:
        monkeypatch.setattr("replay.machine.programs.MOST_PROMPT_PROGRAMS", room)
    # Only half of what is free is taken.
    free_bytes = room * 2 * PROGRAM_BYTES if free else None
    machine, num_made, found = captured_run(words, device, monkeypatch, free_bytes)
    num_long = sum(len(forward.rows) == 6 for forward in prompts_of(words))
    assert machine.programs.num_unprepared == num_long
    # Four layers each, made as the forward comes; decode and short prompts need nothing new.
    assert num_made[1] - num_made[0] == 4 * num_long
    assert not any(made.captured for made in device.made[num_made[0] :])
    assert all(map(all, captured_by_bucket(machine, device).values()))
    assert (found.num_wrong, found.num_executions > 0) == (0, True)


@pytest.mark.slow
def test_without_room_prompts_are_launched_kernel_by_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = prompt_words(tmp_path)
    device = ScriptedDevice()
    machine, num_made, found = captured_run(words, device, monkeypatch, free_bytes=0)
    prompts = prompts_of(words)
    assert machine.programs.num_unprepared == len(prompts)
    assert num_made[1] - num_made[0] == 4 * len(prompts)
    # Sizes that decode has are captured, those that only a prompt has are not.
    rows = row_class(machine.kernels.rows(1))
    assert captured_by_bucket(machine, device) == {
        key: [key == (2, rows, False)] * REPLICAS for key in machine.programs._rings
    }
    assert (found.num_wrong, found.num_executions > 0) == (0, True)
