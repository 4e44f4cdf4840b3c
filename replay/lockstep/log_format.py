"""What a log of a run holds: every call from runtime to machine, every wait and every record, in one Parquet file.

A row is a forward; what crossed in it stands in ten streams of whole numbers (lists), one for each kind of
quantity, so that neighbours are alike and a difference code makes them small. `op` says which calls were made
in which order, and with that how the other streams are read. Each row carries a running CRC-32 over the header
and all rows so far: a damaged or edited log is refused.
"""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from expertflow.host_memory import EVICTIONS, HostMemorySpec
from expertflow.machine import GATE, HOST, LOAD, TOKEN, Chunk, Costs, HostResult, Mark, Read
from expertflow.runtime import RunConfig
from traces.jsontext import parse_json

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
DIFFERENCED = ("layer", "mark", "load", "time")
"""Streams that climb; the others repeat themselves and are left to the compressor as they are."""

ATTENTION, EXPERTS, HEAD, COPY, DECIDED, WAIT, RECORD, ESTIMATE, ON_HOST, HOST_ENDED = range(10)
"""The last three are of runs whose policy may place experts on the host; a log of any other holds none."""
KINDS = (GATE, TOKEN, LOAD, HOST)
STRETCH_OF_ONE = 1 << 20
"""`Costs.stretch` is logged in multiples of 1 / STRETCH_OF_ONE, as machines know it."""
READ, READS = 16, 17
"""Of machines whose experts lie on storage: a read that was asked for, and those that a record tells the end of."""
_PACKAGES = ("expertflow", "numpy", "pyarrow")

TYPES: dict[str, pa.DataType] = {
    "forward": pa.int64(),
    "crc": pa.int64(),
    **{
        name: pa.list_(pa.field("element", pa.uint8() if name == "op" else pa.int64(), nullable=False))
        for name in STREAMS
    },
}


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


class Estimated(NamedTuple):
    """`machine.estimate`: the tokens of each missing expert, and what these would cost."""

    tokens: tuple[int, ...]
    costs: Costs


class OnHost(NamedTuple):
    """`machine.on_host` and the task that it returned."""

    keys: tuple[int, ...]
    tokens: tuple[int, ...]
    task: int


class HostEnded(NamedTuple):
    """What `machine.host_ended` told."""

    results: tuple[HostResult, ...]


class Reading(NamedTuple):
    """`machine.read`."""

    key: int
    chunk: int
    room: int
    num_bytes: int


class ReadsTold(NamedTuple):
    """The reads that the machine answered with, beside its last record; there is at least one."""

    reads: tuple[Read, ...]


Event = (
    Attention | Experts | Head | Copy | Decided | Waited | Told | Estimated | OnHost | HostEnded | Reading | ReadsTold
)


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

    world: which machine wrote it (sim, cuda, cpu). config: the plain configuration, as `sim.job.configure.checked`
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
            given = parse_json("log", "header", text if isinstance(text, str) else text.decode())
        except ValueError:
            raise ValueError("its header is no JSON") from None
        if not isinstance(given, dict) or given.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        found = given.pop("version", None)
        if found != VERSION or isinstance(found, bool):
            raise ValueError(f"its version is {found!r:.40}, this reads {VERSION}")
        _same_names(given, [one.name for one in fields(cls)], "header")
        for name, kind in (
            ("world", str),
            ("config", dict),
            ("overrides", list),
            ("trace_sha256", str),
            ("versions", dict),
        ):
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
    # A log of before there were pins, or storage, says nothing of them.
    given = {"num_pinned": 0, "all_initial": False, "storage": None} | given
    _same_names(given, [one.name for one in fields(RunConfig)], "run")
    least = {
        "num_layers": 1,
        "num_experts": 1,
        "top_k": 1,
        "num_slots": 1,
        "channel_depth": 1,
        "num_staging": 0,
        "warmup_forwards": 0,
        "num_pinned": 0,
    }
    for name, low in least.items():
        if type(given[name]) is not int or not low <= given[name] <= MAX_KEYS:
            raise ValueError(f"its run.{name}={given[name]!r:.40} is no whole number from {low} to {MAX_KEYS}")
    num_keys = given["num_layers"] * given["num_experts"]
    if num_keys > MAX_KEYS or given["num_slots"] > num_keys:
        raise ValueError(
            f"its run has {num_keys} experts and {given['num_slots']} slots; at most {MAX_KEYS}, and a slot each"
        )
    for name in ("has_shared", "serial", "all_initial"):
        if not isinstance(given[name], bool):
            raise ValueError(f"its run.{name}={given[name]!r:.40} is neither true nor false")
    for name, low, high in (("chunk_bytes", 1, 1 << 50), ("initial", 0, num_keys - 1)):
        values = given[name]
        if not isinstance(values, list) or not all(type(one) is int and low <= one <= high for one in values):
            raise ValueError(f"its run.{name} is no list of whole numbers from {low} to {high}")
    if not given["chunk_bytes"]:
        raise ValueError("its run.chunk_bytes is empty")
    lists = {"chunk_bytes": tuple(given["chunk_bytes"]), "initial": tuple(given["initial"])}
    return RunConfig(**{**given, **lists, "storage": _host_memory(given["storage"])})


