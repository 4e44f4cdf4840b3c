"""Which column of a table holds which field: as the user names them, the others by their usual names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from traces.container import fault
from traces.importers.packed import stem_of
from traces.importers.rows import RowFile

USUAL: Mapping[str, tuple[str, ...]] = {
    "request": ("request", "request_id", "req_id", "rid", "turn", "prompt_id", "sequence", "seq_id", "sample_id"),
    "phase": ("phase", "stage", "is_prefill", "is_decode"),
    "token": ("position", "pos", "token_pos", "token_idx", "token_index", "token"),
    "step": ("step", "forward", "forward_id", "iteration", "iter", "batch_id"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index", "moe_layer"),
    "rank": ("rank", "slot", "k", "topk_rank", "order"),
    "expert": ("expert", "experts", "expert_id", "expert_ids", "topk_ids", "selected_experts", "topk_experts"),
    "weight": ("weight", "weights", "topk_weights", "gate_weight", "prob", "probs", "expert_weights"),
}
"""Names under which public recordings keep each field, the likeliest first. `token_id` is not among them: in logs it is
the token's number in the vocabulary."""
COUNTS = ("count", "counts", "num_tokens", "frequency", "freq", "hits", "activations", "activation_count")
"""Columns of a histogram: how often an expert was chosen, not by which token."""
HOW = "give layer=, expert= and token= or step=, see python -m traces import --help"
_NUMBERED = re.compile(r"expert_?(?P<number>[0-9]{1,3})", re.IGNORECASE)
_LAYER_OF_NAME = re.compile(r"layer[_.-]?(?P<number>[0-9]{1,4})(?![0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """Which column holds which field; empty: none does. `expert` and `weight` may name several."""

    request: str = ""
    phase: str = ""
    token: str = ""
    step: str = ""
    layer: str = ""
    rank: str = ""
    expert: tuple[str, ...] = ()
    weight: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """All columns, in the order of the fields."""
        single = (self.request, self.phase, self.token, self.step, self.layer, self.rank)
        return [name for name in (*single, *self.expert, *self.weight) if name]


def named_columns(words: Mapping[str, str]) -> Columns:
    """The columns of the options `token=`, `expert=`, …"""
    given: dict[str, Any] = {field.name: words.get(field.name, "") for field in fields(Columns)}
    return Columns(**given | {key: listed(given[key]) for key in ("expert", "weight")})


def listed(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def completed(file: RowFile, given: Columns, notes: list[str]) -> Columns:
    """The columns as given, the others by their usual names; a note tells these. TraceError where one is missing, and
    where several could hold the experts."""
    there = file.columns()
    if file.kind == "jsonl" and not _has_rows(there, given) and _has_rows(second := file.columns(1), given):
        # A first line that tells of the recording.
        there = second
    columns, found = _found(file.path, there, given)
    for name in columns.names():
        if name not in there:
            raise fault(file.path, "file", f"has no column {name!r}", f"its columns are {_shown(there)}")
    if not columns.expert or not (columns.layer or layer_of_name(file.path) is not None):
        raise fault(file.path, "file", f"has the columns {_shown(there)}", HOW)
    if found:
        guessed = ", ".join(f"{key}={value if isinstance(value, str) else ','.join(value)}" for key, value in found)
        notes.append(f"columns taken by their names: {guessed}")
    if given.step and not given.token:
        unused = [name for name in there if name.lower() in USUAL["token"] and name not in columns.names()]
        if unused:
            notes.append(f"column {unused[0]} not used beside step={given.step}; name it with token= to use it")
    return columns


def _has_rows(there: Sequence[str], given: Columns) -> bool:
    """Whether rows of these columns could tell what was chosen."""
    lower = {name.lower() for name in there}
    return any(name in there for name in given.expert) or bool(lower & set(USUAL["expert"]) or _numbered(there))


def _found(path: Path, there: Sequence[str], given: Columns) -> tuple[Columns, list[tuple[str, str | tuple[str, ...]]]]:
    """All columns, and those that were found by their usual names."""
    lower = {name.lower(): name for name in reversed(there)}
    taken = set(given.names())
    found: list[tuple[str, str | tuple[str, ...]]] = []
    values: dict[str, Any] = {field: getattr(given, field) for field in USUAL}
    for field, usual in USUAL.items():
        # Of token and step the one that is named alone excludes the other.
        if values[field] or (field == "step" and given.token) or (field == "token" and given.step):
            continue
        names = [lower[word] for word in usual if word in lower and lower[word] not in taken]
        if field == "expert":
            numbered = [name for name in there if _NUMBERED.fullmatch(name)]
            if len(names) > 1 or (names and numbered):
                raise _several(path, [*names, *numbered])
            names = names or list(_numbered(there))
        if not names:
            continue
        chosen: str | tuple[str, ...] = names[0]
        if field in ("expert", "weight"):
            chosen = tuple(names) if field == "expert" else (names[0],)
        taken |= {chosen} if isinstance(chosen, str) else set(chosen)
        values[field] = chosen
        found.append((field, chosen))
    return Columns(**values), found


def _several(path: Path, names: Sequence[str]) -> Exception:
    problem = f"has the columns {_shown(names)}, any of which may hold the experts"
    return fault(path, "file", problem, f"name those that do, such as expert={names[0][:60]}")


def _numbered(there: Sequence[str]) -> tuple[str, ...]:
    """expert0, expert1, … (or from 1), in their order; empty where they are not two or more without a gap."""
    found = sorted((int(match["number"]), name) for name in there if (match := _NUMBERED.fullmatch(name)))
    numbers = [number for number, _ in found]
    if len(found) < 2 or numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return ()
    return tuple(name for _, name in found)


def layer_of_name(path: Path) -> int | None:
    """The layer of which a file tells by its name: 3 of `moe_layer3.csv`."""
    found = _LAYER_OF_NAME.findall(stem_of(path))
    return int(found[0]) if len(found) == 1 else None


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20])[:120]
