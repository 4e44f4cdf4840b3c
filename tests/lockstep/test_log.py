"""Logs as files: what is written is read, and what is no log is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.machine import Costs
from replay.lockstep.compare import main
from replay.lockstep.log import LoggingMachine, LogWriter
from replay.lockstep.log_format import (
    STRETCH_OF_ONE,
    Attention,
    Copy,
    Decided,
    Estimated,
    Event,
    Experts,
    Head,
    HostEnded,
    LogError,
    LoggedForward,
    LogHeader,
    OnHost,
    Told,
    Waited,
)
from replay.lockstep.log_reader import LogReader
from replay.lost import DeviceLostError
from replay.run import PartialRunError
from tests.lockstep.support import SMALL_RUN, edited, read_events, small_header, some_forwards, write_events

BIG = 2**62
keys = st.integers(0, 23)
marks = st.integers(1, BIG)
loads = st.integers(-BIG, BIG)
spans = st.tuples(st.integers(-BIG, BIG), st.integers(0, BIG - 1)).map(lambda span: (span[0], span[0] + span[1]))
"""(start, end): a log holds 64 bits, and 2^62 + 2^62 is one too many."""


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    chosen = tuple(draw(st.lists(keys, unique=True, max_size=6)))
    tokens = tuple(draw(st.integers(0, BIG)) for _ in chosen)
    return Experts(
        draw(st.integers(0, 2)), chosen, draw(st.sampled_from([None, tokens])), draw(st.booleans()), draw(marks)
    )


@st.composite
def on_host(draw: st.DrawFn) -> OnHost:
    chosen = tuple(draw(st.lists(keys, unique=True, max_size=6)))
    return OnHost(chosen, tuple(draw(st.integers(0, BIG)) for _ in chosen), draw(marks))


@st.composite
def estimated(draw: st.DrawFn) -> Estimated:
    times = st.integers(0, BIG)
    tokens = tuple(draw(st.lists(times, max_size=6)))
    gpu_ns, host_ns = ([draw(times) for _ in tokens] for _ in range(2))
    stretch = draw(st.integers(STRETCH_OF_ONE, 1 << 40)) / STRETCH_OF_ONE
    return Estimated(tokens, Costs(draw(times), draw(times), gpu_ns, host_ns, draw(times), stretch))


events = st.one_of(
    on_host(),
    estimated(),
    st.builds(
        HostEnded, st.lists(st.tuples(marks, keys, spans).map(lambda r: (r[0], r[1], *r[2])), max_size=3).map(tuple)
    ),
    st.builds(Attention, st.integers(0, 2), marks),
    experts(),
    st.builds(Head, marks),
    st.builds(Copy, loads, st.integers(0, 1), keys, st.integers(0, 8), st.integers(0, BIG), st.integers(0, BIG)),
    st.builds(Decided, st.lists(keys, max_size=30).map(tuple)),
    st.builds(Waited, st.integers(0, 3), loads, st.booleans()),
    st.builds(
        Told,
        st.just(0),
        st.lists(st.tuples(loads, st.integers(0, 1), spans).map(lambda c: (c[0], c[1], *c[2])), max_size=3).map(tuple),
        st.lists(st.tuples(marks, spans).map(lambda m: (m[0], *m[1])), max_size=3).map(tuple),
    ),
)


def in_time(forwards: list[list[Event]], steps: list[int]) -> list[LoggedForward]:
    """Records at climbing times, forwards at climbing indices."""
    now, made = -5, []
    for index, row in enumerate(forwards):
        timed: list[Event] = []
        for place, event in enumerate(row):
            if isinstance(event, Told):
                now += steps[place % len(steps)]
                event = event._replace(now_ns=now)
            timed.append(event)
        made.append(LoggedForward(index * 2, timed))
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(events, max_size=12), max_size=6),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=4),
    st.sampled_from([1, 40, 1 << 20]),
)
def test_what_is_written_is_read(forwards: list[list[Event]], steps: list[int], values_per_group: int) -> None:
    made = in_time(forwards, steps)
    with TemporaryDirectory() as folder:
        path = write_events(Path(folder) / "log.parquet", small_header(), made, values_per_group)
        assert read_events(path) == made
        if values_per_group == 1:
            assert pq.ParquetFile(path).num_row_groups >= sum(bool(one.events) for one in made)


def test_groups_are_written_as_the_run_goes(tmp_path: Path) -> None:
    """Memory holds what one group holds."""
    row = some_forwards()[1].events
    long = [LoggedForward(index, [event for event in row if not isinstance(event, Told)]) for index in range(50)]
    path = write_events(tmp_path / "log.parquet", small_header(), long, values_per_group=20)
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups > 10
    assert max(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)) <= 4
    assert read_events(path) == long


def test_header_is_kept(tmp_path: Path) -> None:
    header = small_header(config={"a": [1, 2.5, None, True, "x"], "b": {"c": {}}}, overrides=["+a=1"], world="cuda")
    with LogReader(write_events(tmp_path / "log.parquet", header, some_forwards())) as reader:
        assert reader.header == header
        assert reader.header.run == SMALL_RUN
        assert reader.num_forwards == 2
        assert set(reader.header.versions) >= {"python", "pyarrow"}
        assert list(reader) == list(reader) == some_forwards()


@pytest.mark.parametrize("config", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_a_configuration_that_json_cannot_hold(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LogWriter(tmp_path / "log.parquet", small_header(config=config))
    assert not list(tmp_path.iterdir())


def test_nothing_has_the_name_before_it_is_whole(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log.parquet", small_header())
    assert not (tmp_path / "log.parquet").exists()
    writer.close()
    assert [one.name for one in tmp_path.iterdir()] == ["log.parquet"]
    writer.abort()
    assert read_events(tmp_path / "log.parquet") == []
    with pytest.raises(AssertionError):
        writer.close()


def test_abort_leaves_nothing_and_an_older_log_alone(tmp_path: Path) -> None:
    path = write_events(tmp_path / "log.parquet", small_header(), some_forwards())
    before = path.read_bytes()
    with pytest.raises(KeyError), LogWriter(path, small_header()):
        raise KeyError
    assert [one.name for one in tmp_path.iterdir()] == ["log.parquet"]
    assert path.read_bytes() == before


def test_the_log_of_a_lost_device_is_kept(tmp_path: Path) -> None:
    with pytest.raises(PartialRunError), LogWriter(tmp_path / "log.parquet", small_header()):
        raise PartialRunError("gone", {}) from DeviceLostError("gone")
    assert read_events(tmp_path / "log.parquet") == []


def test_a_call_interrupted_while_it_is_written_down_is_left_out(tmp_path: Path) -> None:
    class Broken(LoggingMachine):
        def start_a_copy(self) -> None:
            self._load(3)
            self._small(0)
            self._key(2)

    machine = SimpleNamespace(
        begin_forward=lambda forward: None,
        attention=lambda layer: 1,
        experts=None,
        head=None,
        copy=None,
        decided=None,
        wait=None,
    )
    with LogWriter(tmp_path / "log.parquet", small_header()) as writer:
        logging = Broken(cast(Any, machine), writer)
        logging.begin_forward(cast(Any, SimpleNamespace(index=0)))
        logging.attention(0)
        logging.start_a_copy()
        logging.flush()
    assert read_events(tmp_path / "log.parquet") == [LoggedForward(0, [Attention(0, 1)])]


# -- files that are no logs ----------------------------------------------------------------------------------


def refused(path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the reader and by the command, in one line that names the file."""
    with pytest.raises(LogError, match=what) as caught:
        read_events(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_events(tmp_path / "good.parquet", small_header(), some_forwards())


def test_files_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.parquet"
    refused(path, "no such file", capsys)
    path.mkdir()
    with pytest.raises(LogError, match="no such file"):
        LogReader(path)
    path.rmdir()
    for content in (b"", b"PAR1", b"no log at all\n" * 50, b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        refused(path, "no readable Parquet file", capsys)
    pq.write_table(pa.table({"x": [1]}), path)
    refused(path, "not those of a log", capsys)


def test_truncated_anywhere(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = good.read_bytes()
    for length in range(0, len(content), 97):
        path = tmp_path / "cut.parquet"
        path.write_bytes(content[:length])
        refused(path, "no readable Parquet file", capsys)


@pytest.mark.slow
def test_a_flipped_byte_is_never_taken(good: Path, tmp_path: Path) -> None:
    """Refused, or without consequence (bytes that nobody reads)."""
    content, path, num_refused = good.read_bytes(), tmp_path / "flipped.parquet", 0
    with LogReader(good) as reader:
        header = reader.header
    for place in range(0, len(content), 13):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        try:
            with LogReader(path) as reader:
                assert list(reader) == some_forwards()
                assert reader.header == header
        except LogError:
            num_refused += 1
    assert num_refused > 50


def header_with(**changes: Any) -> bytes:
    given_header = json.loads(small_header().to_json())
    for key, value in changes.items():
        target = given_header["run"] if key.startswith("run_") else given_header
        name = key.removeprefix("run_")
        if value is ...:
            del target[name]
        else:
            target[name] = value
    return json.dumps(given_header).encode()


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "format"),
        (b"{}", "format"),
        (header_with(format="other"), "format"),
        (header_with(version=2), "version is 2"),
        (header_with(version=True), "version is True"),
        (header_with(world=...), "lacks 'world'"),
        (header_with(more=1), "unknown 'more'"),
        (header_with(world=3), "world is no str"),
        (header_with(config=[]), "config is no dict"),
        (header_with(overrides=[1]), "must be texts"),
        (header_with(versions={"python": 3}), "must be texts"),
        (header_with(run=[]), "run is no dict"),
        (header_with(run_num_layers=...), "lacks 'num_layers'"),
        (header_with(run_num_layers=0), "run.num_layers=0"),
        (header_with(run_num_layers=True), "run.num_layers=True"),
        (header_with(run_num_experts=2**24), "experts"),
        (header_with(run_num_slots=25), "25 slots"),
        (header_with(run_num_staging=-1), "run.num_staging"),
        (header_with(run_serial=1), "run.serial"),
        (header_with(run_chunk_bytes=[]), "chunk_bytes is empty"),
        (header_with(run_chunk_bytes=[1.5]), "run.chunk_bytes"),
        (header_with(run_initial=[24]), "run.initial"),
    ],
)
def test_headers(good: Path, tmp_path: Path, header: bytes, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(edited(good, tmp_path / "bad.parquet", lambda columns: None, header=header), what, capsys)


def test_header_belongs_to_its_rows(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edited(good, tmp_path / "bad.parquet", lambda columns: None, header=header_with(world="cuda"))
    refused(path, "forward 0 is damaged or edited", capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda columns: [column.pop(0) for column in columns.values()],
        lambda columns: columns["crc"].__setitem__(1, 0),
        lambda columns: columns["forward"].__setitem__(0, 7),
        lambda columns: columns["time"][0].pop(),
        lambda columns: [column.reverse() for column in columns.values()],
    ],
)
def test_rows_changed_without_the_seal(
    good: Path, tmp_path: Path, change: Callable[[dict[str, list[Any]]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(edited(good, tmp_path / "bad.parquet", change), "damaged or edited", capsys)


def test_column_types(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(good)
    path = tmp_path / "bad.parquet"
    for name, kind in (("time", pa.list_(pa.int32())), ("crc", pa.float64()), ("op", pa.list_(pa.int64()))):
        columns = [
            column.cast(kind) if field.name == name else column
            for field, column in zip(table.schema, table.columns, strict=True)
        ]
        made = pa.table(columns, names=table.schema.names).replace_schema_metadata(table.schema.metadata)
        pq.write_table(made, path)
        refused(path, "its column", capsys)
    nullable = pa.schema([field.with_nullable(True) for field in table.schema], metadata=table.schema.metadata)
    pq.write_table(table.cast(nullable), path)
    refused(path, "without null", capsys)


@pytest.mark.parametrize(
    ("event", "what"),
    [
        (Attention(3, 1), "layer 3 is not from 0 to 2"),
        (Attention(-1, 1), "layer -1"),
        (Attention(0, 0), "mark 0"),
        (Head(-1), "mark -1"),
        (Experts(0, (24,), None, False, 1), "key 24 is not from 0 to 23"),
        (Decided((-1,)), "key -1"),
        (Copy(1, 2, 0, 0, 4, 0), "chunk 2"),
        (Copy(1, 0, 24, 0, 4, 0), "key 24"),
        (Copy(1, 0, 0, 9, 4, 0), "slot 9"),
        (Waited(4, 1, False), "wait of kind 4"),
        (Told(-6, (), ()), "follows one at"),
        (Told(5, ((1, 2, 0, 0),), ()), "chunk 2"),
        (Told(5, ((1, 0, 4, 3),), ()), "start of a chunk"),
        (Told(5, (), ((0, 0, 1),)), "mark 0"),
        (Told(5, (), ((1, 2, 1),)), "start of a mark"),
        (OnHost((24,), (1,), 1), "key 24"),
        (OnHost((1,), (1,), 0), "host task 0"),
        (HostEnded(((1, 24, 0, 1),)), "key 24"),
        (HostEnded(((0, 1, 0, 1),)), "host task 0"),
        (HostEnded(((1, 1, 2, 1),)), "start of a host's result"),
        (Estimated((1,), Costs(1, 1, [1], [-1], 1, 1.0)), "time of an estimate -1"),
        (Estimated((1,), Costs(1, 1, [1], [1], 1, 0.5)), "stretch 0.5 is below 1"),
    ],
)
def test_numbers_out_of_bounds(tmp_path: Path, event: Event, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    forwards = [LoggedForward(0, [Told(-5, (), ())]), LoggedForward(1, [event])]
    refused(write_events(tmp_path / "log.parquet", small_header(), forwards), f"forward 1: .*{what}", capsys)


def test_forwards_out_of_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forwards = [LoggedForward(1, []), LoggedForward(1, [])]
    refused(write_events(tmp_path / "log.parquet", small_header(), forwards), "comes after", capsys)


def test_values_per_group_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="values_per_group=0"):
        LogWriter(tmp_path / "log.parquet", small_header(), 0)


def test_header_of_every_field() -> None:
    header = small_header()
    assert LogHeader.from_json(header.to_json()) == header
    assert set(json.loads(header.to_json())) == {"format", "version", *asdict(header)}


def test_no_torch() -> None:
    code = "import sys, replay.lockstep.compare, replay.drive, replay.lockstep.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
