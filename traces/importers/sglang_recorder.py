"""Importer of SGLang's expert distribution recorder (`per_token`), and of step files that a fork of it writes.

`.pt`: what `--expert-distribution-recorder-mode per_token` dumps, one record a forward: `topk_ids_of_layer`
[layers, tokens, top_k], `positions`, `forward_mode` (1 = extend, 2 = decode, 3 = mixed), `extend_seq_lens`, `rank`, and
`last_physical_to_logical_map` [layers, physical experts]. Read as data: nothing in it is executed. How it is read:

- Experts are physical; the map makes them logical. A layer that holds no id from 0 is dense, and left out.
- A token at position 0 begins a request. A token at any other position goes on the request that stands there; where
  several do, the one that began first: requests of one length decoded together may be confused, which a note says.
  Where none does, a request begins there (its beginning was not recorded, or its prefix came from a cache).
- A record without a token, as an idle rank writes it, is left out.
- Tokens of an extend are the prompt's. Tokens of one forward keep its number: they ran together.
- Ranks are read apart; `rank=` takes one. By default it is the lowest there is.

`.jsonl`: one line a step and layer, `{"phase": "prefill", "step": 0, "layer": 0, "rank": 0, "tokens": [{"slot": 0,
"position": 0, "experts": […]}, …]}`. A slot whose position does not rise begins its next request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from traces.container import fault
from traces.importers.assemble import Choices, Source, write_choices
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of, tracked
from traces.importers.json_text import integer, integers, numbered_lines
from traces.importers.packed import suffix_of
from traces.torch_file import Unread, read_torch

_EXTEND, _DECODE, _MIXED = 1, 2, 3
_MOST_LISTED = 1 << 24
_NO_DUMP = "give what SGLang's recorder dumped in the mode per_token"

Ints = npt.NDArray[np.int64]


def import_sglang_recorder(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    *,
    model: str = "",
    num_experts: int = 0,
    rank: int = -1,
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the dump, or the dumps of a folder, as one trace. TraceError names file and record."""
    choices, notes = Choices(positions=True), list[str]()
    paths = files_of(source, ".pt", ".jsonl")
    if len({suffix_of(path) == ".pt" for path in paths}) > 1:
        raise fault(
            source if isinstance(source, str | Path) else paths[0], "source", "mixes .pt and .jsonl", "give one kind"
        )
    dumps = _Dumps(choices, rank) if suffix_of(paths[0]) == ".pt" else _Steps(choices, rank)
    for path in tracked(paths, progress, "reading dumps"):
        choices.reads(path)
        dumps.read(path)
    notes += dumps.notes()
    num_experts = num_experts or dumps.num_experts
    unit = "record" if isinstance(dumps, _Dumps) else "line"
    what = Source(
        paths[0], "SGLang expert distribution recorder", license, model, num_experts, unit=unit, notes=tuple(notes)
    )
    return write_choices(choices, what, output)


# -- .pt -----------------------------------------------------------------------------------------------------


