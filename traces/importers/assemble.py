"""Choices of experts in whatever order a source gives them, put together to requests.

A choice is what one token chose in one layer. `Choices` collects them as they are read, `assemble` sorts them by
request, token and layer, and checks that nothing is missing or given twice. Shape letters: N choices, T tokens of a
request, L layers, K top-k.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.container import TraceError, fault
from traces.format import About
from traces.importers.common import (
    MAX_LAYERS,
    MAX_WEIGHT,
    PADDING,
    ImportReport,
    Request,
    check_choice,
    write_requests,
)
from traces.limits import check_bytes

INCOMPLETE = ("drop", "repeat")
UNNAMED = "unknown"
NO_MODEL = (
    f"model={UNNAMED}: the source names none; to simulate it by name give model=NAME, one that `expertflow sim --help` "
    "lists"
)
_MAX_ID = 1 << 31
_MAX_TOP_K = 1024
_DONE = {
    "drop": "left out, counted as context (incomplete=repeat keeps them)",
    "repeat": "filled with the next token's choice in that layer",
}

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """What is known of a whole source beside its choices.

    path: for messages. model, num_experts, num_layers: as given by the user or the file; empty or 0: not known.
    text: where the routing comes from, for the trace's header. unit: what a place counts (line, entry).
    """

    path: Path
    text: str
    license: str
    model: str = ""
    num_experts: int = 0
    incomplete: str = "drop"
    unit: str = "line"
    notes: tuple[str, ...] = ()


@dataclass
class Choices:
    """Choices in the order in which they were read."""

    labels: list[str] = field(default_factory=list)
    """One a request; a request's number is its place here."""
    positions: bool = False
    """Whether the number of a token is its position in the context, so that what stands before it counts."""
    prompt_len: int = 0
    """How many tokens of each request are its prompt; 0: not given."""
    has_weights: bool = True
    has_phase: bool = True
    has_forward: bool = True
    _paths: list[Path] = field(default_factory=list)
    _path_begins: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._request, self._token, self._layer = array("q"), array("q"), array("q")
        self._place, self._forward, self._size = array("q"), array("q"), array("i")
        self._prefill = array("b")
        self._experts, self._weights = array("q"), array("d")

    def __len__(self) -> int:
        return len(self._layer)

    def reads(self, path: Path) -> None:
        """What follows comes from this file."""
        self._paths.append(path)
        self._path_begins.append(len(self))

    def new_request(self, label: str) -> int:
        """The number of one request more."""
        self.labels.append(label)
        return len(self.labels) - 1

    def add(
        self,
        request: int,
        token: int,
        layer: int,
        experts: Sequence[int],
        *,
        place: int,
        weights: Sequence[float] | None = None,
        prefill: bool | None = None,
        forward: int | None = None,
    ) -> None:
        """One choice: experts best first, negative ones are none; weights as many. ValueError says what is wrong."""
        if not 0 < len(experts) <= _MAX_TOP_K:
            raise ValueError(f"has {len(experts)} experts for one token and layer")
        if max(experts) >= _MAX_ID or min(experts) < -_MAX_ID or not -_MAX_ID < token < _MAX_ID:
            raise ValueError("holds a number of more than 31 bits")
        if not 0 <= layer < MAX_LAYERS:
            raise ValueError(f"has the layer {layer}, outside 0 … {MAX_LAYERS - 1}")
        if weights is None:
            self.has_weights = False
        elif len(weights) != len(experts):
            raise ValueError(f"has {len(experts)} experts and {len(weights)} weights")
        self.has_phase &= prefill is not None
        self.has_forward &= forward is not None
        self._request.append(request)
        self._token.append(token)
        self._layer.append(layer)
        self._place.append(place)
        self._forward.append(-1 if forward is None else forward)
        self._prefill.append(bool(prefill))
        self._size.append(len(experts))
        self._experts.extend(experts)
        if self.has_weights and weights is not None:
            self._weights.extend(weights)

    def place_at(self, choices: Ints, request: Ints, token: Ints, prefill: npt.NDArray[np.bool_]) -> None:
        """Give the choices with these numbers their request, token and phase, which were not known when they came."""
        for column, values in ((self._request, request), (self._token, token)):
            np.frombuffer(column, np.int64)[choices] = values
        np.frombuffer(self._prefill, np.bool_)[choices] = prefill

    def where(self, choice: int) -> tuple[Path, int]:
        """File and place of the choice with this number."""
        index = bisect_right(self._path_begins, choice) - 1
        return self._paths[index], self._place[choice]

    def columns(self) -> tuple[Ints, Ints, Ints, Ints, npt.NDArray[np.bool_]]:
        """Request, token, layer, forward and whether it is of the prompt [N]."""
        wide = (np.frombuffer(part, np.int64) for part in (self._request, self._token, self._layer, self._forward))
        request, token, layer, forward = wide
        return request, token, layer, forward, np.frombuffer(self._prefill, np.bool_)

    def experts(self) -> npt.NDArray[np.int32]:
        """Experts [N,K], padded with −1 at the end."""
        return self._rows(np.frombuffer(self._experts, np.int64), PADDING).astype(np.int32)

    def weights(self) -> npt.NDArray[np.float64] | None:
        """Weights [N,K], 0 where there is no expert; None where not every choice has them."""
        return self._rows(np.frombuffer(self._weights, np.float64), 0) if self.has_weights else None

    def _rows(self, values: npt.NDArray[Any], padding: int) -> npt.NDArray[Any]:
        sizes = np.frombuffer(self._size, np.intc).astype(np.int64)
        width = int(sizes.max())
        # One long row widens all others.
        check_bytes(self._paths[-1], "source", 3 * 8 * width * len(sizes))
        if int(sizes.min()) == width:
            return values.reshape(-1, width)
        rows = np.full((len(sizes), width), padding, values.dtype)
        rows[np.arange(width) < sizes[:, None]] = values
        return rows


