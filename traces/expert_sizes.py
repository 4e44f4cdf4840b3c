"""Bytes of the experts that a trace was recorded with: `expert_bytes` of its header, JSON text.

One number for all, a list of one a layer, or a list of numbers and lists of one an expert, as `model.expert_bytes`
takes them. Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertflow.expert_sizes import MOST_EXPERT_BYTES, ExpertBytes, check_expert_bytes, shortest_form
from traces.jsontext import parse_json
from traces.messages import fault

HEADER = "expert_bytes"
_MOST_SIZES = 1_000_000
"""Of experts one by one: more than any model has."""
_REMEDY = "write whole numbers of bytes, one for all or one a layer, or leave it out"


def sizes_of(path: Path, header: Mapping[str, str], num_layers: int, num_experts: int) -> ExpertBytes | None:
    """What the header says, in its shortest form, so that the same sizes are equal however they were written; None
    where it says nothing. TraceError, one line, for anything but sizes of this shape."""
    if HEADER not in header:
        return None
    found = parse_json(path, f"header, {HEADER},", header[HEADER], _REMEDY)
    if isinstance(found, list):
        try:
            check_expert_bytes(found, HEADER, num_layers, num_experts)
        except ValueError as error:
            raise fault(path, "header", str(error).split(";")[0], _REMEDY) from None
    elif type(found) is not int or not 1 <= found <= MOST_EXPERT_BYTES:
        raise fault(path, "header", f"{HEADER} is {header[HEADER][:40]!r}", _REMEDY)
    if isinstance(found, int):
        return found
    return shortest_form([own if isinstance(own, list) else (own,) for own in found])


@dataclass
class SeenSizes:
    """Sizes as a source gives them, row by row. A source that contradicts itself or names none for a layer gives no
    sizes, and a note says so: its routing is no worse for it."""

    by_layer: dict[int, dict[int, int]] = field(default_factory=dict)
    problem: str = ""

    def add(self, layer: int, expert: int, text: str, place: str) -> None:
        """What one row says of an expert."""
        text = text.strip()
        size = int(text) if text.isascii() and text.isdecimal() and len(text) < 15 else 0
        if not 1 <= size <= MOST_EXPERT_BYTES:
            self.problem = self.problem or f"{place} says {text[:20]!r}"
        elif (known := self.by_layer.setdefault(layer, {}).setdefault(expert, size)) != size:
            self.problem = self.problem or f"expert {expert} of layer {layer} has {known} bytes, and {size} at {place}"

    def header(self, layers: Sequence[int], num_experts: int) -> tuple[dict[str, str], list[str]]:
        """The header's entry for the MoE layers `layers` (their numbers in the source), and notes."""
        if not self.by_layer and not self.problem:
            return {}, []
        missing = next((layer for layer in layers if not self.by_layer.get(layer)), None)
        problem = self.problem or (f"layer {missing} has none" if missing is not None else "")
        rows = [self.by_layer.get(layer, {}) for layer in layers]
        mixed = [row for row in rows if len(set(row.values())) > 1]
        if not problem and len(mixed) * num_experts > _MOST_SIZES:
            problem = f"{len(mixed)} layers with {num_experts} experts of unlike sizes are too many"
        if problem:
            return {}, [f"expert_bytes left out: {problem}"]
        text = json.dumps(shortest_form([_filled(row, num_experts) for row in rows]), separators=(",", ":"))
        notes = []
        if num_guessed := sum(num_experts - len(row) for row in mixed):
            notes.append(f"expert_bytes of {num_guessed} experts that no row names are the mean of their layer")
        return {HEADER: text}, notes


def _filled(row: Mapping[int, int], num_experts: int) -> Sequence[int]:
    """The sizes of a layer [E]; one alone where all that are known are alike."""
    first, *others = row.values()
    if all(size == first for size in others):
        return (first,)
    mean = round(sum(row.values()) / len(row))
    return [row.get(expert, mean) for expert in range(num_experts)]


def merged(headers: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The entry of several headers that do not contradict each other: of the first that has one."""
    return next(({HEADER: header[HEADER]} for header in headers if HEADER in header), {})
