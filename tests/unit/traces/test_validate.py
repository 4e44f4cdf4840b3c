"""Each kind of broken file is refused in one line that names file, array, row and remedy; a sound one is not."""

import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.traces import HEADER, TOKENS, Arrays, save, sound_arrays
from traces import trace as trace_module
from traces.format import TraceError, open_trace, validate_trace

Change = Callable[[Arrays, dict[str, str]], None]


def put(name: str, place: Any, value: Any) -> Change:
    def change(arrays: Arrays, header: dict[str, str]) -> None:
        arrays[name][place] = value

    return change


def become(name: str, make: Callable[[Any], Any]) -> Change:
    def change(arrays: Arrays, header: dict[str, str]) -> None:
        arrays[name] = make(arrays.get(name))

    return change


def without(name: str) -> Change:
    def change(arrays: Arrays, header: dict[str, str]) -> None:
        del arrays[name]

    return change


def head(**values: str | None) -> Change:
    def change(arrays: Arrays, header: dict[str, str]) -> None:
        for key, value in values.items():
            header[key] = value or ""
            if value is None:
                del header[key]

    return change


def pair(first: Change, second: Change) -> Change:
    def change(arrays: Arrays, header: dict[str, str]) -> None:
        first(arrays, header)
        second(arrays, header)

    return change


def few(change: Change) -> Change:
    return pair(pair(without("logits"), without("lookahead")), change)


def no_rows(arrays: Arrays, header: dict[str, str]) -> None:
    for name in list(arrays):
        arrays[name] = arrays[name][:0]
    arrays["request_start"] = np.zeros(1, np.int64)
    header |= {"num_tokens": "0", "num_requests": "0"}


