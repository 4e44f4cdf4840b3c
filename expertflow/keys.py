"""What a configuration key may hold: its type, range and unit, declared once, where its value is used.

A declaration is the annotation of a dataclass field or of an argument of a policy part:

    probability: Annotated[float, Rule(0, 1, above=True, about="least chance that is prefetched")]

`declared` and `arguments_of` read it, `Key.check` holds a value against it, and the table of keys in the documentation
is made of it. Knows no configuration files: keys and values are plain.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Spec = TypeVar("Spec", bound=DataclassInstance)

MOST = 2**63 - 1
"""No number of a configuration is larger, unless its rule says otherwise: what 64 bits hold."""
LONGEST_TEXT = 4096
_LONGEST_SHOWN = 60

WHOLE = "whole number"
NUMBER = "number"
SWITCH = "true or false"
TEXT = "text"
LISTS = {WHOLE: "list of whole numbers", NUMBER: "list of numbers", TEXT: "list of texts"}
_ELEMENT = {name: kind for kind, name in LISTS.items()}
MOST_ITEMS = 1_000
"""Of a list."""
OTHER = "other"
"""Kinds of keys; OTHER is checked by what takes it."""

REQUIRED = inspect.Parameter.empty
"""Stands for the default of a key that has none."""


@dataclass(frozen=True)
class Rule:
    """The range of a key beside its type, and what a reader must know of it.

    above, below: whether the lower, the upper end itself is outside. infinite: infinity is allowed, too. choices: the
    only texts; letters: the only characters of a text; word: the only text that may stand for a number. null: what null
    stands for; empty: null is refused. extra: what the key takes beside a number or a text, checked elsewhere. remedy:
    what to do about a value outside, where the range does not say it.
    """

    low: float = -MOST
    high: float = MOST
    above: bool = False
    below: bool = False
    infinite: bool = False
    unit: str = ""
    choices: tuple[str, ...] = ()
    letters: str = ""
    word: str = ""
    null: str = ""
    extra: str = ""
    about: str = ""
    remedy: str = ""

    @property
    def range(self) -> str:
        """Interval and unit, as messages and documentation show them."""
        low, high = number_text(self.low), number_text(self.high)
        unit = f" {self.unit}" if self.unit else ""
        ends = f"{'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"
        return f"{ends}{unit}{' or inf' if self.infinite else ''}"

    def holds(self, value: float) -> bool:
        """Whether a number lies within."""
        if self.infinite and value == math.inf:
            return True
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)


@dataclass(frozen=True)
class Key:
    """One key: name, kind, rule, and its default (`REQUIRED`: it has none)."""

    name: str
    kind: str
    rule: Rule = field(default_factory=Rule)
    default: Any = REQUIRED
    nullable: bool = False

    @property
    def allowed(self) -> str:
        """What may stand there, in words."""
        rule = self.rule
        if self.kind == SWITCH:
            words = SWITCH
        elif rule.choices:
            words = f"one of {', '.join(rule.choices)}"
        elif rule.letters:
            words = f"text of the letters {', '.join(rule.letters)}, at most {LONGEST_TEXT}"
        elif self.kind == TEXT:
            words = f"text of at most {LONGEST_TEXT} characters"
        elif self.kind in (WHOLE, NUMBER):
            words = f"a {self.kind} in {rule.range}"
        elif self.kind in _ELEMENT:
            words = f"a {self.kind}, 1 to {MOST_ITEMS}"
            words += "" if _ELEMENT[self.kind] == TEXT else f", each in {rule.range}"
        else:
            words = rule.extra or "a value that its part takes"
        words += f", or {rule.word}" if rule.word else ""
        words += f", or {rule.extra}" if rule.extra and self.kind != OTHER else ""
        return f"{words}, or null" if self.nullable else words

    def check(self, value: object, name: str = "") -> None:
        """ValueError, one line that names the key, the value and what is allowed, unless `value` fits.

        name: the key as the user writes it, where that is longer than its own.
        """
        if self.fits(value):
            return
        rule, told = self.rule, f"{name or self.name}={shown(value)}"
        hint = f"; {rule.remedy}" if rule.remedy else ""
        if self.kind in (WHOLE, NUMBER) and _is_of(self.kind, value):
            raise ValueError(f"{told} is outside {rule.range}{hint}")
        near = near_to(value, (*rule.choices, *filter(None, [rule.word]))) if isinstance(value, str) else ""
        raise ValueError(f"{told} must be {self.allowed}{near}{hint}")

    def fits(self, value: object) -> bool:
        """Whether `value` is of the kind and within the range. A bool is no number, whatever Python says."""
        rule = self.rule
        if value is None:
            return self.nullable
        if rule.word and value == rule.word and isinstance(value, str):
            return True
        if self.kind == OTHER or (rule.extra and isinstance(value, list | tuple)):
            return True
        if self.kind == SWITCH:
            return isinstance(value, bool)
        if self.kind == TEXT:
            if not isinstance(value, str) or (rule.letters and not set(value) <= set(rule.letters)):
                return False
            return value in rule.choices if rule.choices else 0 < len(value) <= LONGEST_TEXT and value.isprintable()
        if self.kind in _ELEMENT:
            one = Key(self.name, _ELEMENT[self.kind], rule)
            is_list = isinstance(value, list | tuple) and 0 < len(value) <= MOST_ITEMS
            return is_list and all(one.fits(item) for item in value)  # type: ignore[attr-defined]
        return _is_of(self.kind, value) and rule.holds(value)  # type: ignore[arg-type]


def _is_of(kind: str, value: object) -> bool:
    return isinstance(value, int if kind == WHOLE else int | float) and not isinstance(value, bool)


def number_text(value: float) -> str:
    """A bound, exactly: 65535, 1e+06, 2^63 - 1."""
    if value in (MOST, -MOST):
        return "2^63 - 1" if value > 0 else "-(2^63 - 1)"
    return f"{value:g}" if float(f"{value:g}") == value else f"{value}"


def shown(value: object) -> str:
    """A value as the user would have written it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return literal(value)


