"""Opening files of unknown origin: JSON, CSV lines, YAML, safetensors, NumPy arrays. Every reader begins here.

Whatever is wrong is a `TraceError`: one line with file, place, fault and remedy. Nothing in a file is executed or
unpickled, no count in it is believed before it is held against the file's size, and what is read takes no more memory
than `traces.limits` allows. Only regular files are opened, so that none is waited for. Parquet: `traces.parquet`; how
the content of a trace is checked: `traces.validate`.
"""

from __future__ import annotations

import lzma
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from traces.container import Array, check_file, map_file
from traces.jsontext import REWRITE, kind_of, parse_json, shown
from traces.limits import check_bytes
from traces.messages import TraceError, fault, why

MAX_LINE = 1 << 28
"""Characters of one line of a text file."""
MAX_MEMBERS = 100_000
"""Members of a .npz archive."""


def unreadable(path: Path | str, error: OSError) -> TraceError:
    """The error to raise where the system does not give us the file."""
    problem, remedy = why(error)
    return fault(path, "file", f"cannot be read ({problem})", remedy)


def read_bytes(path: Path, most: int | None = None, remedy: str = REWRITE) -> bytes:
    """The content of a regular file of at most `most` bytes (None: as many as `traces.limits` allows)."""
    size = check_file(path)
    if most is not None and size > most:
        raise fault(path, "file", f"has more than {most} bytes", remedy)
    check_bytes(path, "file", size)
    try:
        with path.open("rb") as file:
            content = file.read(size + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) != size:
        raise fault(path, "file", "changes its size while it is read", "wait until it is written")
    return content


def read_text(path: Path, most: int | None = None, remedy: str = REWRITE) -> str:
    """The same as UTF-8 text; a byte order mark is left out."""
    return decoded(path, "file", read_bytes(path, most, remedy), remedy)


def decoded(path: Path, where: str, content: bytes, remedy: str = REWRITE) -> str:
    """Bytes as UTF-8 text; a byte order mark is left out."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault(path, where, f"is not UTF-8 text (byte {error.start})", remedy) from None


# -- JSON ----------------------------------------------------------------------------------------------------


def read_json(path: Path, remedy: str = REWRITE, most: int | None = None) -> Any:
    """The value that a JSON file holds; see `parse_json`."""
    return parse_json(path, "file", read_text(path, most, remedy), remedy)


def read_table(path: Path, remedy: str = REWRITE, most: int | None = None) -> dict[str, Any]:
    """The same where the file must hold a table."""
    value = read_json(path, remedy, most)
    if not isinstance(value, dict):
        raise fault(path, "file", f"holds a JSON {kind_of(value)}, not a table", remedy)
    return value


def json_lines(path: Path, remedy: str = REWRITE) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line of a .jsonl file that is not empty."""
    for number, line in text_lines(path, remedy):
        if line.strip():
            yield f"line {number}", parse_json(path, f"line {number}", line, remedy)


def text_lines(path: Path, remedy: str = REWRITE, most: int = MAX_LINE) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers; TraceError for one of more than `most` characters."""
    check_file(path)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while line := file.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise fault(path, f"line {number}", f"is longer than {most} characters", "break it into lines")
                yield number, line
    except UnicodeDecodeError:
        raise fault(path, f"line {number + 1}", "is not UTF-8 text", remedy) from None
    except OSError as error:
        raise unreadable(path, error) from None


# -- arrays --------------------------------------------------------------------------------------------------


def read_arrays(path: Path, remedy: str = REWRITE) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays, in memory, and text header of a safetensors file; both as small as the file, which is checked whole."""
    check_bytes(path, "file", check_file(path))
    container = map_file(path, remedy)
    return {name: np.array(array) for name, array in container.arrays.items()}, container.metadata


