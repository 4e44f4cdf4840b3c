"""Importer of route traces in long CSV form: one row per routed expert, as BigMoeOnEdge writes them.

Columns `turn,phase,step,layer,slot,expert,weight,residency,expert_bytes`, read by name; later ones are ignored, lines
that begin with `#` are comments, and a comment `model=… n_expert=…` supplies what is not given. How it is read:

- A `turn` is a request, a `step` (position in the context) is a token of it, `slot` is the rank, 0 = best.
- `phase` is 0 or prefill, 1 or decode; prefill comes first, its tokens are `prompt_len`.
- `context_len` of a request is the step of its first row: earlier turns and unrecorded tokens stand before it.
- Missing slots are padding: the ranks that are there move up. `residency` and `dropped` describe a cache and are not
  read: the trace holds what the router chose.
- `expert_bytes`, where there is such a column, is what that expert takes: the trace keeps it, by layer, or by expert
  where those of a layer differ.
- A weight `nan` is unknown; one such leaves the weights out altogether.
- Engines that need only the last token's logits route the last layer for that token alone, so prompt tokens lack
  a layer. `incomplete=drop` (default) leaves them out and counts them into context_len; `incomplete=repeat` fills
  the gap with the next token's choice in that layer, so a prefill in one forward demands exactly what it did.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from traces.container import TraceError, fault
from traces.expert_sizes import SeenSizes
from traces.format import About
from traces.importers.common import (
    MAX_LAYERS,
    UNKNOWN_LICENSE,
    CsvTable,
    ImportReport,
    Request,
    check_choice,
    files_of,
    tracked,
    write_requests,
)
from traces.limits import check_bytes

SIZES = "expert_bytes"
COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
_PHASES = {"0": 0, "prefill": 0, "1": 1, "decode": 1}
_MOST_EXPERTS = 1 << 31
_MOST_SLOTS = 256
_PREAMBLE = re.compile(r"model=(?P<model>.*?)(?: arch=\S*)?(?: n_layer=\d+)? n_expert=(?P<num_experts>\d{1,6})\b")


@dataclass
class _Token:
    """One token of one turn while it is collected: layer → slot → (expert, weight, line)."""

    phase: int
    line: int
    layers: dict[int, dict[int, tuple[int, float]]] = field(default_factory=dict)


def import_route_csv(
    source: str | Path,
    output: str | Path,
    progress: Progress | None = None,
    *,
    incomplete: str = "drop",
    model: str = "",
    num_experts: int = 0,
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the CSV file, or a folder of them, as one trace. TraceError names file and line."""
    check_choice("incomplete", incomplete, ("drop", "repeat"))
    tables = [CsvTable(path, COLUMNS, comments=True, optional=(SIZES,)) for path in files_of(source, ".csv")]
    turns: list[tuple[Path, int, dict[int, _Token]]] = []
    sizes = SeenSizes()
    for table in tracked(tables, progress, "reading routes"):
        turns.extend((table.path, turn, steps) for turn, steps in _read(table, sizes).items())
    if not turns:
        raise fault(source, "source", "holds no rows", f"the columns are {', '.join(COLUMNS)}")
    model, num_experts, notes = _facts(source, tables, turns, model, num_experts)
    layers = sorted({layer for _, _, steps in turns for token in steps.values() for layer in token.layers})
    if len(layers) > MAX_LAYERS:
        raise fault(source, "source", f"has {len(layers)} layers", f"at most {MAX_LAYERS} are read; correct layer")
    requests, num_changed = [], 0
    for path, turn, steps in turns:
        _check_order(path, steps)
        changed = _complete(path, turn, steps, layers, incomplete)
        num_changed += changed
        requests.append(_request(path, turn, steps, layers, len(tables) > 1))
    if num_changed:
        notes.append(f"{num_changed} prompt tokens lack a layer: {_DONE[incomplete]}")
    if not all(request.weights is not None for request in requests):
        notes.append("weights left out: some are nan")
    header, told = sizes.header(layers, num_experts)
    notes.extend(told)
    about = About(model, num_experts, "route trace CSV", license, moe_layer_ids=layers, header=header)
    return write_requests(source, output, requests, about, notes)


_DONE = {
    "drop": "left out, counted as context (incomplete=repeat keeps them)",
    "repeat": "filled with the next token's choice in that layer",
}


def _read(table: CsvTable, sizes: SeenSizes) -> dict[int, dict[int, _Token]]:
    """Turn → step → token, turns in order of first appearance; what rows say of their experts goes to `sizes`."""
    turns: dict[int, dict[int, _Token]] = {}
    for line, values in table:
        turn, step, layer, slot, expert = (table.whole(line, COLUMNS[i], values[i]) for i in (0, 2, 3, 4, 5))
        if expert >= _MOST_EXPERTS:
            remedy = "experts are numbers below 2^31; correct the row"
            raise fault(table.path, f"line {line}", f"expert is {expert}", remedy)
        phase = _PHASES.get(values[1].strip())
        if phase is None:
            remedy = "give 0 or prefill, 1 or decode"
            raise fault(table.path, f"line {line}", f"phase is {values[1][:40]!r}", remedy)
        token = turns.setdefault(turn, {}).setdefault(step, _Token(phase, line))
        slots = token.layers.setdefault(layer, {})
        if token.phase != phase or slot in slots:
            what = "in both phases" if token.phase != phase else f"twice in layer {layer}, slot {slot}"
            problem = f"turn {turn}, step {step} comes {what}"
            raise fault(table.path, f"line {line}", problem, "give each run a file, or its own turn")
        if len(slots) >= _MOST_SLOTS:
            problem = f"is slot number {_MOST_SLOTS + 1} of one layer"
            raise fault(table.path, f"line {line}", problem, f"a token has at most {_MOST_SLOTS}; correct the row")
        if any(expert == other for other, _ in slots.values()):
            raise fault(table.path, f"line {line}", f"expert {expert} comes twice in one layer", "correct the row")
        if values[7]:
            sizes.add(layer, expert, values[7], f"line {line} of {table.path.name}")
        slots[slot] = (expert, table.weight(line, COLUMNS[6], values[6]))
    return turns


