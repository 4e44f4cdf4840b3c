"""What decided a result: a finished run is repeated when one of it has changed, and for nothing else.

It is what was asked for (configuration, content of the trace, sizes of the model), the files that were read on the
way, and the code that ran: of the modules that the job's own module and the policy's parts lead to by their imports,
those that were loaded. Written to `DONE`, looked up when the same is asked for again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from expertflow.core import MODULES, source_of
from expertflow.model import ModelSpec
from sim.job import reads
from sim.paths import ROOT
from traces.reading import read_table

PACKAGES = ("expertflow", "sim", "traces", "replay")


def asked(cfg: Mapping[str, Any], trace_sha256: str, model: ModelSpec, *more: str) -> str:
    """Hash of what was asked for, in hex; more: whatever else tells it from another run."""
    body = json.dumps([cfg, trace_sha256, asdict(model), *more], sort_keys=True, default=str)
    return hashlib.sha256(body.encode()).hexdigest()


class Decided:
    """Gathers what decides a run, as a context around it.

    mark: of what was asked for. job: the module that runs it. cfg: whose `_target_` entries name the policy's parts.
    """

    def __init__(self, mark: str, job: str, cfg: Mapping[str, Any]) -> None:
        self.mark = mark
        self._roots = {job, *(target.rpartition(".")[0] for target in _targets(cfg))}
        self._files: dict[str, str | None] = {}
        at_start()

    def __enter__(self) -> Decided:
        reads.record_into(self._files)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        reads.record_into(None)

    def to_json(self) -> str:
        """What `stands` looks up: the mark, and hashes of the files read and of the code, by name."""
        found = {"asked": self.mark, "files": self._files, "code": code_that_ran(self._roots)}
        return json.dumps(found, indent=1, sort_keys=True) + "\n"


def stands(path: Path, mark: str, results: Sequence[Path] = ()) -> bool:
    """Whether `path` says that exactly this was run, by the code and on the files that are there now.

    results: the files that the run wrote, all of which must still be there and readable.
    """
    try:
        found = read_table(path)
    except ValueError:
        return False
    if not all(map(_is_whole, results)):
        return False
    files, code, asked_for = (found.get(key) for key in ("files", "code", "asked"))
    return (
        isinstance(files, dict)
        and isinstance(code, dict)
        and asked_for == mark
        and all(reads.hash_now(name) == sha256 for name, sha256 in files.items())
        and all(reads.sha256_of(ROOT / name) == sha256 for name, sha256 in code.items())
    )


def _is_whole(path: Path) -> bool:
    """Whether a result is there and can be read: JSON as a table that holds something, Parquet by its two marks."""
    if path.suffix == ".json":
        try:
            return bool(read_table(path))
        except ValueError:
            return False
    mark = b"PAR1"
    try:
        if not path.is_file() or path.stat().st_size <= 2 * len(mark):
            return False
        with path.open("rb") as file:
            found = file.read(len(mark))
            file.seek(-len(mark), os.SEEK_END)
            return found == file.read() == mark
    except OSError:
        return False


def _targets(value: Any) -> Iterator[str]:
    """Every `_target_` of a configuration."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "_target_":
                yield str(inner)
            else:
                yield from _targets(inner)


@lru_cache(maxsize=1)
def at_start() -> Mapping[str, str]:
    """Hashes of the packages' files by path below ROOT, as they were when this was first asked: before a run.

    What is edited while a run goes on must not be taken for the code that it ran.
    """
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): str(reads.sha256_of(path)) for path in files}


def code_that_ran(roots: set[str]) -> dict[str, str]:
    """Hashes of the files of all loaded modules that `roots` lead to, by path below ROOT, else by absolute path.

    Only the packages' own modules and those of the roots' packages are followed.
    """
    tops = {*PACKAGES, *(root.partition(".")[0] for root in roots)}
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sys.modules or name.partition(".")[0] not in tops:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])
        # A notebook's __main__ has none.
        file = getattr(sys.modules[name], "__file__", None)
        if file is None:
            continue
        # A module that runs compiled is what its source was, and leads to the same.
        path = source_of(name) if name in MODULES else Path(file)
        own = path.is_relative_to(ROOT)
        place = path.relative_to(ROOT).as_posix() if own else str(path)
        found[place] = at_start().get(place) or str(reads.sha256_of(path))
        waiting += _imports(path, name)
    return found


@cache
def _imports(path: Path, name: str) -> tuple[str, ...]:
    """Names that the module imports, anywhere in it: modules, and perhaps what is in them."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ()
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: list[str] = []
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = resolve_name("." * node.level + base, package)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements at any depth: `ast.walk` looks into every expression, where no import can be, and takes half as
    long as a short run."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, name, ())
