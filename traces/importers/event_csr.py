"""Importer of event traces in CSR form (arXiv 2608.07911): the union of experts per (scheduler step, layer).

One safetensors file of one-dimensional arrays: `request, scheduler_step, forward_cycle, phase, layer, token_count`
[N], one entry per event; `offsets` [N+1] into `expert_ids, assignment_counts, gate_mass` [Z], the experts of an event,
how many of its tokens chose each, and the gate weight that these gave it in sum. Assumed, and checked where possible:

- Events of one (request, scheduler_step, forward_cycle) are one forward of that request, one event per layer, all
  with one token_count and one phase. Forwards that lack a layer or disagree are left out and counted.
- (scheduler_step, forward_cycle) is the order in time; requests that share it ran in one batch: one `forward_id`.
- phase is 0 for prefill and 1 for decode (`prefill_phase=1` swaps them); prefill comes first.
- 1 ≤ assignment_counts ≤ token_count, as top-k chooses distinct experts, and each token has at least one expert.

An event of one token is exactly its row. Of an event of n > 1 tokens who chose what is lost: its assignments, best
gate mass first, are dealt to n pseudo-tokens in turn, which keeps each event's set of experts, their counts and (as
float16 means) their gate mass. A pseudo-token's experts are no token's: nothing across layers or steps may be read
off them, and batching by whole forwards is the only faithful use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from traces.container import Array, check_file, fault
from traces.format import About
from traces.importers.assemble import NO_MODEL, UNNAMED
from traces.importers.common import (
    MAX_LAYERS,
    MAX_WEIGHT,
    UNKNOWN_LICENSE,
    ImportReport,
    Request,
    check_choice,
    tracked,
    write_requests,
)
from traces.limits import check_bytes, check_expansion
from traces.reading import read_arrays

EVENT_ARRAYS = ("request", "scheduler_step", "forward_cycle", "phase", "layer", "token_count")
ENTRY_ARRAYS = ("expert_ids", "assignment_counts", "gate_mass")
_BLOCK_ASSIGNMENTS = 1 << 20
_EVENT_BYTES, _ENTRY_BYTES = 56, 24
"""What an event and an entry take in memory."""
_ROW_BYTES = 24
"""What an expert of a row takes until the trace is written: id and weight, joined, widened and checked."""
_ASSIGNMENT_BYTES = 80
"""What an assignment takes while it is dealt."""
_MOST_COUNT = (1 << 31) - 1
_CAPTURE = "per event: forwards of several tokens hold pseudo-tokens with the event's experts and counts"
_REMEDY = "the file is not laid out as this importer assumes (see its docstring); convert it with your own script"

Ints = npt.NDArray[np.int64]


@dataclass
class _Events:
    """The checked file: per event its columns, per entry ids, counts, mass."""

    path: Path
    columns: dict[str, Ints]
    offsets: Ints
    ids: Ints
    counts: Ints
    mass: npt.NDArray[np.float64]

    def totals(self) -> Ints:
        """Assignments of each event."""
        return np.add.reduceat(self.counts, self.offsets[:-1])


@dataclass
class _Forwards:
    """Complete forwards in (request, time) order; events[f, l] is the index of the event of a layer."""

    request: Ints
    time: Ints
    tokens: Ints
    prefill: npt.NDArray[np.bool_]
    events: Ints
    layers: Ints
    num_left_out: int


def import_event_csr(
    source: str | Path,
    output: str | Path,
    progress: Progress | None = None,
    *,
    prefill_phase: str = "0",
    model: str = "",
    num_experts: int = 0,
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the event file as a trace of rows and pseudo-rows; the report says which. TraceError names the event."""
    check_choice("prefill_phase", prefill_phase, ("0", "1"))
    path = Path(source)
    arrays, metadata = read_arrays(path)
    events = _load(path, arrays)
    model = model or metadata.get("model", "")
    notes = [] if model else [NO_MODEL]
    extra = sorted(set(arrays) - {*EVENT_ARRAYS, *ENTRY_ARRAYS, "offsets"})
    if extra:
        notes.append(f"arrays left out: {', '.join(extra)}")
    if not num_experts:
        num_experts = int(events.ids.max()) + 1
        notes.append(f"num_experts={num_experts}, the highest id and one; give num_experts= if there are more")
    _raise_at(events, events.ids >= num_experts, "holds an expert outside num_experts", "correct num_experts")
    forwards = _forwards(events, int(prefill_phase))
    requests = _requests(events, forwards, progress)
    notes += _account(forwards)
    about = About(
        model=model or UNNAMED,
        num_experts=num_experts,
        source="event CSR (arXiv 2608.07911)",
        license=license,
        moe_layer_ids=[int(layer) for layer in forwards.layers],
        header={"capture": _CAPTURE},
    )
    return write_requests(source, output, requests, about, notes)