def plain(text: str, most: int) -> str:
    """`text` in one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


_SCALARS = (int, float, complex, bool, str, bytes, type(None))


def literal(value: object) -> str:
    """A value as Python writes it, cut where it is long; of one that is not plain, what it is: its own words may be
    anything, and hold addresses, which are others in every run."""
    if not _is_plain(value, 3):
        name = plain(type(value).__name__, 40)
        return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"
    if isinstance(value, str | bytes | list | tuple):
        value = value[: 2 * _LONGEST_SHOWN]
    try:
        return plain(repr(value), _LONGEST_SHOWN)
    except ValueError:  # of an int with more digits than Python writes
        return "a number of thousands of digits"


def _is_plain(value: object, depth: int) -> bool:
    """Whether `value` is a number or a text, or a list, tuple or dict of some, so deep at most."""
    if type(value) in _SCALARS:
        return True
    inner: Iterable[object] = ()
    if type(value) is dict:
        inner = chain.from_iterable(islice(value.items(), _LONGEST_SHOWN))
    elif type(value) in (list, tuple):
        inner = value[: 2 * _LONGEST_SHOWN]  # type: ignore[index]
    else:
        return False
    return depth > 0 and all(_is_plain(one, depth - 1) for one in inner)


def nearest(given: str, known: Sequence[str], room: int = 160) -> str:
    """`known` as a list of at most `room` characters, what is nearest to `given` first where not all find place."""
    listed = ", ".join(known)
    if len(listed) <= room:
        return listed
    near = get_close_matches(given, known, n=8, cutoff=0.3)
    found: list[str] = []
    for name in [*near, *(name for name in known if name not in near)]:
        if len(", ".join([*found, name])) > room - 20:
            break
        found.append(name)
    return f"{', '.join(found)} and {len(known) - len(found)} more"


def near_to(given: str, known: Iterable[str], prefix: str = "") -> str:
    """The question whether the one of `known` that is nearest to `given` was meant; nothing where none is near.

    Upper and lower case, and which of `-`, `_` and a space stands between two words, make no difference.
    """
    names = {_folded(name): name for name in known}
    near = get_close_matches(_folded(given[:_LONGEST_SHOWN]), names, n=1)
    return f" (did you mean {prefix}{names[near[0]]}?)" if near else ""


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


def unknown_key(group: str, key: object, known: Sequence[str]) -> ValueError:
    """The error for a key that is none of `known`; group: before the dot, empty for a top-level key."""
    prefix = f"{group}." if group else ""
    # A key of blanks alone would be a message of none.
    text = plain(str(key), _LONGEST_SHOWN) or repr(str(key))[:_LONGEST_SHOWN]
    hint = near_to(text, known, prefix)
    return ValueError(f"{prefix}{text} is no key{hint}; known: {nearest(text, sorted(known))}")


@lru_cache(maxsize=256)
def declared(cls: type[DataclassInstance]) -> Mapping[str, Key]:
    """The keys of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for item in fields(cls):
        default: Any = REQUIRED if item.default is MISSING else item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        found[item.name] = _key(item.name, hints[item.name], default)
    return types.MappingProxyType(found)


