"""Experts on storage at the command line: what is printed, written and drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim import simulate
from sim.views.plots import plot_timeline, plot_tpot_bars
from sim.views.timeline import load_timeline
from tests.support.commands import TINY_MODEL_WORDS, run_here, tiny_trace

WORDS = ["+hardware=rtx4090", "+policy=lru", *TINY_MODEL_WORDS]
# Of the tiny model's experts some two thirds fit.
STORED = ["+storage=sata-ssd", "host_memory_gb=0.032"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 16, prompt=3)


def test_a_run_over_storage_says_what_it_read(trace: Path, tmp_path: Path) -> None:
    words = [*WORDS, *STORED, "residency=0.3", f"trace.path={trace}", "events=true", "timeline=true", "chunk_mib=0.5"]
    found = run_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    metrics = found.metrics()
    assert metrics["storage_preset"] == {"name": "sata-ssd", "eviction": "lru", "queue_depth": 4}
    assert 0 < metrics["capacity"]["num_slots"] < metrics["capacity"]["host_slots"]
    for one in (metrics, *metrics["compare"].values()):
        storage = one["storage"]
        stalls = ("late_stall_ns", "miss_stall_ns", "storage_stall_ns")
        assert one["stall_ns"] == sum(one[key] for key in stalls)
        assert one["elapsed_ns"] == one["compute_ns"] + one["stall_ns"] + one["overhead_ns"]
        assert one["elapsed_ns"] >= metrics["bounds"]["floor_ns"]
        assert storage["reads"] >= metrics["bounds"]["min_reads"] > 0
        assert storage["reads"] == storage["host_misses"] + storage["unused"]
    assert metrics["storage"]["host_hits"] > 0
    assert metrics["storage"]["host_evictions"] > 0
    assert "in host memory, all on sata-ssd" in found.out
    assert "storage was read for" in found.out
    assert "floor: no schedule with these slots and this host memory is faster" in found.out

    events = pd.read_parquet(found.folder / "events.parquet")
    assert int(events["stall_ns"].sum()) == metrics["stall_ns"]
    read = events[events["read_ns"].notna()]
    assert len(read) == metrics["storage"]["host_misses"]
    assert (read["read_ns"] < read["landed_ns"]).all()

    frames = load_timeline(found.folder / "timeline.json")
    assert int((frames.storage["end_ns"] - frames.storage["start_ns"]).sum()) == metrics["storage"]["busy_ns"]
    waits = frames.stalls[frames.stalls["kind"] == "storage"]
    assert int((waits["end_ns"] - waits["start_ns"]).sum()) == metrics["storage_stall_ns"] > 0
    figure = plot_timeline(frames, 0.0, metrics["elapsed_ns"] / 1e6)
    lanes = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert lanes == ["compute", "link", "storage", "stalls"]
    assert "storage stall" in [text.get_text() for text in figure.legends[0].get_texts()]
    again = run_here(words, tmp_path / "again")
    assert (again.folder / "metrics.json").read_bytes() == (found.folder / "metrics.json").read_bytes()


def test_without_storage_nothing_is_said_of_it(trace: Path, tmp_path: Path) -> None:
    found = run_here([*WORDS, f"trace.path={trace}", "compare=none", "timeline=true", "events=true"], tmp_path / "run")
    assert not [key for key in found.metrics() if "storage" in key]
    assert "storage was read" not in found.out
    assert "host hits" not in found.out
    assert '"storage"' not in (found.folder / "timeline.json").read_text()
    assert "read_ns" not in pd.read_parquet(found.folder / "events.parquet").columns


def test_the_same_from_python() -> None:
    storage = {"name": "sata-ssd", "gb_per_s": 0.2}
    words: dict[str, Any] = {"max_tokens": 3, "compare": "none", "events": True}
    result = simulate(hardware="rtx4090", policy="lru", storage=storage, host_memory_gb=8, **words)
    assert result.metrics["storage"]["reads"] > 0
    assert "read_ns" in result.events.columns
    bars = plot_tpot_bars(
        pd.DataFrame(
            {
                "policy": ["lru"],
                "stack": "graph",
                "hardware": "a100",
                "tpot_ms": [3.0],
                "late_ms_per_token": [0.0],
                "miss_ms_per_token": [1.0],
                "storage_ms_per_token": [0.5],
            }
        )
    )
    assert "storage stall" in [text.get_text() for text in bars.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+storage=sata-ssd"], "storage='sata-ssd' needs the host memory above it; give host_memory_gb=GB"),
        (["storage=sata-ssd"], "storage is a group that a run has only where it is added; say +storage=NAME"),
        (["+storage=floppy"], "storage=floppy does not exist; choose one of: nvme-gen3, nvme-gen4"),
        (["host_memory_gb=8"], "host_memory_gb=8 is of a cache above storage, and there is none; add +storage=NAME"),
        ([*STORED, "+policy/place=cheaper", "+host=desktop"], "storage='sata-ssd' and policy.place exclude each other"),
        (["+storage=sata-ssd", "host_memory_gb=0.001"], "host_memory_gb=0.001: 0 experts fit"),
        ([*STORED, "residency=0.95"], "experts fit, and host memory holds what the GPU's"),
        ([*STORED, "storage.eviction=fifo"], "storage.eviction='fifo' must be one of lru, page_cache"),
        ([*STORED, "storage.gb_per_s=[[5,1],[4,1]]"], "storage.gb_per_s[4 bytes] follows 5 bytes"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words: list[str], message: str, trace: Path, tmp_path: Path) -> None:
    found = run_here([*WORDS, f"trace.path={trace}", *words], tmp_path / "run")
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1
    assert len(found.err) <= 301


def test_room_that_is_told_suffices(trace: Path, tmp_path: Path) -> None:
    words = [*WORDS, f"trace.path={trace}", "compare=none", "+storage=sata-ssd"]
    found = run_here([*words, "host_memory_gb=0.02"], tmp_path / "small")
    told = found.err.partition("give ")[2].partition(" or more")[0]
    assert run_here([*words, f"host_memory_gb={told}"], tmp_path / "told").code == 0
