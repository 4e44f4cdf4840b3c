"""A run as a timeline that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Collects what ran on the compute stream, what was copied, what was waited for and how far the policy looked
ahead; writes it as Chrome-trace JSON and reads it back as tables. Knows nothing of machines or policies.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from expertflow.observer import Observer
from expertflow.parts import DEMAND
from traces.files import whole_file
from traces.jsontext import shown
from traces.messages import fault
from traces.reading import read_json

KINDS = ("attention", "experts", "head", "other")
IN_LAYER = ("attention", "experts")
"""Those of which a slice says the layer."""
COMPUTE_TRACK, LINK_TRACK, STALL_TRACK, HOST_TRACK, STORAGE_TRACK = 1, 2, 3, 4, 5
TRACKS = {COMPUTE_TRACK: "compute", LINK_TRACK: "link", STALL_TRACK: "stalls", HOST_TRACK: "host"}
TRACKS[STORAGE_TRACK] = "storage"
STALLS = ("late", "miss", "host", "storage")
"""By kind, as of `Observer.stalled`."""
COUNTER = "horizon S"
COLOURS = {"demand": "bad", "prefetch": "good", "late": "terrible", "miss": "terrible", "host": "terrible"}
COLOURS["storage"] = "terrible"
"""Names of Chrome's own palette, by category; Perfetto colours by slice name."""
NUM_NAMED = 4
"""Experts that a slice names; all of them stand in its arguments."""


class Frames(NamedTuple):
    """A timeline as tables. start_ns, end_ns, at_ns in ns on the machine's clock; rows in stream order.

    compute: start_ns, end_ns, kind (attention, experts, head, other), layer (-1: none), experts (a tuple).
    link: start_ns, end_ns, layer, expert, chunk, cause (demand, prefetch).
    stalls: start_ns, end_ns, layer, expert, kind (late, miss, host, storage).
    host: start_ns, end_ns, layer, expert, kind (experts): computed on the host, if any were.
    storage: start_ns, end_ns, layer, expert, chunk, kind (read): read from storage, if any were.
    horizon: at_ns, reach (the farthest layer looked at, in layers ahead; holds until the next row).
    """

    compute: pd.DataFrame
    link: pd.DataFrame
    stalls: pd.DataFrame
    horizon: pd.DataFrame
    host: pd.DataFrame
    storage: pd.DataFrame


