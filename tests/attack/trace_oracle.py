"""A second reader of traces, written from the description of the format alone: slow, simple, one list at a time.

It shares no code with `traces`, so that a trace which only one of the two takes is a fault of one of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

CODES = {
    "BOOL": ("?", 1),
    "U8": ("u1", 1),
    "I8": ("i1", 1),
    "U16": ("<u2", 2),
    "I16": ("<i2", 2),
    "F16": ("<f2", 2),
    "U32": ("<u4", 4),
    "I32": ("<i4", 4),
    "F32": ("<f4", 4),
    "U64": ("<u8", 8),
    "I64": ("<i8", 8),
    "F64": ("<f8", 8),
}
ARRAYS = {
    "experts": ("T L K", "U8 U16"),
    "weights": ("T L K", "F16"),
    "request_start": ("S", "I64"),
    "prompt_len": ("R", "I32"),
    "context_len": ("R", "I32"),
    "forward_id": ("T", "I64"),
    "token_ids": ("T", "I32"),
    "embedding": ("T d", "F16"),
    "logits": ("T L E", "F16"),
    "lookahead": ("T L D E", "F16"),
    "lookahead_ids": ("T L D M", "U8 U16"),
    "lookahead_scores": ("T L D M", "U8"),
}
Tensor = tuple[str, tuple[int, ...], bytes]
"""Type, shape, bytes."""


class Unsound(Exception):
    """What is wrong with a file."""


def need(sound: bool, problem: str) -> None:
    """Unsound unless so."""
    if not sound:
        raise Unsound(problem)


# -- the container -------------------------------------------------------------------------------------------


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    need(len({key for key, _ in pairs}) == len(pairs), "a key comes twice")
    return dict(pairs)


def _constant(text: str) -> None:
    raise Unsound(f"{text} is no JSON")


def container(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Unsound where it is none."""
    need(len(content) >= 16, "shorter than any file")
    length = int.from_bytes(content[:8], "little")
    need(length <= min(len(content) - 8, 100_000_000), "the header is longer than the file")
    need(content[8:9] == b"{", "the header does not begin as a table")
    try:
        text = content[8 : 8 + length].decode("utf-8")
        table = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"the header is no JSON: {error}") from None
    need(isinstance(table, dict), "the header is no table")
    meta = table.pop("__metadata__", {})
    need(isinstance(meta, dict) and all(isinstance(value, str) for value in meta.values()), "metadata is no text")
    strings = [*table, *meta, *meta.values()]
    need(all(ord(c) < 0xD800 or ord(c) > 0xDFFF for text in strings for c in text), "a broken character")
    tensors, reached = {}, 0
    for name, entry in table.items():
        need(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} == set(entry), f"{name} has other fields")
    for name, entry in sorted(table.items(), key=lambda item: _places(item[1])):
        kind, shape, (first, last) = entry["dtype"], entry["shape"], _places(entry)
        need(isinstance(kind, str) and kind in CODES, f"{name} has an unknown type")
        need(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape), f"{name} has no shape")
        need(len(shape) <= 8, f"{name} has more than eight dimensions")
        need(first == reached, f"{name} overlaps or leaves a hole")
        need(last - first == math.prod(shape) * CODES[kind][1], f"{name} is not as long as its shape")
        need(last <= len(content) - 8 - length, f"{name} ends past the end")
        tensors[name] = (kind, tuple(shape), content[8 + length + first : 8 + length + last])
        reached = last
    need(reached == len(content) - 8 - length, "bytes after the last tensor")
    return meta, tensors


def _places(entry: dict[str, Any]) -> tuple[int, int]:
    places = entry["data_offsets"]
    need(isinstance(places, list) and len(places) == 2, "data_offsets is no pair")
    need(all(type(n) is int and n >= 0 for n in places), "data_offsets is no pair of sizes")
    return places[0], places[1]


