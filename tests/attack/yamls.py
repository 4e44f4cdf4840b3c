"""Mutation of YAML: the tree as in JSON, and what only YAML has: tags, anchors, bombs, its own types."""

from __future__ import annotations

from random import Random
from typing import Any

import yaml

from tests.attack import raw, trees
from tests.attack.trees import Literal, Table

VALUES = (
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!unknown x",
    "&a [*a]",
    "*nosuch",
    "${nosuch}",
    "${oc.env:HOME}",
    "???",
    "1_000",
    "0o17",
    "0x1F",
    ".inf",
    "-.Inf",
    ".NaN",
    "2001-01-01",
    "12:30:45",
    "yes",
    "~",
    "<<: 1",
    "|\n  a\n  b",
    "[" * 3_000,
)
BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return Table([(str(key), _tree(item)) for key, item in value.items()])
    if isinstance(value, list):
        return [_tree(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


_CACHE: dict[bytes, Any] = {}


def parse(content: bytes) -> list[Any]:
    """The tree of a sound file, in a list."""
    if content not in _CACHE:
        _CACHE[content] = yaml.safe_load(content)
    return [_tree(_CACHE[content])]


def _block(tree: Any, depth: int = 0) -> str:
    """Block style for tables, so that errors have lines; all else as in JSON, which YAML takes."""
    if isinstance(tree, Table) and tree.pairs:
        lines = []
        for key, value in tree.pairs:
            shown = key if key.isidentifier() else trees.write(key)
            nested = isinstance(value, Table) and value.pairs
            lines.append(
                "  " * depth + f"{shown}:" + ("\n" + _block(value, depth + 1) if nested else f" {_flow(value)}")
            )
        return "\n".join(lines)
    return "  " * depth + _flow(tree)


def _flow(value: Any) -> str:
    # YAML 1.1 takes 1e9 for text; with a point and a sign it is a number.
    if type(value) is float and "e" in (text := repr(value)):
        mantissa, exponent = text.split("e")
        return (
            f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}"
        )
    return trees.write(value)


def write(lines: list[Any]) -> bytes:
    """The text of the tree."""
    return "\n".join(map(_block, lines)).encode("utf-8", "surrogatepass") + b"\n"


def strange(rng: Random, lines: list[Any]) -> bytes:
    """A value that only YAML has, indentation that is off, a tab, a second document, a bomb of anchors."""
    kind = rng.randrange(6)
    if kind < 3 and lines:
        trees.pick(rng, lines).value = Literal(rng.choice(VALUES))
        return write(lines)
    text = write(lines).decode("utf-8", "surrogatepass")
    if kind == 3:
        at = rng.randrange(len(text) + 1)
        return (text[:at] + rng.choice(("\t", "  ", "---\n", ": ", "#", "- ", "\n\n", "%")) + text[at:]).encode(
            "utf-8", "surrogatepass"
        )
    if kind == 4:
        return (text + rng.choice((BOMB, "---\na: 1\n", "a: 1\n", "- 1\n"))).encode("utf-8", "surrogatepass")
    return trees.reencode(rng, text) if rng.random() < 0.5 else raw.mutate(rng, text.encode("utf-8", "surrogatepass"))
