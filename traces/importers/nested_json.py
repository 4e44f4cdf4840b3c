"""Importer of routing in one JSON file: nested by prompt, token and layer, or a flat list of records.

Nested: `{"model": …, "num_experts": …, "prompts": {name: {"prefill": [tokens][layers][experts], "decode": […],
"prompt_len": …}}}`; in place of `prompts` a list of such tables, or one alone; `tokens` in place of `prefill` and
`decode` holds both, of which `prompt_len` are the prompt. `weights` beside each of the three (`prefill_weights`, …) has
the same shape.

Flat: `{"trace": [[layer, expert, expert, …], …]}`, a record for each token and layer. A layer number that does not rise
begins the next token. What is prompt is not told: give `prompt_len=`, else all tokens decode.

Tables may hold `model`, `num_experts` and `moe_layer_ids` (the layers' own numbers); other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from traces.container import fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.json_text import integer, integer_list, numbers
from traces.importers.packed import source_json, stem_of

_PARTS = (("prefill", True), ("decode", False), ("tokens", None))
_LAYOUT = 'give {"prompts": {name: {"prefill": [tokens][layers][experts], "decode": …}}} or {"trace": [[layer, …], …]}'


@dataclass
class _Facts:
    """What the files themselves say of the model."""

    model: str = ""
    num_experts: int = 0
    num_layers: int = 0
    num_turned: int = 0
    """Requests whose layers stand before their tokens."""


def import_nested_json(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    *,
    model: str = "",
    num_experts: int = 0,
    prompt_len: int = 0,
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the file, or the files of a folder, as one trace. TraceError names file and entry."""
    choices, facts = Choices(), _Facts()
    paths = files_of(source, ".json")
    for path in tracked(paths, progress, "reading routes"):
        choices.reads(path)
        value = source_json(path, "correct or remove it")
        if isinstance(value, dict):
            _learn(facts, value)
        for name, table in _requests(path, value):
            try:
                _learn(facts, table)
                if isinstance(table.get("trace"), list):
                    _flat(choices, table, name, prompt_len)
                else:
                    _nested(choices, _turned(table, facts), name, prompt_len)
            except ValueError as error:
                raise fault(path, name, str(error), _LAYOUT) from None
    notes = [f"{facts.num_turned} requests are [layers][tokens][experts]: turned"] if facts.num_turned else []
    what = Source(
        paths[0],
        "routing in JSON",
        license,
        model or facts.model,
        num_experts or facts.num_experts,
        unit="token",
        notes=tuple(notes),
    )
    return write_choices(choices, what, output)


