"""Importer of the router records of GPT-OSS-MoE-ExpertFingerprinting (Priyanshu & Vijay 2025): JSON, one request each.

A record is an object with `dataset`, `category`, two flags and `router_data`, a list of
`{"token_530": {"layer_0": {"selected_experts": […], "selected_probs": […]}, …}}`, one entry per generated token, best
expert first. Prompt tokens are not recorded. Files hold one object, a list of them, or (.jsonl) one a line; in a
folder, JSON files without `router_data` (the source's summaries) are passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from traces.container import fault
from traces.format import About
from traces.importers.common import (
    MAX_LAYERS,
    MAX_WEIGHT,
    ImportReport,
    Request,
    check_choice,
    files_of,
    tracked,
    write_requests,
)
from traces.importers.packed import source_json, source_lines, suffix_of
from traces.jsontext import parse_json, shown
from traces.limits import check_bytes

SPLITS = ("all", "train", "eval", "other")
SOURCE = "AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting @ 72b368f6, decode tokens only, batch 1, greedy"
_REMEDY = "give records of GPT-OSS-MoE-ExpertFingerprinting, unchanged"
_MOST_LABEL = 200
_ENTRY_BYTES = 64
"""What an expert of a token takes as Python objects and in arrays."""


def import_gpt_oss_json(
    source: str | Path,
    output: str | Path,
    progress: Progress | None = None,
    *,
    split: str = "all",
    keep_all: bool = False,
    context: bool = False,
    model: str = "gpt-oss-20b",
    num_experts: int = 32,
    license: str = "Apache-2.0",
) -> ImportReport:
    """Write the records of `source`, a file or a folder, as one trace. TraceError on anything malformed.

    split: train and eval pick the requests of `traces/data/gpt-oss-20b.split.json` by their hash and in its order,
    whatever their flags, and fail if one is missing: they rebuild the published pair. other: all that are in
    neither. keep_all: also requests that repeat themselves or did not finish. context: also record, as
    context_len, the position of each request's first token. Weights are the given probabilities in float16.
    """
    check_choice("split", split, SPLITS)
    skipped: Counter[str] = Counter()
    candidates = _candidates(source, progress, split in ("all", "other") and not keep_all, skipped)
    read = (_request(path, where, record, num_experts, context) for path, where, record in candidates)
    requests = _select(source, split, read, skipped)
    left_out = ", ".join(f"{count} {what}" for what, count in skipped.items())
    if not requests:
        raise fault(source, "source", "gives no request", f"left out: {left_out or 'nothing'}; see keep_all and split")
    header = {} if split == "all" else {"split": split}
    about = About(model=model, num_experts=num_experts, source=SOURCE, license=license, header=header)
    return write_requests(source, output, requests, about, [f"left out: {left_out}"] if left_out else [])


def _candidates(
    source: str | Path, progress: Progress | None, drop_flagged: bool, skipped: Counter[str]
) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """File, place and record of all that may be a request; what is passed over is counted."""
    for path in tracked(files_of(source, ".json", ".jsonl"), progress, "reading records"):
        for where, record in _records(path):
            if not isinstance(record, dict) or not record.get("router_data"):
                if not Path(source).is_dir():
                    raise fault(path, where, "has no router_data", _REMEDY)
                skipped["without router_data"] += 1
            elif drop_flagged and _is_flagged(record):
                skipped["flagged"] += 1
            else:
                yield path, where, record


def _select(source: str | Path, split: str, requests: Iterable[Request], skipped: Counter[str]) -> list[Request]:
    """The requests of the split: train and eval in its order, the others in the source's."""
    if split == "all":
        return list(requests)
    hashes = load_split()
    wanted = hashes.get(split, [])
    known = {key for keys in hashes.values() for key in keys}
    found: dict[str, Request] = {}
    others: list[Request] = []
    for request in requests:
        key = request_hash(request.experts)
        if key not in known and split == "other":
            others.append(request)
        elif key in wanted and key not in found:
            found[key] = request
        else:
            skipped["repeated" if key in found else "of another split"] += 1
    missing = [key for key in wanted if key not in found]
    if missing:
        problem = f"holds {len(found)} of the {len(wanted)} requests of split={split} (first missing: {missing[0]})"
        raise fault(source, "source", problem, "give the whole data folder of the public source")
    return others if split == "other" else [found[key] for key in wanted]


def request_hash(experts: npt.NDArray[Any]) -> str:
    """First 16 hex digits of the SHA-256 of the experts [n,L,K] of one request, as uint8 in C order."""
    return hashlib.sha256(np.ascontiguousarray(experts.astype(np.uint8)).tobytes()).hexdigest()[:16]