CONTENT: list[tuple[str, Change, str]] = [
    # id, what is broken, what the message says after the file's name
    ("id too large", put("experts", (4, 1, 0), 8), r"experts row 4, layer 1: holds 8, outside 0 … 7; correct"),
    ("padding first", put("experts", (3, 2, 0), 255), r"experts row 3, layer 2: has padding \(255\) in column 0"),
    ("only padding", put("experts", (5, 0), 255), r"experts row 5, layer 0: is nothing but padding; each token"),
    ("twice", put("experts", (2, 1), 6), r"experts row 2, layer 1: holds an expert twice: \[6, 6\]; list"),
    ("first of two", pair(put("experts", (5, 0, 0), 9), put("experts", (1, 1), 3)), r"experts row 1, layer 1: .*twice"),
    ("weight NaN", put("weights", (1, 0, 1), np.nan), r"weights row 1, layer 0: holds nan; values must be finite"),
    ("weight infinite", put("weights", (0, 2, 1), np.inf), r"weights row 0, layer 2: holds inf; values must"),
    ("weight negative", put("weights", (3, 1, 0), -0.5), r"weights row 3, layer 1: holds -0.5; gate weights must"),
    ("weight of padding", put("experts", (3, 1, 1), 255), r"weights row 3, layer 1: holds .* where experts is pad"),
    ("start not 0", put("request_start", 0, 1), r"request_start row 0: is 1; the first request must start at row 0"),
    ("starts fall", put("request_start", 1, 7), r"request_start row 2: is 6 after 7: request 1 has no rows; starts"),
    ("empty request", put("request_start", 1, 6), r"request_start row 2: is 6 after 6: request 1 has no rows"),
    ("end early", put("request_start", 2, 5), r"request_start row 2: is 5, the trace has 6 rows; the last entry"),
    ("prompt too long", put("prompt_len", 1, 3), r"prompt_len row 1: is 3, request 1 has 2 rows; give 0 to"),
    ("prompt negative", put("prompt_len", 0, -1), r"prompt_len row 0: is -1"),
    ("context negative", put("context_len", 1, -4), r"context_len row 1: is -4; give 0 or more"),
    ("forward falls", put("forward_id", 5, 0), r"forward_id row 5: is 0 after 1 in the same request; number"),
    ("forward negative", put("forward_id", 0, -1), r"forward_id row 0: is -1; give 0 or more"),
    ("token negative", put("token_ids", 2, -5), r"token_ids row 2: is -5; give 0 or more"),
    ("embedding NaN", put("embedding", (4, 2), np.nan), r"embedding row 4: holds nan; values must be finite"),
    ("logit infinite", put("logits", (1, 2, 3), -np.inf), r"logits row 1, layer 2: holds -inf; values must"),
    ("lookahead NaN", put("lookahead", (2, 0, 1, 3), np.nan), r"lookahead row 2, layer 0: holds nan at distance 2"),
    ("lookahead past", put("lookahead", (1, 2, 0, 0), 1), r"lookahead row 1, layer 2: distance 1 is past .*; write"),
]
LISTS: list[tuple[str, Change, str]] = [
    ("listed too large", put("lookahead_ids", (3, 1, 0, 2), 9), r"lookahead_ids row 3, layer 1: holds 9, outside"),
    ("listed twice", put("lookahead_ids", (3, 1, 0), 2), r"lookahead_ids row 3, layer 1: holds an expert twice"),
    ("listed past", put("lookahead_ids", (0, 2, 1, 0), 1), r"lookahead_ids row 0, layer 2: distance 2 is past"),
    ("listed gap", put("lookahead_ids", (1, 0, 0, 0), 255), r"lookahead_ids row 1, layer 0: has padding .*column 0"),
    ("no scores", without("lookahead_scores"), r"lookahead_scores: is missing beside lookahead_ids; they come tog"),
    ("both forms", become("lookahead", lambda _: sound_arrays()["lookahead"]), r"lookahead: stands beside .*; keep"),
    ("scores float", become("lookahead_scores", lambda a: a.astype(np.float16)), r"lookahead_scores: has the type F16"),
    ("scores short", become("lookahead_scores", lambda a: a[..., :2]), r"lookahead_scores: has the shape \[6, 3, 2, 2"),
    ("no padding left", pair(head(num_experts="256"), without("logits")), r"lookahead_ids: uint8 leaves no padding"),
]
LAYOUT: list[tuple[str, Change, str]] = [
    ("no format", head(format=None), r"header: names no format; a trace has format=expertflow-trace"),
    ("other format", head(format="csv"), r"header: format is 'csv'; a trace has"),
    ("newer version", head(format_version="2"), r"header: format_version is '2', this release reads '1'; update"),
    ("no model", head(model=None), r"header: model is missing or empty; write it"),
    ("no licence", head(license=""), r"header: license is missing or empty; write it"),
    ("no number", head(top_k="two"), r"header: top_k is 'two', not a whole number"),
    ("negative", head(num_layers="-3"), r"header: num_layers is '-3', not a whole number"),
    ("number missing", head(num_tokens=None), r"header: num_tokens is missing; write the file again"),
    ("too many", head(num_tokens="7"), r"experts: has the shape \[6, 3, 2\], the header .* \[7, 3, 2\].*; write"),
    ("requests", head(num_requests="3"), r"request_start: has the shape \[3\], the header .* \[4\]"),
    ("layers", head(num_layers="4"), r"experts: has the shape \[6, 3, 2\]"),
    ("no rows", no_rows, r"header: the trace is empty \(num_tokens is 0\); record or import"),
    ("no requests", head(num_requests="0"), r"header: the trace is empty \(num_requests is 0\)"),
    ("no experts", head(num_experts="0"), r"header: num_layers, num_experts or top_k is 0"),
    ("k over e", head(num_experts="1"), r"header: top_k is 2, more than num_experts, 1; a token cannot"),
    ("absurd", head(num_experts="70000"), r"header: num_experts is 70000; at most 65535"),
    ("type too small", few(head(num_experts="300")), r"experts: is uint8, too small for num_experts=300; store uint16"),
    ("array missing", without("experts"), r"experts: is missing; a trace needs experts, request_start, prompt_len"),
    ("starts missing", without("request_start"), r"request_start: is missing"),
    ("prompts missing", without("prompt_len"), r"prompt_len: is missing"),
    ("unknown", become("hits", lambda _: np.zeros(TOKENS)), r"array 'hits': is unknown; known are exp.*; remove"),
    ("signed ids", become("experts", lambda a: a.astype(np.int64)), r"experts: has the type I64; it must be U8 or U16"),
    ("double weights", become("weights", lambda a: a.astype(np.float32)), r"weights: has the type F32; it must be F16"),
    ("flat", become("experts", lambda a: a.reshape(6, 6)), r"experts: has the shape \[6, 6\]; it must be \[T, L, K\]"),
    ("narrow weights", become("weights", lambda a: a[..., :1]), r"weights: has the shape \[6, 3, 1\], the header"),
    ("short tokens", become("token_ids", lambda a: a[:5]), r"token_ids: has the shape \[5\], .* \[6\]"),
    ("empty embedding", become("embedding", lambda a: a[:, :0]), r"embedding: has the shape \[6, 0\], which holds no"),
    ("far ahead", become("lookahead", lambda a: np.repeat(a, 2, 2)), r"lookahead: looks 4 layers ahead in a model of"),
    ("labels", head(request_labels='["a"]'), r"header: request_labels has 1 entries, the trace needs 2; give one"),
    ("labels no list", head(request_labels="a, b"), r"header: request_labels is no JSON list of str; write"),
    ("layer ids", head(moe_layer_ids="[2, 1, 3]"), r"header: moe_layer_ids does not rise"),
    ("layer ids bool", head(moe_layer_ids="[true, 1, 3]"), r"header: moe_layer_ids is no JSON list of int"),
]


