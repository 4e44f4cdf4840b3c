"""Importer of what serving engines return when asked for the experts of each token: vLLM and SGLang.

The source is one file or a folder of them: `.npy` (one request), `.npz` (one request an array of three dimensions),
`.json` or `.jsonl` (answers as the engines give them, one or many). Assumed, and how sure that is:

- vLLM (`--enable-return-routed-experts`): per completion an integer array `routed_experts` [tokens, layers, top_k]
  over prompt and answer (sure: documented, and several of its users read it so). That the last sampled token, which
  never runs, has no row is likely; where it has one without a choice, the row is dropped. `prompt_routed_experts`
  beside it, if given, stands before it (unsure: seen in some versions only).
- SGLang (`return_routed_experts`): base64 of int32, little-endian, in C order, [tokens − 1, layers, top_k], in
  `meta_info["routed_experts"]` (sure), or in `routed_experts` of a choice (likely). The shape is not sent with it:
  give `num_layers=` and `top_k=`. `routed_experts_start_len`, if recorded, is the position of the first row.
- layers counts all layers of the model: a dense layer holds one value throughout (sure for SGLang: zeros). Such
  layers are left out, if top_k > 1; else say how many lead with `dense_layers=`.
- Negative ids are experts that were not recorded: padding. Ids within a row come best first as a rule; grouped
  routing may give them in any order, and nothing in the dump says so.

Lengths of prompts come from `prompt_tokens` (meta_info or usage), `prompt_token_ids` or `prompt_len`; in `.npz` from
an array `prompt_len` [requests]. Gate weights are in no such dump. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from traces.container import Array, fault
from traces.format import About
from traces.importers.assemble import NO_MODEL, UNNAMED
from traces.importers.common import (
    MAX_LAYERS,
    PADDING,
    UNKNOWN_LICENSE,
    ImportReport,
    Request,
    files_of,
    tracked,
    write_requests,
)
from traces.importers.json_text import numbered_lines
from traces.importers.known_models import model_layers
from traces.importers.packed import source_json, suffix_of
from traces.limits import Budget, check_bytes
from traces.reading import npz_arrays, read_npy

_SUFFIXES = (".npy", ".npz", ".json", ".jsonl")
_ID_BOUND = 1 << 31
_SHAPE = "routed experts are [tokens, layers, top_k]"

Ids = npt.NDArray[np.int64]


@dataclass
class _Dump:
    """One request as it was found: ids [n, layers, K]; prompt None where unknown."""

    path: Path
    place: str
    ids: Ids
    prompt: int | None = None
    start: int = 0


def import_engine_dumps(
    source: str | Path,
    output: str | Path,
    progress: Progress | None = None,
    *,
    model: str = "",
    num_experts: int = 0,
    num_layers: int = 0,
    top_k: int = 0,
    dense_layers: int = 0,
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the dumped routing as a trace. TraceError names file and place.

    num_layers counts all layers, dense ones too; with top_k it is needed for base64 only, and checked wherever given.
    """
    dumps: list[_Dump] = []
    for path in tracked(files_of(source, *_SUFFIXES), progress, "reading dumps"):
        dumps.extend(_read(path, num_layers, top_k))
    if not dumps:
        raise fault(
            source, "source", "holds no routed experts", "ask the engine for them, see the importer's docstring"
        )
    notes = _turned(dumps, num_layers or model_layers(model) or 0)
    for dump in dumps:
        _check_shape(dump, dumps[0], num_layers, top_k)
    layers, more = _moe_layers(source, dumps, dense_layers)
    notes += more
    if not model:
        notes.append(NO_MODEL)
    requests, more = _requests(dumps, layers)
    notes += more
    highest = max(int(request.experts.max()) for request in requests)
    if not num_experts:
        num_experts = highest + 1
        notes.append(f"num_experts={num_experts}, the highest id and one; give num_experts= if there are more")
    if highest >= num_experts:
        dump = dumps[[int(request.experts.max()) for request in requests].index(highest)]
        problem = f"holds expert {highest}, outside 0 … {num_experts - 1}"
        raise fault(dump.path, dump.place, problem, "correct num_experts, or remove what marks missing experts")
    about = About(
        model=model or UNNAMED,
        num_experts=num_experts,
        source="routed experts returned by a serving engine",
        license=license,
        moe_layer_ids=layers,
        header={"capture": "engine dump; the order within a row is the engine's"},
    )
    return write_requests(source, output, requests, about, notes)


# -- reading -------------------------------------------------------------------------------------------------


def _read(path: Path, num_layers: int, top_k: int) -> Iterator[_Dump]:
    budget = Budget(path)
    if path.suffix in (".npy", ".npz"):
        found = _numpy(path)
    elif suffix_of(path) in (".json", ".jsonl"):
        found = (dump for at, value in _json(path) for dump in _answer(path, at, value, num_layers, top_k))
    else:
        raise fault(path, "file", f"is of the type {path.suffix or '(none)'}", f"give {', '.join(_SUFFIXES)}")
    for dump in found:
        budget.take(dump.place, dump.ids.nbytes)
        yield dump


