"""Mutation of traces: what the rows, requests and counts of one may say, and what they must not.

About half of these leave the trace sound, so that what is accepted is attacked too.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np

from tests.attack import draw, tensors
from tests.attack.tensors import Array, Doc, DocOp

COUNTS = ("num_layers", "num_experts", "top_k", "num_requests", "num_tokens")
OPTIONAL = ("weights", "context_len", "forward_id", "token_ids", "embedding", "logits", "lookahead")


def sound(rng: Random, sizes: tuple[int, int, int, int], wide: bool = False, extra: str = "all") -> Doc:
    """A sound trace. sizes: tokens, layers, top-k, experts. wide: uint16 ids. extra: none, all, or lists."""
    num_tokens, num_layers, top_k, num_experts = sizes
    noise = np.random.default_rng(rng.getrandbits(32))
    kind = np.dtype("<u2" if wide or num_experts > 256 else "u1")
    order = np.argsort(noise.random((num_tokens, num_layers, num_experts)), axis=-1)
    experts = order[..., :top_k].astype(kind)
    weights = -np.sort(-noise.random(experts.shape), axis=-1).astype("<f2")
    padding = np.iinfo(kind).max
    if top_k > 1 and padding >= num_experts:
        experts[1, 0, -1], weights[1, 0, -1] = padding, 0
    starts = np.array([0, max(1, num_tokens // 2), num_tokens] if num_tokens > 1 else [0, 1], "<i8")
    num_requests = len(starts) - 1
    arrays: dict[str, Array] = {
        "experts": experts,
        "request_start": starts,
        "prompt_len": np.array([min(1, int(n)) for n in np.diff(starts)], "<i4"),
    }
    if extra != "none":
        forwards = np.concatenate([np.arange(n) for n in np.diff(starts)]).astype("<i8")
        arrays |= {"weights": weights, "context_len": np.arange(num_requests).astype("<i4"), "forward_id": forwards}
        arrays["token_ids"] = noise.integers(0, 1000, num_tokens).astype("<i4")
        arrays["embedding"] = noise.normal(size=(num_tokens, 3)).astype("<f2")
        distances = min(2, num_layers)
        past = np.arange(num_layers)[:, None] + np.arange(1, distances + 1) >= num_layers
    if extra == "all":
        arrays["logits"] = noise.normal(size=(num_tokens, num_layers, num_experts)).astype("<f2")
        ahead = noise.normal(size=(num_tokens, num_layers, distances, num_experts)).astype("<f2")
        ahead[:, past] = np.nan
        arrays["lookahead"] = ahead
    if extra == "lists":
        listed = min(3, num_experts)
        small = np.dtype("u1" if num_experts < 256 else "<u2")
        ranks = np.argsort(noise.random((num_tokens, num_layers, distances, num_experts)), axis=-1)
        ids = ranks[..., :listed].astype(small)
        ids[:, past] = np.iinfo(small).max
        ids[0, 0, 0, -1] = np.iinfo(small).max
        arrays |= {"lookahead_ids": ids, "lookahead_scores": noise.integers(0, 256, ids.shape).astype("u1")}
    values = (num_layers, num_experts, top_k, num_requests, num_tokens)
    meta = {"format": "expertflow-trace", "format_version": "1"} | dict(zip(COUNTS, map(str, values), strict=True))
    meta |= {"model": "made-up", "source": "tests", "license": "CC0-1.0"}
    meta["request_labels"] = json.dumps([f"r{i}" for i in range(num_requests)])
    meta["moe_layer_ids"] = json.dumps(list(range(1, num_layers + 1)))
    meta["expert_bytes"] = json.dumps([100 * (1 + layer % 2) for layer in range(num_layers)])
    return Doc(meta, arrays)


def bases() -> list[Doc]:
    """Sound traces of every shape that the format tells apart; the same ones each time."""
    rng = Random(5)
    return [
        sound(rng, (6, 3, 2, 8)),
        sound(rng, (6, 3, 2, 8), extra="lists"),
        sound(rng, (5, 2, 4, 4), extra="none"),
        sound(rng, (1, 1, 1, 1)),
        sound(rng, (4, 1, 3, 255), extra="lists"),
        sound(rng, (4, 2, 2, 256), extra="none"),
        sound(rng, (4, 2, 2, 300), wide=True, extra="lists"),
        sound(rng, (3, 2, 40, 64), extra="none"),
        sound(rng, (40, 2, 2, 16)),
    ]


# -- changes that keep a sound trace sound -------------------------------------------------------------------


def permute_row(rng: Random, doc: Doc) -> None:
    """The experts of a row in another order, each with its weight; padding may come first."""
    for name in ("experts", "lookahead_ids"):
        if name in doc.tensors:
            _turn(rng, doc, name, ("weights",) if name == "experts" else ("lookahead_scores",))


def _turn(rng: Random, doc: Doc, name: str, beside: tuple[str, ...]) -> None:
    array = doc.tensors[name].copy()
    if not array.size or array.ndim < 2:
        return
    row = rng.randrange(array.size // array.shape[-1])
    order = list(range(array.shape[-1]))
    rng.shuffle(order)
    for other in (name, *beside):
        if other in doc.tensors and doc.tensors[other].shape == array.shape:
            doc.tensors[other] = doc.tensors[other].copy()
            flat = doc.tensors[other].reshape(-1, array.shape[-1])
            flat[row] = flat[row][order]


def pad_row(rng: Random, doc: Doc) -> None:
    """A row has fewer experts; its weights go with them, or one stays."""
    experts = doc.tensors.get("experts")
    if experts is None or not experts.size or experts.ndim != 3 or experts.dtype.kind != "u":
        return
    experts = doc.tensors["experts"] = experts.copy()
    row, width = rng.randrange(experts.size // experts.shape[-1]), experts.shape[-1]
    first = rng.choice((width - 1, width - 1, max(1, width - 2), 0))
    experts.reshape(-1, width)[row, first:] = np.iinfo(experts.dtype).max
    weights = doc.tensors.get("weights")
    if weights is not None and weights.shape == experts.shape and rng.random() < 0.8:
        weights = doc.tensors["weights"] = weights.copy()
        weights.reshape(-1, width)[row, first:] = rng.choice((0.0, 0.0, -0.0))


def drop_optional(rng: Random, doc: Doc) -> None:
    """Some arrays that a trace need not have are left out."""
    for name in rng.sample(OPTIONAL, rng.randrange(1, 5)):
        doc.tensors.pop(name, None)
    if rng.random() < 0.3:
        doc.tensors.pop("lookahead_ids", None)
        doc.tensors.pop("lookahead_scores", None)


def drop_lists(rng: Random, doc: Doc) -> None:
    """Labels or layers are not given."""
    doc.meta.pop(rng.choice(("request_labels", "moe_layer_ids", "expert_bytes")), None)


def retell(rng: Random, doc: Doc) -> None:
    """Model, source or licence in other words."""
    doc.meta[rng.choice(("model", "source", "license"))] = rng.choice(("x", "α β", "gpt-oss-20b", draw.text(rng)))


def split_again(rng: Random, doc: Doc) -> None:
    """The requests end elsewhere, and all that depends on it agrees."""
    experts = doc.tensors.get("experts")
    if experts is None or not experts.ndim or not len(experts):
        return
    size = len(experts)
    cuts = sorted(rng.sample(range(1, size), rng.randrange(min(4, size)))) if size > 1 else []
    starts = np.array([0, *cuts, size], "<i8")
    doc.tensors["request_start"] = starts
    doc.tensors["prompt_len"] = np.array([rng.randint(0, int(n)) for n in np.diff(starts)], "<i4")
    if "context_len" in doc.tensors:
        doc.tensors["context_len"] = np.array([rng.randrange(1 << 20) for _ in starts[1:]], "<i4")
    if "forward_id" in doc.tensors:
        doc.tensors["forward_id"] = np.sort([rng.randrange(9) for _ in range(size)]).astype("<i8")
    doc.meta["num_requests"] = str(len(starts) - 1)
    doc.meta.pop("request_labels", None)


def fewer_rows(rng: Random, doc: Doc) -> None:
    """The last rows are missing, everywhere."""
    starts = doc.tensors.get("request_start")
    if starts is None or starts.shape != (3,) or not 0 < starts[1] < starts[2] <= 1000:
        return
    size = int(starts[1])
    for name, array in doc.tensors.items():
        if name not in ("request_start", "prompt_len", "context_len"):
            doc.tensors[name] = array[:size]
        elif name != "request_start":
            doc.tensors[name] = array[:1]
    doc.tensors["request_start"] = starts[:2]
    doc.meta |= {"num_tokens": str(size), "num_requests": "1"}
    doc.meta.pop("request_labels", None)


def more_experts(rng: Random, doc: Doc) -> None:
    """The model has more experts than the rows use; what lists all of them is left out, or not."""
    doc.meta["num_experts"] = str(rng.choice((9, 16, 200, 254, 255, 256, 257, 4000, 65_534, 65_535, 65_536)))
    if rng.random() < 0.8:
        doc.tensors.pop("logits", None)
        doc.tensors.pop("lookahead", None)


def other_values(rng: Random, doc: Doc) -> None:
    """Values of floats and numbers that may be anything sound."""
    for name in ("weights", "embedding", "logits", "token_ids", "lookahead_scores"):
        array = doc.tensors.get(name)
        if array is not None and array.dtype.kind == "f" and name != "weights":
            doc.tensors[name] = tensors.put(rng, array, rng.choice((0.0, -1.5, 65_504.0, -65_504.0, 6e-8)))
        elif array is not None and name != "weights":
            doc.tensors[name] = tensors.put(rng, array, rng.choice((0, 1, 255, 2**31 - 1)))


# -- changes that break one ----------------------------------------------------------------------------------


def wrong_id(rng: Random, doc: Doc) -> None:
    """An expert that is not there, is there already, or is padding before one."""
    name = "lookahead_ids" if "lookahead_ids" in doc.tensors and rng.random() < 0.4 else "experts"
    array = doc.tensors.get(name)
    if array is None or not array.size or array.ndim < 2 or array.dtype.kind not in "iu":
        return
    array = doc.tensors[name] = array.copy()
    flat, width = array.reshape(-1, array.shape[-1]), array.shape[-1]
    row, column = rng.randrange(len(flat)), rng.randrange(width)
    count = doc.meta.get("num_experts", "8")
    limit = int(count) if count.isdecimal() and len(count) < 9 else 8
    other = int(flat[row, rng.randrange(width)])
    highest = int(np.iinfo(array.dtype).max)
    drawn = rng.choice((limit - 1, limit, limit + 1, other, other, highest, highest - 1, 0))
    flat[row, column] = min(max(drawn, 0), highest)


def wrong_request(rng: Random, doc: Doc) -> None:
    """Starts that fall, repeat or end elsewhere; prompts and contexts that are too long or negative."""
    name = rng.choice(("request_start", "request_start", "prompt_len", "prompt_len", "context_len"))
    if (array := doc.tensors.get(name)) is not None and array.size and array.dtype.kind in "iu":
        near = int(array.reshape(-1)[rng.randrange(array.size)])
        doc.tensors[name] = tensors.put(rng, array, draw.whole(rng, near))


def wrong_forward(rng: Random, doc: Doc) -> None:
    """Forwards go back, or are negative."""
    for name in ("forward_id", "token_ids"):
        if (array := doc.tensors.get(name)) is not None and array.dtype.kind in "iu" and rng.random() < 0.7:
            doc.tensors[name] = tensors.put(rng, array, draw.whole(rng, 1))


def wrong_value(rng: Random, doc: Doc) -> None:
    """A weight, logit or look-ahead that is negative, not finite, or past the last layer."""
    names = [name for name in ("weights", "weights", "embedding", "logits", "lookahead") if name in doc.tensors]
    if names:
        name = rng.choice(names)
        doc.tensors[name] = tensors.put(rng, doc.tensors[name], draw.real(rng))


def wrong_count(rng: Random, doc: Doc) -> None:
    """A number of the header, or the format, is another, or written in another way."""
    key = rng.choice((*COUNTS, "format", "format_version"))
    value = doc.meta.get(key, "1")
    changed: list[Any] = [value + " ", "0" + value, "+" + value, "-" + value, value + ".0", "٣", "", "1" * 16, "0"]
    doc.meta[key] = rng.choice((*changed, str(draw.whole(rng, 2)), draw.text(rng)))


def other_list(rng: Random, doc: Doc) -> None:
    """Labels and layers: too few, of another type, not rising, no list, nested too deeply."""
    key = rng.choice(("request_labels", "moe_layer_ids"))
    doc.meta[key] = rng.choice(
        (draw.literal(rng), "[0,1,2]", "[1,5,9]", '["a","b"]', "[3,2,1]", "[1.0,2,3]", "[true,2,3]", '["\\ud800","b"]')
    )


def other_sizes(rng: Random, doc: Doc) -> None:
    """Sizes of experts: of another shape, none at all, no whole numbers, of a layer's experts one by one."""
    one = rng.choice(("0", "-1", "1.0", "true", "null", '"9"', "10000000000000", "10000000000001", "1e3", "7"))
    told = (doc.meta.get(key, "1")[:4] for key in ("num_layers", "num_experts"))
    # Another step may have made anything of them.
    layers, experts = (int(text) if text.isascii() and text.isdecimal() else 1 for text in told)
    every = f"[{','.join([one] * min(experts, 300))}]"
    rows = rng.choice((one, every, f"[{one},2]", "[]"))
    whole = f"[{','.join([rows] * min(layers, 50))}]"
    doc.meta["expert_bytes"] = rng.choice((one, rows, whole, whole[:-1], f"[{whole}]", draw.literal(rng)))


BENIGN: tuple[DocOp, ...] = (
    permute_row,
    pad_row,
    drop_optional,
    drop_lists,
    retell,
    split_again,
    fewer_rows,
    more_experts,
    other_values,
    tensors.reorder,
    tensors.add_meta,
)
HOSTILE: tuple[DocOp, ...] = (
    *(wrong_id,) * 3,
    wrong_request,
    wrong_forward,
    *(wrong_value,) * 2,
    wrong_count,
    other_list,
    other_sizes,
    tensors.cast,
    tensors.reshape,
    tensors.remove,
    tensors.add,
    tensors.rename,
    tensors.change_meta,
    tensors.drop_meta,
    tensors.change_entry,
    tensors.fill,
)
OPS: tuple[DocOp, ...] = (*BENIGN * 2, *HOSTILE)
