"""What is written is what is opened; several files are one trace; nothing is loaded that is not asked for."""

import hashlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.support.recordings import named, recordings
from tests.support.traces import EXPERTS, HEADER, save, sound_arrays
from traces.format import ARRAYS, About, ChainedArray, Trace, TraceError, open_trace, write_trace

TOY: dict[str, Any] = {
    "model": "toy",
    "num_experts": EXPERTS,
    "source": "made for a test",
    "license": "Apache-2.0",
}


def about(*, request_labels: list[str] | None = None, moe_layer_ids: list[int] | None = None, **more: Any) -> About:
    """Of `sound_arrays`, with further header strings; those named as a fact replace it."""
    facts = {key: more.pop(key, value) for key, value in TOY.items()}
    return About(**facts, request_labels=request_labels, moe_layer_ids=moe_layer_ids, header=more.pop("header", more))


def written(path: Path, **more: Any) -> Trace:
    return open_trace(write_trace(path, sound_arrays(), about(**more)))


# -- write, then open ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", [False, True])
def test_every_array_comes_back(tmp_path: Path, lists: bool) -> None:
    arrays = sound_arrays(lists)
    trace = open_trace(write_trace(tmp_path / "a.safetensors", arrays, about()))
    for name in ARRAYS:
        got = getattr(trace, name)
        if name not in arrays:
            assert got is None, name
        else:
            assert got.dtype == arrays[name].dtype, name
            np.testing.assert_array_equal(got[:], arrays[name], err_msg=name)


def test_header_and_sizes_come_back(tmp_path: Path) -> None:
    trace = written(tmp_path / "a.b.safetensors", request_labels=["première", "b"], moe_layer_ids=[1, 2, 4], note="x")
    assert (trace.model, trace.num_layers, trace.num_experts, trace.top_k) == ("toy", 3, 8, 2)
    assert (trace.num_requests, trace.num_tokens, trace.padding, trace.name) == (2, 6, 255, "a.b")
    assert trace.request_labels == ["première", "b"]
    assert trace.header["moe_layer_ids"] == "[1, 2, 4]"
    assert trace.header["note"] == "x"


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "a.safetensors", sound_arrays(), about())
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, sound_arrays()[name], err_msg=name)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    arrays = sound_arrays()
    one = write_trace(tmp_path / "a.safetensors", arrays, about(x="1", y="2"))
    turned = dict(reversed(arrays.items()))
    two = write_trace(tmp_path / "b.safetensors", turned, about(y="2", x="1"))
    other = write_trace(tmp_path / "c.safetensors", turned, about(y="2", x="3"))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