class Timeline(Observer):
    """Keeps a run, 40 bytes an event, up to `max_events` events; `name` heads the tracks (the policy)."""

    def __init__(self, name: str, num_experts: int, max_events: int = 2_000_000) -> None:
        if num_experts < 1 or max_events < 1:
            raise ValueError(f"Timeline num_experts={num_experts}, max_events={max_events}: both must be 1 or more")
        self.name = name
        self.num_experts = num_experts
        self.max_events = max_events
        self.num_events = 0
        # Flat rows: (kind, layer, number of keys, start, end), (key, chunk, cause, start, end), ...
        self._kernels = array("q")
        self._kernel_keys = array("i")
        self._copies = array("q")
        self._stalls = array("q")
        self._products = array("q")
        self._reads = array("q")
        self._reaches = array("q")

    def computed(self, kind: str, layer: int, keys: Sequence[int], start_ns: int, end_ns: int) -> None:
        self._count()
        self._kernels.extend((KINDS.index(kind), layer, len(keys), start_ns, end_ns))
        self._kernel_keys.extend(keys)

    def copied(self, key: int, chunk: int, cause: int, start_ns: int, end_ns: int) -> None:
        self._count()
        self._copies.extend((key, chunk, cause, start_ns, end_ns))

    def computed_on_host(self, key: int, start_ns: int, end_ns: int) -> None:
        self._count()
        self._products.extend((key, start_ns, end_ns))

    def was_read(self, key: int, chunk: int, start_ns: int, end_ns: int) -> None:
        self._count()
        self._reads.extend((key, chunk, start_ns, end_ns))

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        self._count()
        self._stalls.extend((key, kind, start_ns, end_ns))

    def horizon(self, now_ns: int, distances: Sequence[int]) -> None:
        reach = max(distances, default=0)
        if not self._reaches or self._reaches[-1] != reach:
            self._count()
            self._reaches.extend((now_ns, reach))

    def _count(self) -> None:
        self.num_events += 1
        if self.num_events > self.max_events:
            raise ValueError(
                f"timeline=true: the run has more than {self.max_events} events, more than a viewer opens; "
                "shorten it with max_tokens=…"
            )

    def write(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all. Same run, same bytes. ValueError names the file where that fails."""
        with whole_file(Path(path), sync=False) as file:
            file.write(b'{"displayTimeUnit":"ns","traceEvents":[')
            separator = "\n"
            for event in self.events():
                file.write((separator + event).encode())
                separator = ",\n"
            file.write(b"\n]}\n")

    def frames(self) -> Frames:
        """What `load_timeline` reads from the file that `write` writes, without the file."""
        kernels, experts = _table(self._kernels, 5), self._kernel_experts()
        kinds, _, _, starts, ends = kernels.T
        compute = {
            "start_ns": starts,
            "end_ns": ends,
            "kind": [KINDS[kind] for kind in kinds.tolist()],
            "layer": [layer if KINDS[kind] in IN_LAYER else -1 for kind, layer in kernels[:, :2].tolist()],
            "experts": experts,
        }
        keys, chunks, causes, starts, ends = _table(self._copies, 5).T
        layer, expert = np.divmod(keys, self.num_experts)
        link = {"start_ns": starts, "end_ns": ends, "layer": layer, "expert": expert, "chunk": chunks}
        link["cause"] = ["demand" if cause == DEMAND else "prefetch" for cause in causes.tolist()]
        keys, kinds_of_stall, starts, ends = _table(self._stalls, 4).T
        layer, expert = np.divmod(keys, self.num_experts)
        stalls = {"start_ns": starts, "end_ns": ends, "layer": layer, "expert": expert}
        stalls["kind"] = [STALLS[kind] for kind in kinds_of_stall.tolist()]
        keys, starts, ends = _table(self._products, 3).T
        layer, expert = np.divmod(keys, self.num_experts)
        host = {"start_ns": starts, "end_ns": ends, "layer": layer, "expert": expert}
        host["kind"] = ["experts"] * len(keys)
        keys, chunks, starts, ends = _table(self._reads, 4).T
        layer, expert = np.divmod(keys, self.num_experts)
        storage = {"start_ns": starts, "end_ns": ends, "layer": layer, "expert": expert, "chunk": chunks}
        storage["kind"] = ["read"] * len(keys)
        times, reaches = _table(self._reaches, 2).T
        horizon = {"at_ns": times, "reach": reaches}
        return Frames(*map(_frame, (compute, link, stalls, horizon, host, storage)))

    def _kernel_experts(self) -> list[tuple[int, ...]]:
        """Of each kernel, the experts that it computed."""
        found, first = [], 0
        for _, _, num_keys, _, _ in _rows(self._kernels, 5):
            found.append(tuple(key % self.num_experts for key in self._kernel_keys[first : first + num_keys]))
            first += num_keys
        return found

    def events(self) -> Iterator[str]:
        """The JSON of each event, metadata first."""
        yield _metadata("process_name", 0, "name", self.name)
        for track, name in TRACKS.items():
            if (track == HOST_TRACK and not self._products) or (track == STORAGE_TRACK and not self._reads):
                continue
            yield _metadata("thread_name", track, "name", name)
            yield _metadata("thread_sort_index", track, "sort_index", track)
        yield from self._kernel_events()
        for key, chunk, cause, start, end in _rows(self._copies, 5):
            layer, expert = divmod(key, self.num_experts)
            category = "demand" if cause == DEMAND else "prefetch"
            args = f'{{"layer":{layer},"expert":{expert},"chunk":{chunk}}}'
            yield _slice(LINK_TRACK, f"L{layer}/E{expert}", category, start, end, args)
        for key, start, end in _rows(self._products, 3):
            layer, expert = divmod(key, self.num_experts)
            args = f'{{"layer":{layer},"expert":{expert}}}'
            yield _slice(HOST_TRACK, f"L{layer}/E{expert}", "experts", start, end, args)
        for key, chunk, start, end in _rows(self._reads, 4):
            layer, expert = divmod(key, self.num_experts)
            args = f'{{"layer":{layer},"expert":{expert},"chunk":{chunk}}}'
            yield _slice(STORAGE_TRACK, f"L{layer}/E{expert}", "read", start, end, args)
        for key, kind, start, end in _rows(self._stalls, 4):
            layer, expert = divmod(key, self.num_experts)
            category = STALLS[kind]
            args = f'{{"layer":{layer},"expert":{expert}}}'
            yield _slice(STALL_TRACK, f"{category} L{layer}/E{expert}", category, start, end, args)
        for now_ns, reach in _rows(self._reaches, 2):
            yield f'{{"ph":"C","pid":1,"name":"{COUNTER}","ts":{_us(now_ns)},"args":{{"layers":{reach}}}}}'

    def _kernel_events(self) -> Iterator[str]:
        first = 0
        for kind, layer, num_keys, start, end in _rows(self._kernels, 5):
            experts = [key % self.num_experts for key in self._kernel_keys[first : first + num_keys]]
            first += num_keys
            category = KINDS[kind]
            name, args = category, "{}"
            if category == "attention":
                name, args = f"L{layer} attention", f'{{"layer":{layer}}}'
            elif category == "experts":
                name = _experts_name(layer, experts)
                args = f'{{"layer":{layer},"experts":[{",".join(map(str, experts))}]}}'
            yield _slice(COMPUTE_TRACK, name, category, start, end, args)


def _experts_name(layer: int, experts: Sequence[int]) -> str:
    if not experts:
        return f"L{layer}/shared"
    named = " ".join(f"E{expert}" for expert in experts[:NUM_NAMED])
    more = len(experts) - NUM_NAMED
    return f"L{layer}/{named}" + (f" +{more}" if more > 0 else "")


def _rows(values: array[int], width: int) -> Iterator[tuple[int, ...]]:
    columns = [iter(values)] * width
    return zip(*columns, strict=True)


def _table(values: array[int], width: int) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64).reshape(-1, width)


def _us(time_ns: int) -> str:
    """Microseconds, exact: the format's unit, with three decimals."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"


def _metadata(kind: str, track: int, field: str, value: str | int) -> str:
    return f'{{"ph":"M","pid":1,"tid":{track},"name":"{kind}","args":{{"{field}":{json.dumps(value)}}}}}'


def _slice(track: int, name: str, category: str, start_ns: int, end_ns: int, args: str) -> str:
    colour = f'"cname":"{COLOURS[category]}",' if category in COLOURS else ""
    return (
        f'{{"ph":"X","pid":1,"tid":{track},"name":"{name}","cat":"{category}",{colour}'
        f'"ts":{_us(start_ns)},"dur":{_us(end_ns - start_ns)},"args":{args}}}'
    )


def load_timeline(path: str | Path) -> Frames:
    """Read what `Timeline.write` wrote. ValueError naming the file, and the event, if it is something else."""
    remedy = "write one with timeline=true"
    document = read_json(Path(path), remedy)
    events = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise fault(path, "file", "is not a timeline of this project (no traceEvents)", remedy)
    by_track: dict[int, list[dict[str, Any]]] = {track: [] for track in TRACKS}
    counts = []
    for index, event in enumerate(events):
        if problem := _wrong(event):
            raise fault(path, f"event {index}", f"is none of a timeline of this project ({problem})", remedy)
        if event["ph"] == "X":
            by_track[event["tid"]].append(event)
        elif event["ph"] == "C":
            counts.append(event)
    return Frames(
        compute=_compute_frame(by_track[COMPUTE_TRACK]),
        link=_copy_frame(by_track[LINK_TRACK], ("layer", "expert", "chunk"), "cause"),
        stalls=_copy_frame(by_track[STALL_TRACK], ("layer", "expert"), "kind"),
        horizon=_frame(
            {
                "at_ns": [round(event["ts"] * 1000) for event in counts],
                "reach": [event["args"]["layers"] for event in counts],
            }
        ),
        host=_copy_frame(by_track[HOST_TRACK], ("layer", "expert"), "kind"),
        storage=_copy_frame(by_track[STORAGE_TRACK], ("layer", "expert", "chunk"), "kind"),
    )


_NEEDS = {
    COMPUTE_TRACK: (KINDS, ()),
    LINK_TRACK: (("demand", "prefetch"), ("layer", "expert", "chunk")),
    STALL_TRACK: (STALLS, ("layer", "expert")),
    HOST_TRACK: (("experts",), ("layer", "expert")),
    STORAGE_TRACK: (("read",), ("layer", "expert", "chunk")),
}
"""Of the slices of a track: their categories, and the numbers among their arguments."""
_MOST_US = 1e15
_MOST_COUNT = 1 << 31


def _wrong(event: Any) -> str:
    """What is wrong with an event as `Timeline` writes it; nothing if it is sound."""
    if not isinstance(event, dict):
        return "no table"
    kind, args = event.get("ph"), event.get("args")
    if kind == "M":
        return ""
    if not isinstance(args, dict) or not _is_time(event.get("ts")):
        return "ts or args"
    if kind == "C":
        named = event.get("name") == COUNTER and _is_count(args.get("layers"))
        return "" if named else f"no count of {COUNTER}"
    if kind != "X":
        return f"ph={shown(kind)}"
    track = event.get("tid")
    if type(track) is not int or track not in _NEEDS:
        return f"tid={shown(track)}"
    categories, numbers = _NEEDS[track]
    if event.get("cat") not in categories or not _is_time(event.get("dur")):
        return "cat or dur"
    layer, experts = args.get("layer", 0), args.get("experts", [])
    if not (_is_count(layer) and isinstance(experts, list) and all(map(_is_count, experts))):
        return "layer or experts"
    return next((name for name in numbers if not _is_count(args.get(name))), "")


def _is_time(value: Any) -> bool:
    """Microseconds from the start of a run, or of a slice."""
    return type(value) in (int, float) and 0 <= value <= _MOST_US


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_COUNT


def _frame(columns: Mapping[str, Any]) -> pd.DataFrame:
    """Numbers are int64 even without rows."""
    texts = ("kind", "cause", "experts")
    types = {name: object if name in texts else "int64" for name in columns}
    return pd.DataFrame({name: pd.Series(values, dtype=types[name]) for name, values in columns.items()})


def _times(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    starts = [round(event["ts"] * 1000) for event in events]
    return {
        "start_ns": starts,
        "end_ns": [start + round(event["dur"] * 1000) for start, event in zip(starts, events, strict=True)],
    }


def _compute_frame(events: list[dict[str, Any]]) -> pd.DataFrame:
    columns = _times(events)
    columns["kind"] = [event["cat"] for event in events]
    columns["layer"] = [event["args"].get("layer", -1) for event in events]
    columns["experts"] = [tuple(event["args"].get("experts", ())) for event in events]
    return _frame(columns)


def _copy_frame(events: list[dict[str, Any]], numbers: tuple[str, ...], category: str) -> pd.DataFrame:
    columns = _times(events)
    for name in numbers:
        columns[name] = [event["args"][name] for event in events]
    columns[category] = [event["cat"] for event in events]
    return _frame(columns)
