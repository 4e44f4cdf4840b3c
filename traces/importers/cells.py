"""Cells of a table as numbers: text, numbers or lists, as the formats give them. ValueError says what is wrong."""

from __future__ import annotations

import math
import re
from typing import Any

_SPLIT = re.compile(r"[\s,;|]+")
_WHOLE = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{0,15})?([eE][+-]?[0-9]{1,2})?")
"""How programs write whole numbers that were floats on their way: 5.0, 1e3, 1.000000e+00."""
_NUMBER = re.compile(r"[0-9]{1,9}")
_PROMPT = ("0", "prefill", "prompt", "extend", "context", "p")
_DECODE = ("1", "decode", "generate", "generation", "d")
_TRUE, _FALSE = ("1", "true", "t", "yes"), ("0", "false", "f", "no")
FLAGS = {"prefill": True, "prompt": True, "decode": False}
"""What a column of that name, or `is_` before it, says where it is true: that the token is of the prompt, or not."""


def cell_integer(value: Any, what: str) -> int:
    """A whole number."""
    if type(value) is str:
        text = value.strip()
        if text.removeprefix("-").isdecimal() and text.isascii() and len(text) < 16:
            return int(text)
        if _WHOLE.fullmatch(text):
            value = float(text)
    if type(value) is float and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if type(value) is not int:
        raise ValueError(f"{what} is {str(value)[:40]!r}, no whole number")
    return value


def cell_layer(value: Any, what: str) -> int:
    """A layer's number, or the one number in its name: `model.layers.3.mlp`."""
    if type(value) is str and not _WHOLE.fullmatch(value.strip()):
        numbers = _NUMBER.findall(value[:200])
        if len(numbers) == 1:
            return int(numbers[0])
    return cell_integer(value, what)


def cell_integers(value: Any, what: str) -> list[int]:
    """One whole number, or a list of them, as a list: `[1, 2]`, `1 2`, `1;2`."""
    return [cell_integer(item, what) for item in _items(value)]


def cell_numbers(value: Any, what: str) -> list[float]:
    """One number or a list of them, as a list; NaN where one is not known."""
    found = []
    for item in _items(value):
        try:
            number = math.nan if item is None else float(item)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{what} is {str(item)[:40]!r}, no number") from None
        found.append(number)
    return found


def is_list(value: Any) -> bool:
    """Whether a cell is written as a list, also as one of a single item."""
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.strip()[:1] in ("[", "(", "{"))


def cell_phase(value: Any, what: str) -> bool:
    """Whether a token is of the prompt: 0 or prefill, 1 or decode; under is_prefill and is_decode a truth value."""
    text = str(value).strip().lower().removesuffix(".0")
    flag = FLAGS.get(what.strip().lower().removeprefix("is_"))
    if flag is not None and text in (*_TRUE, *_FALSE):
        return flag == (text in _TRUE)
    if text in _PROMPT:
        return True
    if text in _DECODE:
        return False
    raise ValueError(f"{what} is {text[:40]!r}: not 0 or prefill, 1 or decode")


def cell_name(value: Any) -> str:
    """A request's name; empty where there is none."""
    if value is None or (type(value) is float and math.isnan(value)):
        return ""
    return str(value).strip()[:200]


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [word for word in _SPLIT.split(value.strip().strip("[](){}").strip()) if word]
    return list(value) if isinstance(value, list | tuple) else [value]