def ids(table: list[tuple[str, Change, str]]) -> list[str]:
    return [row[0] for row in table]


def check_refused(path: Path, arrays: Arrays, change: Change, message: str) -> None:
    header = dict(HEADER)
    change(arrays, header)
    save(path, arrays, header)
    with pytest.raises(TraceError, match=rf"^{path}: ({message})") as caught:
        open_trace(path)
    assert len(caught.value.args) == 1
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize("lists", [False, True])
def test_a_sound_file_passes(tmp_path: Path, lists: bool) -> None:
    trace = open_trace(save(tmp_path / "t.safetensors", sound_arrays(lists), HEADER))
    validate_trace(trace)


@pytest.mark.parametrize(("name", "change", "message"), CONTENT, ids=ids(CONTENT))
def test_faulty_content_is_refused(tmp_path: Path, name: str, change: Change, message: str) -> None:
    check_refused(tmp_path / "t.safetensors", sound_arrays(), change, message)


@pytest.mark.parametrize(("name", "change", "message"), LISTS, ids=ids(LISTS))
def test_faulty_candidate_lists_are_refused(tmp_path: Path, name: str, change: Change, message: str) -> None:
    check_refused(tmp_path / "t.safetensors", sound_arrays(lists=True), change, message)


@pytest.mark.parametrize(("name", "change", "message"), LAYOUT, ids=ids(LAYOUT))
def test_a_faulty_layout_is_refused(tmp_path: Path, name: str, change: Change, message: str) -> None:
    check_refused(tmp_path / "t.safetensors", sound_arrays(), change, message)


@pytest.mark.parametrize(
    "change",
    [
        put("experts", (4, 1), [7, 0]),
        pair(put("experts", (3, 1, 1), 255), put("weights", (3, 1, 1), 0)),
        put("weights", (0, 0), 0),
        put("prompt_len", 1, 2),
        put("context_len", 0, 0),
        put("forward_id", slice(None), 0),
        head(request_labels='["", "b"]', moe_layer_ids="[0, 5, 6]"),
    ],
)
def test_the_last_allowed_value_passes(tmp_path: Path, change: Change) -> None:
    arrays, header = sound_arrays(), dict(HEADER)
    change(arrays, header)
    open_trace(save(tmp_path / "t.safetensors", arrays, header))


