"""Writing files: whole or not at all, the same content as the same bytes, and what goes wrong said in one line.

Every file that a command writes goes through `whole_file`, or, where it grows while a run goes on, through `writing`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from traces.messages import TraceError, fault, why
from traces.processes.whole import Unfinished


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """What the file system refuses while `path` is written, as a TraceError that names it, the reason and a remedy."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path | str, error: OSError) -> TraceError:
    """The error to raise where the file system does not take `path`."""
    problem, remedy = why(error)
    return fault(path, "file", f"cannot be written ({problem})", remedy)


@contextmanager
def whole_file(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends, and is removed if it fails.

    Its name is its own, so that processes that write one path do not meet, and what a killed one has left goes with the
    next (`traces.processes.whole`). sync: wait until the disk has it. TraceError as of `writing`.
    """
    with writing(path), Unfinished(path) as unfinished, unfinished.path.open("wb") as file:
        yield file
        if sync:
            file.flush()
            os.fsync(file.fileno())


def safetensors_bytes(arrays: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the library alone writes the entries of metadata in an order drawn anew."""
    from safetensors.numpy import save

    plain = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    length = int.from_bytes(plain[:8], "little")
    table = json.loads(plain[8 : 8 + length])
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **table}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[8 + length :]


def replace_file(path: Path, content: bytes, sync: bool = True) -> None:
    """Write `content` to `path`, whole or not at all. TraceError where that cannot be."""
    with whole_file(path, sync) as file:
        file.write(content)


def replace_text(path: Path, text: str, sync: bool = True) -> None:
    """The same with a text, in UTF-8."""
    replace_file(path, text.encode(), sync)
