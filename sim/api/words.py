"""Arguments of Python as the overrides that a command would be given, and as what no override can hold: objects.

A key is what it is on the command line. A group (`hardware`, `host`, `link`, `policy`, `model`, `stack`, `storage`,
`trace`) takes the name of a file, or a mapping: its `name` is the file's, every other entry a key of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.types import Quote, QuotedString

from expertflow.keys import plain, shown
from expertflow.parts import Part
from sim.api.tracing import given_trace
from sim.job.keys import CHOSEN_BY_NAME, STORAGE
from sim.job.model import AUTO
from sim.job.parts import KINDS
from sim.paths import config_files
from sim.specs.model_file import read_model_file
from traces.trace import Trace

BASE = "adaptive"
"""The policy that a mapping without a name changes."""
_HOST = "host"
_NO_DEFAULT = ("hardware", "policy", STORAGE, _HOST)
_CHOICES = (*KINDS, "transfer")
"""What a policy is composed of, each a file of a group of its own."""
_NAME = re.compile(r"[\w./+-]+")
_KEY = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w]*(?:[./][\w-]+)*)")
_ENTRY = re.compile(r"\w[\w.-]*")
_BARE = re.compile(r"[A-Za-z_][\w.-]*")
_NO_TEXT = re.compile(r"null|true|false|nan|inf", re.IGNORECASE)
_MOST_BITS = 4_000


@dataclass(frozen=True)
class Asked:
    """One run as it was asked for. words: overrides, as a command would have them. parts: those of the policy that
    are given in Python, by name, each a mapping with `_target_`: a class, an object or a dotted name."""

    words: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trace: Trace | None = None


def asked(keys: Mapping[str, Any]) -> Asked:
    """What these arguments ask for. ValueError, one line, for what no key takes."""
    given = _Given(_ToldModel(keys))
    for key, value in keys.items():
        given.take(key, value)
    given.check()
    return Asked(tuple(given.words), given.parts, given.trace)


def refuse_array(key: str, value: Any) -> None:
    """ValueError for a trace that is an array: of what is not said."""
    if key == "trace" and _is_array(value):
        raise ValueError(
            "trace is an array of numbers; name it: trace={'experts': ARRAY, 'model': NAME}, with [tokens, layers, "
            "top_k], best first"
        )


class _ToldModel:
    """What the arguments say of the model, for arrays that do not: its name, and its experts where only a file of its
    own tells them."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._keys = keys

    def fields(self) -> dict[str, Any]:
        """`model` and `num_experts`, as of arrays; those that are known."""
        told = self._keys.get("model")
        table = dict(told) if isinstance(told, Mapping) else {} if told is None else {"name": told}
        table |= {key.removeprefix("model."): one for key, one in self._keys.items() if key.startswith("model.")}
        path = table.get("path")
        if path is not None:
            spec = read_model_file(Path(path)).spec
            table = {"name": spec.name, "num_experts": spec.num_experts} | table
        found = {"model": table.get("name"), "num_experts": table.get("num_experts")}
        return {key: one for key, one in found.items() if one is not None and one != AUTO}