@pytest.mark.parametrize(("name", "change", "message"), CONTENT, ids=ids(CONTENT))
def test_rows_are_counted_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Change, message: str
) -> None:
    monkeypatch.setattr(trace_module, "BLOCK_BYTES", 1)
    check_refused(tmp_path / "t.safetensors", sound_arrays(), change, message)
    open_trace(save(tmp_path / "sound.safetensors", sound_arrays(), HEADER))


@pytest.mark.parametrize("top_k", [2, 32, 33, 40])
def test_one_duplicate_is_found_at_any_width(tmp_path: Path, top_k: int) -> None:
    experts = np.tile(np.arange(top_k, dtype=np.uint8), (3, 2, 1))
    experts[:, :, -1] = 255
    arrays = {"experts": experts, "request_start": np.array([0, 3]), "prompt_len": np.zeros(1, np.int32)}
    sizes = {"num_layers": "2", "num_experts": "64", "top_k": str(top_k), "num_requests": "1", "num_tokens": "3"}
    path = save(tmp_path / "t.safetensors", arrays, HEADER | sizes)
    open_trace(path)
    experts[2, 1, -1] = 0
    save(path, arrays, HEADER | sizes)
    with pytest.raises(TraceError, match="experts row 2, layer 1: holds an expert twice"):
        open_trace(path)


def test_skipping_the_content_still_checks_the_layout(tmp_path: Path) -> None:
    arrays = sound_arrays()
    arrays["experts"][0, 0, 0] = 9
    path = save(tmp_path / "t.safetensors", arrays, HEADER)
    trace = open_trace(path, validate=False)
    with pytest.raises(TraceError, match="experts row 0"):
        validate_trace(trace)
    with pytest.raises(TraceError, match="top_k"):
        open_trace(save(path, arrays, HEADER | {"top_k": ""}), validate=False)


def test_the_faulty_file_of_several_is_named(tmp_path: Path) -> None:
    arrays = sound_arrays()
    save(tmp_path / "a.safetensors", arrays, HEADER)
    arrays["experts"][1, 0, 0] = 9
    save(tmp_path / "b.safetensors", arrays, HEADER)
    with pytest.raises(TraceError, match=r"b.safetensors: experts row 1, layer 0"):
        open_trace(str(tmp_path / "*.safetensors"))


# -- the container -------------------------------------------------------------------------------------------


