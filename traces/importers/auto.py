"""`import auto`: which importer a source is for, from its suffix and its first bytes.

Only the beginning of the first file is looked at, and nothing is converted on the way: the importer that is chosen
checks the rest. `python -m traces import auto` says what it took a source for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from traces.container import TraceError, check_file, fault
from traces.importers import event_csr, moe_beyond_csv, route_csv
from traces.importers.columns import USUAL, Columns, completed, named_columns
from traces.importers.common import files_of
from traces.importers.packed import source_head, suffix_of
from traces.importers.rows import UNTOLD, RowFile, kind_of, told_kind
from traces.jsontext import parse_json

_HEAD_BYTES = 1 << 18
_SUFFIXES = (
    *(".csv", ".tsv", ".txt", ".parquet", ".jsonl", ".ndjson"),
    *(".json", ".npy", ".npz", ".pt", ".safetensors"),
)
_OF_TABLES = ("layer", "expert", "format", "fields")
"""Options that no other importer has."""
_LISTS = re.compile(r"\s*\[\s*\[")
_ROWS = re.compile(r"\s*\[\s*\{")
_UNTOLD_KINDS = {"csv": ".csv", "text": ".txt", "jsonl": ".jsonl", "json": ".json"}
_KEY = re.compile(r'"([A-Za-z_]\w{0,60})"\s*:')


@dataclass(frozen=True)
class Guess:
    """Which importer, and what was seen that says so."""

    kind: str
    seen: str


def recognise(source: str | Path | Sequence[str | Path], options: Mapping[str, str] | None = None) -> Guess:
    """The importer for a file, a folder or several of them. TraceError where none fits.

    options: as the user gives them: who names columns, or a format, has a table.
    """
    path = files_of(source, *_SUFFIXES)[0]
    check_file(path)
    named = next((key for key in _OF_TABLES if (options or {}).get(key)), "")
    if named:
        return Guess("table", f"the option {named}=")
    suffix = suffix_of(path)
    if suffix in UNTOLD:
        suffix = _UNTOLD_KINDS.get(told_kind(path), suffix)
    if suffix in (".npy", ".npz"):
        return Guess("engine-dumps", f"{suffix} arrays of routed experts")
    if suffix == ".pt":
        return Guess("sglang-recorder", "a .pt file")
    if suffix == ".safetensors":
        return _safetensors(path)
    given = named_columns(options or {})
    if suffix in (".json", ".jsonl", ".ndjson"):
        return _json(path, suffix, given)
    if suffix in (".csv", ".tsv", ".txt", ".parquet"):
        return _rows(path, suffix, given)
    raise _unknown(path, f"has the suffix {suffix or '(none)'}")


def _unknown(path: Path, problem: str) -> TraceError:
    remedy = "choose a KIND, or name the columns with import table (python -m traces import --help)"
    return fault(path, "file", f"{problem}: no importer recognises it", remedy)


def _head(path: Path) -> bytes:
    return source_head(path, _HEAD_BYTES)


def _safetensors(path: Path) -> Guess:
    names = set(_KEY.findall(_head(path).decode("utf-8", "replace")))
    if {"offsets", "expert_ids"} <= names:
        arrays = (*event_csr.EVENT_ARRAYS, *event_csr.ENTRY_ARRAYS)
        missing = [name for name in arrays if name not in names]
        return Guess("event-csr", "arrays offsets and expert_ids" + (f"; lacks {missing[0]}" if missing else ""))
    if {"experts", "request_start"} <= names:
        raise fault(path, "file", "is a trace already", f"check it: python -m traces validate {path}")
    raise _unknown(path, f"holds the arrays {', '.join(sorted(names))[:80]}")


def _json(path: Path, suffix: str, given: Columns) -> Guess:
    """By the keys that stand in the beginning of the file."""
    text = _head(path).decode("utf-8-sig", "replace")
    keys = set(_KEY.findall(text))
    for kind, needed in (
        ("gpt-oss-json", {"router_data"}),
        ("vllm-log", {"topk_ids", "layer", "token_idx"}),
        ("megatron", {"top_indices", "layer", "step"}),
        ("sglang-recorder", {"tokens", "experts", "slot", "position"}),
        ("engine-dumps", {"routed_experts"}),
    ):
        # Loggers of vLLM tell no phase: rows that do are a table, in which it counts.
        if needed <= keys and not (kind == "vllm-log" and keys & {*USUAL["phase"]}):
            return Guess(kind, f"the keys {', '.join(sorted(needed))}")
    if suffix == ".json":
        if _is_list_of_rows(text, keys):
            return _table(path, given)
        if _LISTS.match(text):
            return Guess("nested-json", "lists in a list")
        for needed in ({"prompts"}, {"prefill"}, {"decode"}, {"tokens"}, {"trace"}):
            if needed <= keys:
                return Guess("nested-json", f"the key {next(iter(needed))}")
        raise _unknown(path, f"has the keys {', '.join(sorted(keys))[:80] or '(none)'}")
    first = text.lstrip().splitlines()[:1]
    try:
        is_table = bool(first) and isinstance(parse_json(path, "line 1", first[0], infinite=True), dict)
    except TraceError:
        is_table = len(text) >= _HEAD_BYTES // 2
    if not is_table:
        raise fault(path, "line 1", "is no JSON object", "give one object a line")
    return _table(path, given)


def _is_list_of_rows(text: str, keys: set[str]) -> bool:
    """Whether a JSON file begins as a list of objects that have the columns of a table."""
    lower = {key.lower() for key in keys}
    return bool(_ROWS.match(text)) and all(lower & set(USUAL[field]) for field in ("layer", "expert"))


def _rows(path: Path, suffix: str, given: Columns) -> Guess:
    if suffix == ".csv":
        there = set(RowFile(path, "csv").columns())
        for kind, needed in (("route-csv", route_csv.COLUMNS), ("moe-beyond-csv", moe_beyond_csv.COLUMNS)):
            if there.issuperset(needed):
                return Guess(kind, f"the columns {', '.join(needed)}")
        if {"layer", "expert"} == there or {"phase", "token", "layer", "rank", "expert"} <= there:
            return Guess("llama-csv", f"the columns {', '.join(sorted(there))}")
    return _table(path, given)


def _table(path: Path, given: Columns) -> Guess:
    notes: list[str] = []
    file = RowFile(path, kind_of(path))
    try:
        completed(file, given, notes)
    except TraceError as error:
        if "may hold the experts" in str(error):
            raise
        raise _unknown(path, f"has the columns {', '.join(file.columns())[:80]}") from None
    return Guess("table", notes[0] if notes else "its columns")