def load_split() -> dict[str, list[str]]:
    """The hashes of the requests of the train and of the eval trace, in order."""
    content = json.loads((files("traces") / "data" / "gpt-oss-20b.split.json").read_text(encoding="utf-8"))
    return {name: content[name] for name in ("train", "eval")}


def _is_flagged(record: dict[str, Any]) -> bool:
    return bool(record.get("has_repetition", False)) or not record.get("finished_successfully", True)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place."""
    if suffix_of(path) == ".jsonl":
        for number, text in source_lines(path, _REMEDY):
            if text.strip():
                yield f"line {number}", parse_json(path, f"line {number}", text, _REMEDY)
        return
    content = source_json(path, _REMEDY)
    if isinstance(content, list):
        yield from ((f"entry {index}", record) for index, record in enumerate(content))
    else:
        yield "file", content


def _request(path: Path, where: str, record: dict[str, Any], num_experts: int, context: bool) -> Request:
    tokens = record["router_data"]
    if not isinstance(tokens, list) or not tokens:
        raise fault(path, where, "router_data is no list of tokens", _REMEDY)
    experts: list[list[list[int]]] = []
    weights: list[list[list[float]]] = []
    num_layers, first = 0, 0
    for index, token in enumerate(tokens):
        place = f"{where}, router_data {index}"
        try:
            position, layers = _token(token)
            num_layers, first = (num_layers, first) if index else (len(layers), position)
            if num_layers > MAX_LAYERS:
                raise ValueError(f"has {num_layers} layers, at most {MAX_LAYERS} are read")
            if len(layers) != num_layers:
                raise ValueError(f"has {len(layers)} layers, the first token {num_layers}")
            rows = [_layer(layers, layer, num_experts) for layer in range(num_layers)]
        except ValueError as error:
            raise fault(path, place, str(error), _REMEDY) from None
        experts.append([ids for ids, _ in rows])
        weights.append([probs for _, probs in rows])
    label = "/".join(_label_part(path, where, record, key) for key in ("dataset", "category"))
    width = max(len(values) for token in experts for values in token)
    check_bytes(path, where, _ENTRY_BYTES * len(experts) * num_layers * width)
    return Request(
        _padded(experts, -1, width).astype(np.int32),
        _padded(weights, 0, width).astype(np.float16),
        context_len=first if context else None,
        label=label,
        source=(path, where),
    )


def _label_part(path: Path, where: str, record: dict[str, Any], key: str) -> str:
    text = record.get(key, "")
    if not isinstance(text, str | int) or len(str(text)) > _MOST_LABEL or not str(text).isprintable():
        raise fault(path, where, f"{key} is {shown(text)}, no name", f"give at most {_MOST_LABEL} characters")
    return str(text)


def _token(token: object) -> tuple[int, dict[str, Any]]:
    """Position and layers of one token; ValueError says what is wrong."""
    if not isinstance(token, dict) or len(token) != 1:
        raise ValueError("is no object with one token")
    name, layers = next(iter(token.items()))
    digits = name.removeprefix("token_")
    if not (name.startswith("token_") and digits.isascii() and digits.isdecimal() and len(digits) < 10):
        raise ValueError(f"is called {name[:40]!r}, not token_<position>")
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"{name} has no layers")
    return int(digits), layers


def _layer(layers: dict[str, Any], layer: int, num_experts: int) -> tuple[list[int], list[float]]:
    """Ids and probabilities of one layer; ValueError says what is wrong."""
    name = f"layer_{layer}"
    entry = layers.get(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is missing")
    ids, probs = entry.get("selected_experts"), entry.get("selected_probs")
    if not isinstance(ids, list) or not isinstance(probs, list) or not ids or len(ids) != len(probs):
        raise ValueError(f"{name} needs selected_experts and selected_probs of one length")
    if not all(type(i) is int and 0 <= i < num_experts for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{name} has the experts {str(ids)[:80]}: not distinct ids below {num_experts}")
    if not all(type(p) in (int, float) and 0 <= p <= MAX_WEIGHT for p in probs):
        raise ValueError(f"{name} has the probabilities {str(probs)[:80]}: not numbers from 0")
    return ids, probs


def _padded(rows: list[list[list[Any]]], padding: int, width: int) -> npt.NDArray[np.float64]:
    if all(len(values) == width for token in rows for values in token):
        return np.array(rows, np.float64)
    return np.array([[values + [padding] * (width - len(values)) for values in token] for token in rows], np.float64)
