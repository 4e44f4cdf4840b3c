"""The log of a run: every call from runtime to machine, every wait and every record, as one Parquet file.

A row is a forward; what crossed in it stands in ten streams of whole numbers (lists), one for each kind of
quantity, so that neighbours are alike and a difference code makes them small. `op` says which calls were made
in which order, and with that how the other streams are read. Each row carries a running CRC-32 over the header
and all rows so far: a damaged or edited log is refused.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expertflow.forward import Forward
from expertflow.machine import GATE, LOAD, TOKEN, Chunk, Machine, Mark, Record, Wait
from expertflow.runtime import RunConfig

FORMAT = "expertflow-lockstep"
VERSION = 1
LOG_NAME = "records.parquet"
"""Name of the log in the folder of a run."""

VALUES_PER_GROUP = 1 << 20
"""Numbers held in memory before they are written, 8 bytes each; checked between forwards."""
MAX_GROUP_VALUES = 1 << 26
"""More numbers than this in one row group are refused on reading: no writer makes them."""
MAX_KEYS = 1 << 24

STREAMS = ("op", "layer", "key", "mark", "load", "slot", "after", "small", "size", "time")
"""small: counts, lengths, chunk numbers, flags. size: bytes of a chunk. time: ns on the run's clock."""
_DIFFERENCED = ("layer", "mark", "load", "time")
"""Streams that climb; the others repeat themselves and are left to the compressor as they are."""

_ATTENTION, _EXPERTS, _HEAD, _COPY, _DECIDED, _WAIT, _RECORD = range(7)
_KINDS = (GATE, TOKEN, LOAD)
_PACKAGES = ("expertflow", "numpy", "pyarrow")

_TYPES: dict[str, pa.DataType] = {
    "forward": pa.int64(),
    "crc": pa.int64(),
    **{name: pa.list_(pa.field("element", pa.uint8() if name == "op" else pa.int64(), nullable=False))
       for name in STREAMS},
}  # fmt: skip


class LogError(ValueError):
    """The file is no log that can be used: one line with the file, the fault and the remedy."""


# -- what a log says -----------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """`machine.attention` and the mark that it returned."""

    layer: int
    mark: int


class Experts(NamedTuple):
    """`machine.experts`, `counts` (tokens) in the order of `keys`, and the mark that it returned."""

    layer: int
    keys: tuple[int, ...]
    counts: tuple[int, ...] | None
    shared: bool
    mark: int


class Head(NamedTuple):
    """`machine.head` and the mark that it returned."""

    mark: int


class Copy(NamedTuple):
    """`machine.copy`."""

    load: int
    chunk: int
    key: int
    slot: int
    num_bytes: int
    after: int


class Decided(NamedTuple):
    """`machine.decided`."""

    wants: tuple[int, ...]


class Waited(NamedTuple):
    """A wait that the runtime yielded."""

    kind: int
    ident: int
    drain: bool


class Told(NamedTuple):
    """The record that the machine answered with."""

    now_ns: int
    chunks: tuple[Chunk, ...]
    marks: tuple[Mark, ...]


Event = Attention | Experts | Head | Copy | Decided | Waited | Told


@dataclass(frozen=True)
class LoggedForward:
    """All that crossed in the forward of this index, in order."""

    index: int
    events: list[Event]


def versions() -> dict[str, str]:
    """Python and the packages that a log depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@dataclass(frozen=True)
class LogHeader:
    """What a fresh policy needs to be driven by the log.

    world: which machine wrote it (sim, cuda, cpu). config: the plain configuration, as `sim.configure.checked`
    returns it; more keys may stand in it. run: what the runtime was built with, as it was after any scaling.
    """

    world: str
    config: dict[str, Any]
    overrides: list[str]
    run: RunConfig
    trace_sha256: str
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> str:
        """One line; ValueError for a configuration that JSON cannot hold."""
        try:
            return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, allow_nan=False)
        except TypeError as error:
            raise ValueError(f"config cannot be logged: {error}; give plain numbers, texts, lists and maps") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> LogHeader:
        """The header, checked; ValueError names the field."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("its header is no JSON") from None
        if not isinstance(given, dict) or given.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        found = given.pop("version", None)
        if found != VERSION or isinstance(found, bool):
            raise ValueError(f"its version is {found!r:.40}, this reads {VERSION}")
        _same_names(given, [one.name for one in fields(cls)], "header")
        for name, kind in (("world", str), ("config", dict), ("overrides", list), ("trace_sha256", str),
                           ("versions", dict)):  # fmt: skip
            if not isinstance(given[name], kind):
                raise ValueError(f"its header's {name} is no {kind.__name__}")
        if not all(isinstance(one, str) for one in (*given["overrides"], *given["versions"].values())):
            raise ValueError("its header's overrides and versions must be texts")
        return cls(**{**given, "run": _run_config(given["run"])})


