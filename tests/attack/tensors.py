"""Mutation of safetensors: values and shapes, then the header's table, then bytes.

A file is parsed and written here by hand, so that it can say what no library would write.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.attack import draw, raw, trees

Array = npt.NDArray[Any]

CODES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
NAMES = {np.dtype(code): name for name, code in CODES.items()}
_OTHER_TYPES = ("BF16", "F8_E4M3", "f16", "", "C64", "U128", "object")


@dataclass
class Doc:
    """A file's metadata and tensors, in the order in which they are written."""

    meta: dict[str, str]
    tensors: dict[str, Array]

    def copy(self) -> Doc:
        """The same arrays under tables of its own: an operation copies an array before it writes to it."""
        return Doc(dict(self.meta), dict(self.tensors))


def parse(content: bytes) -> Doc:
    """A sound file; the mutants begin with it."""
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    meta = table.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(content[end + first : end + last], CODES[entry["dtype"]]).reshape(entry["shape"])
    return Doc(meta, tensors)


def table_of(doc: Doc) -> tuple[dict[str, Any], bytes]:
    """The header's table and the data behind it."""
    table: dict[str, Any] = {"__metadata__": doc.meta} if doc.meta else {}
    pieces, offset = [], 0
    for name, array in doc.tensors.items():
        piece = array.tobytes()
        table[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(piece)],
        }
        offset += len(piece)
        pieces.append(piece)
    return table, b"".join(pieces)


def pack(header: bytes, data: bytes) -> bytes:
    """Length, header padded to eight bytes, data."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def write(doc: Doc) -> bytes:
    """The bytes of a file that says what it holds."""
    table, data = table_of(doc)
    return pack(json.dumps(table).encode("utf-8", "surrogatepass"), data)


# -- values and shapes of any tensors ------------------------------------------------------------------------


def some(rng: Random, doc: Doc) -> str:
    """The name of a tensor; "" if there is none."""
    return rng.choice(list(doc.tensors)) if doc.tensors else ""


def put(rng: Random, array: Array, value: float | int) -> Array:
    """A copy with one entry set to what of `value` the type holds."""
    array = array.copy()
    if array.size and array.dtype.kind in "biuf":
        if array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            value = 0 if value != value else max(min(value, int(limits.max)), int(limits.min))
        elif array.dtype.kind == "f" and isinstance(value, int):
            value = float(max(min(value, 10**300), -(10**300)))
        with np.errstate(over="ignore"):
            array.reshape(-1)[rng.randrange(array.size)] = value
    return array


def change_entry(rng: Random, doc: Doc) -> None:
    """One value: not finite, negative, zero, huge; or near what it was."""
    if name := some(rng, doc):
        array = doc.tensors[name]
        whole = draw.whole(rng, int(array.reshape(-1)[0]) if array.size and array.dtype.kind in "iu" else 0)
        doc.tensors[name] = put(rng, array, draw.real(rng) if array.dtype.kind == "f" else whole)


def fill(rng: Random, doc: Doc) -> None:
    """All values of a tensor become one."""
    if name := some(rng, doc):
        one = put(rng, doc.tensors[name].reshape(-1)[:1], draw.real(rng) if rng.random() < 0.5 else 0)
        doc.tensors[name] = np.broadcast_to(one[0], doc.tensors[name].shape).copy() if one.size else one


def agree_on_size(rng: Random, doc: Doc) -> None:
    """Two tensors of whole numbers, counts where there are any, say the same large number throughout."""
    whole = [name for name, array in doc.tensors.items() if array.dtype.kind in "iu"]
    counts = [name for name in whole if "count" in name] or whole
    value = rng.choice((3, 1_000, 100_000, 10**8, 10**11, 10**15))
    for name in rng.sample(counts, min(2, len(counts))):
        array = doc.tensors[name]
        doc.tensors[name] = np.full(array.shape, min(value, int(np.iinfo(array.dtype).max)), array.dtype)


def shuffle(rng: Random, doc: Doc) -> None:
    """The entries of a tensor change places."""
    if name := some(rng, doc):
        array = doc.tensors[name]
        order = list(range(array.size))
        rng.shuffle(order)
        doc.tensors[name] = array.reshape(-1)[order].reshape(array.shape)


def cast(rng: Random, doc: Doc) -> None:
    """A tensor in another type."""
    if (name := some(rng, doc)) and doc.tensors[name].dtype.kind in "biufc":
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            doc.tensors[name] = doc.tensors[name].astype(CODES[rng.choice(list(CODES))])


def reshape(rng: Random, doc: Doc) -> None:
    """A tensor flat, turned, cut, with a dimension more, or grown."""
    if not (name := some(rng, doc)):
        return
    array = doc.tensors[name]
    axis = rng.randrange(array.ndim) if array.ndim else 0
    kind = rng.randrange(6)
    if kind == 0:
        doc.tensors[name] = array.reshape(-1)
    elif kind == 1:
        doc.tensors[name] = np.ascontiguousarray(array.T)
    elif kind == 2:
        doc.tensors[name] = array[..., None]
    elif kind == 3 and array.ndim:
        doc.tensors[name] = np.ascontiguousarray(np.take(array, range(array.shape[axis] - 1), axis))
    elif kind == 4 and array.ndim and array.size < 1 << 16:
        doc.tensors[name] = np.concatenate([array, array], axis)
    elif array.ndim:
        doc.tensors[name] = np.take(array, [0] if kind == 5 and array.shape[axis] else [], axis)


def remove(rng: Random, doc: Doc) -> None:
    """A tensor is missing."""
    if name := some(rng, doc):
        del doc.tensors[name]


def add(rng: Random, doc: Doc) -> None:
    """A tensor that nobody asked for, or one under a second name."""
    name = rng.choice(("extra", "x" * 500, "a\nb", "__metadata", "", "é", some(rng, doc) + "2"))
    doc.tensors[name] = np.arange(rng.randrange(4), dtype="<f4")


def rename(rng: Random, doc: Doc) -> None:
    """A tensor has another's name, or none that is known."""
    if name := some(rng, doc):
        array = doc.tensors.pop(name)
        doc.tensors[rng.choice((name + "_", name[:-1], name.upper(), some(rng, doc) or "x"))] = array


