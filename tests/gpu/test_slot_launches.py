"""What is launched for experts, row by row and kernel by kernel; and what the real compiler makes of it for a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from replay.machine import slot_kernels
from replay.machine.launch_row import Row
from replay.machine.rows import RowLayout
from replay.machine.slot_kernels import SlotKernels, Tile, check_work, gate, stage
from tests.gpu.ptx.launches import Launches, compiled
from tests.gpu.slot_cases import Widths, make_row

GPT_OSS = Widths(hidden=2880, up=1530, middle=765)
SHARED = Widths(hidden=2880, up=2816, middle=1408)
SMALL = Widths(8, 16, 8)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(slot_kernels, "_programs", lambda name="slot_programs": made)
    return made


def words(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def slots(num_slots: int, num_bytes: int) -> Any:
    return SimpleNamespace(num_slots=num_slots, bytes=torch.zeros((num_slots, num_bytes), dtype=torch.uint8))


def kernels(shared: bool = False, widths: Widths = GPT_OSS, num_slots: int = 3, max_rows: int = 64) -> SlotKernels:
    inputs = torch.zeros((max_rows, widths.hidden), dtype=torch.bfloat16)
    block = (SHARED, torch.zeros((2, SHARED.num_values), dtype=torch.bfloat16)) if shared else None
    pool = slots(num_slots, widths.num_values * 2 // 512 * 512 + 512)
    return SlotKernels(widths, pool, inputs, max_rows, torch.bfloat16, block)


def row(capacity: int, words_per_expert: int = 0) -> Row:
    return make_row(RowLayout(capacity, words_per_expert), "cpu")


# -- launches ------------------------------------------------------------------------------------------------


def test_one_launch_pair_serves_all_experts_between_two_checks(launches: Launches) -> None:
    made, words_of = kernels(shared=True), row(5, 8)
    check = check_work(words_of, words(9), 3, words(8), words(1), words(1))
    body = made.experts(words_of, 20, True, check)
    assert launches.calls == []
    body()
    assert [name for name, *_ in launches.calls] == ["check", "up", "down", "check"]
    # 20 rows make one tile of 32; tiles of 32 columns: 2,816 / 32 = 88 and 2,880 / 32 = 90; one more for the shared.
    assert [grid for _, grid, *_ in launches.calls] == [(5,), (88, 6, 1), (90, 6, 1), (5,)]
    # All read the row on the device.
    assert [arguments[0] is words_of.device for _, _, arguments, _ in launches.calls] == [True] * 4


def test_without_shared_experts_and_checks_two_kernels_run(launches: Launches) -> None:
    kernels().experts(row(4), 130, False)()
    # Tiles of 64 rows and 64 columns: 1,530 / 64 = 23.9, 2,880 / 64 = 45, 130 / 64 = 2.03.
    assert [(name, grid) for name, grid, *_ in launches.calls] == [
        ("up", (24, 4, 3)),
        ("down", (45, 4, 3)),
    ]


@pytest.mark.parametrize(("max_rows", "rows"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (500, 64)])
def test_tiles_are_as_high_as_the_rows_of_an_expert(max_rows: int, rows: int) -> None:
    assert slot_kernels.tile_rows(max_rows) == rows


@pytest.mark.parametrize(("max_rows", "rows"), [(1, 1), (2, 4), (4, 4)])
def test_experts_of_few_rows_have_kernels_of_their_own(max_rows: int, rows: int, launches: Launches) -> None:
    kernels(shared=True).experts(row(4), max_rows, True)()
    # Four columns of the shared block's 1,408 gates, 32 of 2,880 outputs.
    assert [(name, grid) for name, grid, *_ in launches.calls] == [("up", (352, 5, 1)), ("down", (90, 5, 1))]
    assert [options["BT"] for *_, options in launches.calls] == [rows, rows]
    up, down = (arguments for _, _, arguments, _ in launches.calls)
    # What the one leaves the other reads: routed and shared.
    assert up[3] is down[1]
    assert up[5] is down[4]
    assert {up[3].dtype, up[5].dtype} == {torch.float32}


def test_tuning_takes_the_fastest_tile_of_each_product(launches: Launches) -> None:
    made = kernels(num_slots=7)
    columns = {"up": (64, 256), "down": (32, 256)}
    read: list[Any] = []

    def device_ns(body: Any) -> float:
        launches.calls.clear()
        body()
        name, _, _, options = launches.calls[0]
        read.append([arguments[0][6:8].tolist() for _, _, arguments, _ in launches.calls])
        return 10.0 if (options["BN"], options["BK"] * 2) == columns[name] else 20.0

    assert made.tile(2, 8, "up") == made.tile(2, 8, "down") == Tile(16, 512, 4, 5)
    made.tune(device_ns, [(2, 8)])
    # Two experts a launch: three launches cover slots 0 to 5 of 7, so that none is read from a cache.
    assert read == [[[0, 1], [2, 3], [4, 5]]] * 8
    assert (made.tile(2, 8, "up"), made.tile(2, 8, "down")) == (Tile(64, 256, 4, 4), Tile(32, 256, 4, 5))
    assert made.tile(2, 40, "up") == Tile(64, 128, 4, 4)
    assert made.tile(2, 4, "up").few_rows
    launches.calls.clear()
    made.experts(row(2), 8, False)()
    assert [options.get("BN") for *_, options in launches.calls] == [64, 32]


@pytest.mark.parametrize("few_rows", [True, False])
def test_of_few_rows_the_faster_pair_of_kernels_is_taken(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, few_rows: bool
) -> None:
    """A single product that is fastest of all is of no use where its partner is slow."""
    monkeypatch.setattr(slot_kernels, "_tuned", {})
    made = kernels(num_slots=7)

    def device_ns(body: Any) -> float:
        launches.calls.clear()
        body()
        name, _, _, options = launches.calls[0]
        if ("STAGES" in options) == few_rows:
            return 10.0 if name == "up" else 12.0
        return 1.0 if name == "up" else 30.0

    made.tune(device_ns, [(4, 3)])
    chosen = [made.tile(4, 2, name) for name in ("up", "down")]
    assert [tile.few_rows for tile in chosen] == [few_rows, few_rows]
    assert made.tile(4, 1, "up").few_rows


def test_sizes_that_do_not_fit_are_one_line(launches: Launches) -> None:
    with pytest.raises(ValueError, match=r"up=1000 is neither middle=765 nor twice that"):
        kernels(widths=Widths(2880, 1000, 765))
    half, x = torch.float16, torch.zeros(1, 8).half()
    with pytest.raises(ValueError, match=r"routed experts: 150 values in a slot, 192 needed; enlarge the slots"):
        SlotKernels(SMALL, slots(2, 300), x, 1, half)
    with pytest.raises(ValueError, match="inputs are 9 wide, experts 8, shared experts 8; give one hidden size"):
        SlotKernels(SMALL, slots(2, 600), torch.zeros(1, 9).half(), 1, half)
    with pytest.raises(ValueError, match="differ in having a gate"):
        SlotKernels(SMALL, slots(2, 600), x, 1, half, (Widths(8, 8, 8), torch.zeros(1, 128).half()))
    with pytest.raises(ValueError, match="has_shared=true, but no shared experts were given"):
        kernels().experts(row(1), 1, True)
    with pytest.raises(ValueError, match="a row holds 2 expected words an expert, the check compares 3"):
        check_work(row(1, 2), words(9), 3, words(3), words(1), words(1))
    with pytest.raises(ValueError, match="gate: 4 words into 3, all of int64"):
        gate(words(4), words(3), words(1), words(1))
    with pytest.raises(ValueError, match="gate: words lie apart"):
        gate(words(8)[::2], words(4), words(1), words(1))
    with pytest.raises(ValueError, match="a row for these kernels needs a copy on the device"):
        kernels().experts(Row(RowLayout(1), torch.device("cpu")), 1, False)


# -- without triton ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_triton_everything_imports_and_the_kernels_say_what_is_missing() -> None:
    script = """