def _same_names(given: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    for name in sorted(set(names) ^ set(given)):
        raise ValueError(f"its {place} {'lacks' if name in names else 'has an unknown'} {name[:40]!r}")


def _run_config(given: Any) -> RunConfig:
    if not isinstance(given, dict):
        raise ValueError("its header's run is no dict")
    _same_names(given, [one.name for one in fields(RunConfig)], "run")
    least = {"num_layers": 1, "num_experts": 1, "top_k": 1, "num_slots": 1, "channel_depth": 1, "num_staging": 0,
             "warmup_forwards": 0}  # fmt: skip
    for name, low in least.items():
        if type(given[name]) is not int or not low <= given[name] <= MAX_KEYS:
            raise ValueError(f"its run.{name}={given[name]!r:.40} is no whole number from {low} to {MAX_KEYS}")
    num_keys = given["num_layers"] * given["num_experts"]
    if num_keys > MAX_KEYS or given["num_slots"] > num_keys:
        raise ValueError(f"its run has {num_keys} experts and {given['num_slots']} slots; "
                         f"at most {MAX_KEYS}, and a slot each")  # fmt: skip
    for name in ("has_shared", "serial"):
        if not isinstance(given[name], bool):
            raise ValueError(f"its run.{name}={given[name]!r:.40} is neither true nor false")
    for name, low, high in (("chunk_bytes", 1, 1 << 50), ("initial", 0, num_keys - 1)):
        values = given[name]
        if not isinstance(values, list) or not all(type(one) is int and low <= one <= high for one in values):
            raise ValueError(f"its run.{name} is no list of whole numbers from {low} to {high}")
    if not given["chunk_bytes"]:
        raise ValueError("its run.chunk_bytes is empty")
    return RunConfig(**{**given, "chunk_bytes": tuple(given["chunk_bytes"]), "initial": tuple(given["initial"])})


# -- writing -------------------------------------------------------------------------------------------------


class _Buffer:
    """Forwards not yet written: the streams, and where in each of them every forward begins."""

    def __init__(self) -> None:
        self.streams = {name: array("B" if name == "op" else "q") for name in STREAMS}
        self.forwards: list[int] = []
        self.starts: dict[str, list[int]] = {name: [] for name in STREAMS}

    def begin(self, forward: int) -> None:
        self.forwards.append(forward)
        for name, stream in self.streams.items():
            self.starts[name].append(len(stream))

    @property
    def num_values(self) -> int:
        return sum(map(len, self.streams.values()))

    def clear(self) -> None:
        # In place: the appends of these arrays are bound elsewhere.
        self.forwards.clear()
        for name, stream in self.streams.items():
            del stream[:]
            self.starts[name].clear()

    def trim(self) -> None:
        """Drop the numbers of a call that was interrupted while it was written down: its op is missing."""
        if not self.forwards:
            return
        first = {name: starts[-1] for name, starts in self.starts.items()}
        row = {name: list(stream[first[name] :]) for name, stream in self.streams.items()}
        _, left = _decode(row)
        for name, stream in self.streams.items():
            del stream[len(stream) - left[name] :]


class LogWriter:
    """Streams a log to `path`: a temporary file beside it until `close` gives it its name; `abort` removes it.

    values_per_group: numbers that `LoggingMachine` holds before they are written. OSError from the file system.
    """

    def __init__(self, path: str | Path, header: LogHeader, values_per_group: int = VALUES_PER_GROUP) -> None:
        if not 1 <= values_per_group <= MAX_GROUP_VALUES // 2:
            raise ValueError(f"values_per_group={values_per_group} must be from 1 to {MAX_GROUP_VALUES // 2}")
        text = header.to_json().encode()
        self.path = Path(path)
        self.values_per_group = values_per_group
        self._partial = self.path.with_name(f".{self.path.name}.tmp")
        self._crc = zlib.crc32(text)
        schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _TYPES.items()],
                           metadata={FORMAT: text})  # fmt: skip
        plain = {f"{name}.list.element": "PLAIN" for name in STREAMS if name not in _DIFFERENCED and name != "op"}
        differenced = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in _DIFFERENCED}
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(
            self._partial, schema, compression="zstd", use_dictionary=["op.list.element"], write_statistics=False,
            column_encoding=differenced | plain)  # fmt: skip

    def write(self, buffer: _Buffer) -> None:
        """One row group of the forwards in `buffer`, which is emptied."""
        if not buffer.forwards:
            return
        if self._writer is None:
            raise AssertionError(f"{self.path} is closed")
        values = {name: np.array(stream, dtype="u1" if name == "op" else "<i8")
                  for name, stream in buffer.streams.items()}  # fmt: skip
        bounds = {name: [*starts, len(values[name])] for name, starts in buffer.starts.items()}
        crcs = []
        for row, forward in enumerate(buffer.forwards):
            parts = [values[name][bounds[name][row] : bounds[name][row + 1]] for name in STREAMS]
            self._crc = _crc(self._crc, forward, parts)
            crcs.append(self._crc)
        columns = [pa.array(buffer.forwards, pa.int64()), pa.array(crcs, pa.int64())]
        for name in STREAMS:
            offsets = pa.array(np.array(bounds[name], dtype=np.int32))
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values[name]), type=_TYPES[name]))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._writer.schema))
        buffer.clear()

    def close(self) -> None:
        """Give the file its name. A log of a run that broke off is closed like any other."""
        if self._writer is None:
            raise AssertionError(f"{self.path} is closed")
        self._writer.close()
        self._writer = None
        os.replace(self._partial, self.path)

    def abort(self) -> None:
        """Leave no file behind. Does nothing after `close`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.abort()
        elif self._writer is not None:
            self.close()


def _crc(crc: int, forward: int, parts: Sequence[Any]) -> int:
    """Running CRC-32 over one more row: index, lengths and little-endian values of its streams."""
    crc = zlib.crc32(np.array([forward, *map(len, parts)], dtype="<i8").tobytes(), crc)
    for part in parts:
        crc = zlib.crc32(part.tobytes(), crc)
    return crc


class LoggingMachine:
    """A machine that writes down what crosses between `machine` and the runtime, and is otherwise that machine.

    Each call costs a few appends to arrays; files are written in `begin_forward` alone, once the writer's
    `values_per_group` numbers are held. Who drives says what is waited for (`waited`) and what was answered
    (`answered`), and calls `flush` when the run has ended or broken off. The writer stays its owner's to close.
    """

    def __init__(self, machine: Machine, writer: LogWriter) -> None:
        self.machine = machine
        self.writer = writer
        self._buffer = buffer = _Buffer()
        # The op of a call is appended last: an interrupted call then leaves numbers without an op, see `trim`.
        self._op, self._layer, self._key, self._mark, self._load, self._slot, self._after, self._small, self._size, \
            self._time = (buffer.streams[name].append for name in STREAMS)  # fmt: skip
        self._keys = buffer.streams["key"].extend
        # Bound once: these are called thousands of times a second.
        self._run_attention, self._run_experts, self._run_head = machine.attention, machine.experts, machine.head
        self._run_copy, self._run_decided = machine.copy, machine.decided

    def begin_forward(self, forward: Forward) -> None:
        buffer = self._buffer
        if buffer.num_values >= self.writer.values_per_group:
            self.writer.write(buffer)
        buffer.begin(forward.index)
        self.machine.begin_forward(forward)

    def attention(self, layer: int) -> int:
        mark = self._run_attention(layer)
        self._layer(layer)
        self._mark(mark)
        self._op(_ATTENTION)
        return mark

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        mark = self._run_experts(layer, keys, counts, shared)
        small = self._small
        self._layer(layer)
        self._mark(mark)
        self._keys(keys)
        small(len(keys))
        small((counts is not None) * 2 + shared)
        if counts is not None:
            for key in keys:
                small(counts[key])
        self._op(_EXPERTS)
        return mark

    def head(self) -> int:
        mark = self._run_head()
        self._mark(mark)
        self._op(_HEAD)
        return mark

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        self._run_copy(load, chunk, key, slot, num_bytes, after)
        self._load(load)
        self._small(chunk)
        self._key(key)
        self._slot(slot)
        self._size(num_bytes)
        self._after(after)
        self._op(_COPY)

    def decided(self, wants: Sequence[int]) -> None:
        self._run_decided(wants)
        self._keys(wants)
        self._small(len(wants))
        self._op(_DECIDED)

    def waited(self, wait: Wait) -> None:
        """The runtime has yielded `wait`."""
        kind, ident, drain = wait
        (self._load if kind == LOAD else self._mark)(ident)
        self._small(kind * 2 + drain)
        self._op(_WAIT)

    def answered(self, record: Record) -> None:
        """The machine has answered the last wait with `record`."""
        now_ns, chunks, marks = record
        small, time = self._small, self._time
        small(len(chunks))
        small(len(marks))
        for load, chunk, start_ns, end_ns in chunks:
            self._load(load)
            small(chunk)
            time(start_ns)
            time(end_ns)
        for mark, start_ns, end_ns in marks:
            self._mark(mark)
            time(start_ns)
            time(end_ns)
        time(now_ns)
        self._op(_RECORD)

    def flush(self) -> None:
        """Write what is held. After this, nothing more may be logged of the forward that is running."""
        self._buffer.trim()
        self.writer.write(self._buffer)


# -- reading -------------------------------------------------------------------------------------------------


def _decode(row: Mapping[str, Sequence[int]]) -> tuple[list[Event], dict[str, int]]:
    """The events of one forward, and how many numbers of each stream are left over; ValueError if too few."""
    streams = {name: iter(values) for name, values in row.items()}
    take: dict[str, Callable[[], int]] = {name: stream.__next__ for name, stream in streams.items()}
    layer, key, mark, load, slot, after, small, size, time = (take[name] for name in STREAMS[1:])
    events: list[Event] = []
    try:
        for op in streams["op"]:
            if op == _RECORD:
                num_chunks, num_marks = small(), small()
                chunks = tuple([(load(), small(), time(), time()) for _ in range(num_chunks)])
                marks = tuple([(mark(), time(), time()) for _ in range(num_marks)])
                events.append(Told(time(), chunks, marks))
            elif op == _WAIT:
                kind, drain = divmod(small(), 2)
                events.append(Waited(kind, load() if kind == LOAD else mark(), bool(drain)))
            elif op == _COPY:
                events.append(Copy(load(), small(), key(), slot(), size(), after()))
            elif op == _DECIDED:
                events.append(Decided(tuple([key() for _ in range(small())])))
            elif op == _ATTENTION:
                events.append(Attention(layer(), mark()))
            elif op == _EXPERTS:
                count, flags = small(), small()
                keys = tuple([key() for _ in range(count)])
                if not 0 <= flags <= 3:
                    raise ValueError(f"experts have the flags {flags}")
                counts = tuple([small() for _ in range(count)]) if flags & 2 else None
                events.append(Experts(layer(), keys, counts, bool(flags & 1), mark()))
            elif op == _HEAD:
                events.append(Head(mark()))
            else:
                raise ValueError(f"op {op} is unknown")
    except StopIteration:
        raise ValueError("a stream ends too soon") from None
    return events, {name: length_hint(stream) for name, stream in streams.items()}


class LogReader:
    """A log, a forward at a time; memory holds one row group. Everything read is checked before it is given.

    header: see `LogHeader`. num_forwards: rows, the last of which may be of a forward that broke off.
    LogError for a file that is no log, damaged, edited or truncated; a context manager.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise LogError(f"{self.path}: no such file; give a log, or the folder of a run made with log=true")
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._fault(f"no readable Parquet file ({_first_line(error)})") from None
        try:
            self._check_shape()
            text = (self._file.schema_arrow.metadata or {}).get(FORMAT.encode(), b"")
            self.header = LogHeader.from_json(text)
        except ValueError as error:
            self.close()
            raise (error if isinstance(error, LogError) else self._fault(str(error))) from None
        self._seed = zlib.crc32(text)
        self.num_forwards: int = self._file.metadata.num_rows

    def _fault(self, what: str) -> LogError:
        return LogError(f"{self.path}: {what}; log the run again")

    def _check_shape(self) -> None:
        schema = self._file.schema_arrow
        if schema.names != list(_TYPES):
            raise self._fault(f"its columns are {', '.join(schema.names)[:80]}, not those of a log")
        for one in schema:
            if one.type != _TYPES[one.name] or one.nullable:
                raise self._fault(f"its column {one.name} is {one.type}, not {_TYPES[one.name]} without null")
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            sizes = [metadata.row_group(group).column(column).num_values for column in range(metadata.num_columns)]
            if sum(sizes) > MAX_GROUP_VALUES:
                raise self._fault(f"row group {group} claims {sum(sizes)} numbers, more than {MAX_GROUP_VALUES}")

    def __iter__(self) -> Iterator[LoggedForward]:
        """From the first forward on."""
        crc, before, now_ns = self._seed, -1, -sys.maxsize
        for group in range(self._file.num_row_groups):
            try:
                table = self._file.read_row_group(group).combine_chunks()
                table.validate(full=True)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._fault(f"row group {group} cannot be read ({_first_line(error)})") from None
            lists = [table.column(name).combine_chunks() for name in STREAMS]
            if any(column.null_count for column in table.columns) or any(one.values.null_count for one in lists):
                raise self._fault(f"row group {group} has nulls")
            values = [np.asarray(one.values.to_numpy(zero_copy_only=False)) for one in lists]
            offsets = [one.offsets.to_pylist() for one in lists]
            indices, crcs = table.column("forward").to_pylist(), table.column("crc").to_pylist()
            for row, index in enumerate(indices):
                parts = [value[place[row] : place[row + 1]] for value, place in zip(values, offsets, strict=True)]
                crc = _crc(crc, index, parts)
                if crc != crcs[row]:
                    raise self._fault(f"forward {index} is damaged or edited: its CRC-32 is {crc}, not {crcs[row]}")
                if index <= before:
                    raise self._fault(f"forward {index} comes after forward {before}")
                before = index
                try:
                    events, left = _decode(dict(zip(STREAMS, (part.tolist() for part in parts), strict=True)))
                    if any(left.values()):
                        raise ValueError(f"stream {next(name for name in STREAMS if left[name])} has too many numbers")
                    now_ns = self._check(events, now_ns)
                except ValueError as error:
                    raise self._fault(f"forward {index}: {error}") from None
                yield LoggedForward(index, events)

    def _check(self, events: Sequence[Event], now_ns: int) -> int:
        """Bounds of one forward; returns its last time."""
        run = self.header.run
        num_keys, num_chunks = run.num_layers * run.num_experts, len(run.chunk_bytes)
        num_slots = run.num_slots + run.num_staging * run.num_layers

        def within(what: str, value: int, stop: int, first: int = 0) -> None:
            if not first <= value < stop:
                raise ValueError(f"{what} {value} is not from {first} to {stop - 1}")

        for event in events:
            if isinstance(event, Told):
                if event.now_ns < now_ns:
                    raise ValueError(f"a record at {event.now_ns} ns follows one at {now_ns} ns")
                now_ns = event.now_ns
                for _, chunk, start_ns, end_ns in event.chunks:
                    within("chunk", chunk, num_chunks)
                    within("start of a chunk", start_ns, end_ns + 1, -sys.maxsize)
                for mark, start_ns, end_ns in event.marks:
                    within("mark", mark, sys.maxsize, 1)
                    within("start of a mark", start_ns, end_ns + 1, -sys.maxsize)
            elif isinstance(event, Waited):
                if event.kind not in _KINDS:
                    raise ValueError(f"a wait of kind {event.kind} is unknown")
            elif isinstance(event, Copy):
                within("chunk", event.chunk, num_chunks)
                within("key", event.key, num_keys)
                within("slot", event.slot, num_slots)
            elif isinstance(event, Decided | Experts):
                for key in event.wants if isinstance(event, Decided) else event.keys:
                    within("key", key, num_keys)
            if isinstance(event, Attention | Experts):
                within("layer", event.layer, run.num_layers)
            if isinstance(event, Attention | Experts | Head):
                within("mark", event.mark, sys.maxsize, 1)
        return now_ns

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:120]