def write_choices(choices: Choices, source: Source, output: str | Path) -> ImportReport:
    """Write the trace of all choices. TraceError names the file and the place of what is wrong with them."""
    check_choice("incomplete", source.incomplete, INCOMPLETE)
    if not len(choices):
        raise fault(source.path, "source", "holds no choice of experts", "check the file and the options")
    experts, weights, notes = _checked(choices, source)
    num_experts, more = _num_experts(choices, source, experts)
    notes += more
    if not source.model:
        notes.append(NO_MODEL)
    requests, layers, more = assemble(choices, source, experts, weights)
    about = About(
        model=source.model or UNNAMED,
        num_experts=num_experts,
        source=source.text,
        license=source.license,
        moe_layer_ids=layers,
    )
    return write_requests(source.path, output, requests, about, [*source.notes, *notes, *more])


def assemble(
    choices: Choices,
    source: Source,
    experts: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float64] | None,
) -> tuple[list[Request], list[int], list[str]]:
    """Requests in their order, their tokens in the order of their numbers; the layers there are; and notes."""
    request, token, layer, forward, prefill = choices.columns()
    order = np.lexsort((layer, token, request))
    sorted_request, sorted_token, sorted_layer = request[order], token[order], layer[order]
    new_token = np.ones(len(order), np.bool_)
    new_token[1:] = (np.diff(sorted_request) != 0) | (np.diff(sorted_token) != 0)
    twice = np.flatnonzero(~new_token[1:] & (np.diff(sorted_layer) == 0))
    if len(twice):
        at = int(order[twice[0] + 1])
        problem = f"gives layer {layer[at]} of token {token[at]} again"
        raise _wrong(choices, source, at, problem, "give each run its own file or request")
    layers, layer_index = np.unique(sorted_layer, return_inverse=True)
    token_index = np.cumsum(new_token) - 1
    num_tokens = int(token_index[-1]) + 1
    if num_tokens * len(layers) > 4 * len(order) + 4096:
        problem = f"has {len(order)} choices for {num_tokens} tokens of {len(layers)} layers: most are missing"
        raise fault(source.path, "source", problem, "check which columns are token and layer")
    found = np.full((num_tokens, len(layers)), -1, np.int64)
    found[token_index, layer_index] = order
    first = order[new_token]
    of_prompt = prefill[first] if choices.has_phase else np.zeros(num_tokens, np.bool_)
    if choices.has_phase:
        mixed = np.flatnonzero(prefill[order] != of_prompt[token_index])
        if len(mixed):
            raise _wrong(choices, source, int(order[mixed[0]]), "is of a token that is in both phases", "correct it")
    begins = np.flatnonzero(np.diff(request[first], prepend=-1))
    ends = np.append(begins[1:], num_tokens)
    if choices.prompt_len:
        of_prompt = _prompts(choices, source, first, begins, of_prompt)
    requests, num_changed, num_cut = [], 0, 0
    many = len({label for label in choices.labels if label}) > 1
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        rows, start, changed, cut = _complete(choices, source, found[begin:end], of_prompt[begin:end], token, layers)
        num_changed += changed
        num_cut += cut
        prompt = of_prompt[begin + start : begin + start + len(rows)]
        late = np.flatnonzero(~prompt[:-1] & prompt[1:])
        if len(late):
            at = int(rows[late[0] + 1, 0])
            raise _wrong(choices, source, at, "is of the prompt, after a decoded token", "split the request")
        label = choices.labels[int(request[first[begin]])]
        requests.append(
            Request(
                experts[rows],
                None if weights is None else weights[rows].astype(np.float16),
                prompt_len=int(prompt.sum()),
                context_len=max(int(token[rows[0, 0]]), 0) if choices.positions else start,
                label=label if many else "",
                forward_id=forward[rows[:, 0]] if choices.has_forward else None,
            )
        )
    return requests, layers.tolist(), _notes(choices, source, num_changed, num_cut)


