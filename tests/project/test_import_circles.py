"""No module needs, at import or for its types, one that needs it back."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("expertflow", "sim", "replay", "traces")


def outside_functions(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is loaded, and those for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from outside_functions(child)


def needs(source: str, known: set[str]) -> set[str]:
    """Those of the modules `known` that the source imports."""
    found: set[str] = set()
    for node in outside_functions(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & known


def circle(sources: Mapping[str, str]) -> list[str]:
    """The modules of one circle, in order; empty if there is none. sources: by module name."""
    names = set(sources)
    graph = {name: needs(source, names) - {name} for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_two_modules_need_each_other() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    assert "traces.validate" in names
    assert circle({name: path.read_text(encoding="utf-8") for name, path in names.items()}) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "import b", "b": "import a"}, {"a", "b"}),
        ({"a": "from b import x", "b": "if TYPE_CHECKING:\n    from a import Y"}, {"a", "b"}),
        ({"a": "import b", "b": "import c", "c": "class C:\n    import a"}, {"a", "b", "c"}),
        ({"a": "import b", "b": "def f():\n    import a"}, set()),
        ({"a": "import b", "b": "import numpy"}, set()),
    ],
)
def test_the_search_finds_circles_and_nothing_else(sources: dict[str, str], found: set[str]) -> None:
    assert set(circle(sources)) == found
