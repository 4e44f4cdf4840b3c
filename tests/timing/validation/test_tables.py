"""Kernel tables of a calibration, on a device that says of each launch of experts what its row costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertflow.model import ModelSpec
from replay.calibration.tables import KernelBench, expert_ns, group_table, kernel_tables, prompt_launches
from replay.machine.programs import launch_rows
from replay.machine.rig import Needs, Rig
from replay.machine.rows import NUM_EXPERTS, SHARED_BLOCK, SHARED_ROWS, RowLayout
from replay.machine.scale import scaled_model
from tests.replay.test_scale import model_of
from tests.support.scripted import PacedDevice, ScriptedDevice

PLAIN = replace(scaled_model(model_of("qwen3-30b-a3b"), 16), num_layers=2, num_experts=8, top_k=3)
SHARED = replace(scaled_model(model_of("deepseek-v2-lite"), 16), num_layers=2, num_experts=8, top_k=3)


def row_ns(words: list[int]) -> int:
    """400 for a launch, 100 for each row of a routed expert, 7 for each of a shared one; other kernels take 1000."""
    if not words:
        return 1000
    num, layout = words[NUM_EXPERTS], RowLayout((len(words) - RowLayout(0).num_words) // 3)
    routed = sum(words[layout.counts + place] for place in range(num))
    return 400 + 100 * routed + (7 * words[SHARED_ROWS] if words[SHARED_BLOCK] >= 0 else 0)


def rig(model: ModelSpec, *, captures: bool = True, num_slots: int = 8, kernels_slower: float = 1.0) -> Rig:
    """For batches of up to 16."""
    device = PacedDevice(
        lambda num_bytes: 50 + num_bytes // 10, row_ns, captures=captures, kernels_slower=kernels_slower
    )
    return Rig(device, model, Needs(num_slots, 16, 64))


def test_programs_of_a_bench_read_other_slots_each() -> None:
    bench = KernelBench(rig(PLAIN), 1)
    programs = bench.experts(3, 5)
    slots = [[program.row.words[program.row.layout.slots + place] for place in range(3)] for program in programs]
    assert slots == [[0, 1, 2], [3, 4, 5]]
    # As much room as a run of this model has for three.
    assert [program.row.layout.capacity for program in programs] == [4, 4]
    for program in programs:
        layout, words = program.row.layout, program.row.words
        # Two rows a token: the rows of one expert begin behind those of the one before it.
        assert [words[layout.first + place] for place in range(3)] == [0, 10, 20]
        assert [words[layout.counts + place] for place in range(3)] == [10, 10, 10]
        assert words[SHARED_BLOCK] == -1


def test_groups_are_a_grid_as_far_as_the_buffers_hold() -> None:
    """Of 16 tokens with three experts each, eight experts get at most six tokens each."""
    found = group_table(KernelBench(rig(PLAIN), 1), (1, 2, 4, 8, 16))
    assert found == [[num, each, 400 + 200 * num * each] for num in (1, 2, 3, 4, 6, 8) for each in (1, 2, 4)]


@pytest.mark.parametrize("captures", [True, False])
def test_of_a_prompt_host_and_device_are_timed_apart(captures: bool) -> None:
    """Sixteen tokens, three experts each: six an expert, two rows a token, all eight at once."""
    bench = rig(PLAIN, captures=captures)
    found = prompt_launches(bench, 16, 3)
    device_ns = {name: times["device_ns"] for name, times in found.items()}
    expected = {"attention": 1000, "experts": 400 + 8 * 6 * 200}
    if captures:
        expected |= {f"{name} by kernel": taken for name, taken in expected.items()}
    assert device_ns == expected
    assert all(times["host_ns"] > 0 for times in found.values())
    assert isinstance(bench.device, ScriptedDevice)
    assert [made.captured for made in bench.device.made] == ([True, True, False, False] if captures else [False] * 2)


def test_groups_need_a_slot_for_each_expert() -> None:
    found = group_table(KernelBench(rig(PLAIN, num_slots=5), 1), (1, 2))
    assert found == [[num, each, 400 + 200 * num * each] for num in (1, 2, 3, 4) for each in (1, 2)]


@pytest.mark.parametrize(("num_slots", "expected"), [(8, (600.0, 400.0)), (2, (600.0, 400.0)), (1, (1000.0, 0.0))])
def test_one_more_expert_is_told_from_a_launch(num_slots: int, expected: tuple[float, float]) -> None:
    assert expert_ns(KernelBench(rig(PLAIN, captures=False, num_slots=num_slots), 1), 3) == expected


def test_tables_of_captured_programs_hold_the_launch() -> None:
    found, launch_ns = kernel_tables(rig(PLAIN, kernels_slower=1.25), (1, 2, 4), 32, 1, 100)
    assert launch_ns == 0.0
    assert found == {
        "groups": [[num, each, 400 + 200 * num * each] for num in (1, 2, 3, 4, 6, 8) for each in (1, 2, 4)],
        "expert": [[1, 600], [2, 800], [4, 1200]],
        "head": [[1, 1000], [2, 1000], [4, 1000]],
        "attention": [[1, 1000], [2, 1000], [4, 1000]],
        "kv": 0.0,
        "attention_slowdown": 1.25,
        "experts_slowdown": 1.25,
        "head_slowdown": 1.25,
    }


def test_tables_of_programs_one_by_one_are_without_it() -> None:
    found, launch_ns = kernel_tables(rig(PLAIN, captures=False), (1, 2, 4), 32, 1, 100)
    assert launch_ns == 400.0
    assert found == {
        "expert": [[1, 200], [2, 400], [4, 800]],
        "head": [[1, 600], [2, 600], [4, 600]],
        "attention": [[1, 600], [2, 600], [4, 600]],
        "kv": 0.0,
    }


@pytest.mark.parametrize("captures", [True, False])
def test_shared_experts_are_what_they_add(captures: bool) -> None:
    made = rig(SHARED, captures=captures)
    found, _ = kernel_tables(made, (1, 2, 4), 32, 1, 100)
    assert found["shared"] == [[count, 7 * made.kernels.shared_rows(count)] for count in (1, 2, 4)]
    assert found["dense"] == [[1, 1], [2, 1], [4, 1]]


def test_shared_experts_are_measured_with_the_kernels_that_a_run_launches() -> None:
    """Eight tokens are sixteen rows of a shared expert: those of few rows would read its weights four times."""
    made = rig(SHARED)
    assert made.kernels.shared_rows(8) == 16
    asked: list[int] = []
    experts = made.kernels.experts
    made.kernels.experts = lambda row, most, shared: asked.append(most) or experts(row, most, shared)  # type: ignore[method-assign]
    bench = KernelBench(made, 1)
    for tokens in (0, 1, 2, 3, 8, 9):
        asked.clear()
        bench.experts(2, 1, tokens)
        assert set(asked) == {launch_rows(made.kernels.rows(1), made.kernels.shared_rows(tokens) if tokens else 0)}
    assert set(asked) == {32}
