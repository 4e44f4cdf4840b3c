"""Mutation of GGUF headers: keys, tensors, and the numbers that say how long all of it is."""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.attack import draw

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KINDS = (0, 1, 2, 6, 8, 10, 11, 12, 13, 14, 16, 19, 20, 23, 28, 30, 39, 4, 5, 31, 42, 255, (1 << 32) - 1)
"""Types of tensors, the last of which are none."""
_BYTES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 6: (32, 22), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144)}
_BYTES |= {13: (256, 176), 14: (256, 210), 16: (256, 66), 19: (256, 50), 20: (32, 18), 23: (256, 136), 28: (1, 8)}
_BYTES |= {30: (1, 2), 39: (32, 17)}
_EDGES = (0, 1, 2, 3, 7, 255, 256, 257, 4096, 65_535, 65_536, 1 << 20, 1 << 31, 2**32 - 1, 1 << 40, 1 << 62, 1 << 63)
_WORDS = ("ffn_up_exps", "ffn_down_exps", "ffn_gate_exps", "ffn_gate_up_exps", "attn_k", "ffn_down", "nextn.eh_proj")
_WORDS += ("ssm_out", "indexer.attn_k", "attn_kv_a_mqa", "ffn_down.0", "ffn_norm_exps", "ffn_down_shexp")


@dataclass
class Doc:
    """keys: name, type and value; of an array (type of its values, values). tensors: name, shape, type."""

    version: int
    keys: list[list[Any]]
    tensors: list[list[Any]]
    tail: bytes = b""

    def copy(self) -> Doc:
        return copy.deepcopy(self)


