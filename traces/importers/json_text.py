"""JSON as the importers read it: values with the number of their line, and fields of a checked type.

A source is untrusted text: it is parsed, never evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from traces.importers.packed import source_lines
from traces.jsontext import parse_json
from traces.limits import Budget

_REMEDY = "correct or remove it"
_VALUE_BYTES = 2
"""What a character of a source takes at most once its numbers are kept: a digit and a comma become a number of eight
bytes, beside which the place and the layer are kept, too."""


def numbered_lines(path: Path, infinite: bool = False) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line that is not empty. TraceError names file and line of what is no JSON.

    infinite: NaN and Infinity are read, for who holds each number against its range."""
    budget = Budget(path)
    for number, text in source_lines(path, _REMEDY):
        if text.strip():
            budget.take(f"line {number}", _VALUE_BYTES * len(text))
            yield number, parse_json(path, f"line {number}", text, _REMEDY, infinite)


def integer(table: Mapping[str, Any], key: str) -> int:
    """A whole number from 0. ValueError otherwise."""
    value = table.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"has {key}={str(value)[:40]!r}, no whole number from 0")
    return value


def integers(table: Mapping[str, Any], key: str) -> list[int]:
    """A list of whole numbers. ValueError otherwise."""
    return integer_list(table.get(key), key)


def integer_list(value: Any, what: str) -> list[int]:
    """The value, if it is a list of whole numbers. ValueError otherwise."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"has {what}={str(value)[:60]!r}, no list of whole numbers")
    return value


def numbers(table: Mapping[str, Any], key: str) -> list[float]:
    """A list of numbers, NaN where one is null. ValueError otherwise."""
    value = table.get(key)
    if not isinstance(value, list) or not all(type(item) in (int, float) or item is None for item in value):
        raise ValueError(f"has {key}={str(value)[:60]!r}, no list of numbers")
    return [math.nan if item is None or abs(item) > 1e300 else float(item) for item in value]
