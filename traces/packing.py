"""How large shipped files are packed for the wheel, which has a bound; needs Python alone, since a build has no more.

Array by array, by LZMA, whose context of a byte is a few bits of the one before it, and the byte's place among as many
as it is told. Numbers of several bytes are taken apart into their first bytes, second bytes and so on. Candidates for a
layer, listed from several distances, are much the same ones: of each only its rank in the list before is kept, a
quarter less. Of scores of
candidates, which fall, the whole byte before says most: the second score of all rows stands in the order of their first
scores, the third in that of their second, and so on, so that those of one context stand together. That makes them 17 %
smaller.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

_CONTEXTS = (0, 0, 0), (0, 2, 2), (0, 3, 3)
"""lc, lp, pb of LZMA: bits of the byte before, and bits of the place that literals and matches are told apart by."""
_TURNED = 1 << 4
"""In the byte that begins a part, beside the place in _CONTEXTS: its last numbers of all rows come last."""
_BY_TARGET = 1 << 5
"""In that byte: candidates for one layer stand together, whichever layer they were listed in."""
_RANKED = 1 << 6
"""In that byte, with _BY_TARGET: of a candidate stands its rank in the list before, made by one token for one layer."""
_NONE = 255
"""What a list of candidates holds that is none: a whole row of it is left as it is."""
_WAYS = {
    ("lookahead_ids", "U8"): 2 | _BY_TARGET | _RANKED,
    ("experts", "U8"): 1,
    ("weights", "F16"): 1,
    ("loadings", "F16"): 1,
    ("tables", "I16"): _TURNED,
    ("cross", "U16"): _TURNED,
}
"""How arrays are packed that another way than the first makes smaller: tried on those that are shipped."""
_WIDTHS = {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
_SCORES = "lookahead_scores"


class _Part(NamedTuple):
    """A stretch of a file: the header, or an array."""

    name: str
    dtype: str
    start: int
    end: int
    shape: tuple[int, ...]


def pack(content: bytes) -> bytes:
    """The bytes of a safetensors file, packed: for each part how, its packed bytes' number in 4 bytes, and they."""
    place = _scores_of(content)
    if place is not None:
        start, end, width = place
        content = content[:start] + _grouped(content[start:end], width) + content[end:]
    made = [bytes([place is not None])]
    for part in _parts(content):
        array, way = content[part.start : part.end], _WAYS.get((part.name, part.dtype), 0)
        if way & _RANKED and not _can_be_ranked(array, part.shape):
            way &= ~_RANKED
        packed = lzma.compress(_moved(array, part, way), lzma.FORMAT_RAW, filters=_filters(way % _TURNED))
        made += [bytes([way]), len(packed).to_bytes(4, "little"), packed]
    return b"".join(made)


def unpack(packed: bytes) -> bytes:
    """The bytes that `pack` was given."""
    at = 1
    parts: Iterator[_Part] | None = None
    found = []
    while at < len(packed):
        way, length = packed[at], int.from_bytes(packed[at + 1 : at + 5], "little")
        part = lzma.decompress(packed[at + 5 : at + 5 + length], lzma.FORMAT_RAW, filters=_filters(way % _TURNED))
        at += 5 + length
        if parts is None:
            # The first part is the header, which tells of all others.
            parts = _parts(part)
        found.append(_moved(part, next(parts), way, back=True))
    content = b"".join(found)
    if not packed[0]:
        return content
    place = _scores_of(content)
    if place is None:
        raise ValueError("not packed by this version")
    start, end, width = place
    return content[:start] + _ungrouped(content[start:end], width) + content[end:]


def _parts(content: bytes) -> Iterator[_Part]:
    """The header of a safetensors file, and its arrays as they lie."""
    start = 8 + int.from_bytes(content[:8], "little")
    yield _Part("", "", 0, start, ())
    arrays = [(about, name) for name, about in json.loads(content[8:start]).items() if name != "__metadata__"]
    for about, name in sorted(arrays, key=lambda array: tuple(array[0]["data_offsets"])):
        first, end = about["data_offsets"]
        yield _Part(name, about["dtype"], start + first, start + end, tuple(about["shape"]))


def _moved(array: bytes, part: _Part, way: int, back: bool = False) -> bytes:
    """The first bytes of all numbers of an array, then their second ones; with _TURNED each by columns, not by rows.
    back: the other way round."""
    if way & _BY_TARGET and len(part.shape) == 4:
        if not way & _RANKED:
            return _by_target(array, part.shape, back)
        if back:
            return _by_target(_ranked(array, part.shape, back), part.shape, back)
        return _ranked(_by_target(array, part.shape, back), part.shape, back)
    width = _WIDTHS.get(part.dtype, 1)
    number = len(array) // width
    columns = number // part.shape[0] if way & _TURNED and number else 1
    found = bytearray(array)
    for place in range(width):
        for column in range(columns):
            first = place * number + column * (number // columns)
            there, here = slice(place + column * width, None, columns * width), slice(first, first + number // columns)
            if back:
                found[there] = array[here]
            else:
                found[here] = array[there]
    return bytes(found)


def _by_target(array: bytes, shape: tuple[int, ...], back: bool) -> bytes:
    """Rows of candidates [tokens, layers, distances, K] by the layer that they are for."""
    tokens, layers, distances, width = shape
    targets = [(layer + distance + 1) % layers for layer in range(layers) for distance in range(distances)] * tokens
    order = sorted(range(len(targets)), key=targets.__getitem__)
    rows = [array[at : at + width] for at in range(0, len(array), width)]
    if not back:
        return b"".join(map(rows.__getitem__, order))
    found = rows[:]
    for row, place in zip(rows, order, strict=True):
        found[place] = row
    return b"".join(found)


def _can_be_ranked(array: bytes, shape: tuple[int, ...]) -> bool:
    """Whether every list of candidates holds each only once, or none at all."""
    if len(shape) != 4:
        return False
    width, nothing = shape[-1], bytes([_NONE]) * shape[-1]
    rows = (array[at : at + width] for at in range(0, len(array), width))
    return all(row == nothing or (_NONE not in row and len(set(row)) == width) for row in rows)


def _ranked(array: bytes, shape: tuple[int, ...], back: bool) -> bytes:
    """Rows of candidates by the layer that they are for, each as its rank: in the row before, then in that before it,
    and so on, as far as one token made them. back: the candidates that have these ranks."""
    distances, width = shape[-2:]
    nothing, found = bytes([_NONE]) * width, bytearray()
    start = list(range(_NONE))
    before = start
    for number, at in enumerate(range(0, len(array), width)):
        row = array[at : at + width]
        if number % distances == 0:
            before = start
        if row == nothing:
            found += row
            continue
        left, named = before[:], []
        for value in row:
            rank = value if back else left.index(value)
            named.append(left.pop(rank))
            found.append(named[-1] if back else rank)
        before = named + left
    return bytes(found)


def _filters(context: int) -> list[dict[str, int]]:
    lc, lp, pb = _CONTEXTS[context]
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "lp": lp, "pb": pb}]


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
