"""A trace written request by request is the trace written at once, and a killed one is good up to its last request."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.traces import EXPERTS, sound_arrays
from traces.format import About, TraceError, open_trace, write_trace
from traces.layout import PER_REQUEST
from traces.stream import TraceWriter, config_of, folder_of

FACTS: dict[str, Any] = {"model": "toy", "num_experts": EXPERTS, "source": "made for a test", "license": "Apache-2.0"}
SPLIT = [(0, 4, 4, 0), (4, 6, 0, 7)]
"""First and one-past-last row, prompt_len and context_len of the two requests of `sound_arrays`."""


def fill(writer: TraceWriter, lists: bool = False, labels: bool = True) -> None:
    arrays = {name: array for name, array in sound_arrays(lists).items() if name not in PER_REQUEST}
    for index, (start, stop, prompt, context) in enumerate(SPLIT):
        rows = {name: array[start:stop] for name, array in arrays.items()}
        label = f"première {index}\n" if labels else None
        writer.append(prompt_len=prompt, context_len=context, label=label, **rows)


def break_off(path: Path) -> None:
    """Leave a recording unfinished after two whole requests."""
    with contextlib.suppress(KeyError), TraceWriter(path, **FACTS) as writer:
        fill(writer)
        raise KeyError


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_it_writes_the_bytes_that_write_trace_writes(tmp_path: Path, lists: bool, labels: bool) -> None:
    with TraceWriter(tmp_path / "a.safetensors", **FACTS, moe_layer_ids=[1, 2, 4], note="x") as writer:
        fill(writer, lists, labels)
        assert not writer.path.exists()
        writer.header["late"] = "y"
    given = ["première 0\n", "première 1\n"] if labels else None
    about = About(**FACTS, request_labels=given, moe_layer_ids=[1, 2, 4], header={"note": "x", "late": "y"})
    at_once = write_trace(tmp_path / "b.safetensors", sound_arrays(lists), about)
    assert writer.path.read_bytes() == at_once.read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_of_the_variants_only_the_chosen_one_is_kept(tmp_path: Path) -> None:
    experts, ahead = sound_arrays()["experts"], sound_arrays()["lookahead"]
    for variant, factor in (("plain", 1), ("doubled", 2)):
        with TraceWriter(tmp_path / f"{variant}.safetensors", **FACTS) as writer:
            writer.variant = "plain"
            writer.append(
                experts=experts, prompt_len=0, **{"lookahead@plain": ahead, "lookahead@doubled": ahead * np.float16(2)}
            )
            writer.variant = variant
        trace = open_trace(writer.path)
        assert trace.lookahead is not None
        np.testing.assert_array_equal(trace.lookahead[:], ahead * np.float16(factor))


@pytest.mark.parametrize("ended", ["closed", "recovered"])
def test_the_configuration_is_there_before_the_trace_however_it_ends(tmp_path: Path, ended: str) -> None:
    text, out = '{\n "num_experts": 8\n}\n', tmp_path / "a.safetensors"
    writer = TraceWriter(out, **FACTS, config=text)
    fill(writer, False, False)
    assert not config_of(out).exists()
    if ended == "closed":
        writer.close()
    else:
        writer._release()
        with pytest.raises(TraceError, match="an unfinished recording of it lies in"):
            TraceWriter(out, **FACTS, config=text)
        # Killed once more while it is assembled, between the two.
        (tmp_path / ".a.safetensors.recording" / "experts.raw").rename(tmp_path / "kept")
        with pytest.raises(TraceError):
            TraceWriter.recover(out)
        (tmp_path / "kept").rename(tmp_path / ".a.safetensors.recording" / "experts.raw")
        TraceWriter.recover(out)
    assert config_of(out).read_text() == text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.config.json", "a.safetensors"]


CHILD = """
import sys, numpy as np
from traces.stream import TraceWriter
writer = TraceWriter(sys.argv[1], model="m", num_experts=8, source="s", license="l")
for request in range(100_000):
    experts = np.full((request % 5 + 1, 2, 1), request % 8)
    writer.append(experts=experts, prompt_len=1, label=f"r{request}", token_ids=np.full(request % 5 + 1, request))
    print(request, flush=True)