class _Places:
    """Bytes, and where the numbers stand that say how much follows, as (place, bytes)."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.places: list[tuple[int, int]] = []

    def number(self, code: str, value: float) -> None:
        if code in "fd":
            self.content += struct.pack("<" + code, max(min(value, 1e30), -1e30) if value == value else value)
        else:
            size = struct.calcsize(code)
            self.content += (int(value) % (1 << 8 * size)).to_bytes(size, "little")

    def mark(self, code: str, value: int) -> None:
        self.places.append((len(self.content), struct.calcsize(code)))
        self.number(code, value)

    def text(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        self.mark("Q", len(raw))
        self.content += raw


def parse(content: bytes) -> Doc:
    """A sound file."""
    at = 8

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == _ARRAY:
            inner, count = take("I"), take("Q")
            return inner, [value(inner) for _ in range(count)]
        return text() if kind == _STRING else take(_CODES[kind])

    num_tensors, num_keys = take("Q"), take("Q")
    keys = []
    for _ in range(num_keys):
        name, kind = text(), take("I")
        keys.append([name, kind, value(kind)])
    tensors = []
    for _ in range(num_tensors):
        name, dims = text(), [take("Q") for _ in range(take("I"))]
        tensors.append([name, dims, take("I")])
        take("Q")
    return Doc(int.from_bytes(content[4:8], "little"), keys, tensors, content[at:])


def _built(doc: Doc, magic: bytes = b"GGUF") -> _Places:
    made = _Places()
    made.content += magic
    made.mark("I", doc.version)
    made.mark("Q", len(doc.tensors))
    made.mark("Q", len(doc.keys))
    for name, kind, value in doc.keys:
        made.text(name)
        made.mark("I", kind)
        _add_value(made, kind, value)
    offset = 0
    for name, dims, kind in doc.tensors:
        made.text(name)
        made.mark("I", len(dims))
        for size in dims:
            made.mark("Q", size)
        made.mark("I", kind)
        made.mark("Q", offset)
        block, size = _BYTES.get(kind, (1, 1))
        weights = 1
        for width in dims:
            weights *= width
        offset += -(-(weights // block * size) // 32) * 32
    made.content += doc.tail
    return made


def _add_value(made: _Places, kind: int, value: Any) -> None:
    if kind == _STRING:
        made.text(value)
    elif kind == _ARRAY and isinstance(value, list | tuple):
        made.mark("I", value[0])
        made.mark("Q", len(value[1]))
        for one in value[1]:
            _add_value(made, value[0], one)
    else:
        # A list whose elements were said to be lists, and are numbers, among them.
        made.number(_CODES.get(kind, "I"), value)


def write(doc: Doc) -> bytes:
    """The bytes, with the places of the tensors that follow from their sizes."""
    return bytes(_built(doc).content)


# -- changes -------------------------------------------------------------------------------------------------


def change_value(rng: Random, doc: Doc) -> None:
    """A key has another value, mostly at an edge."""
    if not doc.keys:
        return
    entry = rng.choice(doc.keys)
    if entry[1] == _ARRAY:
        values = entry[2][1]
        if values and rng.random() < 0.7:
            values[rng.randrange(len(values))] = _other(rng, entry[2][0])
        else:
            entry[2] = (entry[2][0], values * rng.choice((0, 2, 400)))
    else:
        entry[2] = _other(rng, entry[1]) if rng.random() < 0.7 else _near(rng, entry[1], entry[2])


def _other(rng: Random, kind: int) -> Any:
    if kind == _STRING:
        return rng.choice(("", "llama", "llama4", "model", "adapter", "x" * 5000, "a\nb", "é", b"\xff\xfe", "{arch}"))
    if kind in (6, 12):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    return rng.choice(_EDGES)


def _near(rng: Random, kind: int, value: Any) -> Any:
    return value if kind in (_STRING, _ARRAY, 6, 12) else draw.whole(rng, value)


def change_type(rng: Random, doc: Doc) -> None:
    """A key has another type: its value in another width, a text, an array of itself."""
    if not doc.keys:
        return
    entry = rng.choice(doc.keys)
    kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 255))
    number = entry[2] if isinstance(entry[2], int) else 3
    if kind == _STRING:
        entry[1:] = [kind, str(number)]
    elif kind == _ARRAY:
        inner = rng.choice((0, 4, 5, 7, 10, 8, 9))
        one = "a" if inner == _STRING else (4, [1, 2]) if inner == _ARRAY else number
        entry[1:] = [kind, (inner, [one] * rng.choice((0, 1, 3, 4, 48, 5000)))]
    else:
        entry[1:] = [kind, number]


def change_keys(rng: Random, doc: Doc) -> None:
    """A key is missing, comes twice, has another name, or is one of another model."""
    if not doc.keys:
        return
    kind, index = rng.randrange(5), rng.randrange(len(doc.keys))
    if kind == 0:
        del doc.keys[index]
    elif kind == 1:
        doc.keys.insert(rng.randrange(len(doc.keys) + 1), copy.deepcopy(doc.keys[index]))
    elif kind == 2:
        doc.keys[index][0] = rng.choice(("", "general.alignment", "split.count", "x" * 5000, "a\nb", b"\xff", "é"))
    elif kind == 3:
        rng.shuffle(doc.keys)
    else:
        arch = next((str(entry[2]) for entry in doc.keys if entry[0] == "general.architecture"), "x")
        name = rng.choice(
            (
                f"{arch}.nextn_predict_layers",
                f"{arch}.attention.sliding_window",
                f"{arch}.attention.sliding_window_pattern",
                f"{arch}.attention.key_length",
                f"{arch}.attention.kv_lora_rank",
                f"{arch}.full_attention_interval",
                "general.alignment",
                "general.type",
                "split.count",
            )
        )
        doc.keys.append([name, 4, rng.choice((0, 1, 2, 3, 32, 64, 128, 4096))])


def change_shape(rng: Random, doc: Doc) -> None:
    """A tensor has another shape."""
    if not doc.tensors:
        return
    dims = rng.choice(doc.tensors)[1]
    kind = rng.randrange(5)
    if kind == 0 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(_EDGES)
    elif kind == 1 and dims:
        dims[rng.randrange(len(dims))] = draw.whole(rng, rng.choice(dims)) % (1 << 64)
    elif kind == 2:
        dims.reverse()
    elif kind == 3:
        dims += [1] * rng.choice((1, 2, 3, 60))
    else:
        del dims[rng.randrange(len(dims) + 1) :]


def change_kind(rng: Random, doc: Doc) -> None:
    """A tensor, or each of the same name in all blocks, has another type."""
    if not doc.tensors:
        return
    name, _, _ = rng.choice(doc.tensors)
    kind, role = rng.choice(_KINDS), str(name).rsplit(".", 2)[-2:]
    for entry in doc.tensors:
        if entry[0] == name or (rng.random() < 0.5 and str(entry[0]).rsplit(".", 2)[-2:] == role):
            entry[2] = kind


def change_tensors(rng: Random, doc: Doc) -> None:
    """A tensor is missing, comes twice, has another name or place, or is of another block."""
    if not doc.tensors:
        return
    kind, index = rng.randrange(7), rng.randrange(len(doc.tensors))
    name = str(doc.tensors[index][0])
    if kind == 0:
        del doc.tensors[index]
    elif kind == 1:
        doc.tensors.insert(rng.randrange(len(doc.tensors) + 1), copy.deepcopy(doc.tensors[index]))
    elif kind == 2:
        pieces = name.split(".")
        if len(pieces) > 2:
            pieces[2] = rng.choice(_WORDS)
        doc.tensors[index][0] = ".".join(pieces)
    elif kind == 3:
        other = rng.choice(("0", "1", "7", "4095", "4096", "99999999999", "-1", "٣", ""))
        doc.tensors[index][0] = f"blk.{other}." + name.split(".", 2)[-1]
    elif kind == 4:
        rng.shuffle(doc.tensors)
    elif kind == 5:
        doc.tensors[index][0] = rng.choice(("", "x" * 200, "é", b"\xff", "output.weight", "token_embd.weight", "a\nb"))
    else:
        block = f"blk.{rng.randrange(4)}."
        doc.tensors = [entry for entry in doc.tensors if not str(entry[0]).startswith(block)]


OPS = (
    *(change_value,) * 3,
    change_type,
    *(change_keys,) * 2,
    *(change_shape,) * 2,
    *(change_kind,) * 3,
    *(change_tensors,) * 2,
)


# -- lies ----------------------------------------------------------------------------------------------------


def lie(rng: Random, doc: Doc) -> bytes:
    """Counts, lengths, sizes, types or places are others than those of what follows."""
    made = _built(doc, rng.choice((b"GGUF",) * 9 + (b"FUGG", b"GGML", b"lmgg", b"tjgg")))
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(made.places)
        before = int.from_bytes(made.content[at : at + size], "little")
        value = rng.choice((*_EDGES, before + 1, before - 1, before + 32, 2 * before, before << 16))
        made.content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(made.content)
