"""One routing, written in every format that is imported: each gives the same trace, and the same cache hits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.import_sources import (
    NUM_LAYERS,
    PROMPT,
    TOKENS,
    bare_lists,
    flat,
    forwards,
    lines,
    llama_upstream,
    llama_with_tokens,
    megatron,
    nested,
    sglang_dump,
    sglang_steps,
    table_binary,
    table_csv_of_lists,
    table_jsonl,
    table_melted,
    table_objects,
    table_packed,
    table_parquet,
    table_text,
    vllm,
    vllm_lines,
    vllm_per_layer,
)
from tests.support.runs import run_counts
from traces.batching import BatchConfig, Batches
from traces.cli import importer_of, main
from traces.importers.auto import recognise
from traces.reader import Trace, open_trace

ROOT = Path(__file__).resolve().parents[3]


FORMATS: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {
    "vllm-log": (vllm, "vllm-log", []),
    "vllm-log a layer": (vllm_per_layer, "vllm-log", []),
    "llama.cpp": (llama_upstream, "llama-csv", ["top_k=2"]),
    "llama.cpp with tokens": (llama_with_tokens, "llama-csv", []),
    "nested": (nested, "nested-json", []),
    "flat": (flat, "nested-json", ["prompt_len=4"]),
    "megatron": (megatron, "megatron", []),
    "sglang steps": (sglang_steps, "sglang-recorder", []),
    "sglang dump": (sglang_dump, "sglang-recorder", []),
    "table jsonl": (table_jsonl, "table", ["prompt_len=4"]),
    "table parquet": (table_parquet, "table", ["prompt_len=4"]),
    "table packed": (table_packed, "table", ["prompt_len=4"]),
    "table objects": (table_objects, "table", ["prompt_len=4"]),
    "table melted": (table_melted, "table", ["prompt_len=4"]),
    "bare lists": (bare_lists, "nested-json", ["prompt_len=4"]),
    "table csv of lists": (table_csv_of_lists, "table", ["prompt_len=4"]),
    "table text": (table_text, "", ["token=1", "layer=2", "expert=3,4", "prompt_len=4"]),
    "table binary": (table_binary, "", ["fields=t:u4,l:u2,e:u2*2", "token=t", "layer=l", "expert=e", "prompt_len=4"]),
}


def imported(source: Path, kind: str, options: Sequence[str], out: Path) -> Trace:
    assert main(["import", kind, str(source), str(out), *options]) == 0
    return open_trace(out)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_trace(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write, kind, options = FORMATS[name]
    source = write(tmp_path)
    if kind:
        assert recognise(source).kind == kind
    trace = imported(source, "auto" if kind else "table", options, tmp_path / "out.safetensors")
    np.testing.assert_array_equal(trace.experts[:], TOKENS)
    assert trace.prompt_len.tolist() == [4]
    assert trace.num_experts == 8
    said = capsys.readouterr().out
    assert not kind or f"taken for {kind}: " in said


@pytest.mark.parametrize("name", FORMATS)
def test_the_hits_are_those_counted_by_hand(tmp_path: Path, name: str) -> None:
    """LRU over 12 slots, cold, the prompt as one forward: counted apart from this project as 39, 20 and 8."""
    write, _, options = FORMATS[name]
    kind = "table" if "binary" in name or "text" in name else "auto"
    trace = imported(write(tmp_path), kind, options, tmp_path / "out.safetensors")
    batches = list(Batches(trace, BatchConfig()))
    assert run_counts(batches, num_experts=8, num_slots=12, eviction="lru") == (39, 20, 8)


def test_files_given_one_by_one_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    folder = vllm_per_layer(tmp_path)
    files = [str(path) for path in sorted(folder.iterdir())]
    assert main(["import", "auto", *files, str(tmp_path / "a.safetensors"), "model=toy"]) == 0
    np.testing.assert_array_equal(open_trace(tmp_path / "a.safetensors").experts[:], TOKENS)


def test_a_second_log_in_a_folder_is_another_request(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("a", "b"):
        vllm(tmp_path / "logs").rename(tmp_path / "logs" / f"{name}.jsonl")
    trace = imported(tmp_path / "logs", "vllm-log", [], tmp_path / "out.safetensors")
    assert trace.request_start.tolist() == [0, 12, 24]


def test_a_prompt_after_an_answer_begins_a_request(tmp_path: Path) -> None:
    twice = [*vllm_lines(), *vllm_lines()]
    trace = imported(lines(tmp_path / "log.jsonl", twice), "vllm-log", [], tmp_path / "out.safetensors")
    assert trace.request_start.tolist() == [0, 12, 24]
    assert trace.prompt_len.tolist() == [4, 4]


@pytest.mark.parametrize(("incomplete", "expected"), [("drop", TOKENS[3:]), ("repeat", None)])
def test_a_last_layer_of_the_last_token_alone(tmp_path: Path, incomplete: str, expected: Any) -> None:
    """llama.cpp computes the last layer for the token alone whose logits are wanted."""
    rows = [
        f"{layer},{expert}"
        for forward in forwards()
        for layer in range(NUM_LAYERS)
        for token in (forward[-1:] if layer == NUM_LAYERS - 1 else forward)
        for expert in token[layer]
    ]
    (tmp_path / "up.csv").write_text("layer,expert\n" + "\n".join(rows))
    options = ["top_k=2", f"incomplete={incomplete}"]
    trace = imported(tmp_path / "up.csv", "llama-csv", options, tmp_path / "out.safetensors")
    if expected is None:
        filled = [[*token[:2], PROMPT[3][2]] for token in PROMPT[:3]]
        expected = filled + TOKENS[3:]
    np.testing.assert_array_equal(trace.experts[:], expected)
    assert trace.context_len is not None
    assert trace.context_len.tolist() == [12 - len(expected)]


def test_tokens_decoded_together_go_on_their_own_requests(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def record(positions: list[int], mode: int, lengths: list[int] | None, first: int) -> dict[str, Any]:
        ids = torch.tensor([[[first + i] for i in range(len(positions))]], dtype=torch.int32)
        return {
            "rank": 0,
            "positions": positions,
            "forward_mode": mode,
            "extend_seq_lens": lengths,
            "topk_ids_of_layer": ids,
        }

    records = [record([0, 1, 0], 1, [2, 1], 0), record([2, 1], 2, None, 10), record([2, 3], 2, None, 20)]
    torch.save({"records": records}, tmp_path / "two.pt")
    trace = imported(tmp_path / "two.pt", "auto", [], tmp_path / "out.safetensors")
    assert [part.ravel().tolist() for part in np.split(trace.experts[:], trace.request_start[1:-1])] == [
        [0, 1, 10, 21],
        [2, 11, 20],
    ]
    assert trace.forward_id is not None
    assert trace.forward_id[:].tolist() == [0, 0, 1, 2, 0, 1, 2]


def edit(rows: list[dict[str, Any]], at: int, **changes: Any) -> list[dict[str, Any]]:
    return [row | changes if number == at else row for number, row in enumerate(rows)]


WRONG: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "vllm expert twice": (
        "vllm-log",
        lambda f: lines(f / "a.jsonl", edit(vllm_lines(), 4, topk_ids=[1, 1])),
        "line 5: has the experts [1, 1]: one comes twice",
    ),
    "vllm no ids": (
        "vllm-log",
        lambda f: lines(f / "a.jsonl", edit(vllm_lines(), 2, topk_ids="x")),
        "line 3: has topk_ids='x', no list of whole numbers",
    ),
    "vllm empty": ("vllm-log", lambda f: lines(f / "a.jsonl", [{"type": "meta"}]), "holds no choice of experts"),
    "vllm negative layer": (
        "vllm-log",
        lambda f: lines(f / "a.jsonl", edit(vllm_lines(), 0, layer=-1)),
        "line 1: has layer='-1'",
    ),
    "vllm huge id": (
        "vllm-log",
        lambda f: lines(f / "a.jsonl", edit(vllm_lines(), 0, topk_ids=[1 << 40])),
        "more than 31 bits",
    ),
    "vllm layer lost": (
        "vllm-log",
        lambda f: lines(f / "a.jsonl", [r for n, r in enumerate(vllm_lines()) if n not in (13, 14)]),
        "has no choice in layer",
    ),
    "vllm layer's file lost a row": (
        "vllm-log",
        lambda f: _without(vllm_per_layer(f) / "moe_layer1.jsonl", 9).parent,
        "layer 1 has 8 forwards, others 9; rows are missing",
    ),
    "llama header": ("llama-csv", lambda f: _text(f / "a.csv", "layer,x\n1,2\n"), "has the columns layer, x"),
    "llama word": (
        "llama-csv",
        lambda f: _text(f / "a.csv", "phase,token,layer,rank,expert\nprefill,0,0,0,q\n"),
        "line 2: expert is 'q'",
    ),
    "llama phase": (
        "llama-csv",
        lambda f: _text(f / "a.csv", "phase,token,layer,rank,expert\nx,0,0,0,1\n"),
        "line 2: phase is 'x'",
    ),
    "llama no top_k": ("llama-csv", llama_upstream, "give top_k="),
    "nested depth": (
        "nested-json",
        lambda f: _text(f / "a.json", '{"prompts": {"a": {"decode": [[1, 2]]}}}'),
        "decode[0][0]='1', no list",
    ),
    "nested prompt": (
        "nested-json",
        lambda f: _text(f / "a.json", json.dumps({"prefill": PROMPT, "prompt_len": 9})),
        "has prompt_len=9 and 4 tokens",
    ),
    "nested none": (
        "nested-json",
        lambda f: _text(f / "a.json", '{"prompts": {"a": {}}}'),
        "has neither prefill, decode nor tokens",
    ),
    "nested layers": (
        "nested-json",
        lambda f: _text(f / "a.json", json.dumps({"decode": [TOKENS[0], TOKENS[1][:2], TOKENS[2]]})),
        "token 1 has no choice in layer 2",
    ),
    "flat record": (
        "nested-json",
        lambda f: _text(f / "a.json", '{"trace": [[0]]}'),
        "trace[0] holds no layer and experts",
    ),
    "megatron back": (
        "megatron",
        lambda f: lines(f / "a.jsonl", [{"step": s, "layer": 0, "rank": 0, "top_indices": [[1]]} for s in (1, 0)]),
        "line 2: goes back from step 1 to 0",
    ),
    "megatron ids": (
        "megatron",
        lambda f: lines(f / "a.jsonl", [{"step": 0, "layer": 0, "rank": 0, "top_indices": [1]}]),
        "no list of whole numbers",
    ),
    "steps phase": (
        "sglang-recorder",
        lambda f: lines(f / "a.jsonl", [{"step": 0, "layer": 0, "phase": 3, "tokens": []}]),
        "line 1: has phase='3'",
    ),
    "deep": ("nested-json", lambda f: _text(f / "a.json", "[" * 200_000), "is no usable JSON"),
    "table suffix": ("table", lambda f: _text(f / "a.dat", "1"), "tells no format"),
    "table no layer": ("table", lambda f: _text(f / "a.csv", "token,expert\n0,1\n"), "has the columns token, expert"),
    "table short row": ("table", lambda f: _text(f / "a.csv", "token,layer,expert\n0,1\n"), "line 2: has 2 values"),
    "table binary": ("table", lambda f: _text(f / "a.bin", "123"), "a binary file needs fields="),
    "table not parquet": ("table", lambda f: _text(f / "a.parquet", "123"), "no readable Parquet file"),
    "table sparse": (
        "table",
        lambda f: _text(f / "a.csv", "token,layer,expert\n" + "".join(f"{n},{n},1\n" for n in range(4000))),
        "most are missing",
    ),
}


def _without(path: Path, line: int) -> Path:
    kept = [text for number, text in enumerate(path.read_text().splitlines(), 1) if number != line]
    return _text(path, "\n".join(kept))


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, write, expected = WRONG[name]
    source = write(tmp_path)
    assert main(["import", kind, str(source), str(tmp_path / "out.safetensors"), "model=toy"]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "x,y\n1,2\n", "has the columns x, y: no importer recognises it"),
        ("a.json", '{"x": 1}', "has the keys x: no importer recognises it"),
        ("a.jsonl", "[1]\n", "line 1: is no JSON object"),
        ("a.xyz", "1", "has the suffix .xyz"),
        ("a.safetensors", '        {"x": {}}', "holds the arrays x"),
    ],
)
def test_what_is_not_recognised_is_said(
    tmp_path: Path, name: str, content: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["import", "auto", str(tmp_path / name), str(tmp_path / "out.safetensors")]) == 2
    assert expected in capsys.readouterr().err


def test_a_trace_is_told_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(vllm(tmp_path), "vllm-log", [], tmp_path / "out.safetensors")
    assert main(["import", "auto", str(tmp_path / "out.safetensors"), str(tmp_path / "b.safetensors")]) == 2
    assert "is a trace already" in capsys.readouterr().err


def test_a_pt_file_with_code_in_it_is_refused_unexecuted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    torch.save({"records": [], "bomb": Bomb()}, tmp_path / "bad.pt")
    assert main(["import", "auto", str(tmp_path / "bad.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "holds more than tensors and plain values" in capsys.readouterr().err
    assert not marker.exists()


def test_every_importer_is_reached_by_its_name() -> None:
    kinds = {kind for _, kind, _ in FORMATS.values() if kind}
    assert all(callable(importer_of(kind)) for kind in kinds)
    assert [a for a, b in pairwise(sorted(kinds)) if a == b] == []
