"""Does each package know only what it should? The "never knows" column of the design, read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FRAMEWORKS = ["simpy", "torch", "hydra", "omegaconf"]
FILES = ["pathlib", "os", "io", "shutil", "tempfile", "glob", "open"]
CLOCKS = ["time", "datetime"]
FORBIDDEN: dict[str, list[str]] = {
    "expertflow": [*FRAMEWORKS, *FILES, *CLOCKS, "sim", "replay", "traces", "conf"],
    "sim": ["torch", "replay"],
    "traces": [
        "expertflow.policy",
        "expertflow.runtime",
        "expertflow.parts",
        "expertflow.predictors",
        "expertflow.evictions",
        "expertflow.horizons",
        "expertflow.selections",
        "expertflow.orders",
        "sim",
        "replay",
    ],
    "replay": [
        "expertflow.predictors",
        "expertflow.evictions",
        "expertflow.horizons",
        "expertflow.selections",
        "expertflow.orders",
    ],
}


ROOMS: dict[str, list[str]] = {
    "sim/specs": ["sim.job", "sim.machine", "sim.views", "sim.study", "sim.api"],
    "sim/job": ["sim.machine", "sim.views", "sim.study", "sim.api"],
    "sim/views": ["sim.job", "sim.machine", "sim.study", "sim.api"],
    "sim/machine": ["sim.views", "sim.study", "sim.api"],
    "sim/api": ["sim.app", "sim.study"],
    "replay/machine": [
        "sim.job.configure",
        "replay.calibration",
        "replay.lockstep",
        "replay.validation",
        "replay.app",
        "replay.command",
    ],
    "replay/lockstep": ["replay.machine", "replay.calibration", "replay.validation", "replay.app", "replay.command"],
    "replay/calibration": ["replay.lockstep", "replay.validation", "replay.app", "replay.command"],
}
"""What the rooms of a package must not know of each other."""

SIMULATED = ["sim.machine"]
MAY_SIMULATE = {"replay/bench_decide.py", "replay/host_figures.py"}
"""Beside the validation: one times decisions while the simulated machine drives them, the other works out what places
are told of costs, which has to be the same in both worlds."""


CHOOSES_THE_CORE = "expertflow/core.py"
"""Reads files and the environment before anything else of the package runs: are there compiled modules, and may they
stand for their sources?"""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, `from a import b` as a.b, and of each call of open()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            yield node.lineno, "open"


def breaches(source: str, forbidden: list[str]) -> list[str]:
    """`line: name` of each import that is forbidden or lies inside a forbidden package."""
    return [
        f"{line}: {name}"
        for line, name in imported(ast.parse(source))
        if any(name == word or name.startswith(f"{word}.") for word in forbidden)
    ]


def modules(package: str) -> list[Path]:
    """All its Python files."""
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_package_imports_nothing_it_must_not_know(package: str) -> None:
    if not modules(package):
        pytest.skip(f"{package}/ does not exist yet")
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in modules(package)
        if (wrong := breaches(path.read_text(), FORBIDDEN[package]))
    }
    assert found.pop(CHOOSES_THE_CORE, []) == (["12: os", "18: pathlib.Path"] if package == "expertflow" else [])
    assert found == {}


def test_each_room_imports_no_room_above_it() -> None:
    found = {}
    for room, forbidden in ROOMS.items():
        assert modules(room), room
        for path in modules(room):
            if wrong := breaches(path.read_text(), forbidden):
                found[str(path.relative_to(ROOT))] = wrong
    assert found == {}


def test_a_replay_reaches_a_simulated_machine_only_where_it_validates() -> None:
    reaching = {
        path.relative_to(ROOT).as_posix() for path in modules("replay") if breaches(path.read_text(), SIMULATED)
    }
    inside = {path for path in reaching if path.startswith("replay/validation/")}
    assert inside
    assert reaching - inside == MAY_SIMULATE


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import simpy", ["1: simpy"]),
        ("import os.path as p", ["1: os.path"]),
        ("from pathlib import Path", ["1: pathlib.Path"]),
        ("def f():\n    from torch.cuda import Event", ["2: torch.cuda.Event"]),
        ("from expertflow import time", []),
        ("import timeit, opencv", []),
        ("with open('x') as file: pass", ["1: open"]),
        ("heard.open()", []),
    ],
)
def test_the_scan_finds_what_is_forbidden_and_nothing_else(source: str, expected: list[str]) -> None:
    assert breaches(source, FORBIDDEN["expertflow"]) == expected


def test_the_scan_reads_every_part() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in modules("expertflow")}
    assert {"expertflow/runtime.py", "expertflow/evictions/lru.py", "expertflow/orders/index.py"} <= names


def test_no_part_keeps_state_in_its_module() -> None:
    """Module level holds imports, definitions, docstrings and constants in capitals or type aliases."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Expr, ast.If)
    found = []
    for path in modules("expertflow"):
        for node in ast.parse(path.read_text()).body:
            names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            if not isinstance(node, allowed) and not all(name[:1].isupper() or name[:1] == "_" for name in names):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
