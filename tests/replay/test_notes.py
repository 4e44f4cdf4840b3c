"""What is said below a replay's table: by whose calls copies go, which prompts were not captured."""

from __future__ import annotations

from typing import Any

import pytest

from replay.app import notes
from replay.machine import raw
from replay.packages import copies_note


def test_copies_by_torch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "runtime", lambda: None)
    by = raw.raw_copy()[1]
    assert copies_note({"copies_by": by}) == f"copies by {by}"
    assert by == "torch (no cuda-bindings for this driver: each copy takes the host four times as long)"


@pytest.mark.parametrize("machine", [{}, {"copies_by": "cuda-bindings 13.0.3"}, {"copies_by": None}])
def test_others_are_not(machine: dict[str, Any]) -> None:
    assert copies_note(machine) == ""


def metrics_with(*, by: str = "cuda-bindings 13.0.3", num_unprepared: int = 0) -> dict[str, Any]:
    """Of a replay on a GPU, as far as notes read them."""
    machine = {"name": "n", "torch": "2", "dtype": "d", "host_memory": "pinned", "copies_by": by, "warnings": []}
    return {
        "machine": machine,
        "world": "cuda",
        "scale": 1,
        "stack": "found",
        "integrity": None,
        "launches": {"layer_pad_ns": 0, "kv_grid": 256, "num_unprepared": num_unprepared},
    }


@pytest.mark.parametrize("by", ["torch (why)", "cuda-bindings 13.0.3"])
def test_a_replay_says_so_below_its_table(by: str) -> None:
    assert ("copies by torch (why)" in notes(metrics_with(by=by))) is by.startswith("torch")


def test_prompts_that_were_not_captured_are_counted() -> None:
    told = (
        "3 forwards with a prompt launched attention kernel by kernel: prompts are captured, the shortest first, while"
    )
    assert [note for note in notes(metrics_with(num_unprepared=3)) if "prompt" in note] == [f"{told} there is room"]
    assert not any("prompt" in note for note in notes(metrics_with()))