def _prompts(choices: Choices, source: Source, first: Ints, begins: Ints, told: Flags) -> Flags:
    """Which tokens are of their request's prompt [T], by how many of each are. TraceError where a request has fewer
    tokens, or the source tells another number.

    first: a choice of each token; begins: the first token of each request.
    """
    lengths = np.diff(np.append(begins, len(first)))
    short = np.flatnonzero(lengths < choices.prompt_len)
    if len(short):
        problem = f"is of a request of {lengths[short[0]]} tokens, fewer than prompt_len={choices.prompt_len}"
        raise _wrong(
            choices, source, int(first[begins[short[0]]]), problem, "give a smaller one, or what tells prompts"
        )
    if choices.has_phase:
        counts = np.add.reduceat(told.astype(np.int64), begins)
        other = np.flatnonzero(counts != choices.prompt_len)
        if len(other):
            problem = f"is of a request whose prompt has {counts[other[0]]} tokens, not prompt_len={choices.prompt_len}"
            raise _wrong(choices, source, int(first[begins[other[0]]]), problem, "leave out prompt_len=")
        return told
    found: Flags = np.arange(len(first)) - np.repeat(begins, lengths) < choices.prompt_len
    return found


def _notes(choices: Choices, source: Source, num_changed: int, num_cut: int) -> list[str]:
    notes = []
    if num_changed:
        notes.append(f"{num_changed} prompt tokens lack a layer: {_DONE[source.incomplete]}")
    if num_cut:
        notes.append(f"{num_cut} last tokens left out: the recording ends before their last layer")
    if not (choices.has_phase or choices.prompt_len):
        notes.append("no prompt length: all tokens count as decode")
    return notes