def values(tensor: Tensor) -> list[Any]:
    """The entries of a tensor, nested as its shape says."""
    kind, shape, data = tensor
    found: list[Any] = np.frombuffer(data, CODES[kind][0]).reshape(shape).tolist()
    return found


# -- the trace -----------------------------------------------------------------------------------------------


def check(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a sound trace. Unsound otherwise, with the first thing that is wrong."""
    meta, tensors = container(content)
    sizes = header(meta)
    layout(sizes, tensors)
    padding = 255 if tensors["experts"][0] == "U8" else 65_535
    need(sizes["E"] <= padding + 1, "ids do not fit")
    requests(sizes, tensors)
    experts(sizes, tensors, padding)
    lookahead(sizes, tensors)
    for name in ("embedding", "logits"):
        if name in tensors:
            need(all(map(math.isfinite, _flat(tensors[name]))), f"{name} is not finite")
    for name in ("token_ids", "forward_id"):
        if name in tensors:
            need(min(values(tensors[name])) >= 0, f"{name} is negative")
    return meta, tensors


def _flat(tensor: Tensor) -> list[Any]:
    found: list[Any] = np.frombuffer(tensor[2], CODES[tensor[0]][0]).tolist()
    return found


def header(meta: dict[str, str]) -> dict[str, int]:
    """T, L, K, E, R of the header."""
    need(meta.get("format") == "expertflow-trace" and meta.get("format_version") == "1", "another format")
    need(all(meta.get(key, "").strip() for key in ("model", "source", "license")), "a text is missing")
    sizes = {}
    names = (("L", "num_layers"), ("E", "num_experts"), ("K", "top_k"), ("R", "num_requests"), ("T", "num_tokens"))
    for letter, key in names:
        text = meta.get(key, "")
        need(0 < len(text) < 16 and set(text) <= set("0123456789"), f"{key} is no whole number")
        sizes[letter] = int(text)
        need(sizes[letter] > 0, f"{key} is 0")
    need(sizes["K"] <= sizes["E"] <= 65_535, "too many experts, or fewer than are chosen")
    for key, kind, count in (("request_labels", str, sizes["R"]), ("moe_layer_ids", int, sizes["L"])):
        if key in meta:
            try:
                found = json.loads(meta[key])
            except (ValueError, RecursionError):
                raise Unsound(f"{key} is no JSON") from None
            need(isinstance(found, list) and len(found) == count, f"{key} is no list of {count}")
            need(all(type(item) is kind for item in found), f"{key} holds other types")
            if kind is int:
                need(found[0] >= 0 and all(a < b for a, b in pairwise(found)), f"{key} does not rise")
            else:
                text = "".join(found)
                need(all(ord(c) < 0xD800 or ord(c) > 0xDFFF for c in text), f"{key} has a broken character")
    if "expert_bytes" in meta:
        expert_bytes(meta["expert_bytes"], sizes)
    return sizes


def expert_bytes(text: str, sizes: dict[str, int]) -> None:
    """One size, one a layer, or a list of one an expert in place of a layer's."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Unsound("expert_bytes is no JSON") from None
    if isinstance(found, list):
        need(len(found) == sizes["L"], "expert_bytes is not of as many layers")
        need(all(len(own) == sizes["E"] for own in found if isinstance(own, list)), "expert_bytes lacks experts")
    layers = found if isinstance(found, list) else [found]
    each = [size for own in layers for size in (own if isinstance(own, list) else [own])]
    need(all(type(size) is int and 1 <= size <= 10**13 for size in each), "expert_bytes holds what is no size")


def each_size(meta: dict[str, str]) -> list[list[int]]:
    """Bytes by layer and expert of a sound header that gives them."""
    layers, experts = int(meta["num_layers"]), int(meta["num_experts"])
    found = json.loads(meta["expert_bytes"])
    rows = found if isinstance(found, list) else [found] * layers
    return [own if isinstance(own, list) else [own] * experts for own in rows]


def layout(sizes: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Names, types and shapes."""
    need({"experts", "request_start", "prompt_len"} <= set(tensors) <= set(ARRAYS), "arrays missing or unknown")
    known = {**sizes, "S": sizes["R"] + 1}
    for name, (letters, kinds) in ARRAYS.items():
        if name in tensors:
            kind, shape, _ = tensors[name]
            need(kind in kinds.split(), f"{name} is {kind}")
            need(len(shape) == len(letters.split()) and 0 not in shape, f"{name} has the shape {shape}")
            for letter, size in zip(letters.split(), shape, strict=True):
                need(known.setdefault(letter, size) == size, f"{name} has {letter} {size}")
    lists = ("lookahead_ids" in tensors, "lookahead_scores" in tensors)
    need(lists[0] == lists[1] and not (lists[0] and "lookahead" in tensors), "two or half forms of look-ahead")
    need(known.get("D", 1) <= sizes["L"] and known.get("M", 1) <= sizes["E"], "looks too far, or lists too many")


def requests(sizes: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Where requests begin, how long prompts are, and in which order forwards ran."""
    starts = values(tensors["request_start"])
    need(starts[0] == 0 and starts[-1] == sizes["T"], "requests do not cover the rows")
    need(all(a < b for a, b in pairwise(starts)), "a request is empty")
    for prompt, (first, last) in zip(values(tensors["prompt_len"]), pairwise(starts), strict=True):
        need(0 <= prompt <= last - first, "a prompt is longer than its request")
    if "context_len" in tensors:
        need(min(values(tensors["context_len"])) >= 0, "a context is negative")
    if "forward_id" in tensors:
        forwards = values(tensors["forward_id"])
        for first, last in pairwise(starts):
            need(all(a <= b for a, b in pairwise(forwards[first:last])), "a forward goes back")


def _rows(tensor: Tensor) -> Iterator[list[Any]]:
    flat, width = _flat(tensor), tensor[1][-1]
    return (flat[i : i + width] for i in range(0, len(flat), width))


def _chosen(row: list[int], padding: int, num_experts: int) -> int:
    """How many experts the row begins with; nothing but padding may follow."""
    count = row.index(padding) if padding in row else len(row)
    need(all(item == padding for item in row[count:]), "an expert after padding")
    need(len(set(row[:count])) == count, "an expert twice")
    need(all(item < num_experts for item in row[:count]), "an expert that is not there")
    return count


def experts(sizes: dict[str, int], tensors: dict[str, Tensor], padding: int) -> None:
    """Ids in range, once each, padding last; weights finite and 0 or more, 0 at padding."""
    # Where all values of the type are experts, none is padding.
    padding = padding if padding >= sizes["E"] else -1
    counts = []
    for row in _rows(tensors["experts"]):
        counts.append(_chosen(row, padding, sizes["E"]))
        need(counts[-1] > 0, "no expert")
    if "weights" in tensors:
        for count, row in zip(counts, _rows(tensors["weights"]), strict=True):
            need(all(0 <= weight < math.inf for weight in row), "a weight is negative or not finite")
            need(not any(row[count:]), "a weight where no expert is")


def lookahead(sizes: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Past the last layer nothing is foreseen: NaN, or padding; before it all is sound."""
    name = "lookahead" if "lookahead" in tensors else "lookahead_ids"
    if name not in tensors:
        return
    kind, (_, layers, distances, _), _ = tensors[name]
    padding = 255 if kind == "U8" else 65_535
    need(name == "lookahead" or padding >= sizes["E"], "no value is left for padding")
    places = [(layer, ahead) for layer in range(layers) for ahead in range(1, distances + 1)]
    for index, row in enumerate(_rows(tensors[name])):
        layer, ahead = places[index % len(places)]
        past = layer + ahead >= layers
        if name == "lookahead":
            need(all(map(math.isnan if past else math.isfinite, row)), "scores where there is no layer, or none")
        else:
            need(_chosen(row, padding, sizes["E"]) == 0 or not past, "candidates where there is no layer")
