"""How large shipped files are packed for the wheel, which has a bound; needs Python alone, since a build has no more.

XZ, whose context of a byte is a few bits of the one before it. Of scores of candidates, which fall, the whole byte
before says most: the second score of all rows stands in the order of their first scores, the third in that of their
second, and so on, so that those of one context stand together. That makes them 17 % smaller.
"""

from __future__ import annotations

import json
import lzma
from itertools import pairwise

# Small symbols in whole bytes and pairs of them: 3 % smaller than by default.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 1, "pb": 1}]
_PLAIN, _GROUPED = b"\0", b"\1"
_SCORES = "lookahead_scores"


def pack(content: bytes) -> bytes:
    """The bytes of a safetensors file, packed."""
    place = _scores_of(content)
    if place is None:
        return _PLAIN + _compressed(content)
    start, end, width = place
    scores = _grouped(content[start:end], width)
    return _GROUPED + _compressed(content[:start] + scores + content[end:])


def unpack(packed: bytes) -> bytes:
    """The bytes that `pack` was given."""
    kind, content = packed[:1], lzma.decompress(packed[1:])
    if kind == _PLAIN:
        return content
    place = _scores_of(content)
    if kind != _GROUPED or place is None:
        raise ValueError("not packed by this version")
    start, end, width = place
    return content[:start] + _ungrouped(content[start:end], width) + content[end:]


def _compressed(content: bytes) -> bytes:
    return lzma.compress(content, format=lzma.FORMAT_XZ, filters=_FILTERS)


def _scores_of(content: bytes) -> tuple[int, int, int] | None:
    """First and last byte of the candidates' scores in a safetensors file, and how many a row has."""
    size = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + size]).get(_SCORES)
    if about is None or about["dtype"] != "U8":
        return None
    start, end = (8 + size + offset for offset in about["data_offsets"])
    return start, end, about["shape"][-1]


def _order(before: bytes) -> list[int]:
    """Rows by their score before, those of one score in their order."""
    return sorted(range(len(before)), key=before.__getitem__)


def _grouped(scores: bytes, width: int) -> bytes:
    columns = [scores[column::width] for column in range(width)]
    found = columns[:1]
    for before, column in pairwise(columns):
        found.append(bytes(map(column.__getitem__, _order(before))))
    return b"".join(found)


def _ungrouped(grouped: bytes, width: int) -> bytes:
    num_rows = len(grouped) // width
    scores = bytearray(len(grouped))
    before = b""
    for column in range(width):
        part = grouped[column * num_rows : (column + 1) * num_rows]
        if column:
            placed = bytearray(num_rows)
            for row, value in zip(_order(before), part, strict=True):
                placed[row] = value
            part = bytes(placed)
        scores[column::width] = part
        before = part
    return bytes(scores)
