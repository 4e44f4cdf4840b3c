"""YAML of a user's own folder, read as plain values: no tags that make objects, no aliases that unfold without end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from traces.jsontext import kind_of
from traces.messages import TraceError, fault, plain
from traces.reading import read_text

MAX_YAML = 1 << 20
"""Bytes of a file."""
MAX_VALUES = 1 << 16
"""Values that a file may come to once its aliases are followed: Hydra takes some 20 us for each."""
_MOST_DEPTH = 100
_NO_VALUES = ("set", "omap", "pairs", "binary")
"""Kinds that YAML has and a configuration has not: Hydra fails on some without a word."""
_REMEDY = "correct the file: it is a table of `key: value`, as `expertflow keys` lists them"


def read_yaml(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """The table that a YAML file holds. TraceError names file, line and fault."""
    text = read_text(path, MAX_YAML, remedy)
    if _depth(text) > _MOST_DEPTH:
        raise fault(path, "file", "is no usable YAML (nested too deeply)", remedy)
    try:
        value = _constructed(path, text, remedy)
    except yaml.reader.ReaderError as error:
        where = f"line {text.count(chr(10), 0, error.position) + 1}"
        raise fault(path, where, "is no YAML (a character that is not allowed)", remedy) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "file" if mark is None else f"line {mark.line + 1}"
        reason = plain(str(getattr(error, "problem", None) or "broken"))
        raise fault(path, where, f"is no YAML ({reason[:120]})", remedy) from None
    except RecursionError:
        raise fault(path, "file", "is no usable YAML (nested too deeply)", remedy) from None
    except TraceError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        # Of what looks like a date or a number and is none.
        raise fault(path, "file", f"is no usable YAML ({plain(str(error))[:120]})", remedy) from None
    if not isinstance(value, dict):
        raise fault(path, "file", f"holds a YAML {kind_of(value)}, not a table", remedy)
    return value


def _depth(text: str) -> int:
    """How deep brackets stand in each other, those in texts included: the parser's time grows with it."""
    depth = deepest = 0
    for found in re.finditer(r"[][{}]", text):
        depth += 1 if found[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _constructed(path: Path, text: str, remedy: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(path, node, remedy)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_size(path: Path, root: yaml.Node, remedy: str) -> None:
    """TraceError for aliases that lead back to themselves or come to too many values, and for a key given twice."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        found = sizes.get(id(node))
        if found is not None:
            if found < 0:
                raise fault(path, _line(node), "holds an alias of itself", remedy)
            return found
        sizes[id(node)] = -1
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in _NO_VALUES:
            raise fault(path, _line(node), f"holds a YAML {kind}, which is no value of a configuration", remedy)
        total = 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(path, node, remedy)
            total += sum(size(key) + size(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        if total > MAX_VALUES:
            raise fault(path, _line(node), f"comes to more than {MAX_VALUES} values by its aliases", remedy)
        sizes[id(node)] = total
        return total

    size(root)


def _check_keys(path: Path, node: yaml.MappingNode, remedy: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
            raise fault(path, _line(key), "has a key that is no text", remedy)
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise fault(path, _line(key), f"gives {key.value[:40]!r} twice", remedy)
        seen.add(key.value)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