def check_finite(path: Path | str, arrays: dict[str, Array], remedy: str = REWRITE) -> None:
    """TraceError that names array and place of the first value that is NaN or infinite."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            at = np.unravel_index(int(np.argmin(finite)), array.shape)
            place = ", ".join(str(int(index)) for index in at)
            raise fault(path, f"array {name!r} [{place}]", f"holds {array[at]}", f"values must be finite; {remedy}")


def npy_layout(path: Path, where: str, file: BinaryIO, num_bytes: int) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Type, shape and order (Fortran's?) of a .npy of `num_bytes`, of which `file` is read up to the data.

    TraceError for a header that is none, for objects, and where the file holds fewer bytes than its shape takes.
    """
    read = np.lib.format
    try:
        version = read.read_magic(file)  # type: ignore[no-untyped-call, unused-ignore]
        header = {(1, 0): read.read_array_header_1_0, (2, 0): read.read_array_header_2_0}[version]
        # Of a header that Python 2 wrote numpy tells in a warning.
        with warnings.catch_warnings(action="ignore"):
            shape, fortran, dtype = header(file, max_header_size=10_000)
    except Exception as error:
        # numpy hands the header to Python's own parser, which may fail in any way.
        told = str(error).splitlines()[0][:80] if isinstance(error, ValueError) and str(error) else ""
        reason = told if told and " at 0x" not in told else "no .npy header"
        raise fault(path, where, f"is no plain array file ({reason})", "save integers, not objects") from None
    if dtype.hasobject or dtype.kind not in "biufc":
        raise fault(path, where, f"is no plain array file (it holds {dtype})"[:160], "save integers, not objects")
    if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 8:
        raise fault(path, where, f"has the shape {shown(list(shape))}", REWRITE)
    needed = math.prod(shape) * dtype.itemsize
    if needed > (there := num_bytes - file.tell()):
        raise fault(path, where, f"needs {needed} bytes by its shape and has {there}, truncated", REWRITE)
    return dtype, tuple(shape), bool(fortran)


def npy_array(path: Path, where: str, file: BinaryIO, num_bytes: int) -> Array:
    """The array of a .npy of `num_bytes`, in memory: its bytes are read, never evaluated."""
    dtype, shape, fortran = npy_layout(path, where, file, num_bytes)
    needed = math.prod(shape) * dtype.itemsize
    check_bytes(path, where, needed)
    content = file.read(needed)
    if len(content) != needed:
        raise fault(path, where, f"needs {needed} bytes by its shape and has {len(content)}, truncated", REWRITE)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def read_npy(path: Path) -> Array:
    """The array of a .npy file: mapped, so that it takes no memory until it is used."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            dtype, shape, fortran = npy_layout(path, "array", file, size)
            start = file.tell()
    except OSError as error:
        raise unreadable(path, error) from None
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C").view(np.ndarray)


_ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06")
"""How a zip archive begins: with a member, or, of none, with its end."""


def npz_arrays(path: Path) -> Iterator[tuple[str, Array]]:
    """Name and array of each member of a .npz archive, in their order; nothing is unpickled or written to disk.

    What the archive says of its members' sizes is added up before any is unpacked, and no more is unpacked than it
    says. TraceError for a damaged archive, a name that comes twice, and what is no array.
    """
    check_file(path)
    with unzipping(path):
        archive = open_archive(path)
    with archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise fault(path, "file", f"has {len(members)} members", f"at most {MAX_MEMBERS} are read; split it")
        check_bytes(path, "file", sum(member.file_size for member in members))
        seen: set[str] = set()
        for member in members:
            name = member.filename.removesuffix(".npy")
            where = f"array {name[:60]!r}"
            if name in seen:
                raise fault(path, where, "comes twice", "keep one")
            seen.add(name)
            with unzipping(path), archive.open(member) as file:
                array = npy_array(path, where, cast(BinaryIO, file), member.file_size)
                if file.read(1):
                    raise fault(path, where, "has bytes after its last value", REWRITE)
            yield name, array


def open_archive(path: Path) -> zipfile.ZipFile:
    """A zip archive that begins with its first member, or with its end; zipfile.BadZipFile where it does not.

    zipfile itself also takes one that stands behind something else, which other readers take for something else.
    """
    with path.open("rb") as file:
        if file.read(4) not in _ARCHIVES:
            raise zipfile.BadZipFile
    return zipfile.ZipFile(path)


@contextmanager
def unzipping(
    path: Path, what: str = ".npz archive", remedy: str = "write it again with numpy.savez"
) -> Iterator[None]:
    """What the archive's own reader raises, in our words: TraceError that `path` is no usable `what`."""
    try:
        yield
        return
    except TraceError:
        raise
    except NotImplementedError:
        reason = "packed by a method that is not supported"
    except RuntimeError:
        reason = "encrypted"
    except (ValueError, OSError, EOFError, LookupError, ArithmeticError, struct.error, zipfile.BadZipFile):
        reason = "damaged, or of another kind"
    except (zlib.error, lzma.LZMAError):
        reason = "its packed data is damaged"
    raise fault(path, "file", f"is no usable {what} ({reason})", remedy)
