"""The sizes of a model of the user's own, read from the file that publishes it.

A Hugging Face `config.json`, or the folder that holds it; a GGUF file, told by its first four bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expertflow.model import ModelSpec
from traces.messages import fault

GGUF = b"GGUF"
"""The first bytes of a GGUF file."""


@dataclass(frozen=True)
class ReadModel:
    """A model as a file tells it. derived: what was computed from several values of the file; assumed: what the file
    does not say. Short sentences without a full stop, each for a reader to check."""

    spec: ModelSpec
    derived: tuple[str, ...]
    assumed: tuple[str, ...]


def read_model_file(path: Path) -> ReadModel:
    """The model that `path` describes; TraceError, one line with file, place and remedy, where it does not."""
    raise fault(path, "file", "is no model file", "give a Hugging Face config.json or a GGUF file")