# -- reading -------------------------------------------------------------------------------------------------


def _load(path: Path, arrays: dict[str, Array]) -> _Events:
    missing = [name for name in (*EVENT_ARRAYS, "offsets", *ENTRY_ARRAYS) if name not in arrays]
    if missing:
        raise fault(path, f"array {missing[0]}", "is missing", _REMEDY)
    num_events, num_entries = arrays["request"].size, arrays["expert_ids"].size
    sizes = {
        **dict.fromkeys(EVENT_ARRAYS, num_events),
        "offsets": num_events + 1,
        **dict.fromkeys(ENTRY_ARRAYS, num_entries),
    }
    for name, size in sizes.items():
        if arrays[name].shape != (size,):
            raise fault(path, f"array {name}", f"has the shape {list(arrays[name].shape)}, not [{size}]", _REMEDY)
        if arrays[name].dtype.kind not in ("fiu" if name == "gate_mass" else "iu"):
            raise fault(path, f"array {name}", f"has the type {arrays[name].dtype}", _REMEDY)
    if num_events == 0:
        raise fault(path, "array request", "is empty: no events", "record at least one event")
    check_bytes(path, "events", _EVENT_BYTES * num_events + _ENTRY_BYTES * num_entries)
    events = _Events(
        path,
        {name: _whole(path, arrays, name) for name in EVENT_ARRAYS},
        _whole(path, arrays, "offsets"),
        _whole(path, arrays, "expert_ids"),
        _whole(path, arrays, "assignment_counts"),
        arrays["gate_mass"].astype(np.float64),
    )
    _check(events)
    _check_assignments(events)
    return events


def _whole(path: Path, arrays: dict[str, Array], name: str) -> Ints:
    """The array in int64. Counts are so small that no sum of them leaves it."""
    array = arrays[name]
    most = _MOST_COUNT if name in ("token_count", "assignment_counts", "expert_ids") else np.iinfo(np.int64).max
    if array.size and int(array.max()) > most:
        raise fault(path, f"array {name} [{int(array.argmax())}]", f"is {int(array.max())}", f"give at most {most}")
    return array.astype(np.int64)


