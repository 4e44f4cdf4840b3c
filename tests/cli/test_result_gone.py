"""With skip_done=true a run is repeated whose result is not there any more, or cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import run_here, small_trace


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json", "events.parquet", "timeline.json"])
def test_a_run_without_its_result_is_repeated(name: str, tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    words = ["+hardware=a100", "+policy=lru", f"trace.path={trace}", "compare=none", "events=true", "timeline=true"]
    run = tmp_path / "run"
    assert run_here(words, run).done
    path = run / name
    whole = path.read_bytes()
    assert "done before" in run_here([*words, "skip_done=true"], run).out
    for damage in (path.unlink, lambda: path.write_bytes(b""), lambda: path.write_bytes(whole[:-9])):
        damage()
        again = run_here([*words, "skip_done=true"], run)
        assert (again.code, "done before" in again.out) == (0, False)
        assert len(path.read_bytes()) > len(whole) // 2
    path.unlink()
    without = [word for word in words if word not in ("events=true", "timeline=true")]
    assert run_here(without, run).done
    assert "done before" in run_here([*without, "skip_done=true"], run).out
