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
from traces.reading import read_json

_PARTS = (("prefill", True), ("decode", False), ("tokens", None))
_LAYOUT = 'give {"prompts": {name: {"prefill": [tokens][layers][experts], "decode": …}}} or {"trace": [[layer, …], …]}'


@dataclass
class _Facts:
    """What the files themselves say of the model."""

    model: str = ""
    num_experts: int = 0


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
        value = read_json(path, "correct or remove it")
        for name, table in _requests(path, value):
            try:
                _learn(facts, table)
                if isinstance(table.get("trace"), list):
                    _flat(choices, table, name, prompt_len)
                else:
                    _nested(choices, table, name, prompt_len)
            except ValueError as error:
                raise fault(path, name, str(error), _LAYOUT) from None
        if isinstance(value, dict):
            _learn(facts, value)
    what = Source(
        paths[0],
        "routing in JSON",
        license,
        model or facts.model,
        num_experts or facts.num_experts,
        unit="token",
    )
    return write_choices(choices, what, output)


def _requests(path: Path, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, table) of each request of a file."""
    stem = path.stem
    items: Any = value
    if isinstance(value, dict):
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


def _learn(facts: _Facts, table: Mapping[str, Any]) -> None:
    found = table.get("model")
    if not facts.model and isinstance(found, str):
        facts.model = found.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1][:200]
    if not facts.num_experts and "num_experts" in table:
        facts.num_experts = integer(table, "num_experts")


def _nested(choices: Choices, table: Mapping[str, Any], name: str, prompt_len: int) -> None:
    """The tokens of one request. ValueError says what is wrong."""
    if not any(table.get(part) is not None for part, _ in _PARTS):
        raise ValueError("has neither prefill, decode nor tokens")
    known_prompt = integer(table, "prompt_len") if "prompt_len" in table else None
    if known_prompt is not None and isinstance(table.get("prefill"), list) and len(table["prefill"]) != known_prompt:
        raise ValueError(f"has prompt_len={known_prompt} and {len(table['prefill'])} tokens of prefill")
    layers = integer_list(table["moe_layer_ids"], "moe_layer_ids") if "moe_layer_ids" in table else None
    request, token = choices.new_request(name), 0
    for part, prefill in _PARTS:
        tokens, weights = table.get(part), table.get(f"{part}_weights")
        if tokens is None:
            continue
        if not isinstance(tokens, list) or (weights is not None and not _same_length(weights, tokens)):
            raise ValueError(f"has no list {part}, or weights of another length")
        until = prompt_len or known_prompt
        for number, choice in enumerate(tokens):
            of_prompt = (None if until is None else token < until) if prefill is None else prefill
            given = None if weights is None else weights[number]
            _add_token(choices, request, token, (part, number), choice, given, layers, of_prompt)
            token += 1


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