@st.composite
def traces(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    tokens, layers = sum(lengths), draw(st.integers(1, 4))
    num_experts = draw(st.sampled_from([1, 2, 8, 255, 256, 300]))
    top_k = draw(st.integers(1, min(num_experts, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[..., :top_k].astype(np.int64)
    weights = rng.random(experts.shape).astype(np.float16)
    if draw(st.booleans()) and top_k > 1:
        short = rng.random((tokens, layers)) < 0.5
        experts[short, -1], weights[short, -1] = -1, 0
    optional = {
        "weights": weights,
        "context_len": rng.integers(0, 1000, len(lengths)),
        "token_ids": rng.integers(0, 2**31 - 1, tokens),
        "forward_id": np.arange(tokens),
        "embedding": rng.standard_normal((tokens, 3)),
    }
    kept = {name: array for name, array in optional.items() if draw(st.booleans())}
    prompts = [draw(st.integers(0, length)) for length in lengths]
    arrays = {"experts": experts, "request_start": np.cumsum([0, *lengths]), "prompt_len": prompts, **kept}
    return arrays, num_experts


@settings(max_examples=60, deadline=None)
@given(made=traces())
def test_any_sound_trace_survives_the_round_trip(
    made: tuple[dict[str, Any], int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    arrays, num_experts = made
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    trace = open_trace(write_trace(path, arrays, About("m", num_experts, "s", "l")))
    ids = trace.experts[:].astype(np.int64)
    np.testing.assert_array_equal(np.where(ids == trace.padding, -1, ids), arrays["experts"])
    assert trace.experts.dtype == (np.uint8 if num_experts <= 255 else np.uint16)
    for name in ("weights", "context_len", "token_ids", "forward_id", "request_start", "prompt_len"):
        if name in arrays:
            np.testing.assert_array_equal(getattr(trace, name)[:], arrays[name])
        else:
            assert getattr(trace, name) is None
    if "embedding" in arrays:
        np.testing.assert_array_equal(trace.embedding[:], arrays["embedding"].astype(np.float16))  # type: ignore[index]


def test_all_256_ids_of_uint8_may_be_experts(tmp_path: Path) -> None:
    experts = np.array([[[255, 0]], [[1, 255]]], np.uint8)
    arrays = {"experts": experts, "request_start": [0, 2], "prompt_len": [0]}
    write_trace(tmp_path / "t.safetensors", arrays, About("m", 256, "s", "l"))
    trace = open_trace(tmp_path / "t.safetensors")
    assert trace.padding < trace.num_experts
    np.testing.assert_array_equal(trace.experts[:], experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": "7"}, "header: num_tokens is derived"),
        ({"header": {"license": "mine"}}, "header: license is a field of its own; give it there"),
        ({"note": 3}, "header: note is a int"),
        ({"note": "\ud800"}, "header: note holds a broken character"),
        ({"model": " "}, "header: model is missing"),
        ({"weights": np.ones((6, 3, 2), np.int64)}, "weights: is int64; give floating"),
        ({"experts": np.ones((6, 3, 2), bool)}, "experts: is bool; give whole numbers"),
        ({"experts": np.ones((6, 3), np.uint8)}, r"experts: has the shape \[6, 3\]"),
        ({"experts": np.full((6, 3, 2), 300)}, "experts row 0: holds 300; it must fit uint8"),
        ({"weights": np.full((6, 3, 2), 1e6)}, "weights row 0, layer 0: holds inf"),
        ({"prompt_len": [5, 0]}, "prompt_len row 0: is 5, request 0 has 4 rows"),
        ({"request_labels": ["a"]}, "request_labels has 1 entries, the trace needs 2"),
    ],
)
def test_what_is_faulty_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("before")
    arrays = sound_arrays() | {name: change[name] for name in change.keys() & ARRAYS.keys()}
    change = {name: value for name, value in change.items() if name not in ARRAYS}
    with pytest.raises(TraceError, match=message):
        write_trace(path, arrays, about(**change))
    assert path.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(tmp_path / "t.safetensors", sound_arrays(), about())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"the folder .*nowhere does not exist; create it"):
        write_trace(tmp_path / "nowhere" / "t.safetensors", sound_arrays(), about())


# -- mapping -------------------------------------------------------------------------------------------------


def test_rows_are_mapped_read_only_plain_arrays(tmp_path: Path) -> None:
    trace = written(tmp_path / "a.safetensors")
    rows = trace.experts[1:3]
    assert type(rows) is np.ndarray
    base: Any = trace.experts
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    for name, array in trace.layout_arrays().items():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
        assert array.flags.aligned, name


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors", note="x")
    content = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert one.sha256() == hashlib.sha256(content[0]).hexdigest() != two.sha256()
    both = open_trace([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert both.sha256() == hashlib.sha256(b"".join(content)).hexdigest() == both.sha256()


# -- several files -------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for index, name in enumerate("abc"):
        arrays = sound_arrays()
        arrays["token_ids"] = arrays["token_ids"] + 100 * index
        write_trace(tmp_path / f"{name}.safetensors", arrays, about(request_labels=[f"{name}0", f"{name}1"]))
    return tmp_path


def test_a_list_is_chained_in_its_order_and_a_glob_sorted(three: Path) -> None:
    for paths, first in (([three / "c.safetensors", three / "a.safetensors"], 200), (str(three / "*.safetensors"), 0)):
        trace = open_trace(paths)
        assert trace.token_ids is not None
        assert trace.token_ids[0] == first
    assert trace.name == "a+2 more"
    assert (trace.num_requests, trace.num_tokens, len(trace.parts)) == (6, 18, 3)
    assert trace.request_labels == ["a0", "a1", "b0", "b1", "c0", "c1"]
    np.testing.assert_array_equal(trace.request_start, [0, 4, 6, 10, 12, 16, 18])
    np.testing.assert_array_equal(trace.prompt_len, [4, 0] * 3)
    for name in ("experts", "logits", "lookahead"):
        np.testing.assert_array_equal(np.asarray(getattr(trace, name)), np.concatenate([sound_arrays()[name]] * 3))


def test_forward_ids_of_different_files_do_not_meet(three: Path) -> None:
    trace = open_trace(str(three / "*.safetensors"))
    assert trace.forward_id is not None
    one = sound_arrays()["forward_id"]
    np.testing.assert_array_equal(trace.forward_id[:], np.concatenate([one, one + 3, one + 6]))


def test_a_chain_can_be_written_as_one_file(three: Path, tmp_path: Path) -> None:
    chain = open_trace(str(three / "*.safetensors"))
    arrays = {name: array for name, array in chain.layout_arrays().items() if name != "forward_id"}
    whole = open_trace(write_trace(tmp_path / "whole", arrays, about()))
    np.testing.assert_array_equal(whole.experts[:], chain.experts[:])


ROWS = np.arange(14).reshape(7, 2)
CHAIN = ChainedArray([ROWS[:3], ROWS[3:4], ROWS[4:]])
KEYS = st.one_of(
    st.integers(-7, 6),
    st.slices(7),
    st.lists(st.integers(-7, 6), max_size=5).map(lambda rows: np.array(rows, np.int64)),
    st.lists(st.booleans(), min_size=7, max_size=7).map(np.array),
    st.tuples(st.slices(7), st.integers(0, 1)),
    st.tuples(st.integers(-7, 6), st.slices(2)),
)


@given(key=KEYS)
def test_a_chain_is_indexed_like_one_array(key: Any) -> None:
    got, want = CHAIN[key], ROWS[key]
    np.testing.assert_array_equal(got, want)
    assert np.shape(got) == np.shape(want)


def test_a_chain_stops_at_its_end() -> None:
    assert (CHAIN.shape, CHAIN.ndim, len(CHAIN), CHAIN.dtype) == ((7, 2), 2, 7, ROWS.dtype)
    with pytest.raises(IndexError):
        CHAIN[7]
    with pytest.raises(IndexError, match="one list"):
        CHAIN[np.zeros((2, 2), int)]
    assert [row.tolist() for row in CHAIN] == ROWS.tolist()


@pytest.mark.parametrize(
    ("arrays", "header", "message"),
    [
        ({}, {"model": "other"}, "header: model is other, in .*a.safetensors it is toy"),
        ({}, {"num_experts": "9"}, "header: num_experts is 9"),
        ({"weights": None}, {}, "weights: this file lacks it"),
        ({"embedding": np.zeros((6, 4), np.float16)}, {}, r"embedding: is float16 \[6, 4\], in .* \[6, 5\]"),
        ({"experts": sound_arrays()["experts"].astype(np.uint16)}, {}, "experts: is uint16"),
    ],
)
def test_files_that_differ_are_not_chained(
    tmp_path: Path, arrays: dict[str, Any], header: dict[str, str], message: str
) -> None:
    base = {name: a for name, a in sound_arrays().items() if name not in ("logits", "lookahead")}
    save(tmp_path / "a.safetensors", base, HEADER)
    changed = {name: a for name, a in (base | arrays).items() if a is not None}
    save(tmp_path / "b.safetensors", changed, HEADER | header)
    with pytest.raises(TraceError, match=rf"b.safetensors: {message}"):
        open_trace(str(tmp_path / "*.safetensors"))
    save(tmp_path / "b.safetensors", base, HEADER)
    assert open_trace(str(tmp_path / "*.safetensors")).num_requests == 4


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="matches no file"):
        open_trace(str(tmp_path / "*.safetensors"))
    with pytest.raises(TraceError, match="empty list"):
        open_trace([])


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    assert written(tmp_path / "a[1].safetensors").num_requests == 2


# -- recorded traces -----------------------------------------------------------------------------------------


FACTS = {
    "gpt-oss-20b-twin-eval": ("gpt-oss-20b-twin", 7, 1344),
    "gpt-oss-20b.eval": ("gpt-oss-20b", 30, 9522),
    "gpt-oss-20b.train": ("gpt-oss-20b", 95, 31941),
}
"""Model, requests and tokens of each recording."""


@pytest.mark.parametrize("path", recordings("eval", "train"), ids=named)
def test_a_recorded_trace_opens(path: Path, tmp_path: Path) -> None:
    one, num_tokens = open_trace(path), FACTS[path.stem][2]
    assert (one.model, one.num_requests, one.num_tokens) == FACTS[path.stem]
    assert one.experts.shape == (num_tokens, 24, 4)
    assert one.request_labels is not None
    assert len(one.request_labels) == one.num_requests
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").symlink_to(path)
    both = open_trace(str(tmp_path / "*.safetensors"))
    assert (both.num_requests, both.num_tokens) == (2 * one.num_requests, 2 * num_tokens)
    np.testing.assert_array_equal(both.experts[num_tokens - 9 : num_tokens], one.experts[num_tokens - 9 :])
    np.testing.assert_array_equal(both.experts[num_tokens:], one.experts[:])
