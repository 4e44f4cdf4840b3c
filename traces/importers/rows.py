"""Rows of named columns from a file of any common kind: CSV, whitespace text, JSON lines, Parquet, fixed-width binary.

Each kind gives (place, values of the columns asked for), the place being a line or row number. Values are text, numbers
or lists; `cell_integer`, `cell_integers` and `cell_numbers` read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.container import TraceError, check_file, fault
from traces.importers.common import CsvTable, check_choice
from traces.importers.json_text import numbered_lines
from traces.limits import Budget, check_bytes
from traces.parquet import open_parquet
from traces.reading import text_lines

FORMATS = ("csv", "text", "jsonl", "parquet", "binary")
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "text",
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".bin": "binary",
}
_FIELD = re.compile(r"(?P<name>\w{1,100}):(?P<type>[<>]?[uif][1248])(\*(?P<count>[1-9][0-9]{0,3}))?", re.ASCII)
_SPLIT = re.compile(r"[\s,;|]+")
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
        return "row" if self.kind in ("parquet", "binary") else "line"

    def columns(self) -> list[str]:
        """The names of the columns there are; of JSON lines those of the first line."""
        check_file(self.path)
        if self.kind == "binary":
            return list(_record_type(self.path, self.fields).names or ())
        if self.kind == "parquet":
            return [str(name) for name in open_parquet(self.path).file.schema_arrow.names]
        if self.kind == "jsonl":
            value: Any = next((value for _, value in numbered_lines(self.path)), {})
            return list(value) if isinstance(value, dict) else []
        return _header(self.path, self.kind)[0]

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """(place, values) of each row. TraceError names file and place."""
        check_file(self.path)
        reader = {"csv": _csv, "text": _text, "jsonl": _jsonl, "parquet": _parquet_rows, "binary": self._binary}
        return reader[self.kind](self.path, columns)

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
    """The kind of a file: as given, else by its suffix."""
    if given:
        check_choice("format", given, FORMATS)
        return given
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise TraceError(
            f"{path}: the suffix {path.suffix or '(none)'} tells no format; give format={'|'.join(FORMATS)}"
        )
    return kind


def _header(path: Path, kind: str) -> tuple[list[str], bool]:
    """The column names of a text file, and whether its first line holds them; else they are 1, 2, …"""
    for _, line in text_lines(path, _NOT_TEXT):
        words = [] if line.startswith("#") else [word.strip() for word in _split(line, kind)]
        if words and words != [""]:
            named = not all(_is_number(word) for word in words)
            return words if named else [str(number + 1) for number in range(len(words))], named
    raise fault(path, "file", "holds no rows", "give a file with a row for each token and layer")


def _split(line: str, kind: str) -> list[str]:
    return line.strip().split(",") if kind == "csv" else line.split("\t") if "\t" in line else line.split()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    if _header(path, "csv")[1]:
        for line, cells in CsvTable(path, columns, comments=True):
            yield line, list(cells)
    else:
        yield from _text_rows(path, columns, "csv")


def _text(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    return _text_rows(path, columns, "text")


def _text_rows(path: Path, columns: Sequence[str], kind: str) -> Iterator[Row]:
    header, named = _header(path, kind)
    places = [_place(path, header, name) for name in columns]
    budget = Budget(path)
    for number, line in text_lines(path, _NOT_TEXT):
        if line.startswith("#") or not line.strip():
            continue
        if named:
            named = False
            continue
        budget.take(f"line {number}", _ROW_BYTES)
        cells = [cell.strip() for cell in _split(line, kind)]
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
    for line, value in numbered_lines(path):
        if not isinstance(value, dict):
            raise fault(path, f"line {line}", "is no JSON object", "give an object a line")
        yield line, [value.get(name) for name in columns]


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


# -- cells ---------------------------------------------------------------------------------------------------


def cell_integer(value: Any, what: str) -> int:
    """A whole number. ValueError otherwise."""
    if type(value) is float and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if type(value) is str:
        text = value.strip()
        if text.removeprefix("-").isdecimal() and text.isascii() and len(text) < 16:
            return int(text)
    if type(value) is not int:
        raise ValueError(f"{what} is {str(value)[:40]!r}, no whole number")
    return value


def cell_integers(value: Any, what: str) -> list[int]:
    """One whole number, or a list of them, as a list: `[1, 2]`, `1 2`, `1;2`. ValueError otherwise."""
    return [cell_integer(item, what) for item in _items(value)]


def cell_numbers(value: Any, what: str) -> list[float]:
    """One number or a list of them, as a list; NaN where one is not known. ValueError otherwise."""
    found = []
    for item in _items(value):
        try:
            number = math.nan if item is None else float(item)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{what} is {str(item)[:40]!r}, no number") from None
        found.append(number)
    return found


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [word for word in _SPLIT.split(value.strip().strip("[](){}").strip()) if word]
    return list(value) if isinstance(value, list | tuple) else [value]
