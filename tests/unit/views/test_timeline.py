"""The timeline shows every nanosecond once, and says what waited for what."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from expertflow.parts import PREFETCH
from sim.views.timeline import Frames, Timeline, load_timeline
from tests.unit.views.support import RUNS, at_random, by_hand, run


def lengths(frame: pd.DataFrame) -> int:
    return int((frame["end_ns"] - frame["start_ns"]).sum())


def overlaps(frame: pd.DataFrame) -> bool:
    return any(start < end for end, start in zip(frame["end_ns"][:-1], frame["start_ns"][1:], strict=True))


def by_hand_written(folder: Path) -> Path:
    timeline = Timeline("lru", 4)
    run(by_hand(), 4, 3, [timeline])
    path = folder / "timeline.json"
    timeline.write(path)
    return path


def rows(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(frame.itertuples(index=False, name=None))


# -- the file ------------------------------------------------------------------------------------------------


def test_the_file_is_a_chrome_trace_in_microseconds(tmp_path: Path) -> None:
    document = json.loads(by_hand_written(tmp_path).read_text())
    assert document["displayTimeUnit"] == "ns"
    events = document["traceEvents"]
    assert {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "lru"}} in events
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {1: "compute", 2: "link", 3: "stalls"}
    slices = [e for e in events if e["ph"] == "X"]
    assert slices[0] == {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "name": "L0 attention",
        "cat": "attention",
        "ts": 0.0,
        "dur": 0.1,
        "args": {"layer": 0},
    }
    assert [e["name"] for e in slices if e["tid"] == 1] == [
        "L0 attention",
        "L0/E1",
        "L1 attention",
        "L1/E2",
        "head",
        "L0 attention",
        "L0/E1",
        "L1 attention",
        "L1/E3",
        "head",
    ]
    assert [e["name"] for e in slices if e["tid"] == 3] == ["miss L0/E1", "late L1/E2", "late L1/E3"]


def test_nanoseconds_stand_as_three_decimals(tmp_path: Path) -> None:
    timeline = Timeline("lru", 4)
    timeline.copied(6, 1, PREFETCH, 123_456_789_001_002, 123_456_789_002_007)
    timeline.write(tmp_path / "t.json")
    assert '"ts":123456789001.002,"dur":1.005,' in (tmp_path / "t.json").read_text()
    expected = (123_456_789_001_002, 123_456_789_002_007, 1, 2, 1, "prefetch")
    assert rows(load_timeline(tmp_path / "t.json").link) == [expected]


def test_demand_and_prefetch_differ_in_category_and_colour(tmp_path: Path) -> None:
    events = json.loads(by_hand_written(tmp_path).read_text())["traceEvents"]
    copies = [e for e in events if e["ph"] == "X" and e["tid"] == 2]
    assert [e["cat"] for e in copies] == ["demand"] * 2 + ["prefetch"] * 4
    assert len({(e["cat"], e["cname"]) for e in copies}) == len({e["cname"] for e in copies}) == 2


def test_a_group_of_many_experts_names_the_first_and_lists_all(tmp_path: Path) -> None:
    timeline = Timeline("lru", 8)
    timeline.computed("experts", 1, [8, 9, 10, 11, 12, 15], 0, 10)
    timeline.computed("experts", 1, [], 10, 20)
    timeline.write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "X"] == ["L1/E0 E1 E2 E3 +2", "L1/shared"]
    assert list(load_timeline(tmp_path / "t.json").compute["experts"]) == [(0, 1, 2, 3, 4, 7), ()]


def test_a_name_with_quotes_is_escaped(tmp_path: Path) -> None:
    Timeline('my "best"\n', 4).write(tmp_path / "t.json")
    process = json.loads((tmp_path / "t.json").read_text())["traceEvents"][0]
    assert process["args"]["name"] == 'my "best"\n'


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = by_hand_written(tmp_path).read_bytes()
    (tmp_path / "again").mkdir()
    assert by_hand_written(tmp_path / "again").read_bytes() == first


def test_a_failed_write_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path: Path) -> None:
    path = by_hand_written(tmp_path)
    before = path.read_bytes()
    timeline = Timeline("lru", 4)
    timeline.name = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        timeline.write(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]


# -- the contents --------------------------------------------------------------------------------------------


def test_the_run_by_hand_to_the_nanosecond(tmp_path: Path) -> None:
    frames = load_timeline(by_hand_written(tmp_path))
    assert rows(frames.compute) == [
        (0, 100, "attention", 0, ()),
        (2100, 2150, "experts", 0, (1,)),
        (2150, 2250, "attention", 1, ()),
        (4100, 4150, "experts", 1, (2,)),
        (4150, 4180, "head", -1, ()),
        (4180, 4280, "attention", 0, ()),
        (4280, 4330, "experts", 0, (1,)),
        (4330, 4430, "attention", 1, ()),
        (6280, 6330, "experts", 1, (3,)),
        (6330, 6360, "head", -1, ()),
    ]
    assert rows(frames.link) == [
        (100, 1100, 0, 1, 0, "demand"),
        (1100, 2100, 0, 1, 1, "demand"),
        (2100, 3100, 1, 2, 0, "prefetch"),
        (3100, 4100, 1, 2, 1, "prefetch"),
        (4280, 5280, 1, 3, 0, "prefetch"),
        (5280, 6280, 1, 3, 1, "prefetch"),
    ]
    assert rows(frames.stalls) == [(100, 2100, 0, 1, "miss"), (2250, 4100, 1, 2, "late"), (4430, 6280, 1, 3, "late")]
    assert rows(frames.horizon) == [(100, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_slices_add_up_to_the_counters_and_never_overlap(name: str, tmp_path: Path) -> None:
    num_slots, how = RUNS[name]
    timeline = Timeline(name, 8)
    counters = run(at_random(), 8, num_slots, [timeline], **how).counters
    timeline.write(tmp_path / "t.json")
    frames = load_timeline(tmp_path / "t.json")
    assert lengths(frames.compute) == counters.compute_ns > 0
    assert lengths(frames.stalls) == counters.stall_ns > 0
    assert lengths(frames.stalls[frames.stalls["kind"] == "late"]) == counters.late_stall_ns
    assert lengths(frames.link) == counters.link_busy_ns
    busy = pd.concat([frames.compute, frames.stalls]).sort_values(["start_ns", "end_ns"])
    assert not overlaps(frames.compute)
    assert not overlaps(frames.link)
    assert not overlaps(busy)
    assert int(busy["end_ns"].max()) <= counters.elapsed_ns


def test_an_overlap_would_be_found() -> None:
    assert overlaps(pd.DataFrame({"start_ns": [0, 9], "end_ns": [10, 20]}))
    assert not overlaps(pd.DataFrame({"start_ns": [0, 10], "end_ns": [10, 20]}))


def test_the_horizon_is_kept_when_it_changes(tmp_path: Path) -> None:
    timeline = Timeline("adaptive", 4)
    for now_ns, distances in [(0, [1]), (5, [1, 2]), (7, [2]), (9, []), (2001, [1, 2, 3])]:
        timeline.horizon(now_ns, distances)
    timeline.write(tmp_path / "t.json")
    assert rows(load_timeline(tmp_path / "t.json").horizon) == [(0, 1), (5, 2), (9, 0), (2001, 3)]
    counts = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "C"]
    assert counts[3] == {"ph": "C", "pid": 1, "name": "horizon S", "ts": 2.001, "args": {"layers": 3}}


# -- limits --------------------------------------------------------------------------------------------------


def test_the_last_event_that_fits_is_kept_and_the_next_refused(tmp_path: Path) -> None:
    events = Timeline("lru", 4)
    run(by_hand(), 4, 3, [events])
    assert events.num_events == 10 + 6 + 3 + 1
    run(by_hand(), 4, 3, [Timeline("lru", 4, max_events=20)])
    with pytest.raises(ValueError, match=r"timeline=true: the run has more than 19 events.*max_tokens"):
        run(by_hand(), 4, 3, [Timeline("lru", 4, max_events=19)])


def test_an_empty_run_has_empty_frames_of_the_same_columns(tmp_path: Path) -> None:
    Timeline("lru", 4).write(tmp_path / "t.json")
    empty, full = load_timeline(tmp_path / "t.json"), load_timeline(by_hand_written(tmp_path))
    for frame, other in zip(empty, full, strict=True):
        assert len(frame) == 0
        assert list(frame.columns) == list(other.columns)
        assert list(frame.dtypes) == list(other.dtypes)
    assert isinstance(empty, Frames)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts=0"):
        Timeline("lru", 0)
    with pytest.raises(ValueError, match="max_events=0"):
        Timeline("lru", 4, max_events=0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents":[{"ph":"X","tid":99}]}', '{"traceEvents":'])
def test_another_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a timeline of this project"):
        load_timeline(tmp_path / "other.json")


def test_marks_stand_in_stream_order(tmp_path: Path) -> None:
    frames = load_timeline(by_hand_written(tmp_path))
    for frame in (frames.compute, frames.link, frames.stalls):
        assert all(a <= b for a, b in pairwise(frame["start_ns"]))