class _Given:
    def __init__(self, model: _ToldModel) -> None:
        self._model = model
        self.words: list[str] = []
        self.parts: dict[str, Mapping[str, Any]] = {}
        self.trace: Trace | None = None

    def take(self, key: str, value: Any) -> None:
        """One argument: a group, a part of a policy, or a key."""
        found = _KEY.fullmatch(key)
        if found is None or found[2].startswith("hydra"):
            remedy = "out= names the folder" if found else "give a key of `expertflow keys`"
            raise ValueError(f"{plain(key, 80)} is no key that Python takes; {remedy}")
        sign, name = found.groups()
        refuse_array(name, value)
        if isinstance(value, range | np.ndarray):
            value = list(value)
        if sign == "~":
            self.words.append(f"~{name}")
        elif name == "trace" and not isinstance(value, str | Mapping):
            self._trace(value)
        elif name in (*CHOSEN_BY_NAME, _HOST) and value is not None:
            self._group(name, value)
        elif "/" in name:
            self._file(name, value)
        else:
            self._nested(name, value, sign)

    def check(self) -> None:
        """ValueError for a word that would have no effect: an object takes the place of a whole part."""
        for part in self.parts:
            of_part = re.compile(rf"[+~]*policy[./]{part}\b")
            for word in self.words:
                if of_part.match(word):
                    raise ValueError(
                        f"{plain(word.lstrip('+~'), 80)} would have no effect: policy.{part} is given in Python; "
                        "give what it needs to the object, or to its mapping"
                    )

    def _group(self, name: str, value: Any) -> None:
        if isinstance(value, str):
            self._choose(name, value)
            return
        if not isinstance(value, Mapping):
            listed = "; sweep() runs a list" if isinstance(value, Sequence) else ""
            raise ValueError(
                f"{name}={_told(value)} must be the name of a file, or a mapping with name= and keys{listed}"
            )
        entries = dict(value)
        if name == "trace" and ("experts" in entries or any(map(_is_array, entries.values()))):
            self.trace = given_trace({**self._model.fields(), **entries})
            return
        # Of a model that a file of the user's describes it is what the model is called.
        is_file = name != "model" or entries.get("path") is None
        file = entries.pop("name", BASE if name == "policy" else None) if is_file else None
        if file is not None:
            self._choose(name, file)
        elif name in _NO_DEFAULT:
            raise ValueError(f"{name} has no name; give {name}={{'name': NAME, …}} or {name}=NAME")
        for key, one in entries.items():
            _check_name(key, name)
            # A file of host fills in keys of the hardware.
            self._entry(f"{'hardware' if name == _HOST else name}.{key}", key, one, name)

    def _entry(self, key: str, name: str, value: Any, group: str) -> None:
        """An entry of a group's mapping."""
        if group != "policy" or name not in _CHOICES:
            self._nested(key, value, "")
        elif isinstance(value, str):
            self._file(f"policy/{name}", value)
        elif isinstance(value, Part | type) and name in KINDS:
            self.parts[name] = {"_target_": value}
        elif isinstance(value, Mapping) and "_target_" in value:
            self.parts[name] = dict(value)
        else:
            self._nested(key, value, "")

    def _choose(self, group: str, value: Any) -> None:
        """A file of a group by its name."""
        if group == "trace" and isinstance(value, str) and value not in config_files("trace"):
            self._trace(value)
            return
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise ValueError(f"{group}={_told(value)} must be the name of a file of {group}")
        self.words.append(f"{'+' if group in _NO_DEFAULT else ''}{group}={value}")

    def _file(self, group: str, value: Any) -> None:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise ValueError(f"{group}={_told(value)} must be the name of a file of {group}")
        # Of the parts, the one that no policy needs to name.
        self.words.append(f"{'+' if group == 'policy/place' else ''}{group}={value}")

    def _trace(self, value: Any) -> None:
        if isinstance(value, Trace):
            self.trace = value
        elif value is not None:
            self.words.append(f"trace.path={text_of(value, 'trace')}")

    def _nested(self, key: str, value: Any, sign: str) -> None:
        """A key with its value, or each key below it."""
        place = key.removeprefix("policy.")
        if place in KINDS and key != place and _is_part(value):
            self.parts[place] = value if isinstance(value, Mapping) else {"_target_": value}
            return
        if isinstance(value, Mapping) and "." in key:
            for name, one in value.items():
                _check_name(name, key)
                self._nested(f"{key}.{name}", one, sign)
            return
        # A key that the file does not have is one that its part may take.
        self.words.append(f"{sign or ('++' if '.' in key else '')}{key}={text_of(value, key)}")


def _check_name(name: Any, place: str) -> None:
    """ValueError for an entry of a mapping that no override can name."""
    if not isinstance(name, str) or not _ENTRY.fullmatch(name):
        raise ValueError(f"{place}: {_told(name)} cannot be given as a key; write a file of your own (config_dir=)")


def _is_array(value: Any) -> bool:
    """Whether a value is an array, numpy's or another's, of more than one dimension."""
    ndim = getattr(value, "ndim", 0)
    return isinstance(ndim, int) and ndim > 1


def _is_part(value: Any) -> bool:
    return isinstance(value, Part | type) or (isinstance(value, Mapping) and "_target_" in value)


def text_of(value: Any, key: str) -> str:
    """A value as an override holds it. ValueError for one that none can hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() < _MOST_BITS:
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Path):
        return text_of(str(value), key)
    if isinstance(value, str):
        if _BARE.fullmatch(value) and not _NO_TEXT.fullmatch(value):
            return value
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list | tuple | range | np.ndarray):
        return f"[{','.join(text_of(one, key) for one in value)}]"
    raise ValueError(f"{key}={_told(value)} is no value of a key; give a number, a text, a truth value, None or a list")


def _told(value: Any) -> str:
    """A value for a message; of an object its class, since what it says of itself may be anything."""
    if value is None or isinstance(value, str | int | float | list | tuple):
        return plain(shown(value), 60)
    kind = value if isinstance(value, type) else type(value)
    return plain(f"{'the class' if kind is value else 'a'} {kind.__qualname__}", 60)


def label_of(value: Any) -> Any:
    """What a table shows of an argument: plain values as they are, what has a name by that."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Part):
        return type(value).__name__
    if isinstance(value, Trace):
        return value.name
    if isinstance(value, Mapping):
        if "_target_" in value:
            rest = ", ".join(_pairs({key: one for key, one in value.items() if key != "_target_"}))
            return f"{label_of(value['_target_'])}({rest})" if rest else label_of(value["_target_"])
        name = str(value.get("name", BASE if not KINDS.keys().isdisjoint(value) else ""))
        changed = ", ".join(_pairs({key: one for key, one in value.items() if key not in ("name", "experts")}))
        return " with ".join(filter(None, (name, changed)))
    if isinstance(value, list | tuple):
        return ", ".join(str(label_of(one)) for one in value)
    return str(value) if isinstance(value, Path) else value


def _pairs(entries: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in entries.items():
        if isinstance(value, Mapping) and "_target_" not in value:
            yield from _pairs(value, f"{prefix}{key}.")
        elif not isinstance(value, np.ndarray):
            yield f"{prefix}{key}={label_of(value)}"
