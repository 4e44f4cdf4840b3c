"""Each importer against a small made-up source whose trace is known, against faulty ones, and recorded requests."""

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from safetensors.numpy import save_file

from tests.support.recordings import BESIDE, SHIPPED, named, recordings
from traces.format import About, Trace, TraceError, open_trace, write_trace
from traces.importers.common import ImportReport
from traces.importers.event_csr import import_event_csr
from traces.importers.gpt_oss_json import SOURCE, import_gpt_oss_json, load_split, request_hash
from traces.importers.moe_beyond_csv import import_moe_beyond_csv
from traces.importers.route_csv import import_route_csv

# -- gpt-oss JSON --------------------------------------------------------------------------------------------


def record(num_tokens: int = 2, shift: int = 0, **more: Any) -> dict[str, Any]:
    """A record of two layers, two of 32 experts."""
    data = [
        {
            f"token_{70 + t}": {
                f"layer_{layer}": {"selected_experts": [shift + t, 9 - layer], "selected_probs": [0.7, 0.3]}
                for layer in range(2)
            }
        }
        for t in range(num_tokens)
    ]
    flags = {"finished_successfully": True, "has_repetition": False}
    return {"dataset": "d", "category": "c", **flags, "router_data": data, **more}


def from_json(tmp_path: Path, content: Any, name: str = "in.json", **options: Any) -> tuple[ImportReport, Trace]:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    report = import_gpt_oss_json(path, tmp_path / "out.safetensors", **options)
    return report, open_trace(report.path)


def test_json_becomes_rows(tmp_path: Path) -> None:
    report, trace = from_json(tmp_path, record(3), context=True)
    np.testing.assert_array_equal(trace.experts[:], [[[t, 9], [t, 8]] for t in range(3)])
    assert trace.weights is not None
    assert trace.weights[0, 0].tolist() == np.array([0.7, 0.3], np.float16).tolist()
    assert (trace.model, trace.num_experts, trace.request_labels) == ("gpt-oss-20b", 32, ["d/c"])
    assert trace.context_len is not None
    assert (trace.prompt_len.tolist(), trace.context_len.tolist()) == ([0], [70])
    assert (report.num_requests, report.num_tokens, report.notes) == (1, 3, ())


def test_json_of_several_forms_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    (folder / "x" / "a2.json").write_text(json.dumps(record(1, shift=2)))
    (folder / "x" / "a10.jsonl").write_text(f"{json.dumps(record(1, shift=3))}\n\n{json.dumps(record(1, shift=4))}\n")
    (folder / "x" / "a9.json").write_text(json.dumps([record(1, shift=5), record(1, shift=6)]))
    (folder / "summary.json").write_text('{"sample_count": 3}')
    report = import_gpt_oss_json(folder, tmp_path / "out.safetensors")
    trace = open_trace(report.path)
    assert trace.experts[:, 0, 0].tolist() == [2, 5, 6, 3, 4]
    assert report.notes == ("left out: 1 without router_data",)


@pytest.mark.parametrize("name", ["in.json.gz", "in.jsonl.gz"])
def test_packed_json_is_read_as_what_is_packed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(record(2)).encode()))
    report = import_gpt_oss_json(tmp_path / name, tmp_path / "out.safetensors")
    assert report.num_tokens == 2


def test_json_with_fewer_experts_is_padded(tmp_path: Path) -> None:
    content = record(2)
    content["router_data"][1]["token_71"]["layer_1"] = {"selected_experts": [5], "selected_probs": [1]}
    _, trace = from_json(tmp_path, content)
    assert trace.weights is not None
    assert trace.experts[1, 1].tolist() == [5, 255]
    assert trace.weights[1, 1].tolist() == [1, 0]


def test_flagged_requests_are_left_out_unless_kept(tmp_path: Path) -> None:
    several = [record(1), record(2, has_repetition=True), record(3, finished_successfully=False)]
    report, trace = from_json(tmp_path, several)
    assert (trace.num_requests, report.notes) == (1, ("left out: 2 flagged",))
    report, trace = from_json(tmp_path, several, keep_all=True)
    assert (trace.num_requests, report.notes) == (3, ())
    with pytest.raises(TraceError, match="gives no request; left out: 2 flagged; see keep_all"):
        from_json(tmp_path, several[1:])