def reorder(rng: Random, doc: Doc) -> None:
    """The tensors stand in another order in the file; nothing else changes."""
    names = list(doc.tensors)
    rng.shuffle(names)
    doc.tensors = {name: doc.tensors[name] for name in names}


def change_meta(rng: Random, doc: Doc) -> None:
    """A value of the metadata."""
    if doc.meta:
        key = rng.choice(list(doc.meta))
        value = doc.meta[key]
        if value[:1] in ("[", "{") and rng.random() < 0.7:
            doc.meta[key] = trees.mutate_text(rng, value)
        else:
            near = str(int(value) + rng.choice((-1, 1))) if value.isdecimal() and len(value) < 16 else value + "0"
            doc.meta[key] = rng.choice((near, near, draw.text(rng), draw.literal(rng), str(draw.whole(rng))))


def drop_meta(rng: Random, doc: Doc) -> None:
    """A key of the metadata is missing."""
    if doc.meta:
        del doc.meta[rng.choice(list(doc.meta))]


def add_meta(rng: Random, doc: Doc) -> None:
    """A key of the metadata that nobody asked for."""
    doc.meta[rng.choice(("note", "format2", "é", "", "x" * 300))] = draw.text(rng)


DocOp = Callable[[Random, Doc], None]
OPS: tuple[DocOp, ...] = (
    *(change_entry,) * 5,
    fill,
    agree_on_size,
    shuffle,
    cast,
    reshape,
    reshape,
    remove,
    add,
    rename,
    reorder,
    change_meta,
    change_meta,
    drop_meta,
    add_meta,
)


# -- the header's table, and the header as bytes -------------------------------------------------------------


def lie_about_offsets(rng: Random, table: dict[str, Any]) -> None:
    """A tensor begins or ends elsewhere: overlaps, holes, past the end; its shape agrees or not."""
    entries = [entry for name, entry in table.items() if name != "__metadata__"]
    if not entries:
        return
    entry = rng.choice(entries)
    offsets, by = entry["data_offsets"], rng.choice((-8, -2, -1, 1, 2, 8, 4096, 1 << 40, 1 << 62))
    if rng.random() < 0.4:
        entry["data_offsets"] = [offsets[0] + by, offsets[1] + by]
    else:
        offsets[rng.randrange(2)] += by
    if rng.random() < 0.2:
        entry["data_offsets"] = list(rng.choice(entries)["data_offsets"])


def lie_about_shape(rng: Random, table: dict[str, Any]) -> None:
    """A tensor's shape or type is another, with its bytes as they were, or agreeing by product only."""
    entries = [entry for name, entry in table.items() if name != "__metadata__"]
    if not entries:
        return
    entry = rng.choice(entries)
    kind = rng.randrange(4)
    if kind == 0:
        entry["dtype"] = rng.choice((*CODES, *_OTHER_TYPES))
    elif kind == 1 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = draw.whole(rng, entry["shape"][0])
    elif kind == 2:
        entry["shape"] = entry["shape"] + [rng.choice((0, 1, 2))] * rng.choice((1, 2, 9, 40))
    else:
        entry["shape"] = entry["shape"][::-1]


def mutate_table(rng: Random, doc: Doc) -> bytes:
    """The file with a header that lies: about places, about shapes, or as JSON."""
    table, data = table_of(doc)
    kind = rng.random()
    if kind < 0.35:
        # Tables of their own: the metadata is the document's.
        lie_about_offsets(rng, table)
    elif kind < 0.6:
        lie_about_shape(rng, table)
    else:
        text = trees.write(trees.mutate(rng, trees.parse(json.dumps(table))))
        return pack(text.encode("utf-8", "surrogatepass"), data)
    return pack(json.dumps(table).encode("utf-8", "surrogatepass"), data)


def mutate_header(rng: Random, content: bytes) -> bytes:
    """The header as bytes: its length lies, it is text in another encoding, it has blanks."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 16 or length > len(content):
        return raw.mutate(rng, content)
    kind = rng.randrange(6)
    if kind < 3:
        lie = rng.choice((0, 1, 2, 8, length - 1, length + 1, length - 8, length + 8, len(content) - 8, len(content)))
        lie = rng.choice((lie, lie, lie, 100_000_000, 100_000_001, 1 << 31, 1 << 63, (1 << 64) - 1))
        return (lie % (1 << 64)).to_bytes(8, "little") + content[8:]
    header, data = content[8 : 8 + length], content[8 + length :]
    if kind == 3:
        header = trees.space(rng, header.decode("utf-8", "replace")).encode()
    elif kind == 4:
        header = trees.reencode(rng, header.decode("utf-8", "replace"))
    else:
        header = raw.mutate(rng, header)
    return pack(header, data) if rng.random() < 0.8 else len(header).to_bytes(8, "little") + header + data
