"""Importer of vLLM routing logs in JSON lines, as its MoE loggers write them: one file, or one a layer.

A line `{"type": "route", "req_id": …, "token_idx": …, "layer": …, "topk_ids": […], "topk_weights": […]}` is what one
token chose in one layer; a line of the type `meta` names model and top_k. How it is read:

- `token_idx` counts the tokens of a forward: it begins again with the next, in which the layer number falls. A forward
  of several tokens is a prompt, one of a single token decodes; a prompt after a decoded token begins a request. Several
  requests decoded in one forward look like a prompt: record one at a time.
- Each `req_id` is a sequence of forwards of its own.
- Files of a folder belong together (one a layer) until a layer comes again for the same `req_id`: then that file begins
  another log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from traces.container import fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.json_text import integer, integers, numbered_lines, numbers
from traces.importers.runs import Runs

_ROUTE = '{"type": "route", "req_id": …, "token_idx": 0, "layer": 0, "topk_ids": […]}'


def import_vllm_log(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    *,
    model: str = "",
    num_experts: int = 0,
    incomplete: str = "drop",
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the log, or the logs of a folder, as one trace. TraceError names file and line."""
    choices = Choices()
    runs = Runs(choices)
    reader = _Reader(runs)
    paths = files_of(source, ".jsonl")
    for path in tracked(paths, progress, "reading logs"):
        choices.reads(path)
        reader.begin_file()
        for line, value in numbered_lines(path):
            try:
                reader.take(line, value)
            except ValueError as error:
                raise fault(path, f"line {line}", str(error), f"a choice is {_ROUTE}") from None
    notes = tuple(runs.number(paths[0]))
    text = "vLLM routing log"
    named = model or reader.model
    return write_choices(choices, Source(paths[0], text, license, named, num_experts, incomplete, notes=notes), output)


class _Reader:
    """Lines of logs, put to their stream, layer and forward."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.model = ""
        self._log = 0
        self._seen: set[tuple[str, int]] = set()
        self._in_file: set[tuple[str, int]] = set()
        self._last: dict[str, tuple[int, int, int]] = {}
        """Request → the layer, token and forward of its last choice in this file."""

    def begin_file(self) -> None:
        self._seen |= self._in_file
        self._in_file, self._last = set(), {}

    def take(self, line: int, value: Any) -> None:
        """One line. ValueError says what is wrong with it."""
        if not isinstance(value, dict):
            raise ValueError("is no JSON object")
        if value.get("type", "route") != "route":
            name = value.get("model_id")
            if isinstance(name, str) and not self.model:
                self.model = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1][:200]
            return
        layer, token = integer(value, "layer"), integer(value, "token_idx")
        request = str(value.get("req_id", ""))[:200]
        if (request, layer) in self._seen:
            self._log += 1
            self._seen, self._in_file, self._last = set(), set(), {}
        self._in_file.add((request, layer))
        last_layer, last_token, forward = self._last.get(request, (layer, -1, 0))
        forward += layer < last_layer or (layer == last_layer and token <= last_token)
        self._last[request] = (layer, token, forward)
        weights = numbers(value, "topk_weights") if value.get("topk_weights") is not None else None
        experts = integers(value, "topk_ids")
        stream = f"log {self._log}/{request}" if self._log else request or "log"
        self.runs.add(stream, forward, layer, experts, place=line, weights=weights)
