"""How large shipped files are packed for the wheel, which has a bound; needs Python alone, since a build has no more.

Array by array, by LZMA, whose context of a byte is a few bits of the one before it, and the byte's place among as many
as it is told. Which of these suits an array, and whether its numbers are taken apart into their first bytes, second
bytes and so on, is tried on its beginning: together some 3 % of the whole. Of scores of candidates, which fall, the
whole byte before says most: the second score of all rows stands in the order of their first scores, the third in that
of their second, and so on, so that those of one context stand together. That makes them 17 % smaller.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from itertools import pairwise

_CONTEXTS = (0, 0, 0), (0, 0, 1), (0, 2, 2), (0, 3, 3), (2, 0, 0)
"""lc, lp, pb of LZMA: bits of the byte before, and bits of the place that literals and matches are told apart by."""
_TRIED = 1 << 17
"""Bytes of an array that choose how all of it is packed."""
_APART = 1 << 4
"""In the byte that begins a part, beside the place in _CONTEXTS: its numbers were taken apart."""
_WIDTHS = {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
_SCORES = "lookahead_scores"


def pack(content: bytes) -> bytes:
    """The bytes of a safetensors file, packed: for each part how, its packed bytes' number in 4 bytes, and they."""
    place = _scores_of(content)
    if place is not None:
        start, end, width = place
        content = content[:start] + _grouped(content[start:end], width) + content[end:]
    made = [bytes([place is not None])]
    for start, end, width in _parts(content):
        part = content[start:end]
        tried = {
            (context, apart): len(_compressed(_apart(part[:_TRIED], width) if apart else part[:_TRIED], context))
            for context in range(len(_CONTEXTS))
            for apart in ((False, True) if width > 1 else (False,))
        }
        context, apart = min(tried, key=tried.__getitem__)
        packed = _compressed(_apart(part, width) if apart else part, context)
        made += [bytes([context | _APART * apart]), len(packed).to_bytes(4, "little"), packed]
    return b"".join(made)


def unpack(packed: bytes) -> bytes:
    """The bytes that `pack` was given."""
    at = 1
    parts: Iterator[tuple[int, int, int]] | None = None
    found = []
    while at < len(packed):
        kind, length = packed[at], int.from_bytes(packed[at + 1 : at + 5], "little")
        part = lzma.decompress(packed[at + 5 : at + 5 + length], lzma.FORMAT_RAW, filters=_filters(kind % _APART))
        at += 5 + length
        if parts is None:
            # The first part is the header, which tells of all others.
            parts = _parts(part)
        _, _, width = next(parts)
        found.append(_apart(part, width, back=True) if kind & _APART else part)
    content = b"".join(found)
    if not packed[0]:
        return content
    place = _scores_of(content)
    if place is None:
        raise ValueError("not packed by this version")
    start, end, width = place
    return content[:start] + _ungrouped(content[start:end], width) + content[end:]


def _parts(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(first byte, end, bytes of a number) of the header of a safetensors file, and of its arrays as they lie."""
    start = 8 + int.from_bytes(content[:8], "little")
    yield 0, start, 1
    arrays = [about for name, about in json.loads(content[8:start]).items() if name != "__metadata__"]
    for about in sorted(arrays, key=lambda about: tuple(about["data_offsets"])):
        first, end = about["data_offsets"]
        yield start + first, start + end, _WIDTHS.get(about["dtype"], 1)


def _apart(array: bytes, width: int, back: bool = False) -> bytes:
    """The first bytes of all numbers, then their second ones; what is left over stays. back: the other way round."""
    number = len(array) // width
    end = number * width
    found = bytearray(array)
    for place in range(width):
        if back:
            found[place:end:width] = array[place * number : (place + 1) * number]
        else:
            found[place * number : (place + 1) * number] = array[place:end:width]
    return bytes(found)


def _filters(context: int) -> list[dict[str, int]]:
    lc, lp, pb = _CONTEXTS[context]
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "lp": lp, "pb": pb}]


def _compressed(content: bytes, context: int) -> bytes:
    return lzma.compress(content, lzma.FORMAT_RAW, filters=_filters(context))


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
