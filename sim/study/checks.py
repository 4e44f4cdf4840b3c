"""Whether a study's file has the form of one: the kind of every value, before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from traces.jsontext import shown

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_word(value: Any) -> bool:
    return _is_text(value) or _is_number(value) or isinstance(value, bool)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_word, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15


def _is_lists(value: Any) -> bool:
    """Names with lists of overrides, or with nothing."""
    return isinstance(value, dict) and all(inner is None or _is_words(inner) for inner in value.values())


def _is_texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_word, value.values()))


def _is_sweeps(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(keys, dict) and all(map(_is_words, keys.values())) for keys in inner)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w][\w.-]{0,99}", value) is not None


FORM: Mapping[str, tuple[Check, str]] = {
    "parameters": (_is_texts_by_name, "names with what each is"),
    "recordings": (_is_texts_by_name, "parameters with the model that each is a trace of"),
    "defaults": (_is_texts_by_name, "names with values"),
    "base": (_is_words, "a list of overrides"),
    "axes": (lambda v: isinstance(v, dict) and all(map(_is_lists, v.values())), "names of axes with their values"),
    "variants": (_is_lists, "names with lists of overrides"),
    "sweeps": (_is_sweeps, "variants with keys and lists of values"),
    "perfect": (_is_text, "the name of a variant"),
    "optional": (_is_words, "a list of variants"),
}
"""What the values of a study's keys are; the rest is in `ENTRIES`."""
_COMMON: Mapping[str, tuple[Check, str]] = {
    "title": (_is_text, "a text"),
    "name": (_is_text, "a text"),
    "note": (_is_text, "a text"),
    "heading": (_is_text, "a text"),
    "split": (lambda v: isinstance(v, dict) and all(map(_is_number, v.values())), "columns with numbers"),
    "value": (_is_text, "a column"),
    "column": (_is_text, "a column"),
    "axis": (_is_text, "an axis"),
    "axis_title": (_is_text, "a text"),
    "kind": (_is_text, "a kind of picture"),
    "variant": (_is_word, "a variant"),
    "slow": (_is_word, "a value of the axis"),
    "fast": (_is_word, "a value of the axis"),
    "rows": (lambda v: _is_text(v) or _is_texts(v), "an axis or a list of axes"),
    "columns": (_is_texts, "a list of axes"),
    "variants": (_is_words, "a list of variants"),
    "of": (_is_words, "a list of variants"),
    "marked": (_is_words, "a list of variants"),
    "only": (_is_texts_by_name, "columns with values"),
    "percent": (lambda v: isinstance(v, bool), "true or false"),
    "digits": (lambda v: type(v) is int and 0 <= v <= 15, "a whole number from 0 to 15"),
    "at_most": (_is_number, "a number"),
    "at_least": (_is_number, "a number"),
    "line": (_is_number, "a number"),
    "file": (_is_file_name, "the plain name of a file"),
}
NEEDED: Mapping[str, tuple[str, ...]] = {
    "tables": ("title", "value", "columns"),
    "claims": ("name", "variants", "column"),
    "best": ("name", "variant", "of", "column"),
    "pairs": ("name", "axis", "slow", "fast", "column"),
    "crossings": ("name", "axis", "variants", "column"),
    "pictures": ("file", "kind", "value", "variants", "title"),
}
"""What an entry of each list cannot be without."""


def check_form(file: str, content: Mapping[str, Any]) -> None:
    """ValueError that names file, key and value of the first that is of another kind than it must be."""
    for key, (check, wanted) in FORM.items():
        if key in content and not check(content[key]):
            raise ValueError(f"{file}: {key} is {shown(content[key])}; it must be {wanted}, as in the shipped studies")
    for part in NEEDED:
        entries = content.get(part, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(
                f"{file}: {part} is {shown(entries)}; it must be a list of tables, as in the shipped studies"
            )
        for entry in entries:
            for key, value in entry.items():
                check, wanted = _COMMON.get(key, (lambda _: True, ""))
                if not check(value):
                    raise ValueError(
                        f"{file}: {part}: {key} is {shown(value)}; it must be {wanted}, as in the shipped studies"
                    )


def check_needed(file: str, content: Mapping[str, Any]) -> None:
    """ValueError that names what an entry lacks."""
    for part, needed in NEEDED.items():
        for entry in content.get(part, []):
            for key in needed:
                if key not in entry:
                    raise ValueError(f"{file}: {part} has an entry without {key}; give it, as in the shipped studies")
