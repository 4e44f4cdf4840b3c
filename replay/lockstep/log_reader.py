"""Reading the log of a run, a forward at a time, and checking all of it; see `replay.lockstep.log_format`."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from replay.lockstep.log_format import (
    FORMAT,
    KINDS,
    MAX_GROUP_VALUES,
    STREAMS,
    TYPES,
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
    decode,
    running_crc,
)
from traces.messages import TraceError, line
from traces.parquet import open_parquet, reading

_REMEDY = "log the run again"


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
            self._opened = open_parquet(self.path, _REMEDY)
        except TraceError as error:
            raise LogError(str(error)) from None
        try:
            with reading(self.path, "schema", _REMEDY):
                schema = self._opened.file.schema_arrow
            self._check_shape(schema)
            text = (schema.metadata or {}).get(FORMAT.encode(), b"")
            self.header = LogHeader.from_json(text)
        except ValueError as error:
            self.close()
            if isinstance(error, LogError | TraceError):
                raise LogError(str(error)) from None
            raise self._fault(str(error)) from None
        self._seed = zlib.crc32(text)
        self.num_forwards: int = self._opened.file.metadata.num_rows

    def _fault(self, what: str) -> LogError:
        return LogError(line(str(self.path), what, _REMEDY))

    def _check_shape(self, schema: pa.Schema) -> None:
        if schema.names != list(TYPES):
            raise self._fault(f"its columns are {', '.join(schema.names)[:80]}, not those of a log")
        for one in schema:
            if one.type != TYPES[one.name] or one.nullable:
                raise self._fault(f"its column {one.name} is {one.type}, not {TYPES[one.name]} without null")
        for group, claimed in enumerate(self._opened.groups):
            if claimed.num_values > MAX_GROUP_VALUES:
                raise self._fault(
                    f"row group {group} claims {claimed.num_values} numbers, more than {MAX_GROUP_VALUES}"
                )

    def __iter__(self) -> Iterator[LoggedForward]:
        """From the first forward on."""
        crc, before, now_ns = self._seed, -1, -sys.maxsize
        for group in range(len(self._opened.groups)):
            try:
                table = self._opened.read_group(group)
            except TraceError as error:
                raise LogError(str(error)) from None
            lists = [table.column(name).combine_chunks() for name in STREAMS]
            if any(column.null_count for column in table.columns) or any(one.values.null_count for one in lists):
                raise self._fault(f"row group {group} has nulls")
            values = [np.asarray(one.values.to_numpy(zero_copy_only=False)) for one in lists]
            offsets = [one.offsets.to_pylist() for one in lists]
            indices, crcs = table.column("forward").to_pylist(), table.column("crc").to_pylist()
            for row, index in enumerate(indices):
                parts = [value[place[row] : place[row + 1]] for value, place in zip(values, offsets, strict=True)]
                crc = running_crc(crc, index, parts)
                if crc != crcs[row]:
                    raise self._fault(f"forward {index} is damaged or edited: its CRC-32 is {crc}, not {crcs[row]}")
                if index <= before:
                    raise self._fault(f"forward {index} comes after forward {before}")
                before = index
                try:
                    events, left = decode(dict(zip(STREAMS, (part.tolist() for part in parts), strict=True)))
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
                if event.kind not in KINDS:
                    raise ValueError(f"a wait of kind {event.kind} is unknown")
            elif isinstance(event, Copy):
                within("chunk", event.chunk, num_chunks)
                within("key", event.key, num_keys)
                within("slot", event.slot, num_slots)
            elif isinstance(event, Decided | Experts):
                for key in event.wants if isinstance(event, Decided) else event.keys:
                    within("key", key, num_keys)
            elif isinstance(event, OnHost | HostEnded | Estimated):
                _check_host(event, num_keys, within)
            if isinstance(event, Attention | Experts):
                within("layer", event.layer, run.num_layers)
            if isinstance(event, Attention | Experts | Head):
                within("mark", event.mark, sys.maxsize, 1)
        return now_ns

    def close(self) -> None:
        """Let go of the file."""
        self._opened.file.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_host(event: OnHost | HostEnded | Estimated, num_keys: int, within: Callable[..., None]) -> None:
    """Bounds of what crossed between the runtime and the host's worker."""
    if isinstance(event, Estimated):
        costs = event.costs
        for time_ns in (costs.copy_ns, costs.link_wait_ns, costs.round_trip_ns, *costs.gpu_ns, *costs.host_ns):
            within("time of an estimate", time_ns, sys.maxsize)
        if costs.stretch < 1:
            raise ValueError(f"an estimate's stretch {costs.stretch} is below 1")
        return
    if isinstance(event, OnHost):
        within("host task", event.task, sys.maxsize, 1)
    for key in event.keys if isinstance(event, OnHost) else [key for _, key, _, _ in event.results]:
        within("key", key, num_keys)
    for task, _, start_ns, end_ns in event.results if isinstance(event, HostEnded) else ():
        within("host task", task, sys.maxsize, 1)
        within("start of a host's result", start_ns, end_ns + 1, -sys.maxsize)
