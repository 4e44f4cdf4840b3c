"""One routing in every format that is imported, for the tests of the importers and the attack on them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

PROMPT = [[[5, 1], [6, 1], [5, 0]], [[1, 3], [1, 4], [5, 6]], [[1, 0], [1, 4], [4, 5]], [[1, 0], [1, 4], [4, 6]]]
ANSWER = [
    [[0, 1], [0, 6], [4, 0]],
    [[1, 4], [0, 6], [4, 7]],
    [[1, 4], [4, 1], [6, 0]],
    [[1, 6], [4, 6], [6, 0]],
    [[1, 6], [4, 6], [5, 6]],
    [[4, 5], [0, 6], [5, 0]],
    [[5, 1], [0, 1], [0, 5]],
    [[6, 3], [7, 0], [6, 0]],
]
TOKENS = PROMPT + ANSWER
NUM_LAYERS = 3


def lines(path: Path, values: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def forwards() -> list[list[list[list[int]]]]:
    """The tokens as an engine runs them: the prompt at once, then one by one."""
    return [PROMPT, *([token] for token in ANSWER)]


def vllm_lines() -> list[dict[str, Any]]:
    return [
        {"type": "route", "req_id": "r", "token_idx": i, "layer": layer, "topk_ids": token[layer]}
        for forward in forwards()
        for layer in range(NUM_LAYERS)
        for i, token in enumerate(forward)
    ]


def vllm(folder: Path) -> Path:
    return lines(folder / "log.jsonl", [{"type": "meta", "model_id": "a/Toy"}, *vllm_lines()])


def vllm_per_layer(folder: Path) -> Path:
    (folder / "logs").mkdir()
    for layer in range(NUM_LAYERS):
        lines(folder / "logs" / f"moe_layer{layer}.jsonl", [row for row in vllm_lines() if row["layer"] == layer])
    return folder / "logs"


def llama_upstream(folder: Path) -> Path:
    rows = [
        f"{layer},{expert}"
        for forward in forwards()
        for layer in range(NUM_LAYERS)
        for token in forward
        for expert in token[layer]
    ]
    (folder / "up.csv").write_text("layer,expert\n" + "\n".join(rows) + "\n")
    return folder / "up.csv"


def llama_with_tokens(folder: Path) -> Path:
    rows, first = [], 0
    for forward in forwards():
        phase = "prefill" if first == 0 else "decode"
        rows += [
            f"{phase},{first + i},{layer},{rank},{expert}"
            for layer in range(NUM_LAYERS)
            for i, token in enumerate(forward)
            for rank, expert in enumerate(token[layer])
        ]
        first += len(forward)
    (folder / "fork.csv").write_text("phase,token,layer,rank,expert\n" + "\n".join(rows) + "\n")
    return folder / "fork.csv"


def nested(folder: Path) -> Path:
    content = {"model": "toy", "prompts": {"a": {"prompt_len": 4, "prefill": PROMPT, "decode": ANSWER}}}
    (folder / "nested.json").write_text(json.dumps(content))
    return folder / "nested.json"


def flat(folder: Path) -> Path:
    records = [[layer, *experts] for token in TOKENS for layer, experts in enumerate(token)]
    (folder / "flat.json").write_text(json.dumps({"top_k": 2, "trace": records}))
    return folder / "flat.json"


def megatron(folder: Path) -> Path:
    records = [
        {
            "step": step,
            "block": "decoder",
            "layer": layer,
            "rank": 0,
            "top_indices": [token[layer] for token in forward],
        }
        for step, forward in enumerate(forwards())
        for layer in range(NUM_LAYERS)
    ]
    mtp = {"step": 0, "block": "mtp", "mtp_idx": 0, "layer": 0, "rank": 0, "top_indices": [[1, 2]]}
    return lines(folder / "router_trace_rank0.jsonl", [*records, mtp])


def sglang_steps(folder: Path) -> Path:
    rows, first = [], 0
    for step, forward in enumerate(forwards()):
        for layer in range(NUM_LAYERS):
            tokens = [{"slot": 0, "position": first + i, "experts": token[layer]} for i, token in enumerate(forward)]
            phase = "decode" if step else "prefill"
            rows.append({"rank": 0, "phase": phase, "step": step, "layer": layer, "tokens": tokens})
        first += len(forward)
    return lines(folder / "steps.jsonl", rows)


def sglang_dump(folder: Path, extra: Sequence[dict[str, Any]] = ()) -> Path:
    torch = pytest.importorskip("torch")
    records, first = [], 0
    for number, forward in enumerate(forwards()):
        ids = torch.tensor(forward, dtype=torch.int32).permute(1, 0, 2) + 1  # one physical expert stands before all
        dense = torch.full((1, len(forward), 2), -1, dtype=torch.int32)
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "positions": torch.arange(first, first + len(forward)),
                "forward_mode": 2 if number else 1,
                "extend_seq_lens": None if number else [len(forward)],
                "topk_ids_of_layer": torch.cat([dense, ids]),
            }
        )
        first += len(forward)
    mapping = torch.tensor([[7, *range(8)]] * (NUM_LAYERS + 1))
    content = {"records": [*records, *extra], "last_physical_to_logical_map": mapping}
    torch.save(content, folder / "recorder_0.pt")
    return folder / "recorder_0.pt"


def table_rows() -> list[dict[str, Any]]:
    return [
        {"pos": number, "layer_id": layer, "selected_experts": experts}
        for number, token in enumerate(TOKENS)
        for layer, experts in enumerate(token)
    ]


def table_jsonl(folder: Path) -> Path:
    return lines(folder / "own.jsonl", table_rows())


def table_parquet(folder: Path) -> Path:
    pd.DataFrame(table_rows()).to_parquet(folder / "own.parquet")
    return folder / "own.parquet"


def table_csv_of_lists(folder: Path) -> Path:
    frame = pd.DataFrame(table_rows())
    frame["selected_experts"] = frame["selected_experts"].map(str)
    frame.to_csv(folder / "own.csv", index=False)
    return folder / "own.csv"


def table_packed(folder: Path) -> Path:
    path = folder / "own.jsonl.gz"
    path.write_bytes(gzip.compress(table_jsonl(folder).read_bytes(), mtime=0))
    return path


def table_objects(folder: Path) -> Path:
    rows = [{"token": row["pos"], "layer": row["layer_id"], "expert": row["selected_experts"]} for row in table_rows()]
    (folder / "own.json").write_text(json.dumps(rows))
    return folder / "own.json"


def table_melted(folder: Path) -> Path:
    """From wide to long: all first experts, then all second ones."""
    rows = [f"{row['pos']},{row['layer_id']},{k},{row['selected_experts'][k]}" for k in (0, 1) for row in table_rows()]
    (folder / "melted.csv").write_text("token,layer,rank,expert\n" + "\n".join(rows) + "\n")
    return folder / "melted.csv"


def table_of_batches(folder: Path) -> Path:
    """Two requests, each with the tokens of all, as the rows of a forward tell them."""
    rows = [
        f"{step},{layer},{request},{token[layer][0]} {token[layer][1]}"
        for step, forward in enumerate(forwards())
        for layer in range(NUM_LAYERS)
        for request in "ab"
        for token in forward
    ]
    (folder / "batches.csv").write_text("step,layer,request,experts\n" + "\n".join(rows) + "\n")
    return folder / "batches.csv"


def bare_lists(folder: Path) -> Path:
    (folder / "bare.json").write_text(json.dumps(TOKENS))
    return folder / "bare.json"


def table_text(folder: Path) -> Path:
    rows = [
        f"{row['pos']} {row['layer_id']} {row['selected_experts'][0]} {row['selected_experts'][1]}"
        for row in table_rows()
    ]
    (folder / "own.txt").write_text("\n".join(rows) + "\n")
    return folder / "own.txt"


def table_binary(folder: Path) -> Path:
    rows = [(row["pos"], row["layer_id"], row["selected_experts"]) for row in table_rows()]
    np.array(rows, [("t", "<u4"), ("l", "<u2"), ("e", "<u2", (2,))]).tofile(folder / "own.bin")
    return folder / "own.bin"
