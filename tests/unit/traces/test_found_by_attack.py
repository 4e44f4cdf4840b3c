"""What the attack has found in the reading of traces, each by its smallest input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.traces import HEADER, save, sound_arrays
from traces.cli import main
from traces.reader import TraceError, open_trace


def test_files_that_write_one_number_in_two_ways_are_chained(tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", sound_arrays(), HEADER)
    second = save(tmp_path / "b.safetensors", sound_arrays(), HEADER | {"num_experts": "08", "top_k": "0002"})
    trace = open_trace([first, second])
    assert (trace.num_experts, trace.top_k, trace.num_tokens) == (8, 2, 12)


def test_forwards_that_leave_no_numbers_for_the_next_file_are_refused(tmp_path: Path) -> None:
    arrays = sound_arrays()
    arrays["forward_id"] = arrays["forward_id"] + (2**63 - 3)
    first = save(tmp_path / "a.safetensors", arrays, HEADER)
    second = save(tmp_path / "b.safetensors", sound_arrays(), HEADER)
    assert open_trace(first).num_tokens == 6
    with pytest.raises(TraceError, match=r"a\.safetensors: forward_id: goes up to 9223372036854775807, .*; number"):
        open_trace([first, second])
    arrays["forward_id"] = arrays["forward_id"] - (2**63 - 2**61)
    chained = open_trace([save(first, arrays, HEADER), second])
    assert np.unique(np.asarray(chained.forward_id)).size == 6


@pytest.mark.parametrize("model", ["two\nlines\r\u2028and more", "x" * 70_000, "\u202egnp\x1b[2J"])
def test_a_trace_is_described_in_one_line_whatever_it_is_called(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.safetensors", sound_arrays(), HEADER | {"model": model})
    assert main(["validate", str(path)]) == 0
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.isprintable()
    assert len(line) < 400
