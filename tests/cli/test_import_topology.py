"""An import of a trace that is not of the shipped model it names says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import small_trace
from traces import cli
from traces.importers.known_models import topology_note
from traces.reader import open_trace


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        ("gpt-oss-20b", (24, 32, 4), None),
        # Fewer experts for a token are padded ones.
        ("gpt-oss-20b", (24, 32, 3), None),
        ("gpt-oss-20b", (23, 32, 4), "gpt-oss-20b has 24 MoE layers, the trace 23: a run refuses it"),
        ("gpt-oss-20b", (24, 31, 4), "gpt-oss-20b has 32 experts a layer, the trace 31: a run"),
        ("gpt-oss-20b", (2, 8, 6), "has 24 MoE layers, the trace 2; 32 experts a layer, the trace 8; top-4, the trace"),
        ("gpt-oss-20b-twin", (24, 32, 4), None),
        ("gpt-oss-20b-twin", (24, 16, 4), "gpt-oss-20b-twin has 32 experts a layer, the trace 16"),
        ("my-own", (2, 8, 2), None),
        ("auto", (2, 8, 2), None),
        ("../model/gpt-oss-20b", (2, 8, 2), None),
    ],
)
def test_other_numbers_than_the_models_are_noted(
    model: str, shape: tuple[int, int, int], said: str | None, tmp_path: Path
) -> None:
    note = topology_note(open_trace(small_trace(tmp_path / "t.safetensors", model=model, shape=shape)))
    assert (note is None) == (said is None)
    assert (said or "") in (note or "")


def test_the_command_says_it_in_one_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"request": "a", "token": token, "layer": layer, "expert": [token, 3]} for token in (0, 1) for layer in (0, 1)
    ]
    source = tmp_path / "log.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    words = ["import", "table", str(source), str(tmp_path / "o.safetensors"), "num_experts=32", "model=gpt-oss-20b"]
    assert cli.main(words) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "the trace" in line]
    assert notes == [
        "note: gpt-oss-20b has 24 MoE layers, the trace 2: a run refuses it under that name; check num_experts= and "
        "that no layer is missing, or give it another name, and model.path= in a run"
    ]
