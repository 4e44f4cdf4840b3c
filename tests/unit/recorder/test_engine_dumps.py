"""Routed experts as serving engines return them become traces; what is malformed is said in one line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.traces import run
from traces.format import Trace, TraceError, open_trace
from traces.importers.common import ImportReport
from traces.importers.engine_dumps import import_engine_dumps

E, LAYERS, K = 12, 3, 2
Ids = npt.NDArray[np.int32]


def routed(tokens: int, seed: int = 0, dense: int = 0) -> Ids:
    """[tokens, dense + LAYERS, K]: zeros in leading dense layers; expert E − 1 is among the first."""
    ids = np.argsort(np.random.default_rng(seed).random((tokens, LAYERS, E)), axis=2)[:, :, :K]
    ids[0, 0] = [E - 1, seed % (E - 1)]
    return np.concatenate([np.zeros((tokens, dense, K), np.int64), ids], axis=1).astype(np.int32)


def encoded(ids: Ids) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def imported(tmp_path: Path, content: Any, name: str = "in.json", **options: Any) -> tuple[ImportReport, Trace]:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    report = import_engine_dumps(path, tmp_path / "out.safetensors", **{"model": "m", "num_experts": E} | options)
    return report, open_trace(report.path)


def test_an_array_is_one_request_and_a_folder_many(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    for number in (2, 10):
        np.save(folder / f"r{number}.npy", routed(number, number))
    report = import_engine_dumps(folder, tmp_path / "o.safetensors", model="m")
    trace = open_trace(report.path)
    np.testing.assert_array_equal(trace.experts[:], np.concatenate([routed(2, 2), routed(10, 10)]))
    assert trace.request_labels == ["r2.npy, array", "r10.npy, array"]
    assert (trace.prompt_len.tolist(), trace.header["moe_layer_ids"]) == ([0, 0], "[0, 1, 2]")
    assert report.notes == (
        "2 requests without a prompt length: all their rows count as decode",
        "num_experts=12, the highest id and one; give num_experts= if there are more",
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_holds_a_request_an_array(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", first=routed(3, 1).astype(np.uint8), second=routed(2, 5), prompt_len=np.array([2, 2]))
    report = import_engine_dumps(tmp_path / "a.npz", tmp_path / "o.safetensors", model="m", num_experts=20)
    trace = open_trace(report.path)
    np.testing.assert_array_equal(trace.experts[:], np.concatenate([routed(3, 1), routed(2, 5)]))
    assert (trace.prompt_len.tolist(), trace.num_experts, report.notes) == ([2, 2], 20, ())


def test_vllm_answers_with_several_completions(tmp_path: Path) -> None:
    answer = {
        "prompt_token_ids": [5, 6, 7],
        "outputs": [{"routed_experts": routed(5, 1).tolist()}, {"routed_experts": routed(4, 2).tolist()}],
    }
    other = {"prompt_token_ids": [5], "outputs": [{"routed_experts": routed(2, 3).tolist()}]}
    content = f"{json.dumps(answer)}\n\n{json.dumps(other)}\n"
    report, trace = imported(tmp_path, content, "in.jsonl")
    np.testing.assert_array_equal(trace.experts[:], np.concatenate([routed(5, 1), routed(4, 2), routed(2, 3)]))
    assert (trace.prompt_len.tolist(), report.notes) == ([3, 3, 1], ())
    assert trace.request_labels == [f"in.jsonl, line {n}, completion {c}" for n, c in ((1, 0), (1, 1), (3, 0))]


def test_vllm_with_the_prompt_apart(tmp_path: Path) -> None:
    ids = routed(5)
    answer = {
        "prompt_routed_experts": ids[:3].tolist(),
        "prompt_token_ids": [1] * 9,
        "outputs": [{"routed_experts": ids[3:].tolist()}],
    }
    _, trace = imported(tmp_path, answer)
    np.testing.assert_array_equal(trace.experts[:], ids)
    assert trace.prompt_len.tolist() == [3]


def test_sglang_answers_with_dense_layers(tmp_path: Path) -> None:
    ids = routed(6, dense=2)
    answer = {"text": "…", "meta_info": {"routed_experts": encoded(ids), "prompt_tokens": 4, "completion_tokens": 3}}
    report, trace = imported(tmp_path, [answer], num_layers=LAYERS + 2, top_k=K)
    np.testing.assert_array_equal(trace.experts[:], ids[:, 2:])
    assert trace.prompt_len.tolist() == [4]
    assert trace.header["moe_layer_ids"] == "[2, 3, 4]"
    assert report.notes == ("dense layers left out: 0, 1",)


def test_sglang_rows_that_begin_later(tmp_path: Path) -> None:
    meta = {"routed_experts": encoded(routed(6)), "prompt_tokens": 10, "routed_experts_start_len": 7}
    _, trace = imported(tmp_path, {"meta_info": meta}, num_layers=LAYERS, top_k=K)
    assert trace.context_len is not None
    assert (trace.prompt_len.tolist(), trace.context_len.tolist()) == ([3], [7])


def test_web_answers_name_their_lengths_in_usage(tmp_path: Path) -> None:
    answer = {"choices": [{"routed_experts": encoded(routed(6))}], "usage": {"prompt_tokens": 2}}
    _, trace = imported(tmp_path, answer, num_layers=LAYERS, top_k=K)
    assert trace.prompt_len.tolist() == [2]


def test_last_tokens_without_a_choice_and_missing_experts(tmp_path: Path) -> None:
    ids = routed(5)
    ids[3, 1, 0] = -1
    ids[4] = 0
    report, trace = imported(tmp_path, {"routed_experts": ids.tolist(), "prompt_len": 5})
    assert (trace.num_tokens, trace.prompt_len.tolist()) == (4, [4])
    assert trace.experts[3, 1].tolist() == [ids[3, 1, 1], 255]
    assert report.notes == ("1 last tokens without a choice left out: they never ran",)


@pytest.mark.parametrize("options", [{"num_layers": 24}, {"model": "gpt-oss-20b"}])
def test_layers_that_stand_first_are_turned(tmp_path: Path, options: dict[str, Any]) -> None:
    """By the layers that are given, or those of the shipped model that is named."""
    ids = np.random.default_rng(1).random((24, 7, 9)).argsort(axis=2)[:, :, :4]
    np.save(tmp_path / "a.npy", ids)
    report = import_engine_dumps(tmp_path / "a.npy", tmp_path / "o.safetensors", num_experts=32, **options)
    np.testing.assert_array_equal(open_trace(report.path).experts[:], ids.transpose(1, 0, 2))
    assert report.notes[0] == "arrays taken for [layers, tokens, top_k], since 24 layers stand first"


def test_with_one_expert_a_token_dense_layers_must_be_named(tmp_path: Path) -> None:
    ids = np.concatenate([np.zeros((4, 1, 1)), np.arange(4)[:, None, None]], axis=1).astype(int).tolist()
    assert imported(tmp_path, {"routed_experts": ids})[1].num_layers == 2
    _, trace = imported(tmp_path, {"routed_experts": ids}, dense_layers=1)
    assert (trace.experts[:, 0, 0].tolist(), trace.header["moe_layer_ids"]) == ([0, 1, 2, 3], "[1]")


GOOD = {"routed_experts": routed(3).tolist()}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, "line 1: is no JSON"),
        ("[" * 100_000, {}, "is no usable JSON .nested too deeply."),
        ("[]", {}, "source: holds no routed experts"),
        ([3], {}, "entry 0: is no object"),
        ({"outputs": [3]}, {}, "file, completion 0: is no object"),
        ({}, {}, "file: has no routed_experts"),
        ({"routed_experts": 3}, {}, "routed_experts of the type int; give lists or base64"),
        ({"routed_experts": [[1], [1, 2]]}, {}, "file: has rows of different lengths"),
        ({"routed_experts": [[1, 2]]}, {}, r"file: is int64 of the shape \[1, 2\]; routed experts are \[tokens, lay"),
        ({"routed_experts": [[[0.5, 1.5]]]}, {}, r"file: is float64 of the shape \[1, 1, 2\]"),
        ({"routed_experts": [[["a", "b"]]]}, {}, "file: is no list of numbers"),
        ({"routed_experts": [[[1, 1 << 40]]]}, {}, "holds ids of more than 31 bits"),
        ({"routed_experts": [[[1, 1 << 99]]]}, {}, r"is object of the shape|different lengths"),
        ({"routed_experts": "AAAA"}, {}, "is base64, which does not say its shape; give num_layers="),
        ({"routed_experts": "AAAA"}, {"num_layers": 3, "top_k": 2}, "has 3 bytes, no multiple of 4 × 3 layers × 2"),
        ({"routed_experts": "§"}, {"num_layers": 3, "top_k": 2}, "routed_experts that are no base64"),
        (GOOD, {"num_layers": 4}, "file: has num_layers 3, not 4"),
        (GOOD, {"top_k": 4}, "file: has top_k 2, not 4"),
        (GOOD, {"num_experts": 7}, r"file: holds expert 11, outside 0 … 6"),
        (GOOD | {"prompt_tokens": 4}, {}, "file: has 3 rows, fewer than the 4 tokens of its prompt"),
        (GOOD, {"dense_layers": 3}, "has 3 layers, all dense; correct dense_layers"),
        (GOOD | {"prompt_tokens": -1}, {}, "has the prompt length '-1'"),
        (GOOD | {"prompt_tokens": 2.5}, {}, "has the prompt length '2.5'"),
        (GOOD | {"routed_experts_start_len": "3"}, {}, "has the start '3'"),
        (GOOD | {"prompt_routed_experts": [[[1, 2]]]}, {}, r"has \[1, 1, 2\] of the prompt and \[3, 3, 2\]"),
        ([GOOD, {"routed_experts": [[[1, 2]]]}], {}, r"entry 1: has \[layers, top_k\] = \[1, 2\], in.json .entry 0."),
        ({"routed_experts": [[[1, 1]]] * 2}, {}, "has no layer in which tokens choose different experts"),
        ([GOOD, {"routed_experts": [[[1, 1]] * 3]}], {}, "entry 1: holds no token with a choice of experts"),
        ({"routed_experts": [[[1, 2]], [[1, 1]], [[2, 1]]]}, {}, "experts row 1, layer 0: holds an expert twice"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, content: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        imported(tmp_path, content, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_malformed_arrays_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    objects = np.empty(1, object)
    objects[0] = Bomb(touched)
    np.save(tmp_path / "object.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "object.npz", allow_pickle=True, a=objects)
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04K\x03.")
    np.save(tmp_path / "cut.npy", routed(50))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-9])
    (tmp_path / "text.npz").write_text("PK, not really")
    np.savez(tmp_path / "behind.npz", a=routed(50))
    (tmp_path / "behind.npz").write_bytes(b"PK" + (tmp_path / "behind.npz").read_bytes())
    np.savez(tmp_path / "cut.npz", a=routed(50))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    np.savez(tmp_path / "lengths.npz", a=routed(3), prompt_len=np.array([1.5]))
    np.save(tmp_path / "flat.npy", routed(3)[0])
    (tmp_path / "dump.pt").write_bytes(b"PK")
    expected = {
        "object.npy": "is no plain array file",
        "object.npz": "is no plain array file",
        "pickle.npy": "is no plain array file",
        "cut.npy": "array: needs 1200 bytes by its shape and has 1191, truncated",
        "text.npz": "is no usable .npz archive",
        "behind.npz": "is no usable .npz archive",
        "cut.npz": "is no usable .npz archive",
        "lengths.npz": "array 'prompt_len': is no list of one length a request",
        "flat.npy": r"is int32 of the shape \[3, 2\]",
        "dump.pt": "is of the type .pt; give .npy, .npz",
    }
    for name, message in expected.items():
        with pytest.raises(TraceError, match=message) as caught:
            import_engine_dumps(tmp_path / name, tmp_path / "o.safetensors", model="m")
        assert name in str(caught.value)
    assert not touched.exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTFLOW_MAX_BYTES", "1000")
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros((1000, LAYERS, K), np.int32))
    with pytest.raises(TraceError, match=r"would take \d+ bytes of memory, at most 1000 are allowed; split it, or"):
        import_engine_dumps(tmp_path / "a.npz", tmp_path / "o.safetensors", model="m")


def test_the_command_reaches_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", routed(3))
    words = ("import", "engine-dumps", tmp_path / "a.npy", tmp_path / "o.safetensors")
    code, out, _ = run(capsys, *words, "model=m", "num_experts=12")
    shown = "3 tokens × 3 layers × top-2 of 12 experts"
    assert (code, out.splitlines()[0]) == (0, f"wrote {tmp_path / 'o.safetensors'}: 1 requests, {shown}")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "note: model=unknown: the source names none" in out