"""


def test_a_killed_recording_is_recovered_up_to_its_last_whole_request(tmp_path: Path) -> None:
    path = tmp_path / "killed.safetensors"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line == "60\n":
            break
    with pytest.raises(TraceError, match="is being recorded by another process; wait for it, or end it"):
        TraceWriter.recover(path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    # What a kill in the middle of a request may leave: rows that the journal does not count.
    with (folder_of(path) / "experts.raw").open("ab") as file:
        file.write(b"\x07\x07\x07")
    with pytest.raises(TraceError, match="an unfinished recording of it lies in"):
        TraceWriter(path, **FACTS)
    trace = open_trace(TraceWriter.recover(path))
    assert trace.num_requests > 60
    assert trace.header["recovered"] == "true"
    assert trace.request_labels == [f"r{request}" for request in range(trace.num_requests)]
    lengths = np.arange(trace.num_requests) % 5 + 1
    np.testing.assert_array_equal(np.diff(trace.request_start), lengths)
    expected = np.repeat(np.arange(trace.num_requests), lengths)
    np.testing.assert_array_equal(trace.experts[:, 1, 0], expected % 8)
    assert trace.token_ids is not None
    np.testing.assert_array_equal(trace.token_ids[:], expected)
    assert [item.name for item in tmp_path.iterdir()] == ["killed.safetensors"]


def test_an_exception_leaves_what_was_whole_and_nothing_if_nothing_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyError), TraceWriter(path, **FACTS):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    break_off(path)
    assert not path.exists()
    assert open_trace(TraceWriter.recover(path)).num_requests == 2


def test_a_faulty_request_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    experts = sound_arrays()["experts"]
    with TraceWriter(tmp_path / "a.safetensors", **FACTS) as writer:
        writer.append(experts=experts, prompt_len=2)
        twice = experts.copy()
        twice[3, 1] = 5
        with pytest.raises(TraceError, match=r"\(request 1\): experts row 3, layer 1: holds an expert twice"):
            writer.append(experts=twice, prompt_len=2)
        with pytest.raises(TraceError, match=r"\(request 1\): prompt_len row 0: is 7, request 0 has 6 rows"):
            writer.append(experts=experts, prompt_len=7)
        with pytest.raises(TraceError, match=r"token_ids is int32 .*, in the first request it was absent"):
            writer.append(experts=experts, prompt_len=2, token_ids=np.arange(6))
        with pytest.raises(TraceError, match="some requests have a label and some have none"):
            writer.append(experts=experts, prompt_len=2, label="x")
        with pytest.raises(TraceError, match=r"experts is uint8 \[3, 1\], in the first request it was uint8 \[3, 2\]"):
            writer.append(experts=experts[:, :, :1], prompt_len=2)
        with pytest.raises(TraceError, match="array 'routes': is unknown"):
            writer.append(experts=experts, prompt_len=2, routes=experts)
        with pytest.raises(TraceError, match="experts: is missing or holds nothing"):
            writer.append(experts=experts[:0], prompt_len=0)
        writer.header["embedding"] = "x"
        with pytest.raises(TraceError, match="header: embedding is the name of a keyword of its own"):
            writer.append(experts=experts, prompt_len=2)
        del writer.header["embedding"]
        writer.append(experts=experts[::-1], prompt_len=3)
    trace = open_trace(writer.path)
    assert trace.prompt_len.tolist() == [2, 3]
    np.testing.assert_array_equal(trace.experts[:], np.concatenate([experts, experts[::-1]]))


def test_what_a_failed_write_left_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = sound_arrays()["experts"]
    with TraceWriter(tmp_path / "a.safetensors", **FACTS) as writer:
        writer.append(experts=experts[:2], prompt_len=0, label="a")
        with monkeypatch.context() as full:
            full.setattr("os.replace", fail_to_replace)
            with pytest.raises(TraceError, match=r"cannot be written \(the disk is full\); free space"):
                writer.append(experts=experts[2:5], prompt_len=1, label="lost, and longer")
        writer.append(experts=experts[5:], prompt_len=1, label="c")
    trace = open_trace(writer.path)
    np.testing.assert_array_equal(trace.experts[:], experts[[0, 1, 5]])
    assert (trace.prompt_len.tolist(), trace.request_start.tolist()) == ([0, 1], [0, 2, 3])
    assert trace.request_labels == ["a", "c"]


def fail_to_replace(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_or_recovered_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist; create it first"):
        TraceWriter(tmp_path / "no" / "a.safetensors", **FACTS)
    with pytest.raises(TraceError, match="is a folder; name a file in it"):
        TraceWriter(tmp_path, **FACTS)
    with pytest.raises(TraceError, match="no unfinished recording of it"):
        TraceWriter.recover(tmp_path / "a.safetensors")
    writer = TraceWriter(tmp_path / "a.safetensors", **FACTS)
    with pytest.raises(TraceError, match="would hold no request; append at least one"):
        writer.close()
    with pytest.raises(TraceError, match="is closed already"):
        writer.append(experts=[[[0]]], prompt_len=0)
    folder_of(writer.path).mkdir()
    with pytest.raises(TraceError, match="holds no whole request; delete the folder"):
        TraceWriter.recover(writer.path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "is of another release"),
        ("num_requests", 3, "needs 24 bytes of request_rows.raw, which has fewer"),
        ("num_tokens", 10**12, "which has fewer"),
        ("num_tokens", "6", "is no journal"),
        ("facts", {"model": "m"}, "is no journal"),
        ("header", {"experts": "x"}, "is no journal"),
        ("header", {"note": 3}, "note is a int"),
        ("columns", {"experts": ["U8", [3, -2]]}, "is no journal"),
        ("columns", {"../../experts": ["U8", [3, 2]], "request_rows": ["I64", []]}, "does not know '../../experts'"),
        ("columns", {"experts@/x": ["U8", [3, 2]], "request_rows": ["I64", []]}, "does not know 'experts@/x'"),
    ],
)
def test_a_spoiled_journal_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "a.safetensors"
    break_off(path)
    file = folder_of(path) / "journal.json"
    journal = json.loads(file.read_text())
    if key == "columns" and "experts@/x" in value:
        journal["variant"] = "/x"
    file.write_text(json.dumps(journal | {key: value}))
    with pytest.raises(TraceError, match=message):
        TraceWriter.recover(path)
    assert not path.exists()
    file.write_text(json.dumps(journal))
    if journal["variant"] == "":
        assert TraceWriter.recover(path) == path


@pytest.mark.slow
def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    experts = np.zeros((2000, 24, 4), np.uint8) + np.arange(4, dtype=np.uint8)
    embedding = np.zeros((2000, 16), np.float16)
    peaks = []
    for requests in (60, 120):
        tracemalloc.start()
        with TraceWriter(tmp_path / f"{requests}.safetensors", **FACTS) as writer:
            for _ in range(requests):
                writer.append(experts=experts, prompt_len=0, embedding=embedding)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The checks take some multiples of a block of 4 MiB; sixty requests hold 15 MB, 120 hold 31.
    assert peaks[1] < 1.1 * peaks[0]
