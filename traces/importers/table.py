"""Importer of routing in any table: you say which column is what.

A row is what one token chose in one layer (`expert=` names a column of lists, or several columns: `expert=e0,e1`), or
one expert of that (`expert=` names a column of numbers; `rank=` orders them, else the rows' order does). Formats: CSV,
whitespace text, JSON lines, a JSON list of objects, Parquet, fixed-width binary (`format=binary
fields=token:u4,layer:u2,expert:u2*8`); text also packed by gzip. Columns of a file without a header line are called
1, 2, …. How rows become tokens:

- `request=` tells requests apart. Without it, a layer whose token number does not rise begins the next request.
- `token=` is the token's number in its request, `positions=true` if it counts from the context's beginning. `step=`
  beside it is the number of the forward: requests that share one ran together (`forward_id`). Numbers that begin again
  with each forward are recognised, and count as none.
- Without `token=`, `step=` is the number of the forward; a layer's rows of one step are its tokens. Without both, a
  layer number that falls begins the next forward. A forward of several tokens is a prompt, one of a single token
  decodes, and a prompt after a decoded token begins a request. Where a row holds a single expert, give `top_k=`.
- `phase=` holds 0 or prefill, 1 or decode, a column is_prefill or is_decode whether it is so. Without it,
  `prompt_len=` says how many tokens of each request are its prompt.
- Files with a column of requests are one table, in the order of their names; others are requests of their own, unless
  one goes on where the one before ended, or each has a layer of its own (by its name, where no column tells it).
- Columns that are not named are found by their usual names, which a note tells; one that is not what it is called (a
  rank that orders no experts, a token from the vocabulary) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from traces.container import fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.cells import (
    cell_integer,
    cell_integers,
    cell_layer,
    cell_name,
    cell_numbers,
    cell_phase,
    is_list,
)
from traces.importers.collected import UNKNOWN, Rows, picked
from traces.importers.columns import HOW, Columns, completed, layer_of_name, listed
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.numbering import Asked, numbered
from traces.importers.rows import RowFile, kind_of


def import_table(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    *,
    format: str = "",
    request: str = "",
    phase: str = "",
    token: str = "",
    step: str = "",
    layer: str = "",
    rank: str = "",
    expert: str = "",
    weight: str = "",
    fields: str = "",
    top_k: int = 0,
    prompt_len: int = 0,
    positions: bool = False,
    model: str = "",
    num_experts: int = 0,
    incomplete: str = "drop",
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the table, or the tables of a folder, as one trace. TraceError names file and row."""
    given = Columns(request, phase, token, step, layer, rank, listed(expert), listed(weight))
    options = Options(top_k, prompt_len, positions, bool(token and step))
    suffixes = (f".{format}",) if format else (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")
    files = [RowFile(path, kind_of(path, format), fields) for path in files_of(source, *suffixes)]
    notes: list[str] = []
    columns = completed(files[0], given, notes)
    choices, more = read_table(files, columns, options, progress)
    what = Source(
        files[0].path,
        f"table ({files[0].kind})",
        license,
        model,
        num_experts,
        incomplete,
        unit=files[0].unit,
        notes=(*notes, *more),
    )
    return write_choices(choices, what, output)


@dataclass(frozen=True)
class Options:
    """How rows become tokens, beside their columns. top_k, prompt_len: 0 = not given. both_named: the user named the
    columns of the token and of the step."""

    top_k: int = 0
    prompt_len: int = 0
    positions: bool = False
    both_named: bool = False


def read_table(
    files: Sequence[RowFile], columns: Columns, options: Options, progress: Progress | None = None
) -> tuple[Choices, list[str]]:
    """The choices of all files, and notes on what was concluded. TraceError names file and row."""
    choices = Choices(positions=options.positions, prompt_len=options.prompt_len)
    if options.positions and not columns.token:
        raise fault(files[0].path, "file", "has no column of positions", "name it with token=, or leave out positions=")
    if options.prompt_len and not columns.token:
        problem = "has no column of tokens: prompt_len= needs token=, without it the forwards tell the prompts"
        raise fault(files[0].path, "file", problem, "name it, or leave out prompt_len=")
    notes: list[str] = []
    rows = Rows(columns, files[0].unit)
    num_prefaces = 0
    for file in tracked(files, progress, "reading tables"):
        rows.paths.append(file.path)
        num_prefaces += file.has_preface(columns.names())
        _collect(rows, file)
    if num_prefaces:
        notes.append("a first line without any of the columns is left out")
    if not columns.layer:
        notes.append("layers taken from the names of the files")
    picks = picked(rows, options.top_k, files[0].columns(), notes)
    numbered(rows, picks, choices, Asked(options.positions, options.both_named), notes)
    return choices, notes


def _collect(rows: Rows, file: RowFile) -> None:
    """All rows of a file."""
    columns = rows.columns
    names = columns.names()
    index = {name: number for number, name in enumerate(names)}
    of_file = -1
    if not columns.layer:
        found = layer_of_name(file.path)
        if found is None:
            raise fault(
                file.path, "file", "tells no layer by its name", "call each layer's file layer0.csv, layer1.csv"
            )
        of_file = found
    for place, values in file.rows(names):

        def cell(name: str, values: list[Any] = values) -> Any:
            return values[index[name]]

        try:
            experts = [item for name in columns.expert for item in cell_integers(cell(name), name)]
            weights = [item for name in columns.weight for item in cell_numbers(cell(name), name)]
            numbers = (
                _request(rows, cell(columns.request)) if columns.request else UNKNOWN,
                int(cell_phase(cell(columns.phase), columns.phase)) if columns.phase else UNKNOWN,
                cell_integer(cell(columns.step), columns.step) if columns.step else UNKNOWN,
                cell_integer(cell(columns.token), columns.token) if columns.token else 0,
                cell_layer(cell(columns.layer), columns.layer) if columns.layer else of_file,
                cell_integer(cell(columns.rank), columns.rank) if columns.rank else UNKNOWN,
            )
            is_listed = len(columns.expert) > 1 or is_list(cell(columns.expert[0]))
            rows.add(place, numbers, experts, weights if columns.weight else None, is_listed)
        except ValueError as error:
            raise fault(file.path, f"{file.unit} {place}", str(error), HOW) from None


def _request(rows: Rows, value: Any) -> int:
    """The number of the request of this name; `UNKNOWN` where a row names none."""
    name = cell_name(value)
    return rows.requests.setdefault(name, len(rows.requests)) if name else UNKNOWN
