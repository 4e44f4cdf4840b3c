"""The sizes of a model of the user's own, read from the file that publishes it.

A Hugging Face `config.json`, or the folder that holds it or a GGUF file; a GGUF file, told by its first four bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from expertflow.model import ModelSpec
from traces.container import check_file
from traces.messages import fault
from traces.reading import unreadable

GGUF = b"GGUF"
"""The first bytes of a GGUF file."""
_NO_MODEL = re.compile(r"^mmproj|-(?!00001)\d{5}-of-\d{5}\.gguf$")
"""What reads pictures, and parts of a model behind the first."""


@dataclass(frozen=True)
class ReadModel:
    """A model as a file tells it. derived: what was computed from several values of the file; assumed: what the file
    does not say; incomplete: what is missing of the file, so that a part of the model is made up. Short sentences
    without a full stop, each for a reader to check."""

    spec: ModelSpec
    derived: tuple[str, ...]
    assumed: tuple[str, ...]
    incomplete: tuple[str, ...] = ()


def read_model_file(path: Path) -> ReadModel:
    """The model that `path` describes; TraceError, one line with file, place and remedy, where it does not."""
    file = _in_folder(path) if path.is_dir() else path
    check_file(file)
    if _first_bytes(file) == GGUF:
        from sim.specs.gguf_header import read_gguf

        return read_gguf(file)
    from sim.specs.hf_config import read_hf_config

    return ReadModel(*read_hf_config(file))


def _in_folder(folder: Path) -> Path:
    """The config.json of a folder, else its only GGUF file, or the first of its parts."""
    file = folder / "config.json"
    if file.exists() or file.is_symlink():
        return file
    found = sorted(one for one in folder.glob("*.gguf") if not _NO_MODEL.search(one.name))
    if len(found) > 1:
        raise fault(folder, "file", f"holds {len(found)} GGUF files, and no config.json", "give one of the files")
    return found[0] if found else file


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF))
    except OSError as error:
        raise unreadable(path, error) from None