def _complete(
    choices: Choices, source: Source, found: Ints, of_prompt: Flags, token: Ints, layers: Ints
) -> tuple[Ints, int, int, int]:
    """The choices [T,L] of a request's whole tokens, how many tokens stand before them, how many prompt tokens were
    left out or filled, and how many were cut off at the end."""
    lacking: Flags = np.any(found < 0, axis=1)
    if not lacking.any():
        return found, 0, 0, 0
    num_cut = 0
    if len(found) > 1 and lacking[-1]:
        # A recording that was stopped in the middle of a token.
        found, lacking, of_prompt, num_cut = found[:-1], lacking[:-1], of_prompt[:-1], 1
    start = int(lacking.sum())
    leading = bool(lacking[:start].all() and of_prompt[:start].all())
    if not start:
        return found, 0, 0, num_cut
    if source.incomplete == "repeat" and bool((of_prompt | ~lacking).all()) and not lacking[-1]:
        for row in range(len(found) - 2, -1, -1):
            gap = found[row] < 0
            found[row, gap] = found[row + 1, gap]
        return found, 0, start, num_cut
    if source.incomplete == "drop" and leading and start < len(found):
        return found[start:], start, start, num_cut
    row = int(np.flatnonzero(lacking)[0])
    at = int(found[row].max())
    missing = int(layers[np.flatnonzero(found[row] < 0)[0]])
    problem = f"token {token[at]} has no choice in layer {missing}"
    raise _wrong(choices, source, at, problem, "the file is cut off or mixed up; remove this token")


def _checked(
    choices: Choices, source: Source
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64] | None, list[str]]:
    """Experts [N,K], best first by their weights and what is none at the end, the weights, and notes. TraceError on an
    expert chosen twice."""
    experts, weights = choices.experts(), choices.weights()
    none = experts < 0
    if none.any():
        moved = np.argsort(none, axis=1, kind="stable")
        experts = np.take_along_axis(np.where(none, PADDING, experts), moved, axis=1)
        weights = None if weights is None else np.take_along_axis(np.where(none, 0, weights), moved, axis=1)
        empty = np.flatnonzero(experts[:, 0] < 0)
        if len(empty):
            raise _wrong(choices, source, int(empty[0]), "holds no expert", "leave out layers without experts")
    ordered = np.sort(experts, axis=1)
    twice = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1))
    if len(twice):
        at = int(twice[0])
        problem = f"has the experts {experts[at].tolist()[:12]}: one comes twice"
        raise _wrong(choices, source, at, problem, "give each token and layer distinct experts")
    if weights is not None:
        if np.isnan(weights).any():
            return experts, None, ["weights left out: some are not known"]
        outside = np.flatnonzero(((weights < 0) | (weights > MAX_WEIGHT)).any(axis=1))
        if len(outside):
            problem = f"has the weights {weights[outside[0]].tolist()[:8]}"
            raise _wrong(choices, source, int(outside[0]), problem, f"give 0 to {MAX_WEIGHT}, or nan for unknown")
        return _by_weight(experts, weights)
    return experts, weights, []


def _by_weight(
    experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], list[str]]:
    """Experts and weights [N,K] with the largest weight first, and a note where they were not."""
    rising = ((weights[:, 1:] > weights[:, :-1]) & (experts[:, 1:] >= 0)).any(axis=1)
    if not rising.any():
        return experts, weights, []
    order = np.argsort(np.where(experts < 0, np.inf, -weights), axis=1, kind="stable")
    note = f"experts of {int(rising.sum())} of {len(experts)} choices put in the order of their weights, best first"
    return np.take_along_axis(experts, order, axis=1), np.take_along_axis(weights, order, axis=1), [note]


def _num_experts(choices: Choices, source: Source, experts: npt.NDArray[np.int32]) -> tuple[int, list[str]]:
    at = int(experts.max(axis=1).argmax())
    highest = int(experts[at].max())
    if not source.num_experts:
        note = f"num_experts={highest + 1}, the highest id and one; give num_experts= if there are more"
        return highest + 1, [note]
    if highest >= source.num_experts:
        problem = f"holds expert {highest}, outside 0 … {source.num_experts - 1}"
        raise _wrong(choices, source, at, problem, "correct num_experts")
    return source.num_experts, []


def _wrong(choices: Choices, source: Source, choice: int, problem: str, remedy: str) -> TraceError:
    path, place = choices.where(choice)
    return fault(path, f"{source.unit} {place}", problem, remedy)
