"""Rows of named columns from a file of any common kind: CSV, whitespace text, JSON lines or a JSON list, Parquet,
fixed-width binary.

Each kind gives (place, values of the columns asked for), the place being a line or row number. Values are text, numbers
or lists, which `traces.importers.cells` reads.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.container import TraceError, check_file, fault
from traces.importers.cells import is_list
from traces.importers.common import CsvTable, check_choice
from traces.importers.json_text import numbered_lines
from traces.importers.packed import source_head, source_json, source_lines, suffix_of
from traces.limits import Budget, check_bytes
from traces.parquet import open_parquet

FORMATS = ("csv", "text", "jsonl", "json", "parquet", "binary")
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "text",
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".bin": "binary",
}
_FIELD = re.compile(r"(?P<name>\w{1,100}):(?P<type>[<>]?[uif][1248])(\*(?P<count>[1-9][0-9]{0,3}))?", re.ASCII)
UNTOLD = (".log", "")
"""Suffixes that tell no format: the first line does."""
_HEAD_BYTES = 1 << 16
_BLOCK_ROWS = 65_536
_ROW_BYTES = 256
"""What a row takes while it is read and kept."""
_NOT_TEXT = "give text in UTF-8, or format=binary with fields="

Row = tuple[int, list[Any]]


@dataclass(frozen=True)
class RowFile:
    """A file of rows. kind: one of FORMATS. fields: of a binary file, `name:type` or `name:type*count`, by comma."""

    path: Path
    kind: str
    fields: str = ""

    @property
    def unit(self) -> str:
        """What a place counts."""
        return {"parquet": "row", "binary": "row", "json": "entry"}.get(self.kind, "line")

    def columns(self, row: int = 0) -> list[str]:
        """The names of the columns there are; of JSON those of the row with this number."""
        check_file(self.path)
        if self.kind == "binary":
            return list(_record_type(self.path, self.fields).names or ())
        if self.kind == "parquet":
            return [str(name) for name in open_parquet(self.path).file.schema_arrow.names]
        if self.kind in ("jsonl", "json"):
            objects = numbered_lines(self.path, infinite=True) if self.kind == "jsonl" else _entries(self.path)
            value: Any = next((value for number, (_, value) in enumerate(objects) if number == row), {})
            return list(value) if isinstance(value, dict) else []
        return _header(self.path, self.kind)[0]

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(place, values) of each row. TraceError names file and place."""
        check_file(self.path)
        reader = {
            "csv": _csv,
            "text": _text,
            "jsonl": _jsonl,
            "json": _json,
            "parquet": _parquet_rows,
            "binary": self._binary,
        }
        return reader[self.kind](self.path, columns)

    def has_preface(self, columns: Sequence[str]) -> bool:
        """Whether the first JSON line has none of these columns: it tells of the recording, and is no row."""
        if self.kind != "jsonl":
            return False
        value = next((value for _, value in numbered_lines(self.path, infinite=True)), None)
        return isinstance(value, dict) and not set(columns) & set(value)

    def _binary(self, path: Path, columns: Sequence[str]) -> Iterator[Row]:
        record = _record_type(path, self.fields)
        size = check_file(path)
        if size % record.itemsize:
            problem = f"has {size} bytes, no multiple of {record.itemsize} a row"
            raise fault(path, "file", problem, "correct fields=, or fetch the file again")
        check_bytes(path, "file", _ROW_BYTES * (size // record.itemsize))
        if not size:
            return
        data = np.memmap(path, record, mode="r")
        for begin in range(0, len(data), _BLOCK_ROWS):
            block = data[begin : begin + _BLOCK_ROWS]
            parts = [block[name].tolist() for name in columns]
            for number, values in enumerate(zip(*parts, strict=True), begin + 1):
                yield number, list(values)


def kind_of(path: Path, given: str = "") -> str:
    """The kind of a file: as given, else by its suffix, or where that is none or .log by its first line."""
    if given:
        check_choice("format", given, FORMATS)
        return given
    suffix = suffix_of(path)
    kind = _SUFFIXES.get(suffix) or (told_kind(path) if suffix in UNTOLD else "")
    if not kind:
        raise TraceError(f"{path}: the suffix {suffix or '(none)'} tells no format; give format={'|'.join(FORMATS)}")
    return kind


def told_kind(path: Path) -> str:
    """The kind of text by its first line; empty for what is no text."""
    head = source_head(path, _HEAD_BYTES)
    if b"\0" in head:
        return ""
    lines = (line.strip() for line in head.decode("utf-8-sig", "replace").splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if first.startswith("{"):
        return "jsonl"
    if first.startswith("["):
        return "json"
    return "csv" if any(mark in first for mark in ",;") else "text"


def _header(path: Path, kind: str) -> tuple[list[str], bool, str]:
    """The column names of a text file, whether its first line holds them (else they are 1, 2, …), and of CSV what
    stands between two values."""
    for _, line in source_lines(path, _NOT_TEXT):
        mark = delimiter_of(line)
        words = [] if line.startswith("#") else [word.strip() for word in _split(line, kind, mark)]
        if words and words != [""]:
            named = not all(_is_number(word) or is_list(word) for word in words)
            return words if named else [str(number + 1) for number in range(len(words))], named, mark
    raise fault(path, "file", "holds no rows", "give a file with a row for each token and layer")


def delimiter_of(line: str) -> str:
    """What stands between the values of a CSV file: a comma, or where its first line has none `;` or a tab."""
    return next((mark for mark in ",;\t" if mark in line), ",")


def _split(line: str, kind: str, mark: str) -> list[str]:
    if kind != "csv":
        return line.split("\t") if "\t" in line else line.split()
    if '"' not in line:
        return line.strip("\r\n ").split(mark)
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error:
        return line.strip("\r\n ").split(mark)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    _, named, mark = _header(path, "csv")
    if named:
        for line, cells in CsvTable(path, columns, comments=True, delimiter=mark):
            yield line, list(cells)
    else:
        yield from _text_rows(path, columns, "csv")


def _text(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    return _text_rows(path, columns, "text")


def _text_rows(path: Path, columns: Sequence[str], kind: str) -> Iterator[Row]:
    header, named, mark = _header(path, kind)
    places = [_place(path, header, name) for name in columns]
    budget = Budget(path)
    for number, line in source_lines(path, _NOT_TEXT):
        if line.startswith("#") or not line.strip():
            continue
        if named:
            named = False
            continue
        budget.take(f"line {number}", _ROW_BYTES)
        cells = [cell.strip() for cell in _split(line, kind, mark)]
        if len(cells) != len(header):
            problem = f"has {len(cells)} values, the first line {len(header)}"
            raise fault(path, f"line {number}", problem, "correct or remove it")
        yield number, [cells[place] for place in places]


def _place(path: Path, header: Sequence[str], name: str) -> int:
    if header.count(name) != 1:
        known = ", ".join(header[:20])
        raise fault(path, "file", f"has {header.count(name)} columns {name!r}", f"its columns are {known[:120]}")
    return header.index(name)


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    first = True
    for line, value in numbered_lines(path, infinite=True):
        if not isinstance(value, dict):
            raise fault(path, f"line {line}", "is no JSON object", "give an object a line")
        if not (first and not set(columns) & set(value)):
            yield line, [value.get(name) for name in columns]
        first = False


def _json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for entry, value in _entries(path):
        if not isinstance(value, dict):
            raise fault(path, f"entry {entry}", "is no JSON object", "give a list of objects")
        yield entry, [value.get(name) for name in columns]


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each entry of a JSON list."""
    value = source_json(path, "correct or remove it")
    if not isinstance(value, list):
        raise fault(path, "file", "holds no JSON list", "give a list of objects, or an object a line")
    yield from enumerate(value)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    opened = open_parquet(path)
    names = [str(name) for name in opened.file.schema_arrow.names]
    for name in columns:
        _place(path, names, name)
    number = 0
    for table in opened.read_groups():
        parts = [table.column(name).to_pylist() for name in columns]
        for values in zip(*parts, strict=True):
            number += 1
            yield number, list(values)


def _record_type(path: Path, fields: str) -> np.dtype[Any]:
    """The structured type of `name:type*count` words; little-endian unless told."""
    if not fields:
        raise TraceError(f"{path}: a binary file needs fields=, such as fields=token:u4,layer:u2,expert:u2*8")
    parts: list[Any] = []
    for word in fields.split(","):
        match = _FIELD.fullmatch(word.strip())
        if match is None or match["type"][-2:] in ("f1", "f2"):
            raise TraceError(
                f"option fields has {word[:40]!r}; write name:type or name:type*count, types u1 … u8, i1 … i8, f4, f8"
            )
        kind = match["type"] if match["type"][0] in "<>" else "<" + match["type"]
        parts.append((match["name"], kind, (int(match["count"]),)) if match["count"] else (match["name"], kind))
    if len({part[0] for part in parts}) < len(parts):
        raise TraceError("option fields names one field twice; give each its own name")
    return np.dtype(parts)