def _check_assignments(events: _Events) -> None:
    """TraceError where counts of the file stand for rows that would take too much memory, before any is made."""
    tokens, layer, totals = events.columns["token_count"], events.columns["layer"], events.totals()
    num_layers = np.unique(layer).size
    if num_layers > MAX_LAYERS:
        problem = f"holds {num_layers} different layers"
        raise fault(events.path, "array layer", problem, f"at most {MAX_LAYERS} are read; {_REMEDY}")
    width = int((-(-totals // tokens)).max())
    # A forward has one event in each layer, all with its number of tokens.
    rows = int(tokens[layer == layer[0]].sum())
    largest = int(np.argmax(totals))
    dealt = min(int(totals.sum()), _BLOCK_ASSIGNMENTS + num_layers * int(totals[largest]))
    num_bytes = _ROW_BYTES * rows * num_layers * width + _ASSIGNMENT_BYTES * dealt
    where = f"event {largest}, token_count {int(tokens[largest])}"
    check_expansion(events.path, where, num_bytes, check_file(events.path))


def _check(events: _Events) -> None:
    lengths = np.diff(events.offsets)
    if events.offsets[0] != 0 or events.offsets[-1] != events.ids.size:
        raise fault(events.path, "array offsets", f"must go from 0 to {events.ids.size}", _REMEDY)
    _raise_event(events, lengths <= 0, "has no experts, or offsets fall")
    for name, column in events.columns.items():
        _raise_event(events, column < (1 if name == "token_count" else 0), f"has a {name} too small")
    _raise_event(events, events.columns["phase"] > 1, "has a phase that is neither 0 nor 1")
    tokens = np.repeat(events.columns["token_count"], lengths)
    _raise_at(events, (events.counts < 1) | (events.counts > tokens), "has an assignment count outside 1 … token_count")
    _raise_at(events, events.ids < 0, "holds a negative expert id")
    _raise_at(events, ~np.isfinite(events.mass) | (events.mass < 0), "has a gate mass that is not 0 or more")
    too_much = events.mass > MAX_WEIGHT * events.counts
    _raise_at(events, too_much, f"has a gate mass of more than {MAX_WEIGHT} an assignment")
    _raise_event(events, events.totals() < events.columns["token_count"], "has fewer assignments than tokens")
    owner = np.repeat(np.arange(lengths.size), lengths)
    order = np.lexsort((events.ids, owner))
    same = (np.diff(owner[order]) == 0) & (np.diff(events.ids[order]) == 0)
    twice = np.zeros(events.ids.size, np.bool_)
    twice[order[1:][same]] = True
    _raise_at(events, twice, "lists an expert twice")


def _raise_event(events: _Events, bad: npt.NDArray[np.bool_], problem: str, remedy: str = _REMEDY) -> None:
    if bad.any():
        raise fault(events.path, f"event {int(np.argmax(bad))}", problem, remedy)


def _raise_at(events: _Events, bad: npt.NDArray[np.bool_], problem: str, remedy: str = _REMEDY) -> None:
    """The same for a fault of one entry, named by its event."""
    if bad.any():
        event = int(np.searchsorted(events.offsets, int(np.argmax(bad)), side="right")) - 1
        raise fault(events.path, f"event {event}", problem, remedy)


# -- forwards ------------------------------------------------------------------------------------------------


def _forwards(events: _Events, prefill_phase: int) -> _Forwards:
    columns = events.columns
    _, time = np.unique(np.stack([columns["scheduler_step"], columns["forward_cycle"]]), axis=1, return_inverse=True)
    time = time.reshape(-1).astype(np.int64)
    layers, layer = np.unique(columns["layer"], return_inverse=True)
    order = np.lexsort((layer, time, _admission(columns["request"], time)))
    request, when, place = columns["request"][order], time[order], layer[order]
    new = np.concatenate(([True], (np.diff(request) != 0) | (np.diff(when) != 0)))
    again = np.zeros(order.size, np.bool_)
    again[order[1:]] = ~new[1:] & (np.diff(place) == 0)
    _raise_event(events, again, "repeats (request, scheduler_step, forward_cycle, layer) of an earlier one")
    starts = np.flatnonzero(new)
    tokens, phase = columns["token_count"][order], columns["phase"][order]
    sizes = np.diff(np.append(starts, order.size))
    whole = sizes == layers.size
    for values in (tokens, phase):
        whole &= np.minimum.reduceat(values, starts) == np.maximum.reduceat(values, starts)
    if not whole.any():
        problem = f"no forward has all {layers.size} layers with one token_count and one phase"
        raise fault(events.path, "events", problem, _REMEDY)
    kept = starts[whole]
    return _Forwards(
        request[kept],
        when[kept],
        tokens[kept],
        phase[kept] == prefill_phase,
        order[kept[:, None] + np.arange(layers.size)],
        layers,
        int((~whole).sum()),
    )


def _admission(request: Ints, time: Ints) -> Ints:
    """Rank of each event's request by its first time, ties by id."""
    ids, index = np.unique(request, return_inverse=True)
    first = np.full(ids.size, np.iinfo(np.int64).max)
    np.minimum.at(first, index, time)
    rank = np.empty(ids.size, np.int64)
    rank[np.lexsort((ids, first))] = np.arange(ids.size)
    return rank[index]


def _requests(events: _Events, forwards: _Forwards, progress: Progress | None) -> list[Request]:
    bases = np.concatenate(([0], np.cumsum(forwards.tokens)))
    totals = events.totals()[forwards.events]
    width = int((-(-totals // forwards.tokens[:, None])).max())
    experts = np.full((int(bases[-1]), forwards.layers.size, width), -1, np.int32)
    weights = np.zeros(experts.shape, np.float16)
    # Blocks bound the memory of the dealing, which needs several numbers per assignment.
    block = np.cumsum(totals.sum(axis=1)) // _BLOCK_ASSIGNMENTS
    cuts = np.flatnonzero(np.diff(block, prepend=-1))
    for low, high in tracked([*zip(cuts, [*cuts[1:], block.size], strict=True)], progress, "dealing assignments"):
        row, layer, column, entry = _deal(events, forwards, bases, slice(low, high))
        experts[row, layer, column] = events.ids[entry]
        weights[row, layer, column] = events.mass[entry] / events.counts[entry]
    _, forward_id = np.unique(forwards.time, return_inverse=True)
    firsts = np.flatnonzero(np.concatenate(([True], np.diff(forwards.request) != 0)))
    result = []
    for low, high in zip(firsts, [*firsts[1:], forwards.request.size], strict=True):
        span, prefill = slice(int(bases[low]), int(bases[high])), forwards.prefill[low:high]
        tokens, name = forwards.tokens[low:high], f"request {forwards.request[low]}"
        if (np.diff(prefill.astype(np.int8)) > 0).any():
            raise fault(events.path, name, "has a prefill forward after a decode forward", "swap prefill_phase")
        result.append(
            Request(
                experts[span],
                weights[span],
                int(tokens[prefill].sum()),
                None,
                name,
                np.repeat(forward_id[low:high], tokens).astype(np.int64),
            )
        )
    return result


def _deal(events: _Events, forwards: _Forwards, bases: Ints, part: slice) -> tuple[Array, Array, Array, Array]:
    """Row, layer, column and entry of every assignment of the forwards in `part`.

    Entries go best mass first; assignment p of an event of n tokens goes to row p mod n, column p div n. An
    expert's assignments are neighbours and at most n, so no row gets one twice.
    """
    chosen = forwards.events[part]
    event = chosen.reshape(-1)
    tokens = np.repeat(forwards.tokens[part], chosen.shape[1])
    base = np.repeat(bases[:-1][part], chosen.shape[1])
    layer = np.tile(np.arange(chosen.shape[1]), chosen.shape[0])
    lengths = events.offsets[event + 1] - events.offsets[event]
    owner = np.repeat(np.arange(event.size), lengths)
    entry = np.arange(owner.size) + (events.offsets[event] - (np.cumsum(lengths) - lengths))[owner]
    entry = entry[np.lexsort((events.ids[entry], -events.mass[entry], owner))]
    counts = events.counts[entry]
    entry, owner = np.repeat(entry, counts), np.repeat(owner, counts)
    totals = np.bincount(owner, minlength=event.size)
    position = np.arange(owner.size) - (np.cumsum(totals) - totals)[owner]
    return base[owner] + position % tokens[owner], layer[owner], position // tokens[owner], entry


def _account(forwards: _Forwards) -> list[str]:
    """Notes on how the trace differs from the recording it was made of."""
    notes = []
    single = int((forwards.tokens == 1).sum())
    several, rows = forwards.tokens.size - single, int(forwards.tokens[forwards.tokens > 1].sum())
    notes.append(f"exact: {single} forwards of one token")
    if several:
        notes.append(
            f"approximated: {several} forwards of several tokens, {rows} pseudo-tokens; experts and counts of each "
            "event are kept, which token chose what is not; weights are means"
        )
    if forwards.num_left_out:
        notes.append(f"left out: {forwards.num_left_out} forwards without all layers in one token_count and phase")
    return notes