LAYER = {"selected_experts": [1, 2], "selected_probs": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: is no JSON"),
        ("[" * 100_000, "file: is no usable JSON"),
        ("{}", "file: has no router_data"),
        ("[]", "gives no request"),
        (record(0), "file: has no router_data"),
        (record(1, router_data="x"), "file: router_data is no list of tokens"),
        (record(1, router_data=[3]), "file, router_data 0: is no object with one token"),
        (record(1, router_data=[{"tok": {}}]), "router_data 0: is called 'tok'"),
        (record(1, router_data=[{"token_1": {}}]), "router_data 0: token_1 has no layers"),
        (record(1, router_data=[{"token_1": {"layer_1": LAYER}}]), "router_data 0: layer_0 is missing"),
        ([record(1), record(1, router_data=[{"token_1": {"layer_0": {}}}])], "entry 1, router_data 0: layer_0 needs"),
        (
            record(1, router_data=[{"token_1": {"layer_0": LAYER, "layer_1": LAYER}}, {"token_2": {"layer_0": LAYER}}]),
            "router_data 1: has 1 layers, the first token 2",
        ),
        (record(1, router_data=[{"token_1": {"layer_0": LAYER | {"selected_experts": [1, 32]}}}]), "below 32"),
        (record(1, router_data=[{"token_1": {"layer_0": LAYER | {"selected_experts": [1, True]}}}]), "below 32"),
        (record(1, router_data=[{"token_1": {"layer_0": LAYER | {"selected_experts": [1, 1]}}}]), "not distinct"),
        (record(1, router_data=[{"token_1": {"layer_0": LAYER | {"selected_experts": [1]}}}]), "of one length"),
        (record(1, router_data=[{"token_1": {"layer_0": LAYER | {"selected_probs": [-1, 1]}}}]), "not numbers from 0"),
        (
            record(1, router_data=[{"token_1": {"layer_0": LAYER | {"selected_probs": [float("nan"), 1]}}}]),
            "NaN is no number",
        ),
    ],
)
def test_faulty_json_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(TraceError, match=rf"in.json: .*{message}"):
        from_json(tmp_path, content)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_faulty_json_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"in.jsonl: line 2: is no JSON"):
        from_json(tmp_path, json.dumps(record(1)) + "\n{]\n", name="in.jsonl")


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="split=test is unknown; choose one of all, train, eval, other"):
        from_json(tmp_path, record(1), split="test")


def test_a_split_takes_its_requests_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(1, shift=shift, finished_successfully=shift != 2) for shift in range(4)] + [record(1, shift=2)]
    _, whole = from_json(tmp_path, records, keep_all=True)
    hashes = [request_hash(whole.experts[row : row + 1]) for row in range(4)]
    content = {"train": [hashes[2], hashes[0]], "eval": [hashes[1]]}
    monkeypatch.setattr("traces.importers.gpt_oss_json.load_split", lambda: content)
    for split, want in (("train", [2, 0]), ("eval", [1]), ("other", [3])):
        _, trace = from_json(tmp_path, records, split=split)
        assert trace.experts[:, 0, 0].tolist() == want
        assert trace.header["split"] == split
    with pytest.raises(TraceError, match=rf"holds 1 of the 2 requests of split=train \(first missing: {hashes[2]}\)"):
        from_json(tmp_path, records[:2], split="train")


SAMPLE = BESIDE / "gpt-oss-20b.sample.json"
"""A request of the train trace as the public source gives it."""


def like_the_source(path: Path, folder: Path) -> Trace:
    """A recording with what the importer keeps, as it would write it; `path` itself where that was imported."""
    if path != SHIPPED:
        return open_trace(path)
    shipped = open_trace(path)
    assert shipped.weights is not None
    labels = [f"twin/{index}" for index in range(shipped.num_requests)]
    arrays = {
        "experts": shipped.experts[:],
        "weights": shipped.weights[:],
        "request_start": shipped.request_start,
        "prompt_len": [0] * shipped.num_requests,
    }
    about = About("gpt-oss-20b", 32, SOURCE, "Apache-2.0", request_labels=labels, header={"split": "eval"})
    return open_trace(write_trace(folder / "original.safetensors", arrays, about))


def restated_hashes(trace: Trace) -> list[str]:
    """`request_hash` of each request, byte by byte."""
    bounds = pairwise(trace.request_start.tolist())
    chosen = [bytes(e for row in trace.experts[a:b].tolist() for layer in row for e in layer) for a, b in bounds]
    return [hashlib.sha256(text).hexdigest()[:16] for text in chosen]