def arguments_of(call: Callable[..., Any]) -> tuple[dict[str, Key], bool]:
    """The keys that a class takes as arguments, by name, and whether it takes any others as well (`**kwargs`).

    An argument without an annotation, or with one of its own, is of kind OTHER.
    """
    function = call.__init__ if isinstance(call, type) else call  # type: ignore[misc]
    if function is object.__init__:
        return {}, False
    hints = get_type_hints(function, include_extras=True)
    found, open_ended = {}, False
    for name, item in inspect.signature(call).parameters.items():
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            open_ended = open_ended or item.kind is item.VAR_KEYWORD
            continue
        found[name] = _key(name, hints.get(name, object), item.default)
    return found, open_ended


def _key(name: str, hint: Any, default: Any) -> Key:
    rule = None
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        rule = next((note for note in notes if isinstance(note, Rule)), None)
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    nullable = type(None) in members
    kinds = [kind for kind in (_kind(member) for member in members) if kind]
    if rule is not None and rule.word:
        kinds = [kind for kind in kinds if kind != TEXT]
    elif rule is not None and rule.extra:
        kinds = [kind for kind in kinds if kind not in _ELEMENT]
    elif len(kinds) < len(members) - nullable or (len(kinds) > 1 and set(kinds) != {WHOLE, NUMBER}):
        # A union with something else is checked here only if its rule tells what that is.
        kinds = []
    kind = OTHER if not kinds else NUMBER if NUMBER in kinds else kinds[0]
    return Key(name, kind, rule or Rule(), default, nullable or hint in (Any, object))


def _kind(hint: Any) -> str:
    element = get_args(hint)
    if get_origin(hint) in (list, Sequence) and element:
        return LISTS.get(_kind(element[0]), "")
    return {int: WHOLE, float: NUMBER, bool: SWITCH, str: TEXT}.get(hint, "")


def check_fields(spec: DataclassInstance, group: str) -> None:
    """ValueError naming `group`.key where a field is not what its declaration says."""
    for name, key in declared(type(spec)).items():
        key.check(getattr(spec, name), f"{group}.{name}")


def check_range(key: str, value: float, low: float, high: float, *, remedy: str = "", above: bool = False) -> None:
    """ValueError naming key, value, range and remedy unless low <= value <= high (`above`: low < value).

    For ranges that depend on other values; those that do not are declared.
    """
    rule = Rule(low, high, above=above)
    if not rule.holds(value):
        hint = f"; {remedy}" if remedy else ""
        raise ValueError(f"{key}={shown(value)} is outside {rule.range}{hint}")


def from_mapping(cls: type[Spec], values: Mapping[str, object], group: str) -> Spec:
    """Build the dataclass `cls` from plain configuration values; errors name them `group`.key.

    ValueError on an unknown key, a missing one, or a value that its declaration does not allow. Nothing is converted.
    """
    known = declared(cls)
    for name in values:
        if name not in known:
            raise unknown_key(group, name, list(known))
    missing = sorted(name for name, key in known.items() if key.default is REQUIRED and name not in values)
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"{group} lacks {', '.join(missing[:4])}{more}; choose another file of the group {group}, or add them (in "
            "a file of yours `defaults: [NAME, _self_]` takes what it leaves out from the file NAME)"
        )
    for name, value in values.items():
        known[name].check(value, f"{group}.{name}")
    return cls(**values)
