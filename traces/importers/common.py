"""What the importers share: a request in memory, CSV rows with line numbers, and the writing of the trace.

Knows no source format. A source is untrusted text: it is parsed, never evaluated, and every message names its file
and line. Shape letters: n tokens of one request, L layers, K top-k.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from traces.container import TraceError, check_file, fault
from traces.format import About, checked_trace, write_checked
from traces.importers.packed import source_lines, suffix_of
from traces.limits import Budget, check_bytes

Item = TypeVar("Item")
PADDING = -1
UNKNOWN_LICENSE = "unknown"
MAX_WEIGHT = 65_504
"""The largest float16."""
MAX_LAYERS = 4096
"""Layers of a model, far above any: what a file claims beyond them is not followed."""
_ROW_BYTES = 256
"""What a row of a CSV file takes as Python objects."""
_ENTRY_BYTES = 24
"""What an entry of experts and weights takes while requests are joined, widened and checked."""
_MOST_COMMENT = 1000
"""Characters of a comment that are looked at."""


@dataclass(frozen=True)
class ImportReport:
    """The file written, its size, and what to know of it: left out, approximated, assumed."""

    path: Path
    num_requests: int
    num_tokens: int
    notes: tuple[str, ...]


@dataclass
class Request:
    """One request: experts [n,L,K] with −1 as padding, weights [n,L,K] float16 or None."""

    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float16] | None = None
    prompt_len: int = 0
    context_len: int | None = None
    label: str = ""
    forward_id: npt.NDArray[np.int64] | None = None
    source: tuple[Path, str] | None = None
    """The file and the place in it, for messages."""


def write_requests(
    source: str | Path, output: str | Path, requests: Sequence[Request], about: About, notes: Sequence[str] = ()
) -> ImportReport:
    """Join the requests, pad them to one K, write and check the trace. Optional arrays only where all have them.

    source: what they were read from, for messages. about: all but the labels, which the requests bring. TraceError as
    of `write_trace`.
    """
    if not requests:
        raise fault(output, "file", "would hold no request", "check source and options")
    _check_alike(source, requests)
    top_k = max(request.experts.shape[2] for request in requests)
    lengths = [len(request.experts) for request in requests]
    check_bytes(source, "experts", _ENTRY_BYTES * sum(lengths) * requests[0].experts.shape[1] * top_k)
    contexts = [request.context_len for request in requests if request.context_len is not None]
    weights = [request.weights for request in requests if request.weights is not None]
    forwards = [request.forward_id for request in requests if request.forward_id is not None]
    whole = len(requests)
    arrays = {
        "experts": np.concatenate([widen(request.experts, top_k, PADDING) for request in requests]),
        "weights": np.concatenate([widen(w, top_k, 0) for w in weights]) if len(weights) == whole else None,
        "request_start": np.cumsum([0, *lengths]),
        "prompt_len": [request.prompt_len for request in requests],
        "context_len": contexts if len(contexts) == whole else None,
        "forward_id": np.concatenate(forwards) if len(forwards) == whole else None,
    }
    labels = [r.label for r in requests] if all(r.label for r in requests) else None
    path = write_checked(output, checked_trace(Path(source), arrays, replace(about, request_labels=labels)))
    return ImportReport(path, whole, sum(lengths), tuple(notes))


def _check_alike(origin: str | Path, requests: Sequence[Request]) -> None:
    """TraceError where a request has other layers than the first."""
    wanted = requests[0].experts.shape[1]
    for index, request in enumerate(requests):
        if (found := request.experts.shape[1]) != wanted:
            path, where = request.source or (Path(origin), f"request {index}")
            first, place = requests[0].source or (Path(origin), "request 0")
            problem = f"has {found} layers, {first.name} ({place}) has {wanted}"
            raise fault(path, where, problem, "import the records of one model at a time")


def widen(array: npt.NDArray[Any], width: int, value: int) -> npt.NDArray[Any]:
    """The array with its last axis filled up to `width`."""
    missing = width - array.shape[-1]
    return np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=value) if missing else array


def files_of(source: str | Path | Sequence[str | Path], *suffixes: str) -> list[Path]:
    """The file itself, or the folder's files with these suffixes, names with numbers in their numeric order; of several
    sources all, in the order given."""
    if not isinstance(source, str | Path):
        return [path for item in source for path in files_of(item, *suffixes)]
    path = Path(source)
    if not path.is_dir():
        check_file(path)
        return [path]
    found = [item for item in path.rglob("*") if suffix_of(item) in suffixes and item.is_file()]
    if not found:
        raise fault(path, "folder", f"holds no {' or '.join(suffixes)} file", "give the folder with the records")
    return sorted(found, key=lambda item: [_natural(part) for part in item.relative_to(path).parts])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"([0-9]+)", name)]


def tracked(items: Sequence[Item], progress: Progress | None, text: str) -> Iterable[Item]:
    """The items, each shown as it is taken."""
    return items if progress is None else progress.track(items, description=text)


class CsvTable:
    """Rows of a CSV file with the numbers of their last lines; comment lines (`#`) are kept apart if asked.

    Iterating gives (line, values of `columns`, then of `optional`, empty where there is no such column); other columns
    are ignored and named in `ignored`. TraceError names file and line of what is no CSV, of a missing column, of a row
    with too few values.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        comments: bool = False,
        optional: Sequence[str] = (),
        delimiter: str = ",",
    ) -> None:
        self.path = path
        self._delimiter = delimiter
        self.columns = tuple(columns)
        self._optional = tuple(optional)
        self.comments: list[str] = []
        self.ignored: list[str] = []
        self._has_comments = comments

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(self._lines(), strict=True, delimiter=self._delimiter)
        try:
            yield from self._rows(reader)
        except csv.Error as error:
            raise fault(self.path, f"line {reader.line_num}", f"is no CSV ({error})", "correct or remove it") from None

    def _lines(self) -> Iterator[str]:
        for _, line in source_lines(self.path, "give a CSV file in UTF-8"):
            if self._has_comments and line.startswith("#"):
                self.comments.append(line[1:_MOST_COMMENT].strip())
                # An empty line in its place keeps the line numbers right.
                yield "\n"
            else:
                yield line

    def _rows(self, reader: Any) -> Iterator[tuple[int, list[str]]]:
        header: list[str] | None = None
        places: list[int] = []
        budget = Budget(self.path)
        for row in reader:
            line = int(reader.line_num)
            budget.take(f"line {line}", _ROW_BYTES)
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                places = self._places(header, line)
                continue
            if [name.strip() for name in row] == header:
                remedy = "these are several files joined; give them apart, in a folder"
                raise fault(self.path, f"line {line}", "repeats the header", remedy)
            if len(row) != len(header):
                problem = f"has {len(row)} values, the header {len(header)}"
                raise fault(self.path, f"line {line}", problem, "correct or remove it")
            yield line, [row[place] if place >= 0 else "" for place in places]
        if header is None:
            raise fault(self.path, "file", "has no header line", f"the columns are {', '.join(self.columns)}")

    def _places(self, header: list[str], line: int) -> list[int]:
        for name in self.columns:
            if header.count(name) != 1:
                problem = f"has {header.count(name)} columns {name!r}"
                raise fault(self.path, f"line {line}", problem, f"the columns are {', '.join(self.columns)}")
        self.ignored = [name for name in header if name not in self.columns]
        more = [header.index(name) if header.count(name) == 1 else -1 for name in self._optional]
        return [header.index(name) for name in self.columns] + more

    def whole(self, line: int, column: str, text: str) -> int:
        """`text` as a number from 0; TraceError otherwise."""
        text = text.strip()
        if not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise fault(self.path, f"line {line}", f"{column} is {text[:40]!r}", "give a whole number from 0")
        return int(text)

    def weight(self, line: int, column: str, text: str) -> float:
        """`text` as a weight from 0, or NaN for an unknown one; TraceError otherwise."""
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not (0 <= value <= MAX_WEIGHT or math.isnan(value)):
            raise fault(self.path, f"line {line}", f"{column} is {text[:40]!r}", f"give 0 to {MAX_WEIGHT}, or nan")
        return value


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """ValueError unless the option has one of its values."""
    if value not in choices:
        raise TraceError(f"option {key}={value} is unknown; choose one of {', '.join(choices)}")
