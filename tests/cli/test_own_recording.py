"""Recordings of an engine of one's own: the writer that the docs show, and how batches are run again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.commands import ROOT, job, small_trace
from traces import cli
from traces.format import About
from traces.reader import open_trace
from traces.recorded_batches import Batches, recorded_batches, settings_line

LAYERS, EXPERTS, TOP_K = 24, 32, 4


def writer() -> dict[str, Any]:
    """What the block on the page defines."""
    text = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    defined: dict[str, Any] = {}
    exec(compile(code, "docs/traces.md", "exec"), defined)
    return defined


def test_the_writer_of_the_docs_records_an_engine_that_batches_and_the_trace_runs(tmp_path: Path) -> None:
    defined, rng = writer(), np.random.default_rng(0)
    said: dict[str, list[np.ndarray]] = {"a": [], "b": []}

    def token(request: str, forward: int) -> None:
        experts = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)])
        said[request].append(experts)
        defined["took"](request, forward, experts.tolist())

    # Prompts of 3 and 2 tokens in forwards of their own; then both decode side by side, and b alone.
    for request, length, forward in (("a", 3, 0), ("b", 2, 1)):
        for _ in range(length):
            token(request, forward)
    for forward, both in ((2, "ab"), (3, "ba"), (4, "b")):
        for request in both:
            token(request, forward)
    path = tmp_path / "mine.safetensors"
    about = About("gpt-oss-20b", num_experts=EXPERTS, source="my engine", license="CC0-1.0")
    defined["write"](path, {"a": 3, "b": 2}, about)

    trace = open_trace(path)
    np.testing.assert_array_equal(trace.experts[:], np.array(said["a"] + said["b"]))
    assert (trace.request_start.tolist(), trace.prompt_len.tolist()) == ([0, 5, 10], [3, 2])
    assert recorded_batches(trace) == Batches(batch_size=2, prefill_chunk=3, mixed=False)
    assert cli.main(["validate", str(path)]) == 0
    words = ("+hardware=a100", "+policy=lru", f"trace.path={path}", "compare=none")
    metrics = job(*words, "batch_size=2", "prefill_chunk=3")
    # Two prompts, then as many forwards as the longer request decodes.
    assert (metrics["model"], metrics["num_forwards"]) == ("gpt-oss-20b", 5)


def traced(path: Path, forwards: list[int], prompt: int) -> str | None:
    trace = open_trace(small_trace(path, len(forwards), 2, prompt=prompt, forward_id=np.array(forwards)))
    return settings_line(trace, "t.safetensors")


@pytest.mark.parametrize(
    ("forwards", "prompt", "said"),
    [
        # One after the other, as a run does by default.
        ([0, 1, 2, 3, 4, 5], 1, None),
        ([0, 2, 3, 1, 2, 3], 1, "up to 2 requests in a forward; the nearest run: trace.path=t.safetensors batch"),
        ([0, 0, 3, 1, 2, 3], 2, "the nearest run: trace.path=t.safetensors batch_size=2 prefill_chunk=2"),
        # The prompt of the second request ran in the forward in which the first decoded.
        ([0, 1, 2, 1, 3, 4], 1, "up to 1 request in a forward (there prompts ran beside"),
    ],
)
def test_what_comes_nearest_to_the_recorded_batches(
    forwards: list[int], prompt: int, said: str | None, tmp_path: Path
) -> None:
    line = traced(tmp_path / "t.safetensors", forwards, prompt)
    assert line is None if said is None else said in (line or "")


def test_a_trace_that_does_not_say_which_forward_a_token_ran_in_says_nothing(tmp_path: Path) -> None:
    assert settings_line(open_trace(small_trace(tmp_path / "t.safetensors")), "t") is None


def test_an_importer_says_it_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["request,step,token,layer,e0,e1"]
    for step, request, token in [(0, "a", 0), (1, "b", 0), (2, "a", 1), (2, "b", 1), (3, "a", 2), (3, "b", 2)]:
        lines += [f"{request},{step},{token},{layer},{token},{layer + 3}" for layer in range(2)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "o.safetensors"
    columns = ["request=request", "token=token", "step=step", "layer=layer", "expert=e0,e1", "prompt_len=1"]
    words = [str(tmp_path / "log.csv"), str(out), *columns, "num_experts=8", "model=mine"]
    assert cli.main(["import", "table", *words]) == 0
    said = capsys.readouterr().out
    assert f"the nearest run: trace.path={out} batch_size=2" in said
    assert open_trace(out).forward_id is not None
