"""The event table has one row per access, and its stalls add up to the run's."""

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from expertflow.counters import Counters
from expertflow.forward import Forward
from expertflow.parts import DEMAND, PREFETCH
from sim.views.events import SCHEMA, EventTable
from tests.unit.views.support import RUNS, at_random, by_hand, decode, prefill, run


def written(
    folder: Path, forwards: list[Forward], num_experts: int, num_slots: int, rows_per_group: int = 1 << 16, **how: Any
) -> tuple[Path, Counters]:
    table = EventTable(folder / "events.parquet", num_experts, rows_per_group)
    counters = run(forwards, num_experts, num_slots, [table], **how).counters
    table.close()
    return table.path, counters


def read(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


# -- the contents --------------------------------------------------------------------------------------------


def test_the_run_by_hand_row_by_row(tmp_path: Path) -> None:
    path, _ = written(tmp_path, by_hand(), 4, 3)
    assert read(path) == [
        (0, "decode", 0, 1, "miss", 100, 1, 2000, 2100),
        (0, "decode", 1, 2, "late", 2250, 1, 1850, 4100),
        (1, "decode", 0, 1, "hit", 4280, 1, 0, None),
        (1, "decode", 1, 3, "late", 4430, 1, 1850, 6280),
    ]


def test_columns_and_types_are_as_declared(tmp_path: Path) -> None:
    path, _ = written(tmp_path, by_hand(), 4, 3)
    assert pq.read_schema(path).equals(SCHEMA)
    frame = pd.read_parquet(path)
    assert list(frame["class"].cat.categories) == ["hit", "late", "miss", "host"]
    assert list(frame["phase"].cat.categories) == ["decode", "prefill"]


def test_a_layer_stands_in_touch_order_with_its_tokens(tmp_path: Path) -> None:
    # E3 runs its two tokens, 100 ns, while E0 is being copied: E0 is waited for that much less.
    path, _ = written(tmp_path, [prefill(0, [{3: 2, 0: 5}, {6: 1}], 5)], 4, 4, prefetch=False)
    assert read(path) == [
        (0, "prefill", 0, 3, "miss", 100, 2, 2000, 2100),
        (0, "prefill", 0, 0, "miss", 100, 5, 1900, 4100),
        (0, "prefill", 1, 2, "miss", 4450, 1, 2000, 6450),
    ]


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_the_accesses_and_stalls_the_stall(name: str, tmp_path: Path) -> None:
    num_slots, how = RUNS[name]
    path, counters = written(tmp_path, at_random(), 8, num_slots, **how)
    frame = pd.read_parquet(path)
    assert len(frame) == counters.num_accesses > 0
    assert int(frame["stall_ns"].sum()) == counters.stall_ns > 0
    classes = Counter(frame["class"])
    assert (classes["hit"], classes["late"], classes["miss"]) == (
        counters.num_hits,
        counters.num_late,
        counters.num_misses,
    )
    stall_ns = frame.groupby("class", observed=False)["stall_ns"].sum()
    assert (stall_ns["late"], stall_ns["miss"]) == (counters.late_stall_ns, counters.miss_stall_ns)
    assert stall_ns["hit"] == 0


@pytest.mark.parametrize("name", RUNS)
def test_what_was_waited_for_landed_after_its_routing_and_nothing_else_landed(name: str, tmp_path: Path) -> None:
    num_slots, how = RUNS[name]
    frame = pd.read_parquet(written(tmp_path, at_random(), 8, num_slots, **how)[0])
    copied = frame["class"] != "hit"
    assert (frame["landed_ns"].notna() == copied).all()
    assert (frame["landed_ns"] > frame["known_ns"])[copied].all()
    assert (frame["stall_ns"] <= frame["landed_ns"] - frame["known_ns"])[copied].all()


def test_a_copy_of_another_layer_is_not_the_landing_of_this_one(tmp_path: Path) -> None:
    table = EventTable(tmp_path / "events.parquet", 4)
    forward = decode(0, [[1, 2], [5]])
    table.copied(1, 0, PREFETCH, 0, 10)  # Before its routing: an early chunk of a late expert.
    table.demanded(forward, 0, 20, hits=[2], late=[1], missing=[])
    table.copied(6, 0, PREFETCH, 20, 30)
    table.copied(2, 0, DEMAND, 30, 35)
    table.copied(1, 1, PREFETCH, 35, 40)
    table.stalled(25, 40, 1, False)
    table.demanded(forward, 1, 50, hits=[5], late=[], missing=[])
    table.copied(1, 0, DEMAND, 60, 70)
    table.end_forward(forward, 80)
    table.close()
    assert [row[-2:] for row in read(table.path)] == [(15, 40), (0, None), (0, None)]


def test_a_stall_on_an_expert_that_is_not_demanded_is_our_mistake(tmp_path: Path) -> None:
    table = EventTable(tmp_path / "events.parquet", 4)
    table.demanded(decode(0, [[1]]), 0, 0, hits=[], late=[], missing=[1])
    with pytest.raises(AssertionError, match="a stall on expert key 2"):
        table.stalled(0, 5, 2, True)
    table.end_forward(decode(0, [[1]]), 9)
    with pytest.raises(AssertionError, match="a stall on expert key 1"):
        table.stalled(0, 5, 1, True)
    table.abort()


# -- the file ------------------------------------------------------------------------------------------------


def test_row_groups_are_written_as_the_run_goes_and_hold_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    whole, _ = written(tmp_path, at_random(), 8, 12)
    parts, counters = written(tmp_path / "small", at_random(), 8, 12, rows_per_group=50)
    assert read(parts) == read(whole)
    file = pq.ParquetFile(parts)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(sizes) == counters.num_accesses
    # A group ends with the first layer that fills it.
    assert all(50 <= size < 50 + 5 for size in sizes[:-1])
    assert pq.ParquetFile(whole).num_row_groups == 1


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, _ = written(tmp_path, at_random(), 8, 12)
    second, _ = written(tmp_path / "again", at_random(), 8, 12)
    assert first.read_bytes() == second.read_bytes()


def test_the_file_gets_its_name_at_close(tmp_path: Path) -> None:
    table = EventTable(tmp_path / "events.parquet", 4)
    run(by_hand(), 4, 3, [table])
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.name.startswith(".events.parquet.")
    table.close()
    assert [p.name for p in tmp_path.iterdir()] == ["events.parquet"]


def test_abort_leaves_nothing_but_what_was_closed(tmp_path: Path) -> None:
    table = EventTable(tmp_path / "events.parquet", 4)
    run(by_hand(), 4, 3, [table])
    table.abort()
    table.abort()
    assert list(tmp_path.iterdir()) == []
    path, _ = written(tmp_path, by_hand(), 4, 3)
    before = path.read_bytes()
    EventTable(path, 4).abort()
    assert path.read_bytes() == before


def test_abort_after_close_keeps_the_file_and_a_second_close_is_our_mistake(tmp_path: Path) -> None:
    table = EventTable(tmp_path / "events.parquet", 4)
    table.close()
    table.abort()
    assert read(table.path) == []
    assert pq.read_schema(table.path).equals(SCHEMA)
    with pytest.raises(AssertionError, match="is closed"):
        table.close()


def test_sizes_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_experts=0"):
        EventTable(tmp_path / "events.parquet", 0)
    with pytest.raises(ValueError, match="rows_per_group=0"):
        EventTable(tmp_path / "events.parquet", 4, rows_per_group=0)
    assert list(tmp_path.iterdir()) == []