def _numpy(path: Path) -> Iterator[_Dump]:
    if path.suffix == ".npy":
        yield _Dump(path, "array", _ids(path, "array", read_npy(path)))
        return
    arrays = dict(npz_arrays(path))
    prompts = arrays.pop("prompt_len", None)
    if prompts is not None and (prompts.shape != (len(arrays),) or prompts.dtype.kind not in "iu"):
        raise fault(path, "array 'prompt_len'", "is no list of one length a request", "correct or remove it")
    for index, (name, array) in enumerate(arrays.items()):
        place = f"array {name!r}"
        prompt = None if prompts is None else _count(path, place, "prompt length", int(prompts[index]))
        yield _Dump(path, place, _ids(path, place, array), prompt)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line, or of each entry."""
    if suffix_of(path) == ".jsonl":
        yield from ((f"line {number}", value) for number, value in numbered_lines(path))
        return
    value = source_json(path, "correct or remove it")
    if isinstance(value, list):
        yield from ((f"entry {index}", item) for index, item in enumerate(value))
    else:
        yield "file", value


def _answer(path: Path, place: str, value: Any, num_layers: int, top_k: int) -> Iterator[_Dump]:
    """The requests of one answer: itself, or its completions (`outputs` of vLLM, `choices` of either's web API)."""
    if not isinstance(value, dict):
        raise fault(path, place, "is no object", "give the answers as the engine returned them")
    completions = next((value[key] for key in ("outputs", "choices") if isinstance(value.get(key), list)), None)
    if completions is None:
        yield _dump(path, place, [value], num_layers, top_k)
        return
    for index, completion in enumerate(completions):
        if not isinstance(completion, dict):
            raise fault(path, f"{place}, completion {index}", "is no object", "give the answers as they were returned")
        yield _dump(path, f"{place}, completion {index}", [completion, value], num_layers, top_k)


def _dump(path: Path, place: str, tables: list[dict[str, Any]], num_layers: int, top_k: int) -> _Dump:
    """A request from the tables that speak of it, nearest first."""
    tables = [
        part
        for table in tables
        for part in (table, table.get("meta_info"), table.get("usage"))
        if isinstance(part, dict)
    ]

    def look_up(key: str) -> Any:
        return next((table[key] for table in tables if table.get(key) is not None), None)

    found = look_up("routed_experts")
    if found is None:
        raise fault(path, place, "has no routed_experts", "ask the engine to return them, or remove it")
    ids = _decoded(path, place, found, num_layers, top_k)
    before = look_up("prompt_routed_experts")
    prompt = None
    if before is not None:
        ahead = _decoded(path, place, before, num_layers, top_k)
        if ahead.shape[1:] != ids.shape[1:]:
            problem = f"has {list(ahead.shape)} of the prompt and {list(ids.shape)} of the answer"
            raise fault(path, place, problem, _SHAPE)
        ids, prompt = np.concatenate([ahead, ids]), len(ahead)
    else:
        token_ids = look_up("prompt_token_ids")
        counts = [
            look_up("prompt_tokens"),
            look_up("prompt_len"),
            len(token_ids) if isinstance(token_ids, list) else None,
        ]
        prompt = next((_count(path, place, "prompt length", count) for count in counts if count is not None), None)
    start = look_up("routed_experts_start_len")
    return _Dump(path, place, ids, prompt, 0 if start is None else _count(path, place, "start", start))


def _count(path: Path, place: str, what: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise fault(path, place, f"has the {what} {str(value)[:40]!r}", "give a whole number from 0")
    return value


def _decoded(path: Path, place: str, value: Any, num_layers: int, top_k: int) -> Ids:
    """Ids from nested lists, or from base64 of int32."""
    if isinstance(value, list):
        return _listed(path, place, value)
    if not isinstance(value, str):
        raise fault(path, place, f"has routed_experts of the type {type(value).__name__}", "give lists or base64")
    if not num_layers or not top_k:
        remedy = "give num_layers=<all layers of the model> and top_k="
        raise fault(path, place, "is base64, which does not say its shape", remedy)
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise fault(path, place, "has routed_experts that are no base64", "give them as they were returned") from None
    if not raw or len(raw) % (4 * num_layers * top_k):
        problem = f"has {len(raw)} bytes, no multiple of 4 × {num_layers} layers × {top_k}"
        raise fault(path, place, problem, "correct num_layers and top_k")
    return np.frombuffer(raw, "<i4").reshape(-1, num_layers, top_k).astype(np.int64)


def _listed(path: Path, place: str, value: list[Any]) -> Ids:
    """Ids from nested lists."""
    if not _are_numbers(value):
        raise fault(path, place, "is no list of numbers", _SHAPE)
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        raise fault(path, place, "has rows of different lengths", _SHAPE) from None
    return _ids(path, place, array)


def _are_numbers(value: list[Any], depth: int = 1) -> bool:
    """Whether lists hold lists or numbers alone: of a text among them numpy would make as much room for all others."""
    if all(type(item) is int for item in value):
        return True
    return depth < 8 and all(
        _are_numbers(item, depth + 1) if isinstance(item, list) else type(item) in (int, float) for item in value
    )


def _ids(path: Path, place: str, array: Array) -> Ids:
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape:
        raise fault(path, place, f"is {array.dtype} of the shape {list(array.shape)}", f"{_SHAPE}, whole numbers")
    check_bytes(path, place, 8 * array.size)
    if int(array.max()) >= _ID_BOUND or int(array.min()) < -_ID_BOUND:
        raise fault(path, place, "holds ids of more than 31 bits", "it is no dump of expert ids")
    return array.astype(np.int64)


# -- rows ----------------------------------------------------------------------------------------------------


def _turned(dumps: list[_Dump], num_layers: int) -> list[str]:
    """Turn dumps that are [layers, tokens, top_k], which the number of layers shows; a note on it."""
    if not num_layers or any(dump.ids.shape[1] == num_layers or dump.ids.shape[0] != num_layers for dump in dumps):
        return []
    for dump in dumps:
        dump.ids = dump.ids.transpose(1, 0, 2)
    return [f"arrays taken for [layers, tokens, top_k], since {num_layers} layers stand first"]


def _check_shape(dump: _Dump, first: _Dump, num_layers: int, top_k: int) -> None:
    shape = list(dump.ids.shape[1:])
    if dump.ids.shape[1:] != first.ids.shape[1:]:
        problem = f"has [layers, top_k] = {shape}, {first.path.name} ({first.place}) has {list(first.ids.shape[1:])}"
        raise fault(dump.path, dump.place, problem, "import the dumps of one model at a time")
    for key, given, found in (("num_layers", num_layers, shape[0]), ("top_k", top_k, shape[1])):
        if given and given != found:
            raise fault(dump.path, dump.place, f"has {key} {found}, not {given}", f"correct {key}")


def _moe_layers(source: str | Path, dumps: list[_Dump], dense_layers: int) -> tuple[list[int], list[str]]:
    """Layers that hold a choice of experts, and a note on the others."""
    num_layers, top_k = dumps[0].ids.shape[1:]
    if dense_layers >= num_layers:
        raise fault(source, "source", f"has {num_layers} layers, all dense", "correct dense_layers")
    if num_layers > MAX_LAYERS:
        raise fault(
            dumps[0].path, dumps[0].place, f"has {num_layers} layers", f"at most {MAX_LAYERS} are read; {_SHAPE}"
        )
    dense = np.full(num_layers, top_k > 1)
    for dump in dumps:
        dense &= _unset(dump.ids).all(axis=0)
    kept = [layer for layer in range(dense_layers, num_layers) if not dense[layer]]
    if not kept:
        raise fault(source, "source", "has no layer in which tokens choose different experts", _SHAPE)
    left_out = sorted(set(range(num_layers)) - set(kept))
    return kept, [f"dense layers left out: {', '.join(map(str, left_out))}"] if left_out else []


def _unset(ids: Ids) -> npt.NDArray[np.bool_]:
    """Which rows [..., K] hold no choice: one value throughout. With K = 1 that is a negative one."""
    same: npt.NDArray[np.bool_] = np.all(ids == ids[..., :1], axis=-1)
    return same if ids.shape[-1] > 1 else ids[..., 0] < 0


def _requests(dumps: Sequence[_Dump], layers: list[int]) -> tuple[list[Request], list[str]]:
    """The request of each dump, and notes on what was left out or is not known."""
    requests, notes, num_cut = [], [], 0
    for dump in dumps:
        request, cut = _request(dump, layers, len(dumps) > 1)
        num_cut += cut
        requests.append(request)
    if num_cut:
        notes.append(f"{num_cut} last tokens without a choice left out: they never ran")
    if unknown := sum(dump.prompt is None for dump in dumps):
        notes.append(f"{unknown} requests without a prompt length: all their rows count as decode")
    return requests, notes


def _request(dump: _Dump, layers: list[int], many: bool) -> tuple[Request, int]:
    """The rows of one dump, and how many at its end were dropped for want of a choice."""
    ids = dump.ids[:, layers]
    ran = ~np.all(_unset(ids), axis=1)
    stop = len(ids) - int(np.argmax(ran[::-1])) if ran.any() else 0
    if not stop:
        raise fault(dump.path, dump.place, "holds no token with a choice of experts", "remove it")
    ids = np.where(ids[:stop] < 0, PADDING, ids[:stop])
    # Padding goes last; the order of what is there stays.
    ids = np.take_along_axis(ids, np.argsort(ids < 0, axis=2, kind="stable"), axis=2)
    prompt = max((dump.prompt or 0) - dump.start, 0)
    if prompt > len(dump.ids):
        problem = f"has {len(dump.ids)} rows, fewer than the {prompt} tokens of its prompt"
        raise fault(dump.path, dump.place, problem, f"{_SHAPE}; if layers stand first, give num_layers=")
    # A last token that never ran is left out, of a prompt, too.
    prompt = min(prompt, stop)
    label = f"{dump.path.name}, {dump.place}" if many else dump.path.name
    return Request(ids.astype(np.int32), prompt_len=prompt, context_len=dump.start, label=label), len(dump.ids) - stop
