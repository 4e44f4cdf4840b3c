"""Mutation of NumPy's files: the header of an .npy as text and bytes, and the directory of an .npz."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from tests.attack import draw, raw, tensors

Member = tuple[str, Any]
"""Name in the archive and array, or bytes that are no array."""
HEADERS = (
    "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 2, 2), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (2, 2, 2), }",
    "{'descr': '<i4', 'fortran_order': True, 'shape': (3, 2, 2), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 2, 2), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 2, 2), }",
    "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (2, 2, 2), }",
    "{'descr': '<i4', 'fortran_order': 0, 'shape': [2, 2, 2]}",
    "{'descr': 'i4'}",
    "__import__('os').system('true')",
    "(" * 300,
    "{" * 5000,
    "'\\",
    "",
    "\x00" * 64,
    "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2, 2), 'x': 1}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (2L, 2, 2)}",
)


def npy(array: Any) -> bytes:
    """The bytes of an .npy file."""
    target = io.BytesIO()
    np.save(target, array, allow_pickle=False)
    return target.getvalue()


def change_array(rng: Random, members: list[Member]) -> None:
    """Values, type or shape of an array, through the changes of tensors."""
    if not members:
        return
    index = rng.randrange(len(members))
    name, array = members[index]
    if isinstance(array, bytes):
        return
    doc = tensors.Doc({}, {"a": array})
    rng.choice((tensors.change_entry,) * 3 + (tensors.fill, tensors.shuffle, tensors.cast, tensors.reshape))(rng, doc)
    members[index] = (name, doc.tensors.get("a", array))


def foreign_type(rng: Random, members: list[Member]) -> None:
    """An array in a type that safetensors does not have, or in Fortran's order."""
    if members and not isinstance(array := members[0][1], bytes) and array.dtype.kind in "iuf":
        with np.errstate(all="ignore"):
            kinds = (">i4", "U3", "S2", "c8", "M8[s]", "m8[s]", "<f8", ">u2", "V4")
            changed = np.asfortranarray(array) if rng.random() < 0.3 else array.astype("i4").astype(rng.choice(kinds))
        members[0] = (members[0][0], changed)


def write_npy(members: list[Member]) -> bytes:
    """The one array as a file."""
    array = members[0][1] if members else b""
    return array if isinstance(array, bytes) else npy(array)


def lie_npy(rng: Random, members: list[Member]) -> bytes:
    """A file whose header is another, is damaged, or lies about its length or version."""
    content = write_npy(members)
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length], content[10 + length :]
    kind = rng.random()
    if kind < 0.35:
        header = (rng.choice(HEADERS) + "\n").encode("latin-1")
    elif kind < 0.7:
        header = raw.mutate(rng, header)
    else:
        shown = str(draw.whole(rng, 2)).encode()
        header = header.replace(
            rng.choice((b"2", b"3", b"(", b"<i", b"False")), rng.choice((shown, b"", b"((", b"'")), 1
        )
    told = len(header) if rng.random() < 0.8 else rng.choice((0, 1, len(header) + 1, 65_535))
    version = rng.choice((b"\x01\x00",) * 8 + (b"\x02\x00", b"\x03\x00", b"\x00\x00", b"\xff\xff"))
    return b"\x93NUMPY" + version + struct.pack("<H", min(told, 65_535)) + header + data


def parse_npy(content: bytes) -> list[Member]:
    """A sound file."""
    return [("array", np.load(io.BytesIO(content), allow_pickle=False))]


# -- archives ------------------------------------------------------------------------------------------------


@dataclass
class Archive:
    """The members of an .npz, and whether they are compressed."""

    members: list[Member]
    packed: bool


def parse_npz(content: bytes) -> Archive:
    """A sound file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        packed = any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
        members = [(name, np.load(io.BytesIO(archive.read(name)))) for name in archive.namelist()]
    return Archive(members, packed)


def copy_archive(archive: Archive) -> Archive:
    """The same arrays in a list of its own."""
    return Archive(list(archive.members), archive.packed)


def write_npz(archive: Archive) -> bytes:
    """The bytes of the archive; names may come twice."""
    target = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if archive.packed else zipfile.ZIP_STORED
    # Names that come twice are what is wanted.
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(target, "w", kind) as written:
        for name, array in archive.members:
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            written.writestr(info, array if isinstance(array, bytes) else npy(array))
    return target.getvalue()


def change_member(rng: Random, archive: Archive) -> None:
    """Values, type or shape of a member."""
    change_array(rng, archive.members)


def change_members(rng: Random, archive: Archive) -> None:
    """A member is missing, comes twice, has another name, or is no array."""
    members = archive.members
    kind = rng.randrange(6)
    if not members:
        return
    index = rng.randrange(len(members))
    name, array = members[index]
    if kind == 0:
        del members[index]
    elif kind == 1:
        rng.shuffle(members)
    elif kind == 2:
        other = rng.choice(("prompt_len.npy", "x.npy", "x", "../x.npy", "", "é.npy", "a" * 400 + ".npy", "a\nb.npy"))
        members[index] = (other, array)
    elif kind == 3:
        members[index] = (name, lie_npy(rng, [(name, array)]))
    elif kind == 4:
        members.append((rng.choice((f"{index}x.npy", "readme.txt")), rng.choice((array, b"text", b""))))
    else:
        members[index] = (name, raw.mutate(rng, array if isinstance(array, bytes) else npy(array)))


def lie_npz(rng: Random, archive: Archive) -> bytes:
    """The archive with a directory that lies: about sizes, checksums, methods, places."""
    content = bytearray(write_npz(archive))
    mark, fields = rng.choice(
        (
            (b"PK\x01\x02", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4))),
            (b"PK\x03\x04", ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2))),
            (b"PK\x05\x06", ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        )
    )
    places = [index for index in range(len(content)) if content.startswith(mark, index)]
    if places:
        start, (offset, size) = rng.choice(places), rng.choice(fields)
        value = rng.choice((0, 1, 8, 12, 14, 99, 1 << 16, 1 << 30, (1 << 8 * size) - 1)) % (1 << 8 * size)
        content[start + offset : start + offset + size] = value.to_bytes(size, "little")
    return bytes(content)


def bomb(rng: Random, archive: Archive) -> bytes:
    """A small archive that unpacks to a large array, as its header says or beyond it."""
    zeros = np.zeros((rng.choice((1, 30_000, 300_000)), 2, 2), "<i8")
    return write_npz(Archive([("bomb.npy", zeros)], True))
