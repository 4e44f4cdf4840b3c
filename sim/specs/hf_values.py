"""Values of a Hugging Face config.json, of unknown origin: each by its names, of the type that is wanted, or refused in
one line that names the file, the key and the remedy. What had to be assumed or derived is noted on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traces.jsontext import shown
from traces.messages import TraceError, fault

MOST_WIDTH = 1_000_000
MOST_LAYERS = 4096
"""As many letters as a pattern may have."""
REMEDY = "mend the file, or give the model's sizes in a model YAML of your own"


class Values:
    """One table of the file. place: where it stands, empty for the file's own keys. notes: shared by all tables."""

    def __init__(self, path: Path, table: Mapping[str, Any], place: str = "", notes: Notes | None = None) -> None:
        self.path, self.table, self.place = path, table, place
        self.notes = Notes() if notes is None else notes

    def inner(self, *names: str) -> Values | None:
        """The table of the first of these names that is there."""
        for name in names:
            if isinstance(self.table.get(name), dict):
                return Values(self.path, self.table[name], f"{self.place}{name}.", self.notes)
        return None

    def name_of(self, *names: str) -> str | None:
        """The first of these names that is there and not null."""
        return next((name for name in names if self.table.get(name) is not None), None)

    def has(self, *names: str) -> bool:
        """Whether one of them is there and not null."""
        return self.name_of(*names) is not None

    def raw(self, *names: str) -> Any:
        """The value of the first of these names that is there, of any type; None if none is."""
        name = self.name_of(*names)
        return None if name is None else self.table[name]

    def wrong(self, name: str, wanted: str, remedy: str = REMEDY) -> TraceError:
        """The error for a value that is not what is wanted."""
        return fault(self.path, f"{self.place}{name}", f"is {shown(self.table.get(name))}, not {wanted}", remedy)

    def lacking(self, name: str) -> TraceError:
        """The error for a key that is not there."""
        return fault(self.path, "file", f"lacks {self.place}{name}", REMEDY)

    def count(self, *names: str, low: int = 1, high: int = MOST_WIDTH, default: int | None = None) -> int:
        """A whole number in [low, high]. A list of one number, repeated, counts as that number; default: where none of
        the names is there (None: refused)."""
        name = self.name_of(*names)
        if name is None:
            if default is None:
                raise self.lacking(names[0])
            return default
        value = self.table[name]
        if isinstance(value, list) and 0 < len(value) <= MOST_LAYERS and all(one == value[0] for one in value):
            value = value[0]
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number in [{low}, {high}]")
        return value

    def amount(self, *names: str, high: float) -> float:
        """A number above 0 and up to `high`, such as bits, of which quantisers give fractions."""
        name = self.name_of(*names)
        if name is None:
            raise self.lacking(names[0])
        value = self.table[name]
        if type(value) not in (int, float) or not 0 < value <= high:
            raise self.wrong(name, f"a number above 0, at most {high:g}")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        name = self.name_of(*names)
        if name is None:
            return default
        if not isinstance(self.table[name], bool):
            raise self.wrong(name, "true or false")
        return bool(self.table[name])

    def text(self, *names: str, default: str = "") -> str:
        """A text of at most 200 characters."""
        name = self.name_of(*names)
        if name is None:
            return default
        value = self.table[name]
        if not isinstance(value, str) or len(value) > 200:
            raise self.wrong(name, "a short text")
        return value

    def items(self, name: str, num_layers: int | None = None, kinds: Sequence[type] = (str,)) -> list[Any]:
        """A list of such items, one for each of `num_layers` layers (None: any number); a longer one, which tells of
        layers behind the model's, is cut."""
        value = self.table.get(name)
        if not isinstance(value, list) or not all(type(one) in kinds for one in value):
            raise self.wrong(name, f"a list of {' or '.join(kind.__name__ for kind in kinds)}")
        if num_layers is None:
            if len(value) > MOST_LAYERS:
                raise self.wrong(name, f"a list of at most {MOST_LAYERS}")
            return value
        if len(value) < num_layers:
            raise fault(self.path, f"{self.place}{name}", f"has {len(value)} entries for {num_layers} layers", REMEDY)
        return value[:num_layers]


class Notes:
    """What a reader of the figures should check, in the order in which it came up."""

    def __init__(self) -> None:
        self.derived: list[str] = []
        self.assumed: list[str] = []

    def derive(self, text: str) -> None:
        """Note what was computed."""
        if text not in self.derived:
            self.derived.append(text)

    def assume(self, text: str) -> None:
        """Note what the file does not say."""
        if text not in self.assumed:
            self.assumed.append(text)
