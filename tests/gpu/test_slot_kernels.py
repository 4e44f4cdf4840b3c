"""The Triton kernels against float64: by Triton's interpreter on any machine, and on a GPU where there is one.

The interpreter multiplies the bit patterns of bfloat16 as if they were whole numbers: that format is tried on a GPU.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from replay.machine.rows import GAVE_UP, NUM_EXPERTS, NUMBER, SHARED_BLOCK, SHARED_ROWS, TOLD, RowLayout
from replay.machine.slot_kernels import SlotKernels, check_work, gate, kinds_of_tiles, stage
from tests.gpu.interpreter import INSIDE, interpreted
from tests.gpu.slot_cases import NO_BLOCK, UNTOUCHED, Bench, Case, Widths, compare, fill, make_row, weights

ODD = Widths(hidden=45, up=58, middle=29)
EVEN = Widths(hidden=64, up=96, middle=48)
WIDE = Widths(hidden=45, up=142, middle=71)
CASES = {
    "fewer-than-capacity": Case(ODD, 5, [3, 1], [4, 1]),
    "full-with-both-ends-of-the-pool": Case(ODD, 3, [0, 5, 2], [2, 4, 3]),
    "one-expert": Case(ODD, 1, [5], [1]),
    "whole-tiles": Case(EVEN, 2, [4, 0], [16, 16]),
    "few-rows": Case(ODD, 5, [3, 1, 5], [4, 1, 2], max_rows=4),
    "few-rows-whole-tiles": Case(EVEN, 2, [4, 0], [4, 4], max_rows=4),
    "one-row-each": Case(ODD, 3, [0, 5, 2], [1, 1, 1], max_rows=1),
    "more-than-few-rows": Case(ODD, 2, [4, 1], [9, 6], max_rows=4),
    "few-rows-ungated": Case(Widths(45, 29, 29), 3, [2, 0], [3, 4], max_rows=4),
    "few-rows-shared-is-wider": Case(ODD, 3, [5, 0], [3, 1], WIDE, 1, 4, max_rows=4),
    "few-rows-shared-is-narrower-and-longer": Case(WIDE, 2, [1, 4], [2, 1], ODD, 0, 9, max_rows=4),
    "one-row-each-and-of-the-shared": Case(ODD, 3, [5, 0], [1, 1], WIDE, 2, 1, max_rows=1),
    "few-rows-several-depths": Case(Widths(1000, 358, 179), 2, [1], [4], num_slots=2, max_rows=4),
    "20-rows": Case(ODD, 2, [1, 2], [20, 3], max_rows=32),
    "several-row-tiles": Case(ODD, 2, [4, 1], [70, 131], max_rows=131),
    "more-rows-than-row-tiles": Case(ODD, 2, [4, 1], [16, 50]),
    "ungated": Case(Widths(45, 29, 29), 3, [2, 0], [3, 5]),
    "shared-only": Case(ODD, 2, [], [], WIDE, 2, 5),
    "shared-is-wider": Case(ODD, 3, [5, 0], [3, 1], WIDE, 1, 4),
    "shared-is-narrower-and-longer": Case(WIDE, 2, [1, 4], [2, 6], ODD, 0, 40),
    "shared-in-other-launches": Case(ODD, 2, [1], [2], WIDE, NO_BLOCK, 3),
    "true-size": Case(Widths(2880, 1530, 765), 2, [1], [4], num_slots=2),
}
LARGE = {"true-size", "few-rows-several-depths"}
"""One launch of these: the interpreter takes seconds for each."""
HERE = [torch.float32, torch.float16]
gpu = pytest.mark.skipif(INSIDE or not torch.cuda.is_available(), reason="no CUDA device here: nothing was tried")


def run_case(name: str, dtype: torch.dtype, device: str) -> None:
    """The launch of a case; then the same body with fewer experts, in other slots, and with none at all."""
    case = CASES[name]
    bench = Bench(case, dtype, device)
    bench.check(case.slots, case.rows, case.shared_block, case.shared_rows)
    if name not in LARGE:
        slots, rows = [(slot + 1) % case.num_slots for slot in case.slots], [max(rows - 1, 1) for rows in case.rows]
        bench.check(slots[:1], rows[:1], case.shared_block, max(case.shared_rows - 1, 0))
        bench.check([], [], NO_BLOCK, case.shared_rows)


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CASES for dtype in HERE if dtype == torch.float16 or name != "true-size"],
    ids=str,
)
def test_experts_are_what_float64_says(name: str, dtype: torch.dtype) -> None:
    run_case(name, dtype, "cpu")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [*HERE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_experts_on_a_gpu_are_what_float64_says(name: str, dtype: torch.dtype) -> None:
    run_case(name, dtype, "cuda")


TILES = [
    (max_rows, kind, place)
    for max_rows in (1, 4, 16, 32, 64)
    for kind, tiles in enumerate(kinds_of_tiles(max_rows))
    for place in range(max(map(len, tiles.values())))
]


def run_with_tile(
    max_rows: int, kind: int, place: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str
) -> None:
    """A launch with one of the pairs of tiles that the tuner chooses from, which may take any of them."""
    tiles = kinds_of_tiles(max_rows)[kind]
    chosen = {product: found[place % len(found)] for product, found in tiles.items()}
    monkeypatch.setattr(SlotKernels, "tile", lambda kernels, capacity, rows, product: chosen[product])
    rows = [-(-max_rows // 2), max_rows]
    case = Case(ODD, 3, [5, 0], rows, WIDE, 1, max_rows, max_rows=max_rows)
    Bench(case, dtype, device).check(case.slots, case.rows, case.shared_block, case.shared_rows)


@interpreted
@pytest.mark.parametrize(("max_rows", "kind", "place"), [tile for tile in TILES if tile[0] <= 4 and tile[1] == 0])
def test_every_tile_of_few_rows_computes_what_float64_says(
    max_rows: int, kind: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_tile(max_rows, kind, place, monkeypatch, torch.float32, "cpu")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("max_rows", "kind", "place"), TILES)
def test_every_tile_on_a_gpu_computes_what_float64_says(
    max_rows: int, kind: int, place: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_tile(max_rows, kind, place, monkeypatch, dtype, "cuda")


@pytest.mark.gpu
@gpu
def test_a_captured_launch_on_a_gpu_serves_any_row() -> None:
    case = CASES["shared-is-wider"]
    bench = Bench(case, torch.bfloat16, "cuda")
    bench.check([1, 3], [2, 1], 0, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bench.work()
    bench.work = graph.replay
    for slots, rows, block, shared_rows in ([5, 0], [3, 1], 1, 4), ([2], [3], NO_BLOCK, 0), ([], [], 2, 1):
        bench.check(slots, rows, block, shared_rows)


def test_the_comparison_finds_a_wrong_value_and_a_wrong_slot() -> None:
    made = weights(ODD, 2, torch.float16, 1)
    x = torch.randn(2, 45, generator=torch.Generator().manual_seed(2)).half()
    middle = (x.double() @ made[0, : 58 * 45].view(58, 45).T.double()).half().double()
    value = (torch.nn.functional.silu(middle[:, :29]) * middle[:, 29:]).half().double()
    right = (value @ made[0, 58 * 45 :].view(29, 45).double()).half()
    compare(right, x, made[0], ODD)
    wrong = right.clone()
    wrong[1, 44] += 0.0625
    for found, values in ((wrong, made[0]), (right, made[1])):
        with pytest.raises(AssertionError):
            compare(found, x, values, ODD)


@interpreted
def test_a_slot_beyond_2_to_the_31_is_found(tmp_path: Path) -> None:
    """Slot 2 begins 2^31 + 2,048 float16 values into a pool that takes no memory: a file of holes."""
    widths, stride = Widths(45, 58, 29), 2**31 + 2048
    words = np.memmap(tmp_path / "pool", dtype=np.uint8, mode="w+", shape=(3, stride))
    pool = torch.from_numpy(words)
    made = weights(widths, 1, torch.float16, 1)
    pool[2, : widths.num_values * 2] = made.view(torch.uint8)[0]
    x = torch.randn(4, 45, generator=torch.Generator().manual_seed(2)).half()
    kernels = SlotKernels(widths, SimpleNamespace(num_slots=3, bytes=pool), x, 4, torch.float16)
    last = widths.num_values * 2 // 8 - 1
    wanted = int(pool[2, last * 8 : last * 8 + 8].clone().view(torch.int64))
    row, found = make_row(RowLayout(1, 1), "cpu"), torch.zeros(2, dtype=torch.int64)
    check = check_work(row, pool.view(torch.int64).view(-1), stride // 8, torch.tensor([last]), found[:1], found[1:])
    fill(row, [2], [4], number=-1, expected=[wanted])
    work = kernels.experts(row, 4, False, check)
    stage(row)()
    work()
    compare(kernels.out, x, made[0], widths)
    assert found.tolist() == [0, 0]
    fill(row, [2], [4], number=-1, expected=[wanted + 1])
    stage(row)()
    work()
    assert found.tolist() == [2, -1]


@interpreted
def test_rows_end_where_inputs_and_outputs_end() -> None:
    """As a slice of a tensor would: 9 rows of 7 inputs are 7; the second expert begins at 9 of 12 and has 3."""
    bench = Bench(Case(ODD, 2, [1, 4], [4, 4], WIDE, 1, 4), torch.float32)
    bench.kernels = SlotKernels(
        ODD, bench.slots, bench.inputs[:4].repeat(2, 1)[:7], 12, torch.float32, (WIDE, bench.shared_weights)
    )
    bench.work = bench.kernels.experts(bench.row, 16, True)
    bench.run([1, 4], [9, 5], 1, 30)
    x = bench.inputs[[0, 1, 2, 3, 0, 1, 2]]
    assert bench.kernels.out.shape == (12, 45)
    assert bench.kernels.shared_out.shape == (7, 45)
    compare(bench.kernels.out[:7], x, bench.weights[1], ODD)
    assert bool((bench.kernels.out[7:9] == UNTOUCHED).all())
    compare(bench.kernels.out[9:], x[:3], bench.weights[4], ODD)
    compare(bench.kernels.shared_out, x, bench.shared_weights[1], WIDE)


def run_copies(device: str, count: int) -> None:
    """Stage and gate move exactly `count` words and those before them; both count their launches."""
    pinned = device == "cuda"
    row = make_row(RowLayout(2, count), device)
    size, rest = row.layout.num_words, row.layout.first
    row.device = there = torch.full((size + 2,), -1, device=device)
    there[TOLD] = 0
    seen = []
    for launch, (slots, block) in enumerate((([3, 2**30], -1), ([5], 7), ([], -1), ([4], 2**30)), 1):
        row.host[NUMBER], row.host[GAVE_UP] = 70 + launch, 60 + launch
        row.host[rest:] = torch.arange(1, size - rest + 1) * (2**40 + launch)
        if launch in (1, 4):
            # Else the words behind the slots are those of before, as far as the kernels know.
            row.changed()
            seen = [70 + launch, 60 + launch, row.host[rest:].tolist()]
        row.describe(slots, block, 8 + launch)
        row.tell()
        stage(row)()
        found = there.tolist()
        assert found[:NUMBER] == [len(slots), block, 8 + launch]
        assert found[RowLayout(2).slots :][: len(slots)] == slots
        assert [found[NUMBER], found[GAVE_UP], found[rest:size]] == seen
        assert (found[TOLD], found[size:]) == (launch, [-1, -1])
    # Told again without a word: as the last one.
    row.tell()
    stage(row)()
    assert there[: NUMBER + 2].tolist() == [1, 2**30, 12, 74, 5]
    words = torch.full((count + 2,), -1, pin_memory=pinned)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    flag = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
    body = gate(there[:count], words[:count], counter, flag)
    for number in (1, 2, 3):
        there[0] = number
        body()
        if pinned:
            torch.cuda.synchronize()
        assert (int(flag), int(counter)) == (number, number)
        assert words.tolist() == [*there[:count].tolist(), -1, -1]


def run_waits(device: str) -> None:
    """Each launch waits until it is told, reads what was written by then, and gives up after a number of looks."""
    row = make_row(RowLayout(2), device)
    body = stage(row, most_polls=20_000_000 if device == "cuda" else 10**9)

    def write(number: int) -> None:
        time.sleep(0.05)
        row.spread([number * 100 + 3, number * 100 + 4])
        row.describe([number * 100 + 1, number * 100 + 2], number * 100, number)
        row.tell()

    assert row.device is not None
    for number in (1, 2, 3):
        host = threading.Thread(target=write, args=(number,))
        host.start()
        body()
        found = row.device.tolist()
        host.join()
        slots, counts = (number * 100 + 1, number * 100 + 2), (number * 100 + 3, number * 100 + 4)
        assert found == [2, number * 100, number, 0, number, 0, *slots, 0, counts[0], *counts]
    # Told twice in advance: two launches pass.
    row.tell()
    row.tell()
    for number in (4, 5):
        body()
        assert (int(row.device[TOLD]), int(row.host[GAVE_UP])) == (number, 0)
    stage(row, most_polls=50)()
    if device == "cuda":
        torch.cuda.synchronize()
    assert (int(row.host[GAVE_UP]), row.device[[NUM_EXPERTS, SHARED_BLOCK, TOLD]].tolist()) == (6, [0, -1, 6])


@interpreted
def test_a_launch_waits_for_the_host() -> None:
    run_waits("cpu")


@pytest.mark.gpu
@gpu
def test_a_launch_on_a_gpu_waits_for_the_host() -> None:
    run_waits("cuda")


@pytest.mark.gpu
@gpu
def test_a_launch_that_waited_reads_what_the_host_wrote_last() -> None:
    """2,000 launches, each told while it waits or before: no cache answers with an earlier row."""
    row = make_row(RowLayout(64, 8), "cuda")
    assert row.device is not None
    kept = torch.zeros((2000, row.layout.num_words), dtype=torch.int64, device="cuda")
    body, told = stage(row), torch.cuda.Event()
    # Libraries load on first use, which must not wait for a kernel that waits.
    row.tell()
    body()
    kept[0].copy_(row.device, non_blocking=True)
    torch.cuda.synchronize()
    for number in range(2000):
        body()
        kept[number].copy_(row.device, non_blocking=True)
        told.record()
        if number % 3:
            time.sleep(0.00002 * (number % 3))
        if number % 2:
            row.spread([number] * 64)
            row.host[row.layout.expected :] = number
        row.describe([number] * 64, number, number)
        row.tell()
        told.synchronize()
    found, wanted = kept.cpu(), torch.arange(2000)[:, None]
    assert bool((found[:, [SHARED_BLOCK, SHARED_ROWS, *range(row.layout.slots, row.layout.first)]] == wanted).all())
    odd = (wanted - 1) // 2 * 2 + 1
    assert bool((found[1:, row.layout.counts :] == odd[1:]).all())


@interpreted
@pytest.mark.parametrize("count", [0, 1, 33, 1024, 2500])
def test_stage_and_gate_move_the_words_and_no_more(count: int) -> None:
    run_copies("cpu", count)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("count", [0, 1, 33, 1024, 2500])
def test_stage_and_gate_on_a_gpu_move_the_words_and_no_more(count: int) -> None:
    run_copies("cuda", count)


@pytest.mark.gpu
@gpu
def test_a_host_that_sees_the_number_sees_the_words() -> None:
    """Read without waiting for the GPU in any other way, 2,000 times."""
    source = torch.zeros(2500, dtype=torch.int64, device="cuda")
    words, flag = (torch.zeros(count, dtype=torch.int64, pin_memory=True) for count in (2500, 1))
    body = gate(source, words, torch.zeros(1, dtype=torch.int64, device="cuda"), flag)
    seen, given = flag.numpy(), words.numpy()
    for number in range(1, 2001):
        source.add_(1)
        body()
        for _ in range(50_000_000):
            if seen[0] >= number:
                break
        assert (seen[0], given.min(), given.max()) == (number, number, number)


def run_checks(device: str) -> None:
    """Launches 9, 4 and 6 of three experts (of a capacity of four), planted wrong: 0, 3 and 1 words of the row's."""
    case = Case(ODD, 4, [5, 0, 3], [1, 1, 1])
    bench = Bench(case, torch.float16, device)
    within = [0, 1, 100, 317, 900]
    words, never = bench.slots.bytes.view(torch.int64), 1 << 62
    words[:, within] = torch.arange(30, device=device).view(6, 5) * 2**33
    wrong, first_bad = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), never, device=device)
    row = make_row(RowLayout(4, 5), device)
    check = check_work(row, words.view(-1), words.size(1), torch.tensor(within, device=device), wrong, first_bad)
    body = bench.kernels.experts(row, 1, False, check)
    seen = []
    for number, planted in ((9, {}), (4, {0: 1, 7: 2**33 + 1, 14: -5}), (6, {3: 8})):
        expected = [(slot * 5 + place) * 2**33 for slot in case.slots for place in range(5)]
        for place, change in planted.items():
            expected[place] += change
        fill(row, case.slots, case.rows, number=number, expected=expected)
        stage(row)()
        body()
        seen.append((int(wrong), int(first_bad)))
    # Each word is compared before and after the experts.
    assert seen == [(0, never), (6, 4), (8, 4)]


@interpreted
def test_a_check_counts_the_planted_words_and_names_the_least_launch() -> None:
    run_checks("cpu")


@pytest.mark.gpu
@gpu
def test_a_check_on_a_gpu_counts_the_planted_words_and_names_the_least_launch() -> None:
    run_checks("cuda")
