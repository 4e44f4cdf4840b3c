"""Nothing that is read is forgotten: every importer, and every module that opens a file of unknown origin."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.attack import composing, formats, kinds_of_files, readers
from tests.attack.kinds import MODULES, registry
from traces import cli

ROOT = Path(__file__).parents[2]
PACKAGES = ("expertflow", "replay", "sim", "traces")
OPENING = {
    "traces.container": {"map_file"},
    "traces.importers.packed": {"source_head", "source_json", "source_lines"},
    "traces.parquet": {"open_parquet"},
    "traces.reading": {
        "json_lines",
        "npz_arrays",
        "read_arrays",
        "read_bytes",
        "read_json",
        "read_npy",
        "read_table",
        "read_text",
        "text_lines",
    },
    "traces.yamltext": {"read_yaml"},
}
"""The functions by which files of unknown origin are opened (`traces/reading.py`)."""
OTHERWISE = {
    "replay/calibration/compared.py": "profiles of the package, which no user names",
    "replay/validation/folder.py": "the summary of an earlier validation, to know its folder by",
    "replay/calibrate.py": "the profile of an earlier calibration of the same name, read as hardware-yaml is",
    "sim/job/part_keys.py": "files of policy parts, for the hint of an error: what cannot be read is passed over",
    "sim/study/cells.py": "results that the study itself has written, read as metrics are",
    "traces/assumed/families.py": "a file of the package, which no user names",
    "traces/fitting/baselines.py": "frequencies of a fit, read as fitted-transition is",
}
"""Modules that open files by these functions and have no reader of their own, and why."""


def opening_modules() -> Iterator[str]:
    """Files of the packages that import one of the opening functions."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ImportFrom) or name in _OPENERS:
                    continue
                opened = OPENING.get(node.module or "", set())
                if any(item.name in opened for item in node.names):
                    yield name


_OPENERS = {f"{module.replace('.', '/')}.py" for module in OPENING}


@pytest.mark.slow
def test_readers_reach_every_module_that_opens_files(tmp_path: Path) -> None:
    reached: set[str] = set()
    # What an earlier test has composed is composed no more.
    composing._rest.cache_clear()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        # To be imported is not to be used: neither a module nor the body of a class is a function.
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            reached.add(frame.f_code.co_filename)

    for reader in readers.READERS:
        folder = tmp_path / reader.name
        folder.mkdir()
        path = reader.make(folder)
        sys.setprofile(watch)
        try:
            reader.read(path)
        finally:
            sys.setprofile(None)
    wanted = set(opening_modules())
    assert len(wanted) > 12
    missing = {name for name in wanted if str(ROOT / name) not in reached}
    assert missing - OTHERWISE.keys() == set(), "give them a line in tests/attack/readers.py"
    assert OTHERWISE.keys() <= missing, "these are read by a reader now: take them out of OTHERWISE"


@pytest.mark.slow
def test_every_importer_is_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, importer_of = set(), cli.importer_of

    def remembered(kind: str) -> Any:
        found.add(kind)
        return importer_of(kind)

    monkeypatch.setattr(cli, "importer_of", remembered)
    for reader in readers.READERS:
        # Twins, logs and configurations import nothing, and take seconds to make.
        if not reader.name.startswith(("twin", "lockstep", "hardware", "link", "stack", "storage", "model", "metrics")):
            folder = tmp_path / reader.name
            folder.mkdir()
            reader.read(reader.make(folder))
    assert found == cli.KINDS.keys()


def test_every_reader_is_a_kind_with_a_format(tmp_path: Path) -> None:
    kinds = registry(MODULES[:2])
    names = [reader.name for reader in readers.READERS]
    assert len(names) == len(set(names))
    assert set(names) <= kinds.keys()
    for suffix in (".safetensors", ".json", ".jsonl", ".csv", ".npy", ".npz", ".parquet", ".yaml", ".txt", ""):
        assert formats.of(tmp_path / f"a{suffix}").changes
    assert set(kinds_of_files.SLOW) <= kinds.keys()
