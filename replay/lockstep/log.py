"""Writing the log of a run while it runs; see `replay.lockstep.log_format` for what it holds."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expertflow.forward import Forward
from expertflow.machine import HOST, LOAD, Read, Record, StorageMachine, Wait
from replay.drive import BlockingMachine
from replay.lockstep.log_format import (
    ATTENTION,
    COPY,
    DECIDED,
    DIFFERENCED,
    EXPERTS,
    FORMAT,
    HEAD,
    MAX_GROUP_VALUES,
    READ,
    READS,
    RECORD,
    STREAMS,
    TYPES,
    VALUES_PER_GROUP,
    WAIT,
    LogHeader,
    decode,
    running_crc,
)
from replay.lost import close_at_end, loss
from traces.files import writing
from traces.processes.whole import Unfinished


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
        _, left = decode(row)
        for name, stream in self.streams.items():
            del stream[len(stream) - left[name] :]


class LogWriter:
    """Streams a log to `path`: a temporary file beside it until `close` gives it its name; `abort` removes it.

    values_per_group: numbers that `LoggingMachine` holds before they are written. ValueError where the file system
    refuses: the log's name, the reason and a remedy.
    """

    def __init__(self, path: str | Path, header: LogHeader, values_per_group: int = VALUES_PER_GROUP) -> None:
        if not 1 <= values_per_group <= MAX_GROUP_VALUES // 2:
            raise ValueError(f"values_per_group={values_per_group} must be from 1 to {MAX_GROUP_VALUES // 2}")
        text = header.to_json().encode()
        self.path = Path(path)
        self.values_per_group = values_per_group
        with writing(self.path):
            self._unfinished = Unfinished(self.path)
        self._crc = zlib.crc32(text)
        schema = pa.schema(
            [pa.field(name, kind, nullable=False) for name, kind in TYPES.items()], metadata={FORMAT: text}
        )
        plain = {f"{name}.list.element": "PLAIN" for name in STREAMS if name not in DIFFERENCED and name != "op"}
        differenced = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in DIFFERENCED}
        with writing(self.path):
            self._writer: pq.ParquetWriter | None = pq.ParquetWriter(
                self._unfinished.path,
                schema,
                compression="zstd",
                use_dictionary=["op.list.element"],
                write_statistics=False,
                column_encoding=differenced | plain,
            )
        close_at_end(self)

    def write(self, buffer: _Buffer) -> None:
        """One row group of the forwards in `buffer`, which is emptied."""
        if not buffer.forwards:
            return
        if self._writer is None:
            raise AssertionError(f"{self.path} is closed")
        values = {
            name: np.array(stream, dtype="u1" if name == "op" else "<i8") for name, stream in buffer.streams.items()
        }
        bounds = {name: [*starts, len(values[name])] for name, starts in buffer.starts.items()}
        crcs = []
        for row, forward in enumerate(buffer.forwards):
            parts = [values[name][bounds[name][row] : bounds[name][row + 1]] for name in STREAMS]
            self._crc = running_crc(self._crc, forward, parts)
            crcs.append(self._crc)
        columns = [pa.array(buffer.forwards, pa.int64()), pa.array(crcs, pa.int64())]
        for name in STREAMS:
            offsets = pa.array(np.array(bounds[name], dtype=np.int32))
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values[name]), type=TYPES[name]))
        with writing(self.path):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._writer.schema))
        buffer.clear()

    def close(self) -> None:
        """Give the file its name. A log of a run that broke off is closed like any other."""
        if self._writer is None:
            raise AssertionError(f"{self.path} is closed")
        with writing(self.path):
            self._writer.close()
            self._writer = None
            self._unfinished.finish()

    def abort(self) -> None:
        """Leave no file behind. Does nothing after `close`."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
            self._unfinished.abandon()

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What a lost device has told until then is worth reading.
        if kind is not None and loss(error) is None:
            self.abort()
        elif self._writer is not None:
            self.close()


class LoggingMachine:
    """A machine that writes down what crosses between `machine` and the runtime, and is otherwise that machine.

    Each call costs a few appends to arrays; files are written in `begin_forward` alone, once the writer's
    `values_per_group` numbers are held. It is put on before the runtime is made; who drives it calls `flush` when the
    run has ended or broken off. The writer stays its owner's to close.
    """

    def __init__(self, machine: BlockingMachine, writer: LogWriter) -> None:
        self.machine = machine
        self.writer = writer
        self._buffer = buffer = _Buffer()
        # The op of a call is appended last: an interrupted call then leaves numbers without an op, see `trim`.
        (
            self._op,
            self._layer,
            self._key,
            self._mark,
            self._load,
            self._slot,
            self._after,
            self._small,
            self._size,
            self._time,
        ) = (buffer.streams[name].append for name in STREAMS)
        self._keys = buffer.streams["key"].extend
        # Bound once: these are called thousands of times a second.
        self._run_attention, self._run_experts, self._run_head = machine.attention, machine.experts, machine.head
        self._storage = cast(StorageMachine, machine)
        self._run_copy, self._run_decided, self._block = machine.copy, machine.decided, machine.wait

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
        self._op(ATTENTION)
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
        self._op(EXPERTS)
        return mark

    def head(self) -> int:
        mark = self._run_head()
        self._mark(mark)
        self._op(HEAD)
        return mark

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        self._run_copy(load, chunk, key, slot, num_bytes, after)
        self._load(load)
        self._small(chunk)
        self._key(key)
        self._slot(slot)
        self._size(num_bytes)
        self._after(after)
        self._op(COPY)

    def read(self, key: int, chunk: int, room: int, num_bytes: int) -> None:
        """Of a machine whose experts lie on storage."""
        self._storage.read(key, chunk, room, num_bytes)
        self._key(key)
        self._small(chunk)
        self._slot(room)
        self._size(num_bytes)
        self._op(READ)

    def reads_ended(self) -> Sequence[Read]:
        """Of the same: none are written down where there are none."""
        reads = self._storage.reads_ended()
        if reads:
            self._small(len(reads))
            for key, chunk, start_ns, end_ns in reads:
                self._key(key)
                self._small(chunk)
                self._time(start_ns)
                self._time(end_ns)
            self._op(READS)
        return reads

    def decided(self, wants: Sequence[int], effort: float) -> None:
        self._run_decided(wants, effort)
        self._keys(wants)
        self._small(len(wants))
        self._op(DECIDED)

    def wait(self, wait: Wait) -> Record:
        self.waited(wait)
        record = self._block(wait)
        self.answered(record)
        return record

    def waited(self, wait: Wait) -> None:
        """The runtime has yielded `wait`."""
        kind, ident, drain = wait
        self._small(kind * 2 + drain)
        (self._load if kind == LOAD else self._small if kind == HOST else self._mark)(ident)
        self._op(WAIT)

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
        self._op(RECORD)

    def flush(self) -> None:
        """Write what is held. After this, nothing more may be logged of the forward that is running."""
        self._buffer.trim()
        self.writer.write(self._buffer)
