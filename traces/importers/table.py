"""Importer of routing in any table: you say which column is what.

A row is what one token chose in one layer (`expert=` names a column of lists, or several columns: `expert=e0,e1`), or
one expert of that (`expert=` names a column of numbers; `rank=` orders them, else the rows' order does). Formats: CSV,
whitespace text, JSON lines, Parquet, fixed-width binary (`format=binary fields=token:u4,layer:u2,expert:u2*8`).
Columns of a file without a header line are called 1, 2, …. How rows become tokens:

- `request=` tells requests apart. Without it, a layer whose token number does not rise begins the next request.
- `token=` is the token's number in its request, `positions=true` if it counts from the context's beginning. `step=`
  beside it, where you name it, is the number of the forward: requests that share one ran together (`forward_id`).
- Without `token=`, `step=` is the number of the forward; a layer's rows of one step are its tokens. Without both, a
  layer number that falls begins the next forward. A forward of several tokens is a prompt, one of a single token
  decodes, and a prompt after a decoded token begins a request. Where a row holds a single expert, give `top_k=`.
- `phase=` holds 0 or prefill, 1 or decode; without it, `prompt_len=` says how many tokens of each request are its
  prompt.
- Columns that are not named are found by their usual names, which a note tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from traces.container import TraceError, fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.rows import RowFile, cell_integer, cell_integers, cell_numbers, kind_of
from traces.importers.runs import Runs

USUAL: Mapping[str, tuple[str, ...]] = {
    "request": ("request", "request_id", "req_id", "rid", "turn", "prompt_id", "sequence", "seq_id", "sample_id"),
    "phase": ("phase", "stage"),
    "token": ("token", "token_idx", "token_index", "token_id", "position", "pos", "token_pos"),
    "step": ("step", "forward", "forward_id", "iteration", "iter", "batch_id"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index", "moe_layer"),
    "rank": ("rank", "slot", "k", "topk_rank", "order"),
    "expert": ("expert", "experts", "expert_id", "expert_ids", "topk_ids", "selected_experts", "topk_experts"),
    "weight": ("weight", "weights", "topk_weights", "gate_weight", "prob", "probs", "expert_weights"),
}
"""Names under which public recordings keep each field, the likeliest first."""
_PROMPT = ("0", "prefill", "prompt", "extend", "context")
_DECODE = ("1", "decode", "generate", "generation")
_TEXT = "give layer=, expert= and token= or step=, see python -m traces import --help"


@dataclass(frozen=True)
class Columns:
    """Which column holds which field; empty: none does. `expert` and `weight` may name several."""

    request: str = ""
    phase: str = ""
    token: str = ""
    step: str = ""
    layer: str = ""
    rank: str = ""
    expert: tuple[str, ...] = ()
    weight: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """All columns, in the order of the fields."""
        single = (self.request, self.phase, self.token, self.step, self.layer, self.rank)
        return [name for name in (*single, *self.expert, *self.weight) if name]


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
    given = Columns(request, phase, token, step, layer, rank, _listed(expert), _listed(weight))
    options = Options(top_k, prompt_len, positions)
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
    """How rows become tokens, beside their columns. top_k, prompt_len: 0 = not given."""

    top_k: int = 0
    prompt_len: int = 0
    positions: bool = False


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def completed(file: RowFile, given: Columns, notes: list[str]) -> Columns:
    """The columns as given, the others by their usual names; a note tells these. TraceError where one is missing."""
    there = file.columns()
    lower = {name.lower(): name for name in reversed(there)}
    taken = set(given.names())
    found: dict[str, Any] = {}
    for field, usual in USUAL.items():
        value = getattr(given, field)
        name = next((lower[word] for word in usual if word in lower and lower[word] not in taken), "")
        if not value and name and not (field == "step" and given.token):
            found[field] = (name,) if field in ("expert", "weight") else name
            taken.add(name)
    columns = Columns(**{field: found.get(field) or getattr(given, field) for field in USUAL})
    for name in columns.names():
        if name not in there:
            shown = ", ".join(there[:20])
            raise fault(file.path, "file", f"has no column {name!r}", f"its columns are {shown[:120]}")
    if not columns.layer or not columns.expert:
        shown = ", ".join(there[:20])
        raise fault(file.path, "file", f"has the columns {shown[:120]}", _TEXT)
    if found:
        guessed = ", ".join(
            f"{field}={value if isinstance(value, str) else value[0]}" for field, value in found.items()
        )
        notes.append(f"columns taken by their names: {guessed}")
    return columns


def read_table(
    files: Sequence[RowFile], columns: Columns, options: Options, progress: Progress | None = None
) -> tuple[Choices, list[str]]:
    """The choices of all files, and notes on what was concluded. TraceError names file and row."""
    choices = Choices(positions=options.positions)
    if options.positions and not columns.token:
        raise fault(files[0].path, "file", "has no column of positions", "name it with token=, or leave out positions=")
    runs = Runs(choices)
    for number, file in enumerate(tracked(files, progress, "reading tables")):
        choices.reads(file.path)
        name = file.path.stem if len(files) > 1 else ""
        taker: _Numbered | _Unnumbered
        taker = _Numbered(choices, options, name) if columns.token else _Unnumbered(runs, options, name or f"{number}")
        place = 0
        try:
            for place, row in _merged(file, columns, options):
                taker.take(place, row)
        except TraceError:
            raise
        except ValueError as error:
            at = error.place if isinstance(error, _RowError) else place
            raise fault(file.path, f"{file.unit} {at}", str(error), _TEXT) from None
    return choices, ([] if columns.token else runs.number(files[0].path))


@dataclass
class _Row:
    """A choice as the table tells it."""

    request: str
    phase: str
    token: int
    step: int
    layer: int
    experts: list[int]
    weights: list[float] | None


class _RowError(ValueError):
    """A row that cannot be read, with its place."""

    def __init__(self, place: int, text: str) -> None:
        super().__init__(text)
        self.place = place


def _rows(file: RowFile, columns: Columns) -> Iterator[tuple[int, _Row, int]]:
    """(place, row, rank or −1) as they stand in the file."""
    names = columns.names()
    index = {name: number for number, name in enumerate(names)}
    for place, values in file.rows(names):

        def cell(name: str, values: list[Any] = values) -> Any:
            return values[index[name]] if name else None

        try:
            experts = [item for name in columns.expert for item in cell_integers(cell(name), name)]
            weights = [item for name in columns.weight for item in cell_numbers(cell(name), name)]
            row = _Row(
                str(cell(columns.request)) if columns.request else "",
                _phase(cell(columns.phase)) if columns.phase else "",
                cell_integer(cell(columns.token), columns.token) if columns.token else 0,
                cell_integer(cell(columns.step), columns.step) if columns.step else -1,
                cell_integer(cell(columns.layer), columns.layer),
                experts,
                weights if columns.weight else None,
            )
            rank = cell_integer(cell(columns.rank), columns.rank) if columns.rank else -1
        except ValueError as error:
            raise _RowError(place, str(error)) from None
        yield place, row, rank


def _phase(value: Any) -> str:
    text = str(value).strip().lower()
    if text in _PROMPT:
        return "prefill"
    if text in _DECODE:
        return "decode"
    raise ValueError(f"phase is {text[:40]!r}: not 0 or prefill, 1 or decode")


def _merged(file: RowFile, columns: Columns, options: Options) -> Iterator[tuple[int, _Row]]:
    """Rows of one choice put together: those in a row that agree in all but expert, weight and rank."""
    pending: list[tuple[int, _Row, int]] = []
    for place, row, rank in _rows(file, columns):
        if pending and not _goes_on(pending, row, rank, columns, options):
            yield _joined(pending)
            pending = []
        pending.append((place, row, rank))
    if pending:
        yield _joined(pending)


def _goes_on(
    pending: Sequence[tuple[int, _Row, int]], row: _Row, rank: int, columns: Columns, options: Options
) -> bool:
    last = pending[0][1]
    if len(row.experts) > 1 or len(last.experts) > 1:
        return False
    same = (row.request, row.phase, row.token, row.step, row.layer) == (
        last.request,
        last.phase,
        last.token,
        last.step,
        last.layer,
    )
    if not same:
        return False
    if columns.rank and not columns.token:
        return all(rank != other for _, _, other in pending)
    if options.top_k:
        return len(pending) < options.top_k
    return bool(columns.token)


def _joined(pending: list[tuple[int, _Row, int]]) -> tuple[int, _Row]:
    place, row, _ = pending[0]
    if len(pending) > 1:
        ordered = sorted(pending, key=lambda item: item[2])
        row.experts = [expert for _, part, _ in ordered for expert in part.experts]
        if row.weights is not None:
            row.weights = [weight for _, part, _ in ordered for weight in part.weights or ()]
    return place, row


class _Numbered:
    """Rows with a token number: a layer whose number does not rise begins the next request."""

    def __init__(self, choices: Choices, options: Options, name: str) -> None:
        self._choices, self._options, self._name = choices, options, name
        self._requests: dict[tuple[str, int], int] = {}
        self._last: dict[tuple[str, int], tuple[int, int]] = {}

    def take(self, place: int, row: _Row) -> None:
        """The next choice."""
        last, number = self._last.get((row.request, row.layer), (-(1 << 40), 0))
        if row.token <= last and not row.request:
            number += 1
        self._last[(row.request, row.layer)] = (row.token, number)
        request = self._requests.get((row.request, number))
        if request is None:
            words = [word for word in (self._name, row.request or f"request {number}") if word]
            request = self._requests[(row.request, number)] = self._choices.new_request("/".join(words)[:200])
        prefill: bool | None = None
        if row.phase:
            prefill = row.phase == "prefill"
        elif self._options.prompt_len:
            prefill = row.token < self._options.prompt_len
        forward = row.step if row.step >= 0 else None
        self._choices.add(
            request,
            row.token,
            row.layer,
            row.experts,
            place=place,
            weights=row.weights,
            prefill=prefill,
            forward=forward,
        )


class _Unnumbered:
    """Rows without a token number: forwards by step, or by layers that fall."""

    def __init__(self, runs: Runs, options: Options, name: str) -> None:
        self._runs, self._name = runs, name
        self._forward: dict[str, tuple[int, int, int]] = {}
        if options.prompt_len:
            raise TraceError("option prompt_len= needs token=: without it, forwards of several tokens are the prompts")

    def take(self, place: int, row: _Row) -> None:
        """The next choice."""
        forward, step, layer = self._forward.get(row.request, (0, row.step, row.layer))
        if row.step < step and row.step >= 0:
            raise ValueError(f"goes back from step {step} to {row.step}")
        forward += row.step > step if row.step >= 0 else row.layer < layer
        self._forward[row.request] = (forward, row.step, row.layer)
        stream = "/".join(word for word in (self._name, row.request) if word)
        self._runs.add(stream, forward, row.layer, row.experts, place=place, weights=row.weights)