def _requests(path: Path, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, table) of each request of a file."""
    stem = stem_of(path)
    items: Any = value
    if isinstance(value, list) and value and isinstance(value[0], list):
        items = _bare(value)
    elif isinstance(value, dict):
        prompts = value.get("prompts")
        items = prompts if isinstance(prompts, dict | list) else [value]
    if isinstance(items, dict):
        named = [(f"{stem}/{str(name)[:100]}", table) for name, table in items.items()]
    elif isinstance(items, list):
        named = [(stem if len(items) == 1 else f"{stem}/{number}", table) for number, table in enumerate(items)]
    else:
        raise fault(path, "file", "is no table", _LAYOUT)
    for name, table in named:
        if not isinstance(table, dict):
            raise fault(path, name, "is no table", _LAYOUT)
        yield name, table


def _bare(value: list[Any]) -> list[dict[str, Any]]:
    """The requests of a list without any table: of records, of one request's tokens, or of several requests'."""
    depth, inner = 0, value
    while isinstance(inner, list) and inner and depth < 5:
        depth, inner = depth + 1, inner[0]
    if depth == 2:
        return [{"trace": value}]
    return [{"tokens": value}] if depth == 3 else [{"tokens": item} for item in value]


def _learn(facts: _Facts, table: Mapping[str, Any]) -> None:
    found = table.get("model")
    if not facts.model and isinstance(found, str):
        facts.model = found.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1][:200]
    if not facts.num_experts and "num_experts" in table:
        facts.num_experts = integer(table, "num_experts")
    facts.num_layers = facts.num_layers or _whole(table, "num_layers")


def _whole(table: Mapping[str, Any], key: str) -> int:
    """A whole number from 1; 0 where there is none."""
    value = table.get(key)
    return value if type(value) is int and value > 0 else 0


def _nested(choices: Choices, table: Mapping[str, Any], name: str, prompt_len: int) -> None:
    """The tokens of one request. ValueError says what is wrong."""
    if not any(table.get(part) is not None for part, _ in _PARTS):
        raise ValueError("has neither prefill, decode nor tokens")
    known_prompt = integer(table, "prompt_len") if "prompt_len" in table else None
    if known_prompt is not None and isinstance(table.get("prefill"), list) and len(table["prefill"]) != known_prompt:
        raise ValueError(f"has prompt_len={known_prompt} and {len(table['prefill'])} tokens of prefill")
    layers = integer_list(table["moe_layer_ids"], "moe_layer_ids") if "moe_layer_ids" in table else None
    _check_layers(table)
    until = prompt_len or known_prompt
    tokens = table.get("tokens")
    if until and isinstance(tokens, list) and len(tokens) < until:
        raise ValueError(f"has prompt_len={until} and {len(tokens)} tokens")
    request, token = choices.new_request(name), 0
    for part, prefill in _PARTS:
        tokens, weights = table.get(part), table.get(f"{part}_weights")
        if tokens is None:
            continue
        if not isinstance(tokens, list) or (weights is not None and not _same_length(weights, tokens)):
            raise ValueError(f"has no list {part}, or weights of another length")
        for number, choice in enumerate(tokens):
            of_prompt = (None if until is None else token < until) if prefill is None else prefill
            given = None if weights is None else weights[number]
            _add_token(choices, request, token, (part, number), choice, given, layers, of_prompt)
            token += 1


def _turned(table: Mapping[str, Any], facts: _Facts) -> Mapping[str, Any]:
    """The table as [tokens][layers][experts] where it is [layers][tokens][experts], as its number of layers shows."""
    num_layers = _whole(table, "num_layers") or facts.num_layers
    parts = {part: table[part] for part, _ in _PARTS if isinstance(table.get(part), list) and table[part]}
    if not num_layers or not parts:
        return table
    inner = {len(item) if isinstance(item, list) else -1 for tokens in parts.values() for item in tokens}
    if -1 in inner or "moe_layer_ids" in table:
        return table
    if max(inner) <= num_layers and not (num_layers not in inner and all(len(p) == num_layers for p in parts.values())):
        return table
    if any(len(tokens) != num_layers or len({len(item) for item in tokens}) != 1 for tokens in parts.values()):
        raise ValueError(f"has num_layers={num_layers} and tokens of {max(inner)} layers")
    facts.num_turned += 1
    names = [name for part in parts for name in (part, f"{part}_weights") if isinstance(table.get(name), list)]
    if any(not isinstance(item, list) or len(item) != len(table[name][0]) for name in names for item in table[name]):
        raise ValueError("has layers of different numbers of tokens")
    return {**table, **{name: [list(token) for token in zip(*table[name], strict=True)] for name in names}}


def _check_layers(table: Mapping[str, Any]) -> None:
    """ValueError where the prompt's tokens have other layers than the answer's: layers stand before tokens."""
    sizes = [
        {len(token) for token in table[part] if isinstance(token, list)}
        for part in ("prefill", "decode")
        if isinstance(table.get(part), list) and table[part]
    ]
    if len(sizes) == 2 and all(len(size) == 1 for size in sizes) and sizes[0] != sizes[1]:
        raise ValueError(f"has {sizes[0].pop()} layers in prefill and {sizes[1].pop()} in decode")


def _add_token(
    choices: Choices,
    request: int,
    token: int,
    where: tuple[str, int],
    choice: Any,
    weights: Any,
    layers: Sequence[int] | None,
    prefill: bool | None,
) -> None:
    what = f"{where[0]}[{where[1]}]"
    if not isinstance(choice, list) or (layers is not None and len(layers) != len(choice)):
        raise ValueError(f"{what} is no list of layers, or of another number than moe_layer_ids")
    if weights is not None and not _same_length(weights, choice):
        raise ValueError(f"{what} has weights of another shape")
    for layer, experts in enumerate(choice):
        given = None if weights is None else numbers({what: weights[layer]}, what)
        own = layer if layers is None else layers[layer]
        ids = integer_list(experts, f"{what}[{layer}]")
        choices.add(request, token, own, ids, place=token, weights=given, prefill=prefill)


def _same_length(value: Any, other: list[Any]) -> bool:
    return isinstance(value, list) and len(value) == len(other)


def _flat(choices: Choices, table: Mapping[str, Any], name: str, prompt_len: int) -> None:
    """Records [layer, experts…] of one request. ValueError says what is wrong."""
    request = choices.new_request(name)
    token, before = -1, None
    for number, record in enumerate(table["trace"]):
        values = integer_list(record, f"trace[{number}]")
        if len(values) < 2:
            raise ValueError(f"trace[{number}] holds no layer and experts")
        if before is None or values[0] <= before:
            token += 1
        before = values[0]
        prefill = token < prompt_len if prompt_len else None
        choices.add(request, token, values[0], values[1:], place=token, prefill=prefill)
    if prompt_len > token + 1:
        raise ValueError(f"has prompt_len={prompt_len} and {token + 1} tokens")
