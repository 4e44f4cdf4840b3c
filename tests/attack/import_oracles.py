"""Second readers of the sources that are imported: which experts each token chose, counted by hand.

Each takes the bytes of an accepted source and what was read of the trace made of it, `(report, arrays)`, and says what
is wrong, or "". They share no code with `traces.importers`.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.attack import trace_oracle

Rows = list[list[list[int]]]
"""Experts of a layer of a token."""
Found = tuple[Any, dict[str, Any]]


def _rows(arrays: dict[str, Any]) -> Rows:
    """The rows of a trace without padding."""
    padding = int(np.iinfo(arrays["experts"].dtype).max)
    return [[[e for e in ids if e != padding] for ids in row] for row in arrays["experts"].tolist()]


def _compared(found: Found, requests: Sequence[Rows]) -> str:
    """Requests, tokens and experts, in their order."""
    report, arrays = found
    starts = np.cumsum([0, *map(len, requests)]).tolist()
    if (report.num_requests, report.num_tokens) != (len(requests), starts[-1]):
        return f"{report.num_requests} requests of {report.num_tokens} tokens, by hand {len(requests)} of {starts[-1]}"
    if arrays["request_start"].tolist() != starts:
        return "requests begin elsewhere"
    return "" if _rows(arrays) == [row for rows in requests for row in rows] else "tokens chose other experts"


def gpt_oss_json(content: bytes, found: Found) -> str:
    """One value: a record or a list of them."""
    value = json.loads(content.decode("utf-8-sig"))
    return _records(value if isinstance(value, list) else [value], found)


def gpt_oss_jsonl(content: bytes, found: Found) -> str:
    """A record a line."""
    lines = io.StringIO(content.decode("utf-8-sig"), newline=None)
    return _records([json.loads(line) for line in lines if line.strip()], found)


def _records(records: Sequence[dict[str, Any]], found: Found) -> str:
    requests = []
    for record in records:
        if record.get("has_repetition", False) or not record.get("finished_successfully", True):
            continue
        rows = []
        for token in record["router_data"]:
            (layers,) = token.values()
            rows.append([layers[f"layer_{index}"]["selected_experts"] for index in range(len(layers))])
        requests.append(rows)
    return _compared(found, requests)


def moe_beyond_csv(content: bytes, found: Found) -> str:
    """Batches in the order in which they come, layers in theirs, tokens in the file's."""
    batches: dict[int, dict[int, list[list[int]]]] = {}
    for row in _table(content, comments=False):
        ids = [int(piece) for piece in row["Activated Expert IDs"].strip()[1:-1].split(",")]
        layers = batches.setdefault(int(row["Batch Number"]), {})
        layers.setdefault(int(row["Layer ID"]), []).append(ids)
    requests = []
    for layers in batches.values():
        columns = [layers[layer] for layer in sorted(layers)]
        requests.append([list(row) for row in zip(*columns, strict=True)])
    return _compared(found, requests)


def route_csv(content: bytes, found: Found) -> str:
    """Turns in the order in which they come, steps and layers in theirs; tokens that lack a layer are left out."""
    turns: dict[int, dict[int, dict[int, dict[int, int]]]] = {}
    for row in _table(content, comments=True):
        layers = turns.setdefault(int(row["turn"]), {}).setdefault(int(row["step"]), {})
        layers.setdefault(int(row["layer"]), {})[int(row["slot"])] = int(row["expert"])
    every = sorted({layer for steps in turns.values() for layers in steps.values() for layer in layers})
    requests = []
    for steps in turns.values():
        whole = [steps[step] for step in sorted(steps) if len(steps[step]) == len(every)]
        requests.append([[[t[layer][slot] for slot in sorted(t[layer])] for layer in every] for t in whole])
    return _compared(found, requests)


def _table(content: bytes, comments: bool) -> list[dict[str, str]]:
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    kept = (line for line in lines if not (comments and line.startswith("#")))
    rows = [row for row in csv.reader(kept) if row]
    names = [name.strip() for name in rows[0]]
    return [dict(zip(names, row, strict=True)) for row in rows[1:]]


def event_csr(content: bytes, found: Found) -> str:
    """In each layer each expert is chosen as often as the whole forwards' events say, and there are as many tokens."""
    _, tensors = trace_oracle.container(content)
    lists = {name: trace_oracle.values(tensor) for name, tensor in tensors.items()}
    names = ("request", "scheduler_step", "forward_cycle", "layer", "token_count", "phase")
    events = list(zip(*(lists[name] for name in names), strict=True))
    every = sorted({event[3] for event in events})
    forwards: dict[tuple[int, ...], list[int]] = {}
    for index, event in enumerate(events):
        forwards.setdefault(event[:3], []).append(index)
    whole = [at for at in forwards.values() if len(at) == len(every) and len({events[i][4:] for i in at}) == 1]
    chosen = [Counter[int]() for _ in every]
    for index in (i for at in whole for i in at):
        layer = every.index(events[index][3])
        for entry in range(lists["offsets"][index], lists["offsets"][index + 1]):
            chosen[layer][lists["expert_ids"][entry]] += lists["assignment_counts"][entry]
    report, arrays = found
    if report.num_tokens != sum(events[at[0]][4] for at in whole):
        return "another number of tokens"
    rows = _rows(arrays)
    counted = [Counter(expert for row in rows for expert in row[layer]) for layer in range(len(every))]
    return "" if counted == chosen else "experts are chosen more or less often"


def engine_npy(content: bytes, found: Found) -> str:
    """One request: NumPy's own reading of it."""
    # It tells of a header that Python 2 wrote in a warning.
    with warnings.catch_warnings(action="ignore"):
        return _dumps([np.load(io.BytesIO(content), allow_pickle=False)], found)


def engine_npz(content: bytes, found: Found) -> str:
    """A request an array."""
    with warnings.catch_warnings(action="ignore"), np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return _dumps([arrays[name] for name in arrays.files if name != "prompt_len"], found)


def _dumps(dumps: Sequence[Any], found: Found) -> str:
    """Negative ids are padding; layers and last tokens with one value throughout hold no choice."""
    lists = [dump.astype(np.int64).tolist() for dump in dumps]
    wide = dumps[0].shape[2] > 1

    def unset(ids: list[int]) -> bool:
        return len(set(ids)) == 1 if wide else ids[0] < 0

    layers = range(dumps[0].shape[1])
    kept = [at for at in layers if not wide or not all(unset(row[at]) for rows in lists for row in rows)]
    requests = []
    for rows in lists:
        made = [[row[at] for at in kept] for row in rows]
        while all(map(unset, made[-1])):
            made.pop()
        requests.append([[[e for e in ids if e >= 0] for ids in row] for row in made])
    return _compared(found, requests)


RECHECKS: dict[str, Callable[[bytes, Any], str]] = {
    "gpt-oss-json": gpt_oss_json,
    "gpt-oss-jsonl": gpt_oss_jsonl,
    "moe-beyond-csv": moe_beyond_csv,
    "route-csv": route_csv,
    "event-csr": event_csr,
    "engine-npy": engine_npy,
    "engine-npz": engine_npz,
    "engine-npz-compressed": engine_npz,
}
"""By the name of the reader."""