class _Dumps:
    """Dumps of the recorder, read one after the other."""

    def __init__(self, choices: Choices, rank: int) -> None:
        self._choices, self._rank = choices, rank
        self._ranks: set[int] = set()
        self._next: dict[int, list[int]] = {}
        """Position → requests that go on there, in the order in which they began."""
        self._num_forwards = self._num_confusable = self._num_headless = 0
        self.num_experts = 0

    def notes(self) -> list[str]:
        """What was left out or concluded."""
        notes = []
        if len(self._ranks) > 1:
            notes.append(f"rank {self._rank} of {len(self._ranks)}; give rank= for another")
        if self._num_confusable:
            notes.append(f"{self._num_confusable} tokens could go on several requests: the first to begin was taken")
        if self._num_headless:
            notes.append(f"{self._num_headless} requests begin after position 0: their beginning is not in the dump")
        return notes

    def read(self, path: Path) -> None:
        """One file, with requests of its own."""
        content = read_torch(path, _NO_DUMP)
        records = content.get("records") if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise fault(path, "file", "has no list records", _NO_DUMP)
        try:
            mapping = _array(content.get("last_physical_to_logical_map"), 2)
        except ValueError as error:
            raise fault(path, "last_physical_to_logical_map", str(error), _NO_DUMP) from None
        self._next = {}
        ranks = {record["rank"] for record in records if isinstance(record, dict) and type(record.get("rank")) is int}
        self._ranks |= ranks
        if self._rank < 0 and ranks:
            self._rank = min(ranks)
        for number, record in enumerate(records):
            try:
                self._take(number, record, mapping)
            except ValueError as error:
                raise fault(path, f"record {number}", str(error), _NO_DUMP) from None

    def _take(self, number: int, record: Any, mapping: Ints | None) -> None:
        if not isinstance(record, dict):
            raise ValueError("is no table")
        if type(record.get("rank")) is int and record["rank"] != self._rank:
            return
        if _is_idle(record):
            return
        ids = _array(record.get("topk_ids_of_layer"), 3)
        if ids is None or 0 in ids.shape:
            raise ValueError("has no topk_ids_of_layer [layers, tokens, top_k]")
        positions = _positions(record.get("positions"), ids.shape[1])
        prefill = _of_prompt(record, ids.shape[1])
        ids = self._logical(ids, mapping)
        requests = [self._request(position) for position in positions]
        for layer in np.flatnonzero((ids >= 0).any(axis=(1, 2))).tolist():
            for token, experts in enumerate(ids[layer].tolist()):
                self._choices.add(
                    requests[token],
                    positions[token],
                    layer,
                    experts,
                    place=number,
                    prefill=prefill[token],
                    forward=self._num_forwards,
                )
        self._num_forwards += 1

    def _logical(self, ids: Ints, mapping: Ints | None) -> Ints:
        if mapping is None:
            return ids
        if len(mapping) != len(ids) or int(ids.max()) >= mapping.shape[1]:
            raise ValueError(f"does not fit last_physical_to_logical_map {list(mapping.shape)}")
        self.num_experts = max(self.num_experts, int(mapping.max()) + 1)
        return np.where(ids < 0, -1, np.take_along_axis(mapping[:, None, :], np.maximum(ids, 0), axis=2))

    def _request(self, position: int) -> int:
        """The request that a token at `position` belongs to."""
        waiting = self._next.get(position, [])
        if position and waiting:
            self._num_confusable += len(waiting) > 1
            request = waiting.pop(0)
        else:
            self._num_headless += position > 0
            request = self._choices.new_request(f"request {len(self._choices.labels)}")
        if not waiting:
            self._next.pop(position, None)
        self._next.setdefault(position + 1, []).append(request)
        return request


def _is_idle(record: Mapping[str, Any]) -> bool:
    """Whether a rank had no token in a forward, as where others' requests were run."""
    positions, ids = record.get("positions"), record.get("topk_ids_of_layer")
    tokens = ids.shape[1] if isinstance(ids, np.ndarray) and ids.ndim == 3 else 0
    return isinstance(positions, np.ndarray | list) and len(positions) == 0 and tokens == 0


def _array(value: Any, num_axes: int) -> Ints | None:
    """An array or nested list as whole numbers of so many axes; None where there is none. ValueError else."""
    if value is None:
        return None
    if isinstance(value, Unread):
        raise ValueError("holds a tensor that cannot be read")
    found = value if isinstance(value, np.ndarray) else _of_lists(value, num_axes)
    if found.dtype.kind not in "iu" or found.ndim != num_axes:
        raise ValueError(f"holds {found.dtype} of the shape {list(found.shape)}")
    if found.size and (int(found.max()) >= 1 << 31 or int(found.min()) < -(1 << 31)):
        raise ValueError("holds numbers of more than 31 bits")
    return found.astype(np.int64)


def _of_lists(value: Any, num_axes: int) -> Ints:
    """The numbers of nested lists, which may be parts of each other: counted before they are written out."""
    level, shape = [value], list[int]()
    for _ in range(num_axes):
        sizes = {len(part) if isinstance(part, list) else -1 for part in level}
        if len(sizes) != 1 or -1 in sizes:
            raise ValueError(f"holds no array of {num_axes} axes")
        shape += sizes
        if len(level) * shape[-1] > _MOST_LISTED:
            raise ValueError(f"holds lists of more than {_MOST_LISTED} numbers")
        level = [item for part in level for item in part]
    if not all(type(item) is int and abs(item) <= 1 << 31 for item in level):
        raise ValueError("holds lists of other than whole numbers of 32 bits")
    return np.array(level, np.int64).reshape(shape)