@pytest.mark.parametrize("path", recordings(*(["train"] if SAMPLE.exists() else [])), ids=named)
def test_a_request_in_the_sources_form_comes_in_as_it_was_recorded(tmp_path: Path, path: Path) -> None:
    original, source = like_the_source(path, tmp_path), SAMPLE
    if path == SHIPPED:
        source = tmp_path / "in.json"
        source.write_text(json.dumps(as_records(original)[5]))
    sample = open_trace(import_gpt_oss_json(source, tmp_path / "out.safetensors").path)
    request = restated_hashes(original).index(request_hash(sample.experts[:]))
    rows = slice(*original.request_start[request : request + 2])
    np.testing.assert_array_equal(sample.experts[:], original.experts[rows])
    assert sample.weights is not None
    assert original.weights is not None
    assert sample.weights[:].tobytes() == original.weights[rows].tobytes()
    assert sample.request_labels is not None
    assert original.request_labels is not None
    assert sample.request_labels == original.request_labels[request : request + 1]


@pytest.mark.parametrize("path", recordings("train", "eval"), ids=named)
def test_the_split_rebuilds_the_recorded_trace(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = like_the_source(path, tmp_path)
    if path == SHIPPED:
        split = {"train": [], "eval": restated_hashes(original)}
        monkeypatch.setattr("traces.importers.gpt_oss_json.load_split", lambda: split)
    requests = as_records(original)
    (tmp_path / "data").mkdir()
    for index in np.random.default_rng(0).permutation(len(requests)):
        (tmp_path / "data" / f"{index}.json").write_text(json.dumps(requests[index]))
    (tmp_path / "data" / "more.json").write_text(json.dumps(record(2)))
    split_name = original.header["split"]
    rebuilt = open_trace(import_gpt_oss_json(tmp_path / "data", tmp_path / "out.safetensors", split=split_name).path)
    for name, array in original.layout_arrays().items():
        assert getattr(rebuilt, name)[:].tobytes() == array[:].tobytes(), name
    assert set(rebuilt.layout_arrays()) == set(original.layout_arrays())
    assert rebuilt.header == original.header


def as_records(trace: Trace) -> list[dict[str, Any]]:
    """The trace in the JSON form of its source."""
    labels = trace.request_labels or []
    assert trace.weights is not None
    result = []
    for index, label in enumerate(labels):
        first, last = trace.request_start[index : index + 2]
        ids, probs = trace.experts[first:last].tolist(), trace.weights[first:last].astype(float).tolist()
        data = [
            {
                f"token_{t}": {
                    f"layer_{n}": {"selected_experts": a, "selected_probs": b} for n, (a, b) in enumerate(rows)
                }
            }
            for t, rows in enumerate(zip(*pair, strict=True) for pair in zip(ids, probs, strict=True))
        ]
        dataset, category = label.split("/", 1)
        flags = {"finished_successfully": len(data) < 511, "has_repetition": False}
        text: dict[str, Any] = {"row_index": index, "original_prompt": "", "full_text": [], "generated_only": []}
        result.append({"dataset": dataset, "category": category, **flags, **text, "router_data": data})
    return result


@pytest.mark.parametrize("path", recordings("train", "eval"), ids=named)
def test_a_request_is_known_by_the_hash_of_its_experts(path: Path) -> None:
    trace = open_trace(path)
    found = [request_hash(trace.experts[a:b]) for a, b in pairwise(trace.request_start)]
    assert found == restated_hashes(trace)
    assert len(set(found)) == trace.num_requests
    if path != SHIPPED:
        assert found == load_split()[trace.header["split"]]


def test_the_shipped_splits_do_not_overlap() -> None:
    hashes = load_split()
    assert (len(hashes["train"]), len(hashes["eval"])) == (95, 30)
    assert len({*hashes["train"], *hashes["eval"]}) == 125


# -- MoE-Beyond CSV ------------------------------------------------------------------------------------------

BEYOND = "Layer ID,Batch Number,Token,Activated Expert IDs"
BY_LAYER = f"""{BEYOND}
1,0,the,"[8, 2]"
1,0,cat,"[3, 1]"
1,0,the,"[5]"
1,1,a,"[7, 6]"
2,0,the,"[9, 0]"
2,0,cat,"[4, 1]"
2,0,the,"[6, 2]"
2,1,a,"[63, 1]"
"""
_LINES = BY_LAYER.splitlines()
BY_TOKEN = "\n".join([BEYOND, *(_LINES[i] for i in (1, 5, 2, 6, 3, 7, 4, 8))])


def from_beyond(tmp_path: Path, text: str, **options: Any) -> tuple[ImportReport, Trace]:
    path = tmp_path / "in.csv"
    path.write_text(text)
    report = import_moe_beyond_csv(path, tmp_path / "out.safetensors", **options)
    return report, open_trace(report.path)


@pytest.mark.parametrize("text", [BY_LAYER, BY_TOKEN, "\ufeff" + BY_LAYER], ids=["by layer", "by token", "with BOM"])
def test_beyond_rows_meet_across_layers(tmp_path: Path, text: str) -> None:
    report, trace = from_beyond(tmp_path, text)
    rows = [[[8, 2], [9, 0]], [[3, 1], [4, 1]], [[5, 255], [6, 2]], [[7, 6], [63, 1]]]
    np.testing.assert_array_equal(trace.experts[:], rows)
    assert (trace.request_start.tolist(), trace.prompt_len.tolist()) == ([0, 3, 4], [3, 1])
    assert (trace.weights, trace.header["moe_layer_ids"]) == (None, "[1, 2]")
    assert (trace.model, trace.num_experts) == ("deepseek-v2-lite", 64)
    assert trace.request_labels == ["in/batch 0", "in/batch 1"]
    assert report.notes == ("experts of a row stand in recorded order, not known to be best first; no weights",)


def test_beyond_folder_phase_and_more_columns(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for number in (10, 9):
        (folder / f"prompt_{number}.csv").write_text(f'{BEYOND},Token Embedding Vector\n1,0,x,"[{number}]","[0.5]"\n')
    report = import_moe_beyond_csv(folder, tmp_path / "out.safetensors", phase="decode")
    trace = open_trace(report.path)
    assert trace.experts[:].reshape(-1).tolist() == [9, 10]
    assert (trace.prompt_len.tolist(), trace.request_labels) == ([0, 0], ["prompt_9", "prompt_10"])
    assert report.notes[1] == "columns left out: Token Embedding Vector"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: has no header line"),
        (BEYOND, "source: holds no rows"),
        ("Layer ID,Token\n1,2", "line 1: has 0 columns 'Batch Number'; the columns are Layer ID"),
        (f"{BEYOND}\n1,0,x", "line 2: has 3 values, the header 4"),
        (f'{BEYOND}\n1,0,x,"[1]"\n{BEYOND}', "line 3: repeats the header; these are several files joined"),
        (f'{BEYOND}\n-1,0,x,"[1]"', "line 2: Layer ID is '-1'; give a whole number"),
        (f'{BEYOND}\n1,zero,x,"[1]"', "line 2: Batch Number is 'zero'"),
        (f'{BEYOND}\n1,0,x,"__import__(1)"', "line 2: Activated Expert IDs is '__import__.*; give a list"),
        (f'{BEYOND}\n1,0,x,"[]"', r"line 2: Activated Expert IDs is '\[\]'"),
        (f'{BEYOND}\n1,0,x,"[1, 64]"', "line 2: Activated Expert IDs holds 64, outside 0 … 63; set num_experts"),
        (f'{BEYOND}\n1,0,x,"[1, 1]"', "line 2: Activated Expert IDs holds an expert twice"),
        (f'{BEYOND}\n1,0,x,"[1]"\n2,0,y,"[1]"', "line 3: layer 2 has the token 'y' where layer 1 has 'x'"),
        (f'{BEYOND}\n1,0,x,"[1]"\n1,0,y,"[1]"\n2,0,x,"[1]"', "line 4: layer 2 ends after 1 tokens, layer 1 has 2"),
        (f'{BEYOND}\n1,0,x,"[1]"\n1,1,x,"[1]"\n2,1,x,"[1]"', r"line 4: batch 1 has the layers \[1, 2\], .* has \[1\]"),
        (f'{BEYOND}\n1,0,x,"[1]\n', "line 2: is no CSV .unexpected end"),
    ],
)
def test_faulty_beyond_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=rf"in.csv: ({message})"):
        from_beyond(tmp_path, text)


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(BEYOND.encode() + b"\n1,0,\xff\xfe,[1]\n")
    with pytest.raises(TraceError, match=r"in.csv: line \d: is not UTF-8"):
        import_moe_beyond_csv(tmp_path / "in.csv", tmp_path / "out.safetensors")
    with pytest.raises(TraceError, match=r"none.csv: file: does not exist"):
        import_moe_beyond_csv(tmp_path / "none.csv", tmp_path / "out.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"empty: folder: holds no .csv file"):
        import_moe_beyond_csv(tmp_path / "empty", tmp_path / "out.safetensors")


# -- route CSV -----------------------------------------------------------------------------------------------

COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
PREAMBLE = "# route_trace v1\n# model=/models/Qwen3-30B.gguf arch=q n_layer=3 n_expert=16 n_expert_used=2\n"


def route(rows: str, columns: str = COLUMNS, preamble: str = PREAMBLE) -> str:
    return preamble + columns + "\n" + "".join(f"{row},0,512\n" for row in rows.split())


# Turn 0: two prompt tokens, one decode step; the last layer sees the last prompt token only. Turn 1: one step at 9.
GAP = route("""0,0,0,1,0,3,.6 0,0,0,1,1,4,.4  0,0,1,1,0,5,.7 0,0,1,1,1,6,.3
               0,0,1,2,0,7,.5 0,0,1,2,1,8,.5  0,1,2,1,0,9,1  0,1,2,2,1,2,.2 0,1,2,2,0,1,.8
               1,1,9,1,0,15,1 1,1,9,2,0,0,1""")


def from_route(tmp_path: Path, text: str, **options: Any) -> tuple[ImportReport, Trace]:
    path = tmp_path / "in.csv"
    path.write_text(text)
    report = import_route_csv(path, tmp_path / "out.safetensors", **options)
    return report, open_trace(report.path)


def test_route_drops_prompt_tokens_that_lack_a_layer(tmp_path: Path) -> None:
    report, trace = from_route(tmp_path, GAP)
    rows = [[[5, 6], [7, 8]], [[9, 255], [1, 2]], [[15, 255], [0, 255]]]
    np.testing.assert_array_equal(trace.experts[:], rows)
    assert trace.weights is not None
    assert trace.weights[1].tolist() == np.array([[1, 0], [0.8, 0.2]], np.float16).tolist()
    assert (trace.request_start.tolist(), trace.prompt_len.tolist()) == ([0, 2, 3], [1, 0])
    assert trace.context_len is not None
    assert trace.context_len.tolist() == [1, 9]
    assert (trace.model, trace.num_experts, trace.header["moe_layer_ids"]) == ("Qwen3-30B", 16, "[1, 2]")
    assert trace.request_labels == ["turn 0", "turn 1"]
    assert any("1 prompt tokens lack a layer: left out" in note for note in report.notes)


def test_route_repeats_the_next_choice_if_asked(tmp_path: Path) -> None:
    report, trace = from_route(tmp_path, GAP, incomplete="repeat")
    assert trace.experts[0].tolist() == [[3, 4], [7, 8]]
    assert trace.context_len is not None
    assert (trace.prompt_len.tolist(), trace.context_len.tolist()) == ([2, 0], [0, 9])
    assert any("filled" in note for note in report.notes)


def test_route_missing_ranks_move_up(tmp_path: Path) -> None:
    _, trace = from_route(tmp_path, route("0,1,0,0,0,3,.6 0,1,0,0,2,4,.4 0,1,1,0,0,5,.5 0,1,1,0,1,6,.3 0,1,1,0,2,7,.2"))
    np.testing.assert_array_equal(trace.experts[:], [[[3, 4, 255]], [[5, 6, 7]]])


def test_route_unknown_weights_leave_all_weights_out(tmp_path: Path) -> None:
    report, trace = from_route(tmp_path, route("0,1,0,0,0,3,nan 0,1,1,0,0,3,.4"))
    assert trace.weights is None
    assert "weights left out: some are nan" in report.notes


def test_route_columns_are_found_by_name(tmp_path: Path) -> None:
    text = "expert,turn,phase,step,layer,slot,weight,dropped\n3,0,decode,5,0,0,0.5,1\n"
    report, trace = from_route(tmp_path, text, model="m", num_experts=4)
    assert (trace.experts[0, 0, 0], trace.model, trace.num_experts) == (3, "m", 4)
    assert report.notes == ()
    report, trace = from_route(tmp_path, text, model="m")
    assert report.notes == ("num_experts=4, the highest id and one; give num_experts= if there are more",)


def test_route_files_of_a_folder_are_requests_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("run2", "run10"):
        (folder / f"{name}.csv").write_text(route("0,1,0,0,0,3,1"))
    trace = open_trace(import_route_csv(folder, tmp_path / "out.safetensors").path)
    assert trace.request_labels == ["run2/turn 0", "run10/turn 0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: has no header line"),
        (route("", preamble=""), "source: holds no rows"),
        (route("0,1,0,0,0,3,1", preamble=""), "source: names no model; give model="),
        (route("0,1,0,0,0,3,1", columns=COLUMNS.replace("slot", "rank")), "line 3: has 0 columns 'slot'"),
        (route("0,1,0,0,0,3,1 0,2,1,0,0,3,1"), "line 5: phase is '2'; give 0 or prefill"),
        (route("0,1,0,0,0,3,1 0,1,-1,0,0,3,1"), "line 5: step is '-1'; give a whole number"),
        (route("0,1,0,0,0,3,-1"), "line 4: weight is '-1'; give 0 to 65504, or nan"),
        (route("0,1,0,0,0,3,inf"), "line 4: weight is 'inf'"),
        (route("0,1,0,0,0,3,1 0,1,0,0,0,4,1"), "line 5: turn 0, step 0 comes twice in layer 0, slot 0; give each run"),
        (route("0,1,0,0,0,3,1 0,0,0,0,1,4,1"), "line 5: turn 0, step 0 comes in both phases"),
        (route("0,1,0,0,0,3,1 0,1,0,0,1,3,1"), "line 5: expert 3 comes twice in one layer"),
        (route("0,1,0,0,0,3,1 0,0,1,0,0,3,1"), "line 5: is a prefill step after a decode step"),
        (route("0,1,0,0,0,3,1 0,1,0,1,0,3,1 0,1,1,0,0,3,1"), "line 6: turn 0, step 1 has no row for layer 1"),
        (route("0,0,0,0,0,3,1 0,0,0,1,0,3,1 0,0,1,0,0,3,1 0,0,2,0,0,3,1 0,0,2,1,0,3,1"), "line 6: .*step 1 has no row"),
        (route("0,0,0,0,0,3,1 1,1,0,0,0,3,1 1,1,0,1,0,3,1"), "turn 0: has no token with all layers"),
        (route("0,1,0,0,0,16,1"), "line 4: .* expert 16, outside 0 … 15; correct num_experts"),
    ],
)
def test_faulty_route_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=rf"in.csv: ({message})"):
        from_route(tmp_path, text)


