"""Importer of vLLM routing logs in JSON lines, as its MoE loggers write them: one file, or one a layer.

A line `{"type": "route", "req_id": …, "token_idx": …, "layer": …, "topk_ids": […], "topk_weights": […]}` is what one
token chose in one layer; a line of the type `meta` names model and top_k. How it is read:

- `token_idx` counts the tokens of a forward: it begins again with the next, in which the layer number falls. A forward
  of several tokens is a prompt, one of a single token decodes; a prompt after a decoded token begins a request. Several
  requests decoded in one forward look like a prompt: record one at a time.
- Each `req_id` is a sequence of forwards of its own. A layer number that falls begins the next forward of all: which
  requests ran together is kept (`forward_id`) where the log shows it.
- Files of a folder belong together (one a layer) until a layer comes again for the same `req_id`: then that file goes
  on where the one before ended, if it begins with a decoded token or within a forward, else it begins another log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from traces.container import TraceError, fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.columns import USUAL
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.json_text import integer, integers, numbered_lines, numbers
from traces.importers.runs import Runs, Told

_PHASES = {*USUAL["phase"]}
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
        line = 0
        try:
            for line, value in numbered_lines(path):
                reader.take(line, value)
            reader.end_head()
        except TraceError:
            raise
        except ValueError as error:
            raise fault(path, f"line {line}", str(error), f"a choice is {_ROUTE}") from None
    choices.has_forward = reader.tells_forwards()
    notes = (*reader.notes(), *runs.number(paths[0]))
    text = "vLLM routing log"
    named = model or reader.model
    return write_choices(choices, Source(paths[0], text, license, named, num_experts, incomplete, notes=notes), output)


@dataclass
class _Line:
    """A choice as a line tells it."""

    number: int
    request: str
    layer: int
    token: int
    experts: list[int]
    weights: list[float] | None


class _Reader:
    """Lines of logs, put to their stream, layer and forward."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.model = ""
        self.num_continued = 0
        self._log = 0
        self._head: list[_Line] | None = None
        """The first lines of a file, until they show whether it goes on where the file before ended."""
        self._seen: set[tuple[str, int]] = set()
        self._in_file: set[tuple[str, int]] = set()
        self._last: dict[str, tuple[int, int, int]] = {}
        """Request → the layer, token and forward of its last choice in this log's file."""
        self._is_continued = False
        self._shared = _Shared()

    def begin_file(self) -> None:
        """What follows is of the next file."""
        self._seen |= self._in_file
        self._in_file, self._head, self._is_continued = set(), [], False

    def take(self, number: int, value: Any) -> None:
        """One line. ValueError says what is wrong with it."""
        if not isinstance(value, dict):
            raise ValueError("is no JSON object")
        if value.get("type", "route") != "route":
            name = value.get("model_id")
            if isinstance(name, str) and not self.model:
                self.model = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1][:200]
            return
        if told := value.keys() & _PHASES:
            raise ValueError(f"tells {min(told)}, which counts in a table: python -m traces import table")
        layer, token = integer(value, "layer"), integer(value, "token_idx")
        request = str(value.get("req_id", ""))[:200]
        weights = numbers(value, "topk_weights") if value.get("topk_weights") is not None else None
        line = _Line(number, request, layer, token, integers(value, "topk_ids"), weights)
        if self._head is None:
            self._place(line)
            return
        first = self._head[0] if self._head else line
        self._head.append(line)
        ends = line.request == first.request and (line.layer != first.layer or line.token <= first.token)
        if len(self._head) > 1 and ends:
            self.end_head()

    def end_head(self) -> None:
        """Place the first lines of a file, which has no more or has shown how it begins. ValueError as of `take`."""
        head, self._head = self._head or [], None
        if not head:
            return
        first = head[0]
        own = [line for line in head if line.request == first.request and line.layer == first.layer]
        if (first.request, first.layer) in self._seen and first.request in self._last:
            layer, token, _ = self._last[first.request]
            inside = first.layer > layer or (first.layer == layer and first.token > token)
            self._is_continued = inside or len({line.token for line in own}) == 1
        if self._is_continued:
            self.num_continued += 1
        else:
            self._last = {}
            self._shared.end_file()
        for line in head:
            self._place(line)

    def _place(self, line: _Line) -> None:
        request, layer, token = line.request, line.layer, line.token
        if (request, layer) in self._seen and not self._is_continued:
            self._log += 1
            self._seen, self._in_file, self._last = set(), set(), {}
            self._shared.end_file()
        self._in_file.add((request, layer))
        last_layer, last_token, forward = self._last.get(request, (layer, -1, 0))
        forward += layer < last_layer or (layer == last_layer and token <= last_token)
        self._last[request] = (layer, token, forward)
        stream = f"log {self._log}/{request}" if self._log else request or "log"
        told = Told(ran_in=self._shared.forward(line, forward))
        self.runs.add(stream, forward, layer, line.experts, place=line.number, weights=line.weights, told=told)

    def tells_forwards(self) -> bool:
        """Whether requests ran together, and the log shows in which forwards. To be asked at the end."""
        self._shared.end_file()
        return self._shared.is_shared and not self._shared.is_unsure

    def notes(self) -> list[str]:
        """What was concluded."""
        notes = []
        if self.num_continued:
            notes.append(f"{self.num_continued} files go on where the file before ended: taken for parts of one log")
        if self._shared.is_shared and self._shared.is_unsure:
            notes.append("which requests ran in one forward is not told: a run makes its own batches")
        return notes


class _Shared:
    """The forwards that requests of a log ran in together: a layer number that falls begins the next."""

    def __init__(self) -> None:
        self.is_shared = self.is_unsure = False
        self._number = self._layer = -1
        self._present: set[str] = set()
        """Requests of the present forward."""
        self._of: dict[str, tuple[int, int]] = {}
        """Request → its own last forward, and the number of the one over all requests."""
        self._layers: set[int] = set()
        self._is_file_shared = False

    def end_file(self) -> None:
        """Another run of lines: its forwards are none of those before."""
        # Of a file with one layer it is not seen where a forward ends for a request that does not come again.
        self.is_unsure |= self._is_file_shared and len(self._layers) == 1
        self._layer, self._layers, self._of, self._is_file_shared = -1, set(), {}, False

    def forward(self, line: _Line, own: int) -> int:
        """The number of the forward, over all requests, of a choice whose request is in its `own` one."""
        known = self._of.get(line.request)
        comes_again = line.request in self._present and known is not None and known[0] != own
        if line.layer < self._layer or self._layer < 0 or comes_again:
            self._number += 1
            self._present = set()
        self.is_unsure |= known is not None and known[0] == own and known[1] != self._number
        self._layers.add(line.layer)
        self._layer = line.layer
        self._present.add(line.request)
        self._of[line.request] = own, self._number
        self._is_file_shared |= len(self._present) > 1
        self.is_shared |= self._is_file_shared
        return self._number