def _positions(value: Any, num_tokens: int) -> list[int]:
    found = _array(value, 1)
    if found is None or len(found) != num_tokens or (len(found) and int(found.min()) < 0):
        raise ValueError(f"has no positions of its {num_tokens} tokens")
    return [int(position) for position in found]


def _of_prompt(record: Mapping[str, Any], num_tokens: int) -> list[bool]:
    """Whether each token of a forward is of a prompt."""
    mode = record.get("forward_mode")
    if mode not in (_EXTEND, _DECODE, _MIXED):
        raise ValueError(f"has forward_mode={str(mode)[:20]!r}: not 1 (extend), 2 (decode) or 3 (mixed)")
    lengths = record.get("extend_seq_lens")
    if mode == _MIXED and isinstance(lengths, list):
        # What is extended stands first; an extension by one token is a decoded one.
        of_prompt = [length > 1 for length in lengths if type(length) is int for _ in range(min(length, num_tokens))]
        return (of_prompt + [False] * num_tokens)[:num_tokens]
    return [mode != _DECODE] * num_tokens


# -- steps ---------------------------------------------------------------------------------------------------


class _Steps:
    """Step files: a line for each step and layer, tokens named by slot and position."""

    def __init__(self, choices: Choices, rank: int) -> None:
        self._choices, self._rank = choices, rank
        self._ranks: set[int] = set()
        self._requests: dict[tuple[int, int], tuple[int, int]] = {}
        """(rank, slot) → (request, highest position)."""
        self._forwards: dict[tuple[int, int], int] = {}
        self._tokens: dict[tuple[int, int, int, int], int] = {}
        self._step: dict[int, int] = {}
        self.num_experts = 0

    def notes(self) -> list[str]:
        """What was left out or concluded."""
        return [f"rank {self._rank} of {len(self._ranks)}; give rank= for another"] if len(self._ranks) > 1 else []

    def read(self, path: Path) -> None:
        """One file; files of a folder go on where the one before ended."""
        for line, value in numbered_lines(path):
            try:
                self._take(line, value)
            except ValueError as error:
                raise fault(
                    path, f"line {line}", str(error), "give step, layer, phase and tokens with slot, position"
                ) from None

    def _take(self, line: int, value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError("is no JSON object")
        rank = integer(value, "rank") if "rank" in value else 0
        self._ranks.add(rank)
        if self._rank < 0:
            self._rank = rank
        if rank != self._rank:
            return
        step, layer, phase = integer(value, "step"), integer(value, "layer"), value.get("phase")
        if phase not in ("prefill", "extend", "decode"):
            raise ValueError(f"has phase={str(phase)[:20]!r}: not prefill or decode")
        forward = self._forwards.setdefault((rank, step), len(self._forwards))
        if self._step.get(rank) != step:
            self._step[rank] = step
            self._tokens = {}
        for slot, position, experts in _tokens(value):
            request = self._request(rank, slot, position, step)
            self._choices.add(request, position, layer, experts, place=line, prefill=phase != "decode", forward=forward)

    def _request(self, rank: int, slot: int, position: int, step: int) -> int:
        """The request of (slot, position) in a step; all its layers get the same."""
        known = self._tokens.get((rank, step, slot, position))
        if known is not None:
            return known
        request, highest = self._requests.get((rank, slot), (-1, -1))
        if request < 0 or position <= highest:
            request = self._choices.new_request(f"request {len(self._choices.labels)}")
        self._requests[(rank, slot)] = (request, position)
        self._tokens[(rank, step, slot, position)] = request
        return request


def _tokens(value: Mapping[str, Any]) -> Iterator[tuple[int, int, list[int]]]:
    tokens = value.get("tokens")
    if not isinstance(tokens, list):
        raise ValueError("has no list tokens")
    for token in tokens:
        if not isinstance(token, dict):
            raise ValueError("has a token that is no table")
        yield integer(token, "slot"), integer(token, "position"), integers(token, "experts")
