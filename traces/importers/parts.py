"""Which files of a table are one run: shards of one, logs that were rotated, a file a layer, or runs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from traces.container import fault
from traces.importers.collected import Ints, Picks, Rows, codes_of


class Has(NamedTuple):
    """Which columns there are."""

    request: bool
    token: bool
    step: bool


@dataclass
class Numbers:
    """The numbers of all choices [C] that the reading of a table settles; `part` is the run that a file belongs to."""

    part: Ints
    request: Ints
    step: Ints
    token: Ints
    layer: Ints
    phase: Ints
    file: Ints

    @classmethod
    def of(cls, picks: Picks) -> Numbers:
        """As they stand in the rows."""
        columns = {name: picks.column(name) for name in ("request", "step", "token", "layer", "phase", "file")}
        return cls(part=np.zeros(len(picks), np.int64), **columns)


def settle_parts(rows: Rows, n: Numbers, has: Has, notes: list[str]) -> None:
    """Which files are one run."""
    num_files = len(rows.paths)
    if num_files < 2:
        return
    layers = [set(np.unique(n.layer[n.file == file]).tolist()) for file in range(num_files)]
    if sum(map(len, layers)) == len(set[int]().union(*layers)):
        if not has.token and not has.step:
            problem = "is one of several with layers of their own: forwards are not told"
            raise fault(rows.paths[0], "file", problem, "give step= or token=")
        return
    if has.request:
        _parts_of_requests(n, has, notes)
        return
    part_of = [0] * num_files
    for file in range(1, num_files):
        part_of[file] = part_of[file - 1] + (not _goes_on(n, has, part_of, file))
    n.part = np.array(part_of, np.int64)[n.file]
    if joined := num_files - 1 - part_of[-1]:
        notes.append(f"{joined} files go on where the file before ended: taken for parts of one run")


def _parts_of_requests(n: Numbers, has: Has, notes: list[str]) -> None:
    """Files are one table unless requests of one file come again in another with the same tokens."""
    within = [n.request, n.token, n.layer] if has.token else [n.request, n.step, n.layer]
    if not has.token and not has.step:
        return
    code = codes_of([*within, n.step] if has.step else within)
    order = np.lexsort((n.file, code))
    again = (np.diff(code[order]) == 0) & (np.diff(n.file[order]) != 0)
    if not again.any():
        return
    if not has.token:
        # The next file may begin within the forward in which the one before ended.
        falls = falling_step(n)
        if falls is None:
            return
    n.part = n.file.copy()
    notes.append("requests of one file come again in another: each file is taken for a run of its own")


def falling_step(n: Numbers) -> int | None:
    """The first choice whose request and layer had a later step before; None where there is none."""
    order = np.lexsort((np.arange(len(n.step)), n.layer, n.request, n.part))
    same = np.ones(len(order) - 1, np.bool_)
    for column in (n.part, n.request, n.layer):
        same &= np.diff(column[order]) == 0
    falls = np.flatnonzero(same & (np.diff(n.step[order]) < 0))
    return int(order[falls + 1].min()) if len(falls) else None


def _goes_on(n: Numbers, has: Has, part_of: Sequence[int], file: int) -> bool:
    """Whether a file without requests goes on where the one before ended."""
    before = np.isin(n.file, [other for other in range(file) if part_of[other] == part_of[file - 1]])
    here = n.file == file
    if not here.any() or not before.any():
        return True
    if not has.token:
        return has.step and 0 <= int(n.step[here].min()) - int(n.step[before].max()) <= 1
    last = {}
    for layer, token in zip(n.layer[before].tolist(), n.token[before].tolist(), strict=True):
        last[layer] = token
    least = int(n.token[before][0])
    first: dict[int, int] = {}
    for layer, token in zip(n.layer[here].tolist(), n.token[here].tolist(), strict=True):
        first.setdefault(layer, token)
    return all(token == last.get(layer, least - 1) + 1 for layer, token in first.items())
