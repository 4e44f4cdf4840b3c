"""JSON as the importers read it: values with the number of their line, and fields of a checked type.

A source is untrusted text: it is parsed, never evaluated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from traces.container import check_file, fault

_REMEDY = "correct or remove it"


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line that is not empty. TraceError names file and line of what is no JSON."""
    check_file(path)
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, json.loads(text)
    except UnicodeDecodeError:
        raise fault(path, f"line {line + 1}", "is not UTF-8 text", "give JSON in UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise fault(path, f"line {line}", "is no JSON", _REMEDY) from None
    except OSError as error:
        raise fault(path, "file", f"cannot be read ({error.strerror})", "check the path") from None


def json_file(path: Path) -> Any:
    """The value of a whole file. TraceError names file and line of what is no JSON."""
    check_file(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except UnicodeDecodeError:
        raise fault(path, "file", "is not UTF-8 text", "give JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise fault(path, f"line {error.lineno}", "is no JSON", _REMEDY) from None
    except (ValueError, RecursionError):
        raise fault(path, "file", "is no usable JSON", _REMEDY) from None
    except OSError as error:
        raise fault(path, "file", f"cannot be read ({error.strerror})", "check the path") from None


def is_integer(value: Any) -> bool:
    """Whether it is a whole number (true and false are none)."""
    return type(value) is int


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