def test_route_cannot_repeat_what_no_token_chose(tmp_path: Path) -> None:
    text = route("0,0,0,0,0,3,1 1,1,0,0,0,3,1 1,1,0,1,0,3,1")
    with pytest.raises(TraceError, match="line 4: turn 0, step 0 has no row for layer 1"):
        from_route(tmp_path, text, incomplete="repeat")


# -- event CSR -----------------------------------------------------------------------------------------------

Events = list[tuple[int, int, int, int, int, int, dict[int, tuple[int, float]]]]
"""request, scheduler step, forward cycle, phase, layer, tokens, {expert: (count, mass)}."""

EVENTS: Events = [
    (7, 0, 0, 0, 4, 3, {1: (2, 0.5), 5: (3, 2.0), 2: (1, 0.5)}),
    (7, 0, 0, 0, 2, 3, {0: (3, 1.5), 3: (3, 1.0)}),
    (7, 1, 1, 1, 2, 1, {4: (1, 0.25), 6: (1, 0.75)}),
    (7, 1, 1, 1, 4, 1, {4: (1, 0.5)}),
    (3, 1, 1, 1, 2, 1, {7: (1, 1.0)}),
    (3, 1, 1, 1, 4, 1, {0: (1, 0.5), 1: (1, 0.5)}),
]


