"""The recordings that tests run on: shipped ones, which are always there, and larger ones beside the project.

What is tested is tested on a shipped recording; where the folder `shared/traces` lies beside the project, the same
tests run on its traces of gpt-oss-20b as well. A test names what it takes by a list of paths to parametrise over, so
that without the folder there are fewer cases and none is skipped.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

SHIPPED = Path(str(files("traces"))) / "data" / "gpt-oss-20b-twin-eval.safetensors"
"""Routing [1344, 24, 4] of 32 experts, 7 requests."""

BESIDE = Path(__file__).parents[2].parent / "shared" / "traces"


def beside(*splits: str) -> list[Path]:
    """Those of the recorded traces `gpt-oss-20b.SPLIT` that lie beside the project; none on a bare clone."""
    paths = [BESIDE / f"gpt-oss-20b.{split}.safetensors" for split in splits]
    return [path for path in paths if path.exists()]


def recordings(*splits: str) -> list[Any]:
    """Parameters of a test: the shipped recording, and, as slow ones, those of `splits` beside the project."""
    return [SHIPPED, *(pytest.param(path, marks=pytest.mark.slow) for path in beside(*splits))]


def named(path: object) -> str | None:
    """The name of a recording among a test's parameters; None for a parameter that is no path."""
    return path.stem if isinstance(path, Path) else None