import sys
sys.modules["triton"] = None
import replay.machine.rows
assert "torch" not in sys.modules
import torch
from replay.machine.slot_kernels import gate
try:
    gate(*[torch.zeros(1, dtype=torch.int64)] * 4)
except ValueError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("device=cuda needs triton, which torch's CUDA build brings (")
    assert ran.stdout.endswith("pip install 'expertflow[kernels]'\n")


# -- the compiler --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_every_tile_compiles_to_tensor_cores_and_wide_reads(
    rows: int, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = kernels(shared=True)
    for tile in slot_kernels._TILES[rows]:
        for name in ("up", "down"):
            launches.calls.clear()
            made._product(name, words(60), 4, rows, True, tile)()
            binary = compiled(launches.calls[0])
            text = binary.asm["ptx"]
            # 99 KiB: what a block may take on the smallest GPUs with bfloat16.
            assert binary.metadata.shared <= 99 << 10
            assert re.search(r"mma\S*\.bf16", text)
            # Weights and values come in pieces of 16 bytes, ahead of their use; four words of the row do not.
            assert len(re.findall(r"cp\.async\.cg\.shared\.global .*0x10", text)) >= 12
            assert len(re.findall(r"ld\.global", text)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_every_tile_of_few_rows_compiles_to_reads_ahead_and_sums_by_thread(
    rows: int, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = kernels(shared=True)
    for name, tiles in slot_kernels._FEW_ROWS.items():
        for tile in tiles:
            launches.calls.clear()
            made._product(name, words(60), 4, rows, True, tile)()
            binary = compiled(launches.calls[0], "few_row_programs")
            text = binary.asm["ptx"]
            # Two programs of the largest fit into what the smallest GPUs with bfloat16 have.
            assert binary.metadata.shared <= 48 << 10
            # All that is read in the loop comes ahead of its use, weights 16 bytes at a time; the row's words do not.
            assert len(re.findall(r"cp\.async\.cg\.shared\.global .*0x10", text)) >= tile.stages
            assert len(re.findall(r"ld\.global", text)) == 4
            # Sums cross threads once, after the loop: not for each tile.
            last = text.rindex("cp.async.wait_group")
            assert "shfl" not in text[:last]


@pytest.mark.parametrize("capacity", [4, 64])
def test_a_row_is_read_past_every_cache_word_by_word(
    capacity: int, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """In its own memory, where nobody writes but itself, the device reads one word: how many launches have begun."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stage(row(capacity, 2))()
    text = compiled(launches.calls[0]).asm["ptx"]
    reads = re.findall(r"\bld\S*\.global\S*", text)
    volatile = [read for read in reads if "volatile" in read]
    assert set(volatile) == {"ld.volatile.global.b64"}
    # A look before the loop, one in it, and one at all words.
    assert len(volatile) >= 3
    assert [read for read in reads if read not in volatile] == ["ld.global.b64"]


def test_the_number_is_written_after_all_words_for_the_whole_system(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gate(words(32), words(32), words(1), words(1))()
    text = compiled(launches.calls[0]).asm["ptx"]
    order = re.findall(r"st\.global|bar\.sync|atom\.global\.sys\.acq_rel\.add\.u64|atom|ld\.shared", text)
    assert order == ["st.global", "bar.sync", "atom.global.sys.acq_rel.add.u64", "bar.sync", "ld.shared", "st.global"]
