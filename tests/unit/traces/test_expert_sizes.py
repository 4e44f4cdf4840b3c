"""Sizes of experts in a trace's header: what importers keep, what readers refuse, what several files say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.expert_sizes import SeenSizes, sizes_of
from traces.format import About, open_trace, write_trace
from traces.importers.route_csv import import_route_csv
from traces.messages import TraceError


def write(path: Path, sizes: Any, num_layers: int = 2) -> Path:
    experts = np.zeros((3, num_layers, 1), np.uint8)
    header = {} if sizes is None else {"expert_bytes": sizes if isinstance(sizes, str) else json.dumps(sizes)}
    arrays = {"experts": experts, "request_start": [0, 3], "prompt_len": [0]}
    return write_trace(path, arrays, About("m", 3, "tests", "CC0-1.0", header=header))


@pytest.mark.parametrize(
    ("sizes", "expected"), [(7, 7), ([7, 9], (7, 9)), ([[1, 2, 3], 9], ((1, 2, 3), 9)), (None, None)]
)
def test_every_form_comes_back(tmp_path: Path, sizes: Any, expected: Any) -> None:
    assert open_trace(write(tmp_path / "t.safetensors", sizes)).expert_bytes == expected


@pytest.mark.parametrize(
    "sizes",
    [0, 1.0, True, "x", "[1,", [1], [1, 2, 3], [1, 0], [1, [1, 2]], [1, [1, 2, 0]], [1, [[1], 2, 3]], {}, 10**14],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, sizes: Any) -> None:
    with pytest.raises(TraceError, match=r"header.*expert_bytes.*; write whole numbers of bytes") as told:
        write(tmp_path / "t.safetensors", sizes)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) - len(str(tmp_path)) < 300


def test_files_that_contradict_each_other_are_not_chained(tmp_path: Path) -> None:
    one, two, none = (write(tmp_path / f"{n}.safetensors", sizes) for n, sizes in enumerate(([1, 2], [1, 3], None)))
    with pytest.raises(TraceError, match="expert_bytes are not those of"):
        open_trace([one, two])
    assert open_trace([none, one]).expert_bytes == (1, 2)


def test_the_same_sizes_in_another_form_are_the_same(tmp_path: Path) -> None:
    forms = 7, [7, 7], [[7, 7, 7], 7]
    files = [write(tmp_path / f"{n}.safetensors", sizes) for n, sizes in enumerate(forms)]
    assert open_trace(files).expert_bytes == 7


def route(tmp_path: Path, *rows: str) -> Any:
    """Rows `layer,expert,expert_bytes`, each a slot of one token."""
    lines = ["turn,phase,step,layer,slot,expert,weight,expert_bytes"]
    for slot, row in enumerate(rows):
        layer, expert, size = row.split(",")
        lines.append(f"0,1,0,{layer},{slot},{expert},0.5,{size}")
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    report = import_route_csv(tmp_path / "r.csv", tmp_path / "r.safetensors", model="m", num_experts=3)
    return open_trace(report.path).expert_bytes, report.notes


@pytest.mark.parametrize(
    ("rows", "expected", "note"),
    [
        (("0,1,10", "1,2,30"), (10, 30), ""),
        (("0,1,10", "1,2,10"), 10, ""),
        (("0,1,10", "0,2,30", "1,2,10"), ((20, 10, 30), 10), "of 1 experts that no row names are the mean"),
        (("0,1,10", "1,2,0"), None, "expert_bytes left out: line 3 of r.csv says '0'"),
        (("0,1,10", "1,2,x"), None, "expert_bytes left out: line 3 of r.csv says 'x'"),
        (("0,1,10", "1,2,"), None, "expert_bytes left out: layer 1 has none"),
    ],
)
def test_a_route_keeps_what_its_rows_say(tmp_path: Path, rows: tuple[str, ...], expected: Any, note: str) -> None:
    sizes, notes = route(tmp_path, *rows)
    assert sizes == expected
    assert any(note in one for one in notes) if note else notes == ()


def test_a_source_that_contradicts_itself_gives_no_sizes() -> None:
    seen = SeenSizes()
    seen.add(0, 1, "10", "line 2")
    seen.add(0, 1, "11", "line 3")
    assert seen.header([0], 3) == ({}, ["expert_bytes left out: expert 1 of layer 0 has 10 bytes, and 11 at line 3"])


def test_too_many_sizes_one_by_one_are_left_out() -> None:
    seen = SeenSizes()
    for layer in range(20):
        seen.add(layer, 0, "1", "line 1")
        seen.add(layer, 1, "2", "line 2")
    header, notes = seen.header(range(20), 65_000)
    assert header == {}
    assert "are too many" in notes[0]
    assert sizes_of(Path("x"), header, 20, 65_000) is None