def _host_memory(given: Any) -> HostMemorySpec | None:
    """The host memory above storage, checked."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError("its run.storage is no dict")
    _same_names(given, [one.name for one in fields(HostMemorySpec)], "run.storage")
    for name in ("num_slots", "read_depth"):
        if type(given[name]) is not int or not 1 <= given[name] <= MAX_KEYS:
            raise ValueError(f"its run.storage.{name}={given[name]!r:.40} is no whole number from 1 to {MAX_KEYS}")
    if given["eviction"] not in EVICTIONS:
        raise ValueError(f"its run.storage.eviction={given['eviction']!r:.40} is none of: {', '.join(EVICTIONS)}")
    return HostMemorySpec(**given)


def decode(row: Mapping[str, Sequence[int]]) -> tuple[list[Event], dict[str, int]]:
    """The events of one forward, and how many numbers of each stream are left over; ValueError if too few."""
    streams = {name: iter(values) for name, values in row.items()}
    take: dict[str, Callable[[], int]] = {name: stream.__next__ for name, stream in streams.items()}
    layer, key, mark, load, slot, after, small, size, time = (take[name] for name in STREAMS[1:])
    events: list[Event] = []
    try:
        for op in streams["op"]:
            if op == RECORD:
                num_chunks, num_marks = small(), small()
                chunks = tuple([(load(), small(), time(), time()) for _ in range(num_chunks)])
                marks = tuple([(mark(), time(), time()) for _ in range(num_marks)])
                events.append(Told(time(), chunks, marks))
            elif op == WAIT:
                kind, drain = divmod(small(), 2)
                ident = load() if kind == LOAD else small() if kind == HOST else mark()
                events.append(Waited(kind, ident, bool(drain)))
            elif op == COPY:
                events.append(Copy(load(), small(), key(), slot(), size(), after()))
            elif op == READ:
                events.append(Reading(key(), small(), slot(), size()))
            elif op == READS:
                events.append(ReadsTold(tuple([(key(), small(), time(), time()) for _ in range(small())])))
            elif op == DECIDED:
                events.append(Decided(tuple([key() for _ in range(small())])))
            elif op == ATTENTION:
                events.append(Attention(layer(), mark()))
            elif op == EXPERTS:
                count, flags = small(), small()
                keys = tuple([key() for _ in range(count)])
                if not 0 <= flags <= 3:
                    raise ValueError(f"experts have the flags {flags}")
                counts = tuple([small() for _ in range(count)]) if flags & 2 else None
                events.append(Experts(layer(), keys, counts, bool(flags & 1), mark()))
            elif op == HEAD:
                events.append(Head(mark()))
            elif op in (ESTIMATE, ON_HOST, HOST_ENDED):
                events.append(_of_host(op, key, small, time))
            else:
                raise ValueError(f"op {op} is unknown")
    except StopIteration:
        raise ValueError("a stream ends too soon") from None
    return events, {name: length_hint(stream) for name, stream in streams.items()}


def _of_host(op: int, key: Callable[[], int], small: Callable[[], int], time: Callable[[], int]) -> Event:
    """One event between the runtime and the host's worker. key, small, time: take the next number of the stream."""
    if op == HOST_ENDED:
        return HostEnded(tuple([(small(), key(), time(), time()) for _ in range(small())]))
    if op == ON_HOST:
        task, count = small(), small()
        tokens = tuple([small() for _ in range(count)])
        return OnHost(tuple([key() for _ in range(count)]), tokens, task)
    count = small()
    tokens, stretch = tuple([small() for _ in range(count)]), small()
    copy_ns, link_wait_ns, round_trip_ns = time(), time(), time()
    gpu_ns = [time() for _ in range(count)]
    host_ns = [time() for _ in range(count)]
    return Estimated(tokens, Costs(copy_ns, link_wait_ns, gpu_ns, host_ns, round_trip_ns, stretch / STRETCH_OF_ONE))


def running_crc(crc: int, forward: int, parts: Sequence[Any]) -> int:
    """Running CRC-32 over one more row: index, lengths and little-endian values of its streams."""
    crc = zlib.crc32(np.array([forward, *map(len, parts)], dtype="<i8").tobytes(), crc)
    for part in parts:
        crc = zlib.crc32(part.tobytes(), crc)
    return crc
