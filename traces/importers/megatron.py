"""Importer of Megatron-LM's router traces (`--moe-routing-trace-path`): one JSON-lines file a rank.

A line is one layer of one step: `{"step": 0, "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2, "topk": 4,
"top_indices": [[12, 45, 7, 1], …]}`. How it is read:

- A step is a forward; where a layer comes again within a step (training, with several microbatches), a new one begins.
- A forward of several tokens is a prompt, one of a single token decodes; a prompt after a decoded token begins a
  request. Requests decoded together look like a prompt: record one at a time.
- Each rank is a sequence of forwards of its own; `rank=` takes one. Layers of the block `mtp` (multi-token prediction)
  are left out.
- Where the router's map is recorded in place of its choice, the experts of a token stand in rising order, not best
  first; the file does not say which it is. There are no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from traces.container import fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.json_text import integer, integer_list, numbered_lines
from traces.importers.runs import Runs

_RECORD = '{"step": 0, "layer": 0, "rank": 0, "top_indices": [[…], …]}'


def import_megatron(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    *,
    model: str = "",
    num_experts: int = 0,
    rank: int = -1,
    incomplete: str = "drop",
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the trace of a rank, or of all in a folder. TraceError names file and line."""
    choices = Choices()
    runs = Runs(choices)
    reader = _Reader(runs, rank)
    paths = files_of(source, ".jsonl")
    for path in tracked(paths, progress, "reading router traces"):
        choices.reads(path)
        for line, value in numbered_lines(path):
            try:
                reader.take(line, value)
            except ValueError as error:
                raise fault(path, f"line {line}", str(error), f"a record is {_RECORD}") from None
    notes = [*reader.notes(), *runs.number(paths[0])]
    what = Source(paths[0], "Megatron-LM router trace", license, model, num_experts, incomplete, notes=tuple(notes))
    return write_choices(choices, what, output)


class _Reader:
    """Records, put to the forwards of their rank."""

    def __init__(self, runs: Runs, rank: int) -> None:
        self._runs, self._rank = runs, rank
        self._num_mtp = 0
        self._forwards: dict[int, tuple[int, int, set[int]]] = {}

    def take(self, line: int, value: Any) -> None:
        """One line. ValueError says what is wrong with it."""
        if not isinstance(value, dict):
            raise ValueError("is no JSON object")
        if value.get("block", "decoder") != "decoder" or value.get("mtp_idx") is not None:
            self._num_mtp += 1
            return
        step, layer, rank = (integer(value, key) for key in ("step", "layer", "rank"))
        if self._rank >= 0 and rank != self._rank:
            return
        tokens = value.get("top_indices")
        if not isinstance(tokens, list):
            raise ValueError("has no list top_indices")
        last_step, forward, layers = self._forwards.get(rank, (step, 0, set()))
        if step < last_step:
            raise ValueError(f"goes back from step {last_step} to {step}")
        if step > last_step or layer in layers:
            forward, layers = forward + 1, set()
        layers.add(layer)
        self._forwards[rank] = (step, forward, layers)
        for token in tokens:
            self._runs.add(f"rank {rank}", forward, layer, integer_list(token, "top_indices"), place=line)

    def notes(self) -> list[str]:
        """What was left out or concluded."""
        notes = ["experts of a row stand in recorded order, not known to be best first; no weights"]
        if self._num_mtp:
            notes.append(f"{self._num_mtp} records of multi-token prediction left out")
        if len(self._forwards) > 1:
            notes.append(f"{len(self._forwards)} ranks, each with its own requests; give rank= for one")
        return notes