def raw(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


ONE = '{"experts":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}%s}'
BYTES: list[tuple[str, bytes, str]] = [
    ("empty", b"", r"file: is empty \(0 bytes\); fetch or write"),
    ("short", b"\x00" * 9, r"file: is not a safetensors file \(it begins like something else\); convert it"),
    ("text", b"layer,expert\n" * 9, r"file: is not a safetensors file \(it begins like text\); convert it"),
    ("json", b'{"router_data": []} ' * 3, r"file: is not a safetensors file \(it begins like JSON\)"),
    ("pickle", pickle.dumps({"experts": list(range(99))}), r"file: .*\(it begins like a pickle\)"),
    ("zip", b"PK\x03\x04" + bytes(60), r"file: .*\(it begins like a zip archive"),
    ("header too long", raw("{}" + " " * 20, length=10**9), r"header: needs 1000000000 bytes and .*, truncated; fetch"),
    ("no JSON", raw('{"experts": [[[[[[}'), r"header: is not valid JSON \("),
    ("deep JSON", raw('{"a":' + "[" * 200_000), r"header: is not valid JSON \(nested"),
    ("no UTF-8", struct.pack("<Q", 10) + b'{"\xff\xfe"   }  ', r"header: is not valid JSON"),
    ("array twice", raw('{"a":{}, "a":{}      }'), r"header: is not valid JSON \('a' appears twice\)"),
    ("metadata", raw('{"__metadata__":{"model":3}}'), r"header: __metadata__ is not a table of strings"),
    ("no dtype", raw('{"experts":{"shape":[4]}}'), r"array 'experts': lacks dtype, shape or data_offsets"),
    ("bad dtype", raw(ONE.replace("U8", "PY") % "", bytes(4)), r"array 'experts': has the type 'PY'; use one of"),
    ("bad shape", raw(ONE.replace("[4]", '["4"]') % "", bytes(4)), r"array 'experts': has a shape"),
    ("negative shape", raw(ONE.replace("[4]", "[-4]") % "", bytes(4)), r"array 'experts': has a shape"),
    ("bool shape", raw(ONE.replace("[4]", "[true]") % "", bytes(4)), r"array 'experts': has a shape"),
    ("huge shape", raw(ONE.replace("[4]", "[9999999999999]") % "", bytes(4)), r"array 'experts': takes 4 bytes by"),
    ("offsets turned", raw(ONE.replace("[0,4]", "[4,0]") % "", bytes(4)), r"array 'experts': takes -4 bytes by"),
    ("truncated data", raw(ONE % "", bytes(3)), r"array 'experts': ends 1 bytes past the end, truncated; fetch"),
    ("longer data", raw(ONE % "", bytes(6)), r"file: has 2 bytes after the last array"),
    ("hole", raw(ONE.replace("[0,4]", "[2,6]") % "", bytes(6)), r"array 'experts': leaves a hole before it"),
    ("overlap", raw(ONE % ',"x":{"dtype":"U8","shape":[3],"data_offsets":[2,5]}', bytes(5)), r"array 'x': overlaps"),
]


@pytest.mark.parametrize(("name", "content", "message"), BYTES, ids=[row[0] for row in BYTES])
def test_what_is_no_sound_container_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=rf"^{path}: {message}") as caught:
        open_trace(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "t.safetensors", sound_arrays(), HEADER).read_bytes()
    for length in [0, 7, 8, 16, 100, 1000, len(content) // 2, len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(TraceError, match=r"cut: .*(truncated|empty|not a safetensors)"):
            open_trace(tmp_path / "cut")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder; give one file")):
        with pytest.raises(TraceError, match=f"{path}: file: {message}"):
            open_trace(path)
    with pytest.raises(TraceError, match="no regular file"):
        open_trace("/dev/null")
    with pytest.raises(TraceError, match="cannot be read"):
        open_trace("x" * 5000)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), in_header=st.booleans())
def test_one_changed_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int, in_header: bool
) -> None:
    path = save(tmp_path_factory.getbasetemp() / "flip.safetensors", sound_arrays(), HEADER)
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    content[int(place * (end if in_header else len(content)))] = value
    path.write_bytes(bytes(content))
    try:
        trace = open_trace(path)
    except TraceError:
        return
    chosen = trace.experts[:]
    assert ((chosen < trace.num_experts) | (chosen == trace.padding)).all()


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=400))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(content)
    with pytest.raises(TraceError):
        open_trace(path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    num_tokens = 2_000
    arrays = {
        "experts": np.tile(np.arange(8, dtype=np.uint16), (num_tokens, 32, 1)),
        "logits": np.zeros((num_tokens, 32, 512), np.float16),
        "request_start": np.array([0, num_tokens]),
        "prompt_len": np.zeros(1, np.int32),
    }
    sizes = {"num_layers": "32", "num_experts": "512", "top_k": "8", "num_requests": "1", "num_tokens": "2000"}
    path = save(tmp_path / "t.safetensors", arrays, HEADER | sizes)
    tracemalloc.start()
    trace = open_trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trace.logits is not None
    assert path.stat().st_size > 64e6
    assert peak < 6 * trace_module.BLOCK_BYTES
