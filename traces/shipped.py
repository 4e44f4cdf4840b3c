"""The traces and fitted files that come with the package: as they are in a checkout, packed in an installed wheel."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from traces.messages import TraceError
from traces.packing import unpack

FOLDER = Path(__file__).resolve().parent / "data"
PACKED = ".packed"
REPOSITORY_ONLY = (
    "deepseek-v2-lite-twin-eval.safetensors",
    "deepseek-v2-lite-twin.forest.safetensors",
    "deepseek-v2-lite-twin.hybrid.safetensors",
    "gpt-oss-20b-twin-train.safetensors",
    "gpt-oss-20b-twin.forest.safetensors",
    "qwen1.5-moe-a2.7b-twin-eval.safetensors",
    "qwen1.5-moe-a2.7b-twin.forest.safetensors",
    "qwen1.5-moe-a2.7b-twin.hybrid.safetensors",
)
"""What only studies and training need: not in the wheel, which would be three times as large."""

_EVALUATED = ("gpt-oss-20b-twin", "deepseek-v2-lite-twin", "qwen1.5-moe-a2.7b-twin")
RECORDINGS = {
    **{name: f"{name}-eval.safetensors" for name in _EVALUATED},
    **{f"{name}-eval": f"{name}-eval.safetensors" for name in _EVALUATED},
    "gpt-oss-20b-twin-train": "gpt-oss-20b-twin-train.safetensors",
}
"""Short names of the shipped recordings, and their files; a twin's own name is its recording to evaluate on."""


def recording(name: str) -> Path | None:
    """The shipped recording of that short name; None if there is none. ValueError as of `shipped`."""
    return shipped(RECORDINGS[name]) if name in RECORDINGS else None


def path_or_name(text: str) -> str:
    """What a command that is given a trace hands on as `trace.path`: of a file the path from the root; what is written
    as a short name is, and names no file, as it is."""
    if "/" in text or os.sep in text or text.endswith(".safetensors") or Path(text).exists():
        return os.path.realpath(text)
    return text


def is_here(name: str) -> bool:
    """Whether the recording of that short name came with what is installed; else it is in a checkout only."""
    file = RECORDINGS[name]
    return (FOLDER / file).is_file() or (FOLDER / (file + PACKED)).is_file()


def offered() -> str:
    """The short names of the recordings to evaluate on that are here, for a message."""
    return ", ".join(name for name in RECORDINGS if name.endswith("-twin") and is_here(name))


def twins_of(model: str) -> list[str]:
    """The short names of the recordings to evaluate on that are of that model's twin, here or not."""
    return [name for name in RECORDINGS if name == f"{model}-twin"]


def shipped(name: str) -> Path | None:
    """The shipped file of that name, unpacked if it is packed; None if there is none.

    ValueError for one that is in the repository only: to go on without it would be another result.
    """
    if Path(name).name != name:
        return None  # names come from traces, which are not trusted
    path = FOLDER / name
    if path.is_file():
        return path
    packed = FOLDER / (name + PACKED)
    if packed.is_file():
        return _unpacked(packed)
    if name in REPOSITORY_ONLY:
        raise ValueError(f"{name} is in the repository (traces/data), not in the installed package; give its path")
    return None


@lru_cache
def _unpacked(packed: Path) -> Path:
    """The file in the user's cache, under the hash of the packed bytes; written there if it is missing."""
    content = packed.read_bytes()
    name = packed.name.removesuffix(PACKED)
    try:
        return _written(cache_folder() / hashlib.sha256(content).hexdigest()[:16], name, content)
    except (OSError, RuntimeError, TraceError):
        # No home, or none that can be written to: for as long as this process runs.
        return _written(Path(_temporary().name), name, content)


def cache_folder() -> Path:
    """Where an installed package keeps what it made: in the user's cache. RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertflow"


@lru_cache(maxsize=1)
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="expertflow-")


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Here: NumPy takes a while, and who asks for the folder alone needs none.
        from traces.files import replace_file

        replace_file(path, unpack(content), sync=False)
    return path
