"""JSON of unknown origin, read strictly, so that no two programs read it differently.

Refused: a key given twice, NaN and Infinity, numbers that no float holds, nesting beyond Python's depth, and what would
take more memory than `traces.limits` allows. What opens files is `traces.reading`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from traces.limits import check_bytes
from traces.messages import fault

REWRITE = "fetch or write the file again"


def parse_json(path: Path | str, where: str, text: str, remedy: str = REWRITE, infinite: bool = False) -> Any:
    """The value of a JSON text; TraceError names file, place and fault. where: `file`, or a place in it. infinite: NaN
    and Infinity are read, for files of programs that write them; who asks must hold each number against its range."""
    check_bytes(path, where, json_bytes(text))
    try:
        constant = float if infinite else _no_constant
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=constant, parse_float=_finite_number)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if where == "file" else where
        raise fault(path, place, f"is no JSON ({error.msg}, column {error.colno})", remedy) from None
    except RecursionError:
        raise fault(path, where, "is no usable JSON (nested too deeply)", remedy) from None
    except ValueError as error:
        raise fault(path, where, f"is no usable JSON ({_reason(error)})", remedy) from None


def json_bytes(text: str) -> int:
    """At most so many bytes of memory its values take: by what begins and separates them, without reading it."""
    return (
        (1 if text.isascii() else 4) * len(text)
        + 40 * text.count(",")
        + 100 * text.count("[")
        + 240 * text.count("{")
        + 32 * text.count('"')
    )


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of `pairs`; ValueError that names a key which is given twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} appears twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite_number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _reason(error: ValueError) -> str:
    text = str(error)
    return "a number of too many digits" if "integer string conversion" in text else text.splitlines()[0]


def kind_of(value: object) -> str:
    """What a value is, in the words of JSON and YAML."""
    names = {dict: "table", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value of a file as a message quotes it: short, in one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a huge number"
    if isinstance(value, dict):
        return f"a table of {len(value)}"
    text = repr(value[:60] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 60 else text[:59] + "…"
