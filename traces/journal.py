"""The journal of a recording that was not finished, read back: which rows of the files beside it count.

`traces.stream` writes it after each whole request and describes the folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from traces.container import DTYPES, Array, TraceError, check_file, fault
from traces.format import RowArray
from traces.jsontext import parse_json
from traces.layout import ARRAYS, PER_REQUEST
from traces.reading import read_table, read_text, text_lines

JOURNAL, LABELS, CONFIG = "journal.json", "labels.jsonl", "config.json"
JOURNAL_VERSION = 1
FACTS = ("model", "num_experts", "source", "license", "moe_layer_ids")
"""Fields of `traces.format.About` that a recording knows from its start."""
TAKEN = frozenset({*FACTS, *ARRAYS, "request_labels", "path", "arrays"})
"""Names of fields, arrays and arguments: no header keys."""
_MAX_BYTES = 1 << 20
_SPOILED = "the folder was changed; delete it and record again"


class Journal:
    """A journal that was read back, and the files it speaks of; nothing in it is believed unchecked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL
        if not self.path.exists():
            raise fault(folder, "recording", "holds no whole request", "delete the folder and record again")
        read = read_table(self.path, _SPOILED, _MAX_BYTES)
        try:
            self.header, self.variant = read["header"], read["variant"]
            self.num_requests, self.num_tokens = read["num_requests"], read["num_tokens"]
            self.facts, self.has_labels = read["facts"], read["has_labels"]
            self.columns = {
                name: (DTYPES[dtype], tuple(map(_size, row))) for name, (dtype, row) in read["columns"].items()
            }
            known = read["version"] == JOURNAL_VERSION
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._spoiled("is no journal") from None
        if not known:
            raise fault(self.path, "journal", "is of another release", "recover with the release that recorded")
        if not (
            isinstance(self.header, dict)
            and isinstance(self.facts, dict)
            and self.facts.keys() == {*FACTS}
            and isinstance(self.variant, str)
            and _is_count(self.num_requests, 0)
            and _is_count(self.num_tokens, 0)
            and _is_count(self.facts["num_experts"], 1)
            and all(isinstance(self.facts[key], str) for key in ("model", "source", "license"))
            and _is_rising(self.facts["moe_layer_ids"])
            and isinstance(self.has_labels, bool)
            and not self.header.keys() & TAKEN
        ):
            raise self._spoiled("is no journal")
        if self.num_requests < 1:
            raise fault(folder, "recording", "holds no whole request", "delete the folder and record again")

    def arrays(self) -> dict[str, RowArray]:
        """What `write_trace` takes, mapped; of variants the chosen one."""
        lengths = np.array(self._map("request_rows"))
        arrays: dict[str, Any] = {"request_start": np.cumsum([0, *lengths.tolist()])}
        for name in self.columns:
            plain, _, variant = name.partition("@")
            if name != "request_rows" and variant in ("", self.variant):
                arrays[plain] = self._map(name)
        for name in ("experts", "prompt_len"):
            if name not in arrays:
                raise self._spoiled(f"lacks {name}")
        return arrays

    def labels(self) -> list[str] | None:
        """One label per request, if there are any."""
        if not self.has_labels:
            return None
        labels = []
        try:
            for _, (number, line) in zip(range(self.num_requests), text_lines(self.folder / LABELS), strict=False):
                labels.append(parse_json(self.folder / LABELS, f"line {number}", line))
        except ValueError:
            raise self._spoiled("does not fit its labels") from None
        if len(labels) != self.num_requests or not all(isinstance(label, str) for label in labels):
            raise self._spoiled("does not fit its labels")
        return labels

    def config(self) -> str | None:
        """The text of the model's configuration, if it was given."""
        path = self.folder / CONFIG
        return read_text(path, remedy=_SPOILED) if path.exists() else None

    def _map(self, name: str) -> Array:
        plain, at, variant = name.partition("@")
        # A name becomes that of a file: it must not leave the folder.
        if name not in self.columns or plain not in {*ARRAYS, "request_rows"} or (at and not variant.isidentifier()):
            raise self._spoiled(f"does not know {name[:40]!r}")
        dtype, row = self.columns[name]
        if name == "request_rows" and (dtype, row) != (np.dtype(np.int64), ()):
            raise self._spoiled("has request_rows that are no whole numbers")
        rows = self.num_requests if name in PER_REQUEST or name == "request_rows" else self.num_tokens
        file = self.folder / f"{name}.raw"
        needed = rows * math.prod(row) * dtype.itemsize
        if len(row) > 8 or check_file(file) < max(needed, 1):
            raise self._spoiled(f"needs {needed} bytes of {file.name}, which has fewer")
        # A plain ndarray over the mapping, as in traces.container; longer files end in an unfinished request.
        return np.memmap(file, dtype=dtype, mode="r", shape=(rows, *row)).view(np.ndarray)

    def _spoiled(self, problem: str) -> TraceError:
        return fault(self.path, "journal", problem, _SPOILED)


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 48


def _is_rising(value: object) -> bool:
    """Whether it may be `moe_layer_ids`: None, or whole numbers; whether they rise is checked with the trace."""
    return value is None or (isinstance(value, list) and all(_is_count(item, 0) for item in value))


def _size(value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError("no size")
    return value
