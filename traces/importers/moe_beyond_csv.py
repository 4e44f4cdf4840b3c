"""Importer of the expert activations of MoE-Beyond (arXiv 2508.17137): CSV, DeepSeek-V2-Lite.

Columns `Layer ID, Batch Number, Token, Activated Expert IDs`; more columns (`Token Embedding Vector`) are ignored.
How the files are read, since the source does not say:

- A file is one recorded run; each `Batch Number` in it is a request, in order of first appearance.
- `Token` is the token's text, so it cannot tell positions apart ("the" comes twice). The position is the row's rank
  among the rows of its (batch, layer), in file order. That holds for files written layer by layer, as the source
  does, and for files written token by token. Texts at one position must agree in all layers.
- Layer ids are the model's own, so they start at 1 where layer 0 is dense; they go to `moe_layer_ids`.
- The source runs each prompt once: all rows are prefill (`phase=prefill`). `phase=decode` replays them one by one.
- Ids keep their order in the row. DeepSeek's gate does not sort them, so "best first" is not known; no weights.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from rich.progress import Progress

from traces.container import fault
from traces.format import About
from traces.importers.common import (
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

COLUMNS = ("Layer ID", "Batch Number", "Token", "Activated Expert IDs")
_IDS = re.compile(r"\[\s*[0-9]{1,6}(\s*,\s*[0-9]{1,6})*\s*\]", re.ASCII)

Row = tuple[int, str, list[int]]
"""Line, token text, expert ids."""


def import_moe_beyond_csv(
    source: str | Path,
    output: str | Path,
    progress: Progress | None = None,
    *,
    phase: str = "prefill",
    model: str = "deepseek-v2-lite",
    num_experts: int = 64,
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the CSV file, or the folder of them in numeric order, as one trace. TraceError names file and line."""
    check_choice("phase", phase, ("prefill", "decode"))
    requests: list[Request] = []
    first: tuple[Path, list[int]] | None = None
    ignored: set[str] = set()
    for path in tracked(files_of(source, ".csv"), progress, "reading activations"):
        table = CsvTable(path, COLUMNS)
        batches = _batches(table, num_experts)
        ignored.update(table.ignored)
        for batch, layers in batches.items():
            label = path.stem if len(batches) == 1 else f"{path.stem}/batch {batch}"
            found = sorted(layers)
            first = first or (path, found)
            if found != first[1]:
                problem = f"batch {batch} has the layers {found}, {first[0]} has {first[1]}"
                raise fault(path, f"line {layers[found[-1]][-1][0]}", problem, "record all requests alike")
            requests.append(_request(path, [layers[layer] for layer in found], found, phase, label))
    if first is None:
        raise fault(source, "source", "holds no rows", "give the recorded CSV files")
    notes = ["experts of a row stand in recorded order, not known to be best first; no weights"]
    if ignored:
        notes.append(f"columns left out: {', '.join(sorted(ignored))}")
    about = About(
        model=model,
        num_experts=num_experts,
        source="MoE-Beyond CSV (arXiv 2508.17137)",
        license=license,
        moe_layer_ids=first[1],
        header={"expert_order": "as recorded, not sorted by weight"},
    )
    return write_requests(source, output, requests, about, notes)


def _batches(table: CsvTable, num_experts: int) -> dict[int, dict[int, list[Row]]]:
    """Batch number → layer → rows in file order."""
    batches: dict[int, dict[int, list[Row]]] = {}
    for line, (layer_text, batch_text, token, ids_text) in table:
        layer = table.whole(line, COLUMNS[0], layer_text)
        batch = table.whole(line, COLUMNS[1], batch_text)
        ids = _ids(table.path, line, ids_text, num_experts)
        batches.setdefault(batch, {}).setdefault(layer, []).append((line, token, ids))
    return batches


def _ids(path: Path, line: int, text: str, num_experts: int) -> list[int]:
    if not _IDS.fullmatch(text.strip()):
        raise fault(path, f"line {line}", f"{COLUMNS[3]} is {text[:60]!r}", "give a list such as [1, 2]")
    ids = [int(piece) for piece in text.strip()[1:-1].split(",")]
    if max(ids) >= num_experts:
        problem = f"{COLUMNS[3]} holds {max(ids)}, outside 0 … {num_experts - 1}"
        raise fault(path, f"line {line}", problem, "set num_experts, or correct the row")
    if len(set(ids)) < len(ids):
        raise fault(path, f"line {line}", f"{COLUMNS[3]} holds an expert twice", "correct the row")
    return ids


def _request(path: Path, rows: list[list[Row]], layers: list[int], phase: str, label: str) -> Request:
    """Rows [L][n] of one request, checked to be the same tokens in each layer."""
    num_tokens = len(rows[0])
    for layer, tokens in zip(layers, rows, strict=True):
        for (line, text, _), (_, expected, _) in zip(tokens, rows[0], strict=False):
            if text != expected:
                problem = f"layer {layer} has the token {text!r} where layer {layers[0]} has {expected!r}"
                raise fault(path, f"line {line}", problem, "rows of all layers must follow one token order")
        if len(tokens) != num_tokens:
            problem = f"layer {layer} ends after {len(tokens)} tokens, layer {layers[0]} has {num_tokens}"
            raise fault(path, f"line {tokens[-1][0]}", problem, "the file is cut off or mixed up; fetch it again")
    width = max(len(ids) for tokens in rows for _, _, ids in tokens)
    check_bytes(path, f"line {rows[0][0][0]}", 8 * num_tokens * len(rows) * width)
    experts = np.full((num_tokens, len(rows), width), -1, np.int32)
    for layer_index, tokens in enumerate(rows):
        for token_index, (_, _, ids) in enumerate(tokens):
            experts[token_index, layer_index, : len(ids)] = ids
    return Request(experts, prompt_len=num_tokens if phase == "prefill" else 0, context_len=0, label=label)
