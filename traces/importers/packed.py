"""Text of a source, plain or packed by gzip (`log.csv.gz`): told by its first bytes, whatever the file is called.

What is unpacked counts as what a file may make us take: `traces.limits`. Nothing is written to disk.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traces.container import check_file, fault
from traces.jsontext import parse_json
from traces.limits import Budget, max_bytes
from traces.reading import MAX_LINE, decoded, read_text, text_lines, unreadable

_MAGIC = b"\x1f\x8b"
_SUFFIX = ".gz"
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
_AGAIN = "pack it again with gzip, or give it unpacked"


def suffix_of(path: Path) -> str:
    """The suffix in small letters, of a packed file that of what is packed: `.csv` of `log.csv.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == _SUFFIX else suffix


def stem_of(path: Path) -> str:
    """The name without its suffix, and without that of what is packed."""
    return Path(path.stem).stem if path.suffix.lower() == _SUFFIX else path.stem


def is_packed(path: Path) -> bool:
    """Whether a file begins as gzip's do."""
    check_file(path)
    return _head(path, len(_MAGIC)) == _MAGIC


def source_head(path: Path, num_bytes: int) -> bytes:
    """The first bytes, unpacked: at most `num_bytes`."""
    if not is_packed(path):
        return _head(path, num_bytes)
    try:
        with gzip.open(path, "rb") as file:
            return file.read(num_bytes)
    except _DAMAGED:
        raise _damaged(path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def source_lines(path: Path, remedy: str) -> Iterator[tuple[int, str]]:
    """The lines with their numbers; TraceError as of `traces.reading.text_lines`."""
    return _unpacked_lines(path, remedy) if is_packed(path) else text_lines(path, remedy)


def source_json(path: Path, remedy: str) -> Any:
    """The value that a JSON file holds."""
    if not is_packed(path):
        return parse_json(path, "file", read_text(path, None, remedy), remedy)
    most = max_bytes()
    content = source_head(path, most + 1)
    Budget(path).take("file", len(content))
    return parse_json(path, "file", decoded(path, "file", content, remedy), remedy)


def _unpacked_lines(path: Path, remedy: str) -> Iterator[tuple[int, str]]:
    budget, number = Budget(path), 0
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                budget.take(f"line {number}", len(line))
                if len(line) > MAX_LINE:
                    raise fault(path, f"line {number}", f"is longer than {MAX_LINE} characters", "break it into lines")
                yield number, line
    except UnicodeDecodeError:
        raise fault(path, f"line {number + 1}", "is not UTF-8 text", remedy) from None
    except _DAMAGED:
        raise _damaged(path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _damaged(path: Path) -> Exception:
    return fault(path, "file", "is no usable gzip file (damaged, or cut off)", _AGAIN)


def _head(path: Path, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise unreadable(path, error) from None