def csr(events: Events) -> dict[str, Any]:
    columns = np.array([event[:6] for event in events], np.int32)
    names = ("request", "scheduler_step", "forward_cycle", "phase", "layer", "token_count")
    entries = [(i, *chosen) for event in events for i, chosen in event[6].items()]
    return {
        **{name: columns[:, index].copy() for index, name in enumerate(names)},
        "offsets": np.cumsum([0, *(len(event[6]) for event in events)]).astype(np.int64),
        "expert_ids": np.array([e[0] for e in entries], np.int16),
        "assignment_counts": np.array([e[1] for e in entries], np.int32),
        "gate_mass": np.array([e[2] for e in entries], np.float32),
    }


def from_events(tmp_path: Path, arrays: Mapping[str, Any], **options: Any) -> tuple[ImportReport, Trace]:
    save_file(dict(arrays), tmp_path / "in.safetensors")
    facts: dict[str, Any] = {"model": "m", "num_experts": 8}
    report = import_event_csr(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **{**facts, **options})
    return report, open_trace(report.path)


def test_events_of_one_token_are_its_rows_and_others_are_dealt(tmp_path: Path) -> None:
    report, trace = from_events(tmp_path, csr(EVENTS))
    pad = 255
    rows = [
        [[0, 3], [5, 1]],
        [[0, 3], [5, 1]],
        [[0, 3], [5, 2]],
        [[6, 4], [4, pad]],
        [[7, pad], [0, 1]],
    ]
    np.testing.assert_array_equal(trace.experts[:], rows)
    assert trace.weights is not None
    assert trace.weights[3].tolist() == [[0.75, 0.25], [0.5, 0]]
    assert trace.weights[0].tolist() == [[0.5, np.float16(1 / 3)], [np.float16(2 / 3), 0.25]]
    assert trace.forward_id is not None
    assert trace.forward_id[:].tolist() == [0, 0, 0, 1, 1]
    assert (trace.request_start.tolist(), trace.prompt_len.tolist()) == ([0, 4, 5], [3, 0])
    assert (trace.request_labels, trace.header["moe_layer_ids"]) == (["request 7", "request 3"], "[2, 4]")
    assert report.notes[0] == "exact: 2 forwards of one token"
    assert report.notes[1].startswith("approximated: 1 forwards of several tokens, 3 pseudo-tokens")