def _facts(
    source: str | Path,
    tables: list[CsvTable],
    turns: list[tuple[Path, int, dict[int, _Token]]],
    model: str,
    num_experts: int,
) -> tuple[str, int, list[str]]:
    """Model and number of experts: as given, else as the comments say; and notes on what was concluded."""
    notes = []
    found = [match for table in tables for text in table.comments if (match := _PREAMBLE.search(text))]
    if not model and found:
        model = re.split(r"[/\\]", found[0]["model"].strip())[-1].removesuffix(".gguf")
        notes.append(
            f"model={model}, from the file; to simulate it by name give model=NAME, one that `expertflow sim --help` "
            "lists"
        )
    if not model:
        raise fault(source, "source", "names no model", "give model=NAME, one that `expertflow sim --help` lists")
    num_experts = num_experts or max((int(match["num_experts"]) for match in found), default=0)
    where = max(
        (
            (expert, path, token.line)
            for path, _, steps in turns
            for token in steps.values()
            for slots in token.layers.values()
            for expert, _ in slots.values()
        ),
        key=lambda item: item[0],
    )
    if not num_experts:
        num_experts = where[0] + 1
        notes.append(f"num_experts={num_experts}, the highest id and one; give num_experts= if there are more")
    if where[0] >= num_experts:
        problem = f"a token that begins here holds expert {where[0]}, outside 0 … {num_experts - 1}"
        raise fault(where[1], f"line {where[2]}", problem, "correct num_experts")
    return model, num_experts, notes


def _check_order(path: Path, steps: dict[int, _Token]) -> None:
    """Prefill steps come before decode steps."""
    ordered = [steps[step] for step in sorted(steps)]
    for before, token in pairwise(ordered):
        if token.phase < before.phase:
            remedy = "a turn is a prompt, then its answer; split the turn"
            raise fault(path, f"line {token.line}", "is a prefill step after a decode step", remedy)


def _complete(path: Path, turn: int, steps: dict[int, _Token], layers: list[int], incomplete: str) -> int:
    """Drop or fill, in place, prompt tokens that lack a layer; how many there were."""
    lacking: list[int] = []
    following: dict[int, dict[int, tuple[int, float]]] = {}
    for step in sorted(steps, reverse=True):
        token = steps[step]
        missing = [layer for layer in layers if layer not in token.layers]
        if missing and (token.phase == 1 or (incomplete == "repeat" and missing[0] not in following)):
            raise _cut_off(path, token, turn, step, missing[0])
        if missing:
            lacking.append(step)
            if incomplete == "repeat":
                token.layers |= {layer: following[layer] for layer in missing}
        elif lacking and incomplete == "drop":
            gap = steps[lacking[-1]]
            absent = next(layer for layer in layers if layer not in gap.layers)
            raise _cut_off(path, gap, turn, lacking[-1], absent)
        following |= token.layers
    if incomplete == "drop":
        for step in lacking:
            del steps[step]
    if not steps:
        raise fault(path, f"turn {turn}", "has no token with all layers", "use incomplete=repeat, or remove the turn")
    return len(lacking)


def _cut_off(path: Path, token: _Token, turn: int, step: int, layer: int) -> TraceError:
    problem = f"turn {turn}, step {step} has no row for layer {layer}"
    return fault(path, f"line {token.line}", problem, "the file is cut off or mixed up; remove this step")


def _request(path: Path, turn: int, steps: dict[int, _Token], layers: list[int], many: bool) -> Request:
    ordered = sorted(steps)
    width = max(len(slots) for token in steps.values() for slots in token.layers.values())
    check_bytes(path, f"turn {turn}", 16 * len(ordered) * len(layers) * width)
    experts = np.full((len(ordered), len(layers), width), -1, np.int32)
    weights = np.zeros(experts.shape, np.float64)
    for row, step in enumerate(ordered):
        for column, layer in enumerate(layers):
            slots = steps[step].layers[layer]
            chosen = [slots[slot] for slot in sorted(slots)]
            experts[row, column, : len(chosen)] = [expert for expert, _ in chosen]
            weights[row, column, : len(chosen)] = [weight for _, weight in chosen]
    return Request(
        experts,
        _half(weights),
        prompt_len=sum(token.phase == 0 for token in steps.values()),
        context_len=ordered[0],
        label=f"{path.stem}/turn {turn}" if many else f"turn {turn}",
    )


def _half(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float16] | None:
    return None if math.isnan(float(weights.sum())) else weights.astype(np.float16)
