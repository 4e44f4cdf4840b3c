"""By whose calls a GPU's copies go is said where they take the host longer than they need."""

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


@pytest.mark.parametrize("by", ["torch (why)", "cuda-bindings 13.0.3"])
def test_a_replay_says_so_below_its_table(by: str) -> None:
    machine = {"name": "n", "torch": "2", "dtype": "d", "host_memory": "pinned", "copies_by": by, "warnings": []}
    metrics = {"machine": machine, "world": "cuda", "scale": 1, "stack": "found", "integrity": None}
    metrics["launches"] = {"layer_pad_ns": 0, "kv_grid": 0, "num_unprepared": 0}
    assert ("copies by torch (why)" in notes(metrics)) is by.startswith("torch")