@st.composite
def event_lists(draw: st.DrawFn) -> Events:
    events: Events = []
    for request in range(draw(st.integers(1, 3))):
        for step in range(draw(st.integers(1, 4))):
            tokens = draw(st.integers(1, 7)) if step == 0 else 1
            for layer in range(2):
                chosen = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
                counts = [tokens] + [draw(st.integers(1, tokens)) for _ in chosen[1:]]
                mass = [draw(st.floats(0, 50, width=16)) for _ in chosen]
                parts = {e: (c, m) for e, c, m in zip(chosen, counts, mass, strict=True)}
                events.append((request, step, step, int(step > 0), layer, tokens, parts))
    return draw(st.permutations(events))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(events=event_lists())
def test_dealing_keeps_sets_counts_and_mass(events: Events, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, trace = from_events(tmp_path_factory.mktemp("events"), csr(events))
    assert trace.forward_id is not None
    assert trace.weights is not None
    labels = trace.request_labels or []
    for request, step, _, _, layer, tokens, chosen in events:
        index = labels.index(f"request {request}")
        span = slice(*trace.request_start[index : index + 2])
        mine = trace.forward_id[span] == step
        ids, weights = trace.experts[span][mine, layer], trace.weights[span][mine, layer].astype(float)
        assert len(ids) == tokens
        for expert, (count, mass) in chosen.items():
            assert (ids == expert).sum() == count
            assert weights[ids == expert].sum() == pytest.approx(mass, rel=2e-3, abs=1e-5)
        assert (ids != trace.padding).sum() == sum(count for count, _ in chosen.values())


def test_dealing_in_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = from_events(tmp_path, csr(EVENTS))
    expected = whole.experts[:].copy()
    monkeypatch.setattr("traces.importers.event_csr._BLOCK_ASSIGNMENTS", 2)
    _, parts = from_events(tmp_path, csr(EVENTS))
    np.testing.assert_array_equal(parts.experts[:], expected)


def test_forwards_that_lack_a_layer_are_left_out_and_counted(tmp_path: Path) -> None:
    report, trace = from_events(tmp_path, csr([*EVENTS, (7, 2, 2, 1, 2, 1, {4: (1, 1.0)})]))
    assert trace.num_tokens == 5
    assert report.notes[2] == "left out: 1 forwards without all layers in one token_count and phase"


def test_events_with_phases_the_other_way_round(tmp_path: Path) -> None:
    turned = [(*event[:3], 1 - event[3], *event[4:]) for event in EVENTS]
    with pytest.raises(TraceError, match="request 7: has a prefill forward after a decode forward; swap prefill_phase"):
        from_events(tmp_path, csr(turned))
    _, trace = from_events(tmp_path, csr(turned), prefill_phase="1")
    assert trace.prompt_len.tolist() == [3, 0]


def test_events_say_what_was_concluded(tmp_path: Path) -> None:
    report, trace = from_events(tmp_path, csr(EVENTS) | {"extra": np.zeros(2)}, num_experts=0)
    assert trace.num_experts == 8
    assert report.notes[0] == "arrays left out: extra"
    assert report.notes[1].startswith("num_experts=8, the highest id and one")


def changed(name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    arrays = csr(EVENTS)
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    return arrays


def at(place: int, value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({n: a for n, a in csr(EVENTS).items() if n != "gate_mass"}, "array gate_mass: is missing"),
        (changed("layer", lambda a: a[:-1]), r"array layer: has the shape \[5\], not \[6\]"),
        (changed("offsets", lambda a: a[:-1]), r"array offsets: has the shape \[6\], not \[7\]"),
        (changed("gate_mass", lambda a: a[:-1]), r"array gate_mass: has the shape"),
        (changed("expert_ids", lambda a: a.reshape(-1, 1)), r"array expert_ids: has the shape"),
        (changed("phase", lambda a: a.astype(np.float32)), r"array phase: has the type float32"),
        ({n: a[:1] if n == "offsets" else a[:0] for n, a in csr(EVENTS).items()}, "array request: is empty"),
        (changed("offsets", at(0, 1)), "array offsets: must go from 0 to"),
        (changed("offsets", at(1, 0)), "event 0: has no experts, or offsets fall"),
        (changed("offsets", at(2, 99)), "event 2: has no experts, or offsets fall"),
        (changed("token_count", at(2, 0)), "event 2: has a token_count too small"),
        (changed("layer", at(1, -1)), "event 1: has a layer too small"),
        (changed("phase", at(5, 2)), "event 5: has a phase that is neither 0 nor 1"),
        (changed("assignment_counts", at(0, 4)), "event 0: has an assignment count outside"),
        (changed("assignment_counts", at(3, 0)), "event 1: has an assignment count outside"),
        (changed("expert_ids", at(5, -2)), "event 2: holds a negative expert id"),
        (changed("expert_ids", at(5, 8)), "event 2: holds an expert outside num_experts; correct"),
        (changed("expert_ids", at(6, 4)), "event 2: lists an expert twice"),
        (changed("gate_mass", at(7, np.nan)), "event 3: has a gate mass that is not 0 or more"),
        (changed("gate_mass", at(0, -1)), "event 0: has a gate mass"),
        (changed("token_count", at(0, 7)), "event 0: has fewer assignments than tokens"),
        (csr([*EVENTS, EVENTS[3]]), "event 6: repeats"),
        (csr([EVENTS[0], EVENTS[2]]), "events: no forward has all 2 layers with one token_count"),
        (csr([EVENTS[0], (*EVENTS[1][:5], 2, {0: (2, 1.0)})]), "events: no forward has all 2 layers"),
    ],
)
def test_faulty_event_files_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=rf"in.safetensors: ({message})"):
        from_events(tmp_path, arrays)


def test_events_need_no_model_but_a_safetensors_file(tmp_path: Path) -> None:
    report, trace = from_events(tmp_path, csr(EVENTS), model="")
    assert trace.model == "unknown"
    assert report.notes[0].startswith("model=unknown: the source names none")
    (tmp_path / "t.csv").write_text(BY_LAYER)
    with pytest.raises(TraceError, match=r"t.csv: file: is not a safetensors file \(it begins like text\)"):
        import_event_csr(tmp_path / "t.csv", tmp_path / "out.safetensors", model="m")


def test_progress_is_shown_for_every_kind(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(record(1)))
    (tmp_path / "a.csv").write_text(BY_LAYER)
    (tmp_path / "b.csv").write_text(GAP)
    save_file(csr(EVENTS), tmp_path / "c.safetensors")
    with Progress(disable=True) as progress:
        import_gpt_oss_json(tmp_path / "in.json", tmp_path / "o", progress)
        import_moe_beyond_csv(tmp_path / "a.csv", tmp_path / "o", progress)
        import_route_csv(tmp_path / "b.csv", tmp_path / "o", progress)
        import_event_csr(tmp_path / "c.safetensors", tmp_path / "o", progress, model="m")
        assert [task.finished for task in progress.tasks] == [True] * 4
