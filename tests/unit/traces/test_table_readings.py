"""What a table's columns mean is decided by all that they hold: read right, said in a note, or refused in one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import ANSWER, NUM_LAYERS, PROMPT, TOKENS
from traces.cli import main
from traces.reader import Trace, open_trace

OTHER = [[[(3 * t + layer) % 8, (3 * t + layer + 1 + t % 3) % 8] for layer in range(NUM_LAYERS)] for t in range(10)]
"""A second request: three tokens of prompt, seven decoded."""
BY = {"a": TOKENS, "b": OTHER}
STEPS: list[list[tuple[str, int]]] = [
    [("a", token) for token in range(4)],
    [("a", 4), ("b", 0), ("b", 1), ("b", 2)],
    *([("a", 5 + n), ("b", 3 + n)] for n in range(7)),
]
"""The forwards of both requests as an engine batches them: (request, token)."""
BATCHED = [0, 0, 0, 0, *range(1, 9), 1, 1, 1, *range(2, 9)]
ALONE = [[("a", token) for token in range(4)], *([("a", token)] for token in range(4, 12))]


def rows(steps: Sequence[Sequence[tuple[str, int]]] = tuple(ALONE)) -> Iterator[dict[str, Any]]:
    """A row for each token and layer, as an engine logs them."""
    for step, tokens in enumerate(steps):
        for layer in range(NUM_LAYERS):
            for place, (request, token) in enumerate(tokens):
                phase = "prefill" if token < {"a": 4, "b": 3}[request] else "decode"
                experts = BY[request][token][layer]
                row = {"step": step, "request": request, "token": token, "place": place, "layer": layer}
                yield row | {"phase": phase, "experts": " ".join(map(str, experts)), "list": experts}


def single(steps: Sequence[Sequence[tuple[str, int]]] = tuple(ALONE)) -> Iterator[dict[str, Any]]:
    """A row for each expert."""
    for row in rows(steps):
        for rank, expert in enumerate(row["list"]):
            yield row | {"rank": rank, "expert": expert}


def text(columns: str, of: Iterator[dict[str, Any]], mark: str = ",") -> str:
    """A table of some of the columns; `new=old` renames one."""
    pairs = [(word.partition("=")[0], word.rpartition("=")[2]) for word in columns.split()]
    lines = [mark.join(str(row[old]) for _, old in pairs) for row in of]
    return "\n".join([mark.join(new for new, _ in pairs), *lines]) + "\n"


class Imported:
    """What the command printed, and the trace if it wrote one."""

    def __init__(self, code: int, out: str, err: str, path: Path) -> None:
        self.code, self.out, self.err = code, out, err
        self.trace: Trace = open_trace(path) if code == 0 else None  # type: ignore[assignment]

    def refused(self, *parts: str) -> None:
        assert self.code == 2, self.out
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert len(self.err) <= 301
        for part in parts:
            assert part in self.err

    def is_alone(self, prompt: int = 4) -> None:
        assert self.code == 0, self.err
        np.testing.assert_array_equal(self.trace.experts[:], TOKENS)
        assert self.trace.prompt_len.tolist() == [prompt]

    def is_both(self, prompts: Sequence[int] = (4, 3), forwards: Sequence[int] | None = None) -> None:
        assert self.code == 0, self.err
        np.testing.assert_array_equal(self.trace.experts[:], TOKENS + OTHER)
        assert self.trace.request_start.tolist() == [0, 12, 22]
        assert self.trace.prompt_len.tolist() == list(prompts)
        if forwards is not None:
            assert self.trace.forward_id is not None
            assert self.trace.forward_id[:].tolist() == list(forwards)


Take = Callable[..., Imported]


@pytest.fixture
def take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Take:
    def run(*files: tuple[str, str | bytes], kind: str = "auto", options: Sequence[str] = ()) -> Imported:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        for name, content in files:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        source = folder if len(files) > 1 else folder / files[0][0]
        out = tmp_path / "out.safetensors"
        out.unlink(missing_ok=True)
        code = main(["import", kind, str(source), str(out), *options])
        said = capsys.readouterr()
        assert out.exists() == (code == 0)
        return Imported(code, said.out, said.err, out)

    return run


# -- how many experts a token has ----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["layer expert", "step layer expert"])
@pytest.mark.parametrize("kind", ["auto", "table"])
def test_experts_of_a_token_are_not_guessed(take: Take, columns: str, kind: str) -> None:
    take(("a.csv", text(columns, single())), kind=kind).refused("does not tell how many experts", "give top_k=")
    take(("a.csv", text(columns, single())), kind=kind, options=["top_k=2"]).is_alone()


@pytest.mark.parametrize("options", [[], ["top_k=2"]])
def test_a_histogram_is_refused_by_name(take: Take, options: list[str]) -> None:
    counts = "step,layer,expert,count\n" + "".join(f"0,{layer},{e},3\n" for layer in range(3) for e in range(8))
    take(("a.csv", counts), options=options).refused("counts how often each expert was chosen (column 'count')")


def test_a_wrong_top_k_is_seen_and_a_cut_end_left_out(take: Take) -> None:
    whole = text("layer expert", single())
    take(("a.csv", whole), options=["top_k=3"]).refused("no multiple of top_k=3")
    found = take(("a.csv", whole.rstrip().rpartition("\n")[0]), options=["top_k=2"])
    assert "the last choice left out" in found.out
    assert found.trace.num_tokens == 11


# -- what a token's number counts ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 1000])
@pytest.mark.parametrize("options", [[], ["positions=true"]])
def test_prompt_len_counts_in_each_request(take: Take, first: int, options: list[str]) -> None:
    moved = (row | {"token": row["token"] + first} for row in rows())
    take(("a.csv", text("token layer experts", moved)), kind="table", options=["prompt_len=4", *options]).is_alone()


def test_prompt_len_counts_in_each_request_of_running_numbers(take: Take) -> None:
    running = (row | {"token": row["token"] + 12 * (row["request"] == "b")} for row in rows(STEPS))
    take(("a.csv", text("request token layer experts", running)), options=["prompt_len=3"]).is_both((3, 3))


def test_a_longer_prompt_than_the_request_is_refused(take: Take) -> None:
    table = text("request token layer experts", rows(STEPS))
    take(("a.csv", table), options=["prompt_len=11"]).refused("of a request of 10 tokens, fewer than prompt_len=11")
    phases = text("request phase token layer experts", rows(STEPS))
    take(("a.csv", phases), options=["prompt_len=4"]).refused("has 3 tokens, not prompt_len=4")


VOCABULARY = [101, 7592, 2088, 999, 2003, 1037, 3231, 1012, 55, 44, 33, 22]


@pytest.mark.parametrize("columns", ["step token_id layer experts", "request step token_id layer experts"])
def test_a_number_of_the_vocabulary_is_no_tokens_number(take: Take, columns: str) -> None:
    of = (row | {"token_id": VOCABULARY[row["token"]]} for row in rows())
    take(("a.csv", text(columns, of))).is_alone()


@pytest.mark.parametrize("other", ["token_id", "token"])
def test_a_position_goes_before_a_token(take: Take, other: str) -> None:
    of = (row | {"position": row["token"], "id": VOCABULARY[row["token"]]} for row in rows())
    take(("a.csv", text(f"request {other}=id position layer experts", of)), options=["prompt_len=4"]).is_alone()


@pytest.mark.parametrize("columns", ["request token_id layer experts", "token_id layer experts"])
def test_numbers_of_the_vocabulary_that_are_named_are_refused(take: Take, columns: str) -> None:
    of = (row | {"token_id": VOCABULARY[row["token"]]} for row in rows())
    found = take(("a.csv", text(columns, of)), kind="table", options=["token=token_id"])
    found.refused("token_id is 2088 after", "request=" if columns.startswith("token") else "give step=")


def test_gaps_are_noted(take: Take) -> None:
    of = (row | {"token": 10 * row["token"]} for row in rows())
    found = take(("a.csv", text("token layer experts", of)), options=["prompt_len=4"])
    found.is_alone()
    assert "token numbers of 1 requests leave gaps" in found.out


RESTARTS = {
    "step named alone": ("step layer token=place experts", "table", ["step=step"]),
    "by usual names": ("step layer token=place experts", "auto", []),
    "without step": ("layer token=place experts", "auto", []),
    "one expert a row": ("layer token=place expert", "auto", []),
    "with phases": ("phase token=place layer experts", "auto", []),
    "llama.cpp's fork": ("phase token=place layer rank expert", "llama-csv", []),
    "with requests": ("request step token=place layer experts", "auto", []),
}


@pytest.mark.parametrize("name", RESTARTS)
def test_numbers_that_begin_again_with_each_forward(take: Take, name: str) -> None:
    columns, kind, options = RESTARTS[name]
    of = single() if "expert" in columns.split() else rows()
    found = take(("a.csv", text(columns, of)), kind=kind, options=options)
    found.is_alone()
    assert "begin again with each forward" in found.out or "column token not used" in found.out


def test_an_answer_that_is_numbered_from_the_beginning_again(take: Take) -> None:
    of = (row | {"token": row["token"] - 4 * (row["token"] >= 4)} for row in rows())
    found = take(("a.csv", text("phase token layer experts", of)))
    found.is_alone()
    assert "taken to follow the prompt before" in found.out


def test_numbers_of_forwards_beside_requests(take: Take) -> None:
    """The place in the batch is no token of a request; that of both named columns is refused."""
    table = text("step layer token_idx=place req_id=request experts", rows(STEPS))
    take(("a.csv", table)).is_both(forwards=BATCHED)
    alone = text("step layer token=place experts", rows())
    found = take(("a.csv", alone), kind="table", options=["step=step", "token=token"])
    found.refused("numbers tokens from 0 again with each step", "leave out token=")


def test_requests_in_turn_without_their_column_are_refused(take: Take) -> None:
    take(("a.csv", text("token layer experts", rows(STEPS)))).refused("requests stand in turn", "request=")
    take(("a.csv", text("step token layer experts", rows(STEPS)))).refused("requests stand in turn", "request=")


def test_requests_one_after_another_are_told_by_their_numbers(take: Take) -> None:
    in_turn = [[(request, token)] for request in "ab" for token in range(len(BY[request]))]
    take(("a.csv", text("token layer experts", rows(in_turn))), options=["prompt_len=3"]).is_both((3, 3))


def test_prompts_of_one_step_each_are_noted(take: Take) -> None:
    prompts = [[(request, token) for token in range(3)] for request in "ab"]
    found = take(("a.csv", text("step token layer experts", rows(prompts))))
    assert found.trace.request_start.tolist() == [0, 3, 6]
    assert "each is taken for a request, all of it in one forward" in found.out


def test_an_empty_column_of_requests_is_none(take: Take) -> None:
    of = [{"request": None, "token": r["token"], "layer": r["layer"], "experts": r["list"]} for r in rows()]
    found = take(("a.jsonl", "\n".join(map(json.dumps, of))), options=["prompt_len=4"])
    found.is_alone()
    assert "column request is empty" in found.out
    of[5]["request"] = "r"
    take(("a.jsonl", "\n".join(map(json.dumps, of)))).refused("line 1: names no request, other rows do")


# -- phases and forwards -------------------------------------------------------------------------------------


def test_a_phase_without_tokens_is_read(take: Take) -> None:
    take(("a.csv", text("step phase layer experts", rows()))).is_alone()
    one = [[("a", 0)], *([("a", token)] for token in range(4, 12))]
    found = take(("a.csv", text("step phase layer experts", rows(one))))
    assert found.trace.prompt_len.tolist() == [1]


def test_tokens_decoded_together_are_refused_without_requests(take: Take) -> None:
    found = take(("a.csv", text("step phase layer experts", rows(STEPS[2:]))))
    found.refused("forward 0 decodes 2 tokens: whose they are is not told", "request=")
    take(("a.csv", text("step phase layer experts", rows(STEPS)))).refused("holds prompt and decoded tokens")


@pytest.mark.parametrize("columns", ["step layer request experts", "step phase layer request experts"])
def test_a_step_is_the_forward_of_all_its_requests(take: Take, columns: str) -> None:
    found = take(("a.csv", text(columns, rows(STEPS))))
    found.is_both(forwards=BATCHED)
    assert "batch_size=as_recorded" in found.out


def test_steps_that_begin_again_with_each_request_are_no_common_forwards(take: Take) -> None:
    table = text("request step token layer experts", rows())
    again = "\n".join("b" + line[1:] for line in table.splitlines()[1:])
    found = take(("a.csv", table + again + "\n"), options=["prompt_len=4"])
    assert found.trace.forward_id is None
    assert "step numbers begin again with each request" in found.out


PHASES = {
    "P D": (lambda prompt: "P" if prompt else "D", "phase"),
    "is_prefill true": (lambda prompt: prompt, "is_prefill"),
    "is_prefill 1": (lambda prompt: int(prompt), "is_prefill"),
    "is_decode 1": (lambda prompt: int(not prompt), "is_decode"),
    "prefill false": (lambda prompt: str(prompt).lower(), "prefill"),
}


@pytest.mark.parametrize("name", PHASES)
def test_phases_of_several_spellings(take: Take, name: str) -> None:
    spelt, column = PHASES[name]
    of = (row | {"shown": spelt(row["phase"] == "prefill")} for row in rows())
    table = text(f"{column}=shown token layer experts", of)
    take(("a.csv", table), kind="table", options=[f"phase={column}"]).is_alone()


def test_a_truth_value_is_no_phase_of_another_name(take: Take) -> None:
    of = (row | {"shown": row["phase"] == "prefill"} for row in rows())
    take(("a.csv", text("phase=shown token layer experts", of))).refused("phase is 'true'")


# -- ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("columns", ["token layer rank expert", "request token layer rank expert"])
def test_a_melted_table_is_joined_by_its_ranks(take: Take, columns: str, base: int) -> None:
    of = sorted((row | {"rank": row["rank"] + base} for row in single()), key=lambda row: int(row["rank"]))
    take(("a.csv", text(columns, iter(of))), options=["prompt_len=4"]).is_alone()


def test_ranks_order_experts_that_stand_otherwise(take: Take) -> None:
    of = sorted(single(), key=lambda row: (row["token"], row["layer"], -row["rank"]))
    take(("a.csv", text("token layer rank expert", iter(of))), options=["prompt_len=4"]).is_alone()


def test_a_melted_table_of_several_requests_and_sizes(take: Take) -> None:
    """Where one of three tokens has a single expert, what belongs together is not told."""
    table = "token,layer,rank,expert\n0,0,0,5\n0,0,0,3\n0,0,1,4\n0,0,1,6\n"
    assert take(("a.csv", table)).trace.experts[:, 0].tolist() == [[5, 4], [3, 6]]
    take(("a.csv", table.replace("0,0,0,3\n", "0,0,0,3\n0,0,0,7\n"))).refused("take the column out")


@pytest.mark.parametrize("name", ["rank", "slot"])
@pytest.mark.parametrize("columns", ["token layer experts", "step layer experts"])
def test_a_process_or_slot_is_no_order_of_experts(take: Take, name: str, columns: str) -> None:
    of = (row | {name: "ab".index(row["request"])} for row in rows(STEPS))
    take(("a.csv", text(f"{name} {columns}", of))).refused("it tells no order of experts", f"request={name}")
    of = (row | {name: "ab".index(row["request"])} for row in rows(STEPS))
    found = take(("a.csv", text(f"{name} request {columns}", of)))
    assert found.trace.request_start.tolist() == [0, 12, 22]
    assert f"column {name} not used" in found.out


def test_a_process_of_experts_is_no_order(take: Take) -> None:
    of = (row | {"rank": row["expert"] // 4} for row in single())
    take(("a.csv", text("rank token layer expert", of))).refused("the ranks of this token and layer are not 0, 1, …")


def test_one_value_throughout_orders_nothing(take: Take) -> None:
    of = (row | {"k": 2} for row in single())
    found = take(("a.csv", text("token layer k expert", of)), options=["prompt_len=4"])
    found.is_alone()
    assert "column k not used" in found.out


# -- several files -------------------------------------------------------------------------------------------


def cut(table: str, at: int) -> list[tuple[str, str]]:
    """The table as two files, each with its header."""
    head, *lines = table.splitlines(keepends=True)
    return [("part-0.csv", head + "".join(lines[:at])), ("part-1.csv", head + "".join(lines[at:]))]


@pytest.mark.parametrize("at", range(1, 66, 7))
@pytest.mark.parametrize("columns", ["request step token layer experts", "request step layer experts"])
def test_shards_with_requests_are_one_table(take: Take, columns: str, at: int) -> None:
    options = ["prompt_len=3"] if "token" in columns else []
    found = take(*cut(text(columns, rows(STEPS)), at), options=options)
    found.is_both((3, 3) if options else (4, 3), forwards=BATCHED)


@pytest.mark.parametrize("at", [1, 30, 31, 99])
@pytest.mark.parametrize("columns", ["request token layer expert", "request token layer rank expert"])
def test_shards_may_cut_a_choice(take: Take, columns: str, at: int) -> None:
    take(*cut(text(columns, single(STEPS)), at), options=["prompt_len=3"]).is_both((3, 3))


def test_parquet_shards(take: Take, tmp_path: Path) -> None:
    frame = pd.DataFrame([{key: row[key] for key in ("request", "token", "layer", "list")} for row in rows(STEPS)])
    frame = frame.rename(columns={"list": "experts"})
    parts = []
    for number, part in enumerate((frame[:57], frame[57:])):
        part.to_parquet(tmp_path / "part.parquet")
        parts.append((f"part-{number}.parquet", (tmp_path / "part.parquet").read_bytes()))
    take(*parts, options=["prompt_len=3"]).is_both((3, 3))


def test_a_rotated_log_without_requests_goes_on(take: Take) -> None:
    for columns in ("token layer experts", "step layer experts"):
        found = take(*cut(text(columns, rows()), 18), options=["prompt_len=4"] if "token" in columns else [])
        found.is_alone()
        assert "1 files go on where the file before ended" in found.out


@pytest.mark.parametrize("columns", ["token layer experts", "request token layer experts", "step layer experts"])
@pytest.mark.parametrize("empty", ["a", "c", "e"])
def test_a_file_without_rows_changes_nothing(take: Take, columns: str, empty: str) -> None:
    whole = text(columns, rows())
    (_, first), (_, second) = cut(whole, 18)
    files = [("b.csv", first), ("d.csv", second), (f"{empty}.csv", whole.splitlines()[0] + "\n")]
    take(*files, options=["prompt_len=4"] if "token" in columns else []).is_alone()


def test_files_of_the_same_requests_are_runs_of_their_own(take: Take) -> None:
    table = text("request token layer experts", rows())
    found = take(("run-0.csv", table), ("run-1.csv", table), options=["prompt_len=4"])
    assert found.trace.request_start.tolist() == [0, 12, 24]
    assert "each file is taken for a run of its own" in found.out


def test_steps_of_two_runs_are_not_the_same_forwards(take: Take) -> None:
    table = text("request step token layer experts", rows())
    found = take(("run-0.csv", table), ("run-1.csv", table), options=["prompt_len=4"])
    assert found.trace.forward_id is not None
    first, second = np.split(found.trace.forward_id[:], 2)
    assert set(first.tolist()).isdisjoint(second.tolist())


@pytest.mark.parametrize("columns", ["token layer experts", "token experts", "step layer experts"])
def test_a_file_a_layer(take: Take, columns: str) -> None:
    files = [
        (f"layer{layer}.csv", text(columns, (row for row in rows() if row["layer"] == layer)))
        for layer in range(NUM_LAYERS)
    ]
    take(*files, options=["prompt_len=4"] if "token" in columns else []).is_alone()


def test_a_file_a_layer_needs_a_step_or_token(take: Take) -> None:
    files = [
        (f"layer{layer}.csv", text("layer experts", (row for row in rows() if row["layer"] == layer)))
        for layer in range(NUM_LAYERS)
    ]
    take(*files).refused("forwards are not told", "give step= or token=")


# -- columns and cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    ["token layer expert expert_ids=experts", "token layer expert expert_2=expert", "token layer expert experts"],
)
def test_two_columns_of_experts_are_not_chosen_between(take: Take, columns: str) -> None:
    take(("a.csv", text(columns, single()))).refused("any of which may hold the experts", "name those that do")


@pytest.mark.parametrize("names", [("expert0", "expert1"), ("expert_1", "expert_2")])
def test_numbered_columns_of_experts(take: Take, names: tuple[str, str]) -> None:
    of = (row | dict(zip(names, row["list"], strict=True)) for row in rows())
    take(("a.csv", text(f"token layer {names[0]} {names[1]}", of)), options=["prompt_len=4"]).is_alone()


def test_auto_takes_the_columns_that_are_named(take: Take) -> None:
    of = (row | {"a": row["list"][0], "b": row["list"][1]} for row in rows())
    found = take(("a.csv", text("token layer a b", of)), options=["expert=a,b", "prompt_len=4"])
    found.is_alone()
    assert "taken for table: the option expert=" in found.out


TABLE = text("token layer experts", rows())
FORMS: dict[str, tuple[str, str | bytes, list[str]]] = {
    "semicolons": ("a.csv", text("token layer experts", rows(), ";"), []),
    "tabs": ("a.csv", text("token layer experts", rows(), "\t"), []),
    "quoted names": ("a.csv", TABLE.replace("token,layer,experts", '"token","layer","experts"'), []),
    "quoted lists, no names": (
        "a.csv",
        "".join(f'{r["token"]},{r["layer"]},"{r["list"]}"\n' for r in rows()),
        ["token=1", "layer=2", "expert=3"],
    ),
    "packed": ("a.csv.gz", gzip.compress(TABLE.encode()), []),
    "packed under another name": ("a.csv", gzip.compress(TABLE.encode()), []),
    "a log": ("a.log", TABLE, []),
    "no suffix": ("a", TABLE, []),
    "floats": (
        "a.csv",
        "".join([TABLE[:20], *(f"{r['token']}.0,{r['layer']:e},{r['experts']}\n" for r in rows())]),
        [],
    ),
    "names of layers": (
        "a.csv",
        TABLE[:20] + "".join(f"{r['token']},model.layers.{r['layer']}.mlp,{r['experts']}\n" for r in rows()),
        [],
    ),
    "a list of objects": (
        "a.json",
        json.dumps([{"token": r["token"], "layer": r["layer"], "experts": r["list"]} for r in rows()]),
        [],
    ),
    "a first line of its own": (
        "a.jsonl",
        "\n".join(
            map(
                json.dumps,
                [
                    {"type": "meta", "model": "x"},
                    *({"token": r["token"], "layer": r["layer"], "experts": r["list"]} for r in rows()),
                ],
            )
        ),
        [],
    ),
    "weights that are not known": (
        "a.jsonl",
        "\n".join(
            json.dumps({"token": r["token"], "layer": r["layer"], "experts": r["list"], "weights": [0.5, float("nan")]})
            for r in rows()
        ),
        [],
    ),
    "packed lines": (
        "a.jsonl.gz",
        gzip.compress(
            "\n".join(
                json.dumps({"token": r["token"], "layer": r["layer"], "experts": r["list"]}) for r in rows()
            ).encode()
        ),
        [],
    ),
    "bare lists": ("a.json", json.dumps(TOKENS), []),
    "bare records": ("a.json", json.dumps([[layer, *e] for t in TOKENS for layer, e in enumerate(t)]), []),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_a_table(take: Take, name: str) -> None:
    file, content, options = FORMS[name]
    take((file, content), options=["prompt_len=4", *options]).is_alone()


def test_a_layers_name_of_two_numbers_is_refused(take: Take) -> None:
    take(("a.csv", "token,layer,experts\n0,layers.1.experts.2,1 2\n")).refused("layer is 'layers.1.experts.2'")


def test_what_is_unpacked_is_bounded(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(TABLE.encode() + b"#" + b" " * 10_000_000)
    monkeypatch.setenv("EXPERTFLOW_MAX_BYTES", "1000000")
    take(("a.csv.gz", packed)).refused("at most 1000000 are allowed")
    monkeypatch.delenv("EXPERTFLOW_MAX_BYTES")
    take(("a.csv.gz", gzip.compress(TABLE.encode())[:-20])).refused("is no usable gzip file")


def test_experts_are_put_in_the_order_of_their_weights(take: Take) -> None:
    of = (row | {"turned": " ".join(map(str, row["list"][::-1])), "weights": "0.2 0.8"} for row in rows())
    found = take(("a.csv", text("token layer experts=turned weights", of)), options=["prompt_len=4"])
    found.is_alone()
    assert "experts of 36 of 36 choices put in the order of their weights" in found.out
    assert found.trace.weights is not None
    np.testing.assert_array_equal(found.trace.weights[0, 0], np.array([0.8, 0.2], np.float16))


def test_the_shape_is_said(take: Take) -> None:
    found = take(("a.csv", TABLE))
    assert "out.safetensors: 1 requests, 12 tokens × 3 layers × top-2 of 8 experts\n" in found.out


# -- JSON that is nested -------------------------------------------------------------------------------------


def turned(tokens: list[Any]) -> list[Any]:
    return np.array(tokens).transpose(1, 0, 2).tolist()


def test_layers_before_tokens_are_turned_by_their_number(take: Take) -> None:
    one = {"prefill": turned(PROMPT), "decode": turned(ANSWER)}
    found = take(("a.json", json.dumps({"num_layers": 3, "prompts": {"one": one}})))
    found.is_alone()
    assert "1 requests are [layers][tokens][experts]: turned" in found.out
    whole = {"tokens": turned(TOKENS), "prompt_len": 4}
    take(("a.json", json.dumps({"num_layers": 3, "prompts": [whole]}))).is_alone()


def test_layers_before_tokens_are_refused_where_the_file_contradicts_itself(take: Take) -> None:
    one = {"prefill": turned(PROMPT), "decode": turned(ANSWER)}
    take(("a.json", json.dumps({"prompts": {"one": one}}))).refused("has 4 layers in prefill and 8 in decode")
    take(("a.json", json.dumps({"tokens": turned(TOKENS), "prompt_len": 4}))).refused("has prompt_len=4 and 3 tokens")
    odd = {"num_layers": 2, "tokens": TOKENS}
    take(("a.json", json.dumps(odd))).refused("has num_layers=2 and tokens of 3 layers")
    records = [[layer, *e] for t in TOKENS for layer, e in enumerate(t)]
    take(("a.json", json.dumps({"trace": records})), options=["prompt_len=13"]).refused("prompt_len=13 and 12 tokens")


# -- logs of engines -----------------------------------------------------------------------------------------


def vllm(steps: Sequence[Sequence[tuple[str, int]]], name: str = "") -> str:
    of = (
        {"req_id": name or r["request"], "token_idx": r["place"], "layer": r["layer"], "topk_ids": r["list"]}
        for r in rows(steps)
    )
    return "".join(json.dumps(row) + "\n" for row in of)


def test_a_vllm_log_of_several_requests_keeps_its_forwards(take: Take) -> None:
    found = take(("a.jsonl", vllm(STEPS)))
    found.is_both(forwards=BATCHED)
    assert "batch_size=as_recorded" in found.out
    alone = take(("a.jsonl", vllm(ALONE)))
    alone.is_alone()
    assert alone.trace.forward_id is None


def test_a_vllm_log_of_a_layer_a_file_says_that_forwards_are_not_told(take: Take) -> None:
    lines = vllm(STEPS).splitlines(keepends=True)
    files = [(f"l{n}.jsonl", "".join(line for line in lines if f'"layer": {n}' in line)) for n in range(NUM_LAYERS)]
    found = take(*files)
    found.is_both()
    assert found.trace.forward_id is None
    assert "which requests ran in one forward is not told" in found.out


@pytest.mark.parametrize("at", [1, 5, 9, 12, 13, 15, 20, 34])
def test_a_rotated_vllm_log_goes_on(take: Take, at: int) -> None:
    lines = vllm(ALONE).splitlines(keepends=True)
    found = take(("a.0.jsonl", "".join(lines[:at])), ("a.1.jsonl", "".join(lines[at:])))
    found.is_alone()


def test_ranks_that_log_the_same_are_noted(take: Take) -> None:
    found = take(("rank0.jsonl", vllm(ALONE)), ("rank1.jsonl", vllm(ALONE)))
    assert found.trace.num_requests == 2
    assert "1 of 2 sequences choose as another does" in found.out


def test_what_cannot_be_told_of_forwards_is_noted(take: Take) -> None:
    found = take(("a.jsonl", vllm(STEPS, "batch")))
    assert "wrong where they are of requests that ran together" in found.out
    single_tokens = [[("a", token)] for token in range(12)]
    assert "begin with a forward of one token" in take(("a.jsonl", vllm(single_tokens))).out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_may_be_the_first(take: Take, rank: int) -> None:
    lines = [
        {"step": step, "layer": layer, "rank": number, "top_indices": [token[layer] for token in forward]}
        for number, tokens in enumerate((TOKENS, OTHER))
        for step, forward in enumerate([tokens[:4], *([token] for token in tokens[4:])])
        for layer in range(NUM_LAYERS)
    ]
    found = take(("a.jsonl", "\n".join(map(json.dumps, lines))), kind="megatron", options=[f"rank={rank}"])
    np.testing.assert_array_equal(found.trace.experts[:], (TOKENS, OTHER)[rank])


def test_an_idle_forward_of_sglang_is_left_out(take: Take, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.support.import_sources import sglang_dump

    idle = {
        "rank": 0,
        "positions": torch.zeros(0, dtype=torch.long),
        "forward_mode": 4,
        "topk_ids_of_layer": torch.zeros(4, 0, 2, dtype=torch.int32),
    }
    take(("a.pt", sglang_dump(tmp_path, [idle]).read_bytes())).is_alone()


def test_lines_with_the_keys_of_a_vllm_log_that_tell_phases_are_a_table(take: Take) -> None:
    """Token by token, as no logger of vLLM writes them: its importer would take each for a request without a prompt."""
    steps = [*ALONE, [("b", token) for token in range(3)], *([("b", token)] for token in range(3, 10))]
    lines = [
        json.dumps({"req_id": row["request"], "phase": row["phase"], "layer": row["layer"], "token_idx": row["token"]})[
            :-1
        ]
        + f', "topk_ids": {row["list"]}}}'
        for row in sorted(rows(steps), key=lambda row: (row["request"], row["token"], row["layer"]))
    ]
    log = ("log.jsonl", "\n".join(lines) + "\n")
    take(log).is_both()
    take(log, kind="vllm-log").refused("line 1: tells phase, which counts in a table")
