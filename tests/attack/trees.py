"""Mutation of JSON, and of YAML as far as it is JSON: any node of the tree, then the text.

Objects are lists of pairs, so that a key can come twice, and a value can be text that no JSON library would write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.attack import draw, raw


@dataclass
class Table:
    """An object as its pairs."""

    pairs: list[tuple[str, Any]]


@dataclass(frozen=True)
class Literal:
    """Text that stands for a value, JSON or not."""

    text: str


def parse(text: str | bytes) -> Any:
    """The tree of a JSON text."""
    return json.loads(text, object_pairs_hook=Table)


def write(tree: Any) -> str:
    """The text of a tree."""
    if isinstance(tree, Table):
        return "{" + ",".join(f"{json.dumps(key)}:{write(value)}" for key, value in tree.pairs) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(write, tree)) + "]"
    return tree.text if isinstance(tree, Literal) else json.dumps(tree)


@dataclass
class Place:
    """Where a value stands: in a list or in a table."""

    parent: Any
    index: int

    @property
    def value(self) -> Any:
        return self.parent[self.index] if isinstance(self.parent, list) else self.parent.pairs[self.index][1]

    @value.setter
    def value(self, new: Any) -> None:
        if isinstance(self.parent, list):
            self.parent[self.index] = new
        else:
            self.parent.pairs[self.index] = (self.parent.pairs[self.index][0], new)

    def siblings(self) -> list[Any]:
        """What can be deleted, repeated and reordered: the entries or the pairs."""
        return self.parent if isinstance(self.parent, list) else self.parent.pairs


def pick(rng: Random, root: list[Any]) -> Place:
    """A place on a walk down from the root, which ends at a leaf or earlier."""
    place = Place(root, 0)
    while True:
        value = place.value
        size = len(value) if isinstance(value, list) else len(value.pairs) if isinstance(value, Table) else 0
        if not size or (place.parent is not root and rng.random() < 0.15):
            return place
        place = Place(value, rng.randrange(size))


def change_value(rng: Random, place: Place) -> None:
    """A value becomes another: near it, or one of another type."""
    value, kind = place.value, rng.random()
    if kind < 0.4 and type(value) is int:
        place.value = draw.whole(rng, value)
    elif kind < 0.3 and type(value) is float:
        place.value = rng.choice((-value, value * 2, value + 1, 0.0, 1e9))
    elif kind < 0.3 and isinstance(value, str):
        place.value = rng.choice((value + "x", value[:-1], value.upper(), draw.text(rng), str(draw.whole(rng))))
    elif kind < 0.5:
        place.value = draw.text(rng)
    else:
        place.value = Literal(draw.literal(rng))


def swap_type(rng: Random, place: Place) -> None:
    """The same value in another type: text for a number, a list of it, a table of it."""
    value = place.value
    place.value = rng.choice(([value], [], Table([("a", value)]), Table([]), write(value), None, True))


def delete(rng: Random, place: Place) -> None:
    """An entry or a key is missing."""
    if place.siblings():
        del place.siblings()[place.index]


def duplicate(rng: Random, place: Place) -> None:
    """An entry or a key comes twice."""
    place.siblings().insert(rng.randrange(len(place.siblings()) + 1), place.siblings()[place.index])


def exchange(rng: Random, place: Place) -> None:
    """Two neighbours change places."""
    siblings = place.siblings()
    other = rng.randrange(len(siblings))
    siblings[place.index], siblings[other] = siblings[other], siblings[place.index]


def rename(rng: Random, place: Place) -> None:
    """A key becomes another."""
    if isinstance(place.parent, Table):
        key, value = place.parent.pairs[place.index]
        place.parent.pairs[place.index] = (rng.choice((key + "x", key[:-1], key.upper(), draw.text(rng))), value)
    else:
        change_value(rng, place)


def add(rng: Random, place: Place) -> None:
    """A further entry or key, which nobody asked for."""
    value: Any = Literal(draw.literal(rng))
    siblings = place.siblings()
    siblings.append(value if isinstance(place.parent, list) else (rng.choice(("extra", "__class__", "")), value))


def shorten(rng: Random, place: Place) -> None:
    """A list or table ends early."""
    siblings = place.siblings()
    del siblings[rng.randrange(len(siblings) + 1) :]


OPS = (change_value, change_value, change_value, swap_type, delete, duplicate, exchange, rename, add, shorten)


def mutate(rng: Random, tree: Any) -> Any:
    """The tree after one of these; it is changed in place where it can be."""
    root = [tree]
    rng.choice(OPS)(rng, pick(rng, root))
    return root[0] if root else Literal("")


def mutate_text(rng: Random, text: str) -> str:
    """The text of a JSON value after a change; text that is none, or too deep by now, is damaged as such."""
    try:
        return write(mutate(rng, parse(text)))
    except (ValueError, RecursionError):
        return raw.mutate(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def space(rng: Random, text: str) -> str:
    """Blanks where JSON allows them, which changes nothing."""
    return rng.choice((" ", "\n", "\t")) + text.replace(",", rng.choice((", ", " ,", ",\n"))) + rng.choice(("", "\n\n"))


def reencode(rng: Random, text: str) -> bytes:
    """The text in other bytes: a mark at the start, other encodings, a broken character."""
    kind = rng.randrange(5)
    if kind == 0:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if kind == 1:
        return text.encode("utf-16", "surrogatepass")
    if kind == 2:
        return text.encode("utf-8", "surrogatepass").replace(b'"', b'"\xff', 1)
    if kind == 3:
        return text.encode("utf-8", "surrogatepass").replace(b'"', b'"\xed\xa0\x80', 1)
    return raw.mutate(rng, text.encode("utf-8", "surrogatepass"))
