"""Rows of a table as they stand in its files, and how rows of one expert each are put together to choices.

Rows are kept in plain arrays, so that what a column means can be decided by all that it holds. Shape letters: N rows,
C choices.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from traces.container import TraceError, fault
from traces.importers.columns import COUNTS, Columns

Ints = npt.NDArray[np.int64]
UNKNOWN = -1
_INTEGERS = ("file", "place", "request", "phase", "step", "token", "layer", "rank")
_KEY = ("request", "phase", "step", "token", "layer")
"""What rows of one choice have in common."""


@dataclass
class Rows:
    """All rows of all files, in their order. Numbers are `UNKNOWN` where there is no column."""

    columns: Columns
    unit: str
    paths: list[Path] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=dict)
    """Number of each request by its name."""
    is_long: bool = True
    """Whether every row holds one expert, and none a list."""

    def __post_init__(self) -> None:
        self._columns = {name: array("q") for name in _INTEGERS}
        self._sizes, self._experts, self._weights = array("q"), array("q"), array("d")

    def __len__(self) -> int:
        return len(self._sizes)

    def add(
        self, place: int, numbers: Sequence[int], experts: Sequence[int], weights: Sequence[float] | None, listed: bool
    ) -> None:
        """A row of the file that was last begun. numbers: request, phase, step, token, layer and rank."""
        if weights is not None and len(weights) != len(experts):
            raise ValueError(f"has {len(experts)} experts and {len(weights)} weights")
        if any(not -(1 << 62) < number < 1 << 62 for number in (*numbers, *experts)):
            raise ValueError("holds a number of more than 62 bits")
        for name, number in zip(_INTEGERS, (len(self.paths) - 1, place, *numbers), strict=True):
            self._columns[name].append(number)
        self._sizes.append(len(experts))
        self._experts.extend(experts)
        self._weights.extend(weights or ())
        self.is_long &= not listed and len(experts) == 1

    def column(self, name: str) -> Ints:
        """A column [N]."""
        return np.frombuffer(self._columns[name], np.int64)

    def fault_at(self, row: int, problem: str, remedy: str) -> TraceError:
        """The error for a row."""
        path, place = self.paths[int(self.column("file")[row])], int(self.column("place")[row])
        return fault(path, f"{self.unit} {place}", problem, remedy)


class Picks:
    """Choices of rows: what each token chose in each layer. Choices stand in the order of their first rows."""

    def __init__(self, rows: Rows, order: Ints, starts: Ints) -> None:
        """order: rows choice by choice, best expert first; starts [C+1]."""
        self._rows, self._order, self._starts = rows, order, starts
        if len(order) == len(rows) and len(starts) - 1 == len(rows):
            self.first = order
        else:
            self.first = np.minimum.reduceat(order, starts[:-1]) if len(starts) > 1 else order[:0]
        self._begins = np.concatenate([[0], np.cumsum(np.frombuffer(rows._sizes, np.int64))]).astype(np.int64)
        self._weighted = len(rows._weights) == len(rows._experts) and bool(rows.columns.weight)

    def __len__(self) -> int:
        return len(self.first)

    def column(self, name: str) -> Ints:
        """A column of the first row of each choice [C]."""
        return self._rows.column(name)[self.first]

    def experts(self, pick: int) -> tuple[list[int], list[float] | None]:
        """Experts and weights of a choice."""
        experts: list[int] = []
        weights: list[float] = []
        for row in self._order[self._starts[pick] : self._starts[pick + 1]].tolist():
            begin, end = int(self._begins[row]), int(self._begins[row + 1])
            experts.extend(self._rows._experts[begin:end])
            weights.extend(self._rows._weights[begin:end] if self._weighted else ())
        return experts, weights if self._weighted else None


def picked(rows: Rows, top_k: int, other_columns: Sequence[str], notes: list[str]) -> Picks:
    """The choices of all rows. TraceError where rows of one expert each cannot be told apart, or their ranks are no
    order of experts."""
    columns = rows.columns
    num = len(rows)
    if not num:
        return Picks(rows, np.arange(0), np.arange(1))
    if not rows.is_long:
        if columns.rank:
            _check_beside_lists(rows, notes)
        return Picks(rows, np.arange(num), np.arange(num + 1))
    if columns.rank and columns.token and len(np.unique(rows.column("rank"))) == 1:
        # One value throughout, such as how many experts there are, orders nothing.
        notes.append(f"column {columns.rank} not used: it holds one value throughout")
        rows.columns = columns = replace(columns, rank="")
    counts = [name for name in other_columns if name.strip().lower() in COUNTS]
    if not columns.token and not columns.rank:
        if counts:
            problem = f"counts how often each expert was chosen (column {counts[0]!r}), not by which token"
            raise fault(rows.paths[0], "file", problem, "record the choices of each token: a histogram has none")
        if not top_k:
            problem = "does not tell how many experts a token has: a row holds one"
            raise fault(rows.paths[0], "file", problem, "give top_k=, or rank= or token=")
    new = _changes(rows, not columns.request)
    if columns.rank:
        return _ranked(rows, new)
    if top_k:
        run = np.maximum.accumulate(np.where(new, np.arange(num), 0))
        new |= (np.arange(num) - run) % top_k == 0
    starts = np.append(np.flatnonzero(new), num)
    if top_k and not columns.token:
        starts = _of_one_size(rows, starts, top_k, notes)
    return Picks(rows, np.arange(int(starts[-1])), starts)


def _changes(rows: Rows, by_file: bool) -> npt.NDArray[np.bool_]:
    """Rows that do not go on the choice of the row before [N]."""
    new = np.zeros(len(rows), np.bool_)
    new[:1] = True
    for name in (*_KEY, *(("file",) if by_file else ())):
        new[1:] |= np.diff(rows.column(name)) != 0
    return new


def _of_one_size(rows: Rows, starts: Ints, top_k: int, notes: list[str]) -> Ints:
    """The bounds of the choices, without a last one that is cut off. TraceError where another has fewer experts."""
    sizes = np.diff(starts)
    short = np.flatnonzero(sizes < top_k)
    if not len(short):
        return starts
    if len(short) > 1 or short[0] != len(sizes) - 1 or len(sizes) == 1:
        row = int(starts[short[0]])
        layer = int(rows.column("layer")[row])
        problem = f"layer {layer} has a number of rows in a forward that is no multiple of top_k={top_k}"
        raise rows.fault_at(row, problem, "correct top_k=, or remove what is cut off")
    notes.append("the last choice left out: the file ends before its last expert")
    return starts[:-1]


def _check_beside_lists(rows: Rows, notes: list[str]) -> None:
    """TraceError where a rank beside lists of experts tells processes or slots whose tokens are not told apart."""
    name, rank = rows.columns.rank, rows.column("rank")
    pairs = np.unique(np.stack([rows.column("request"), rank]), axis=1)
    if pairs.shape[1] > len(np.unique(pairs[0])):
        row = int(np.flatnonzero(rank != rank[0])[0])
        problem = f"column {name!r} has several values beside lists of experts: it tells no order of experts"
        remedy = f"where it tells processes or slots with a request each, give request={name[:60]}"
        raise rows.fault_at(row, problem, remedy)
    notes.append(f"column {name} not used: lists of experts have their own order")


def _ranked(rows: Rows, new: npt.NDArray[np.bool_]) -> Picks:
    """Choices of rows that tell the rank of their expert, which stand together or rank by rank."""
    rank = rows.column("rank")
    pending: set[int] = set()
    new = new.copy()
    for row, (value, begins) in enumerate(zip(rank.tolist(), new.tolist(), strict=True)):
        if begins or value in pending:
            new[row] = True
            pending = set()
        pending.add(value)
    choice = np.cumsum(new) - 1
    order = np.lexsort((rank, choice))
    wrong = _wrong_rank(rank[order], choice[order])
    if wrong is None:
        return Picks(rows, order, np.append(np.flatnonzero(np.diff(choice[order], prepend=-1)), len(rows)))
    if rows.columns.token and (found := _by_rank(rows)) is not None:
        return found
    row = int(order[wrong])
    problem = f"{rows.columns.rank} is {int(rank[row])}, and the ranks of this token and layer are not 0, 1, …"
    remedy = "rank= is their order; a process with requests of its own is request=, else take the column out"
    raise rows.fault_at(row, problem, remedy)


def _by_rank(rows: Rows) -> Picks | None:
    """Choices of a table that was turned from wide to long, so that all rows of a rank stand together: the n-th row of
    a token, layer and rank is of the n-th choice of that token and layer. None where ranks have other numbers of
    rows."""
    rank = rows.column("rank")
    key = codes_of([rows.column(name) for name in _KEY])
    both = codes_of([key, rank])
    order = np.lexsort((np.arange(len(rows)), both))
    _, begin, count = np.unique(both[order], return_index=True, return_counts=True)
    nth = np.empty(len(rows), np.int64)
    nth[order] = np.arange(len(rows)) - np.repeat(begin, count)
    # Of each key all ranks must come as often: else what belongs together is not told.
    owner = key[order][begin]
    least, most = np.full(int(key.max()) + 1, len(rows)), np.zeros(int(key.max()) + 1, np.int64)
    np.minimum.at(least, owner, count)
    np.maximum.at(most, owner, count)
    choice = codes_of([key, nth])
    inside = np.lexsort((rank, choice))
    if (least != most).any() or _wrong_rank(rank[inside], choice[inside]) is not None:
        return None
    # In the order of their first rows.
    first = np.full(int(choice.max()) + 1, len(rows))
    np.minimum.at(first, choice, np.arange(len(rows)))
    inside = np.lexsort((rank, first[choice]))
    return Picks(rows, inside, np.append(np.flatnonzero(np.diff(first[choice[inside]], prepend=-1)), len(rows)))


def _wrong_rank(rank: Ints, choice: Ints) -> int | None:
    """Where the ranks of a choice, which stand in rising order, are not 0, 1, … or throughout 1, 2, …"""
    begins = np.flatnonzero(np.diff(choice, prepend=-1))
    within = np.arange(len(rank)) - np.repeat(begins, np.diff(np.append(begins, len(rank))))
    base = int(rank.min())
    wrong = np.flatnonzero(rank - base != within)
    if base not in (0, 1):
        return 0
    return int(wrong[0]) if len(wrong) else None


def codes_of(columns: Sequence[Ints]) -> Ints:
    """A number for each combination of values [N]; they rise by the last column, of equals by the one before, …"""
    order = np.lexsort(columns)
    new = np.zeros(len(order), np.bool_)
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    codes = np.empty(len(order), np.int64)
    codes[order] = np.cumsum(new)
    return codes
