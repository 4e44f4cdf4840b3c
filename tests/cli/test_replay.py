"""`python -m replay`: what a run writes and prints, beside what, and what is left of one that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from replay.lockstep.compare import check
from replay.lockstep.log_format import LOG_NAME
from tests.support.commands import command, job, run_there, tiny_trace
from tests.support.replays import TINY, replay_here

ADAPTIVE = (*TINY, "+policy=adaptive", "residency=0.3")
OWN = {"launches", "scale", "integrity", "machine"}
"""Keys of metrics.json that only a replay has."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"trace.path={tiny_trace(tmp_path_factory.mktemp('trace') / 'tiny.safetensors', 24)}"


def shape(value: Any) -> Any:
    """The keys at every depth, without values."""
    return {key: shape(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_metrics_have_the_simulators_keys_and_the_replays_own(trace: str, tmp_path: Path) -> None:
    found = replay_here([*ADAPTIVE, trace], tmp_path / "run")
    assert found.done, found.err
    metrics = found.metrics()
    simulated = simulate(trace)
    # Which predictor was taken both commands add to what was measured.
    assert set(metrics) == set(simulated) | OWN | {"predictor"}
    assert {key: shape(metrics[key]) for key in simulated} == {key: shape(simulated[key]) for key in simulated}
    assert metrics["schema"] == simulated["schema"]
    assert (metrics["world"], metrics["scale"], metrics["model"], metrics["bounds"]) == ("cpu", 8, "tiny/8", None)
    assert (metrics["hardware"], metrics["integrity"], metrics["compare"]) == ("local", None, None)
    assert metrics["trace"] == simulated["trace"]
    assert metrics["capacity"] == simulated["capacity"]
    assert metrics["machine"]["host_memory"] == "pageable"
    provenance = json.loads((found.folder / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["machine"] == metrics["machine"]
    assert {path.name for path in found.folder.iterdir() if path.is_file()} == {
        "DONE",
        "metrics.json",
        "provenance.json",
    }


def simulate(trace: str) -> dict[str, Any]:
    """The same configuration, simulated."""
    own = ("+hardware", "machine", "scale")
    words = [word for word in ADAPTIVE if word.split("=")[0] not in own]
    return job("+hardware=a100", *words, trace)


@pytest.mark.slow
def test_a_reader_is_told_what_the_numbers_are(trace: str, tmp_path: Path) -> None:
    found = replay_here([*ADAPTIVE, trace, "verify=true", "host_memory_gb=0.0003"], tmp_path / "run")
    for part in (
        "adaptive (predictor: transition) on local",
        "measured on",
        "(cpu)",
        "float32",
        "divided by 8",
        "0 wrong stamps",
        "no measurement",
        "shared round-robin",
        "written to",
    ):
        assert part in found.out, part
    machine = found.metrics()["machine"]
    assert (machine["host_buffers"], machine["host_buffers_shared"]) == (12, True)


@pytest.mark.slow
@pytest.mark.parametrize(("stack", "pad"), [("graph", "0.02 ms"), ("eager", "1 ms")])
def test_a_stack_is_named_for_what_it_is(stack: str, pad: str, trace: str, tmp_path: Path) -> None:
    words = [word for word in ADAPTIVE if not word.startswith("stack")]
    out = replay_here([*words, f"stack={stack}", "max_tokens=2", trace], tmp_path / "run").out
    assert f"stack={stack}: its overhead, {pad} a layer, is spent doing nothing" in out


@pytest.mark.slow
def test_runs_beside_are_replayed_on_the_same_machine(trace: str, tmp_path: Path) -> None:
    words = [word for word in ADAPTIVE if not word.startswith("compare")]
    metrics = replay_here([*words, "compare=full", trace], tmp_path / "run").metrics()
    assert set(metrics["compare"]) == {"on_demand", "lru"}
    assert metrics["bounds"] is None
    assert metrics["compare"]["on_demand"]["num_hits"] == 0
    assert metrics["compare"]["lru"]["num_accesses"] == metrics["num_accesses"]
    assert metrics["compare"]["lru"]["bytes"]["prefetch"] == 0


@pytest.mark.slow
def test_redundant_prefetches_are_counted(trace: str, tmp_path: Path) -> None:
    prefetch = replay_here([*ADAPTIVE, "count_redundant=true", trace], tmp_path / "run").metrics()["prefetch"]
    assert 0 <= prefetch["redundant"] <= prefetch["useful"]
    assert replay_here([*ADAPTIVE, trace], tmp_path / "run").metrics()["prefetch"]["redundant"] is None


def test_timeline_events_and_log_are_of_this_run(trace: str, tmp_path: Path) -> None:
    found = replay_here([*ADAPTIVE, "timeline=true", "events=true", "log=true", trace], tmp_path / "run")
    metrics = found.metrics()
    timeline = json.loads((found.folder / "timeline.json").read_text(encoding="utf-8"))
    assert len(timeline["traceEvents"]) > metrics["num_accesses"]
    assert len(pd.read_parquet(found.folder / "events.parquet")) == metrics["num_accesses"]
    result = check(found.folder)
    assert (result.difference, result.partial, result.num_forwards) == (None, None, 24)
    assert (found.folder / LOG_NAME).exists()


@pytest.mark.slow
def test_a_profile_sets_the_pace_at_the_experts_scale(trace: str, tmp_path: Path) -> None:
    words = [word for word in ADAPTIVE if "hardware" not in word]
    found = replay_here(["+hardware=a100", *words, trace], tmp_path / "run")
    simulated = simulate(trace)
    pace = found.metrics()["machine"]["throttle_gb_per_s"]
    assert 20 < pace * 8**2 < 32
    assert found.metrics()["hardware"] == simulated["hardware"] == "a100"
    free = replay_here(["+hardware=ideal_link", *words, trace], tmp_path / "free").metrics()
    assert free["machine"]["throttle_gb_per_s"] is None


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_another_is_not(trace: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*ADAPTIVE, trace, "skip_done=true"]
    first = replay_here(words, folder)
    assert first.done
    written = (folder / "metrics.json").stat()
    assert "done before" in replay_here(words, folder).out
    found = (folder / "metrics.json").stat()
    assert (found.st_mtime_ns, found.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert "done before" not in replay_here([*words, "seed=1"], folder).out
    (folder / "metrics.json").unlink()
    assert "done before" not in replay_here([*words, "seed=1"], folder).out
    assert (folder / "metrics.json").exists()


def test_simulation_and_replay_do_not_take_each_others_results(trace: str, tmp_path: Path) -> None:
    from tests.support.commands import run_here

    own = ("machine", "scale")
    words = [word for word in ADAPTIVE if "hardware" not in word]
    simulated = [word for word in words if word.split("=")[0] not in own]
    run_here(["+hardware=a100", *simulated, trace], tmp_path / "run")
    found = replay_here(["+hardware=a100", *words, trace, "skip_done=true"], tmp_path / "run")
    assert "done before" not in found.out


@pytest.mark.slow
def test_a_process_elsewhere_writes_its_own_folder(trace: str, tmp_path: Path) -> None:
    """The default folder, and the default of everything but the trace."""
    found = run_there([*ADAPTIVE, trace], tmp_path, cwd=tmp_path, module="replay")
    assert found.code == 0, found.err
    (done,) = tmp_path.glob("outputs/replay-*/*/DONE")
    assert json.loads((done.parent / "metrics.json").read_text(encoding="utf-8"))["world"] == "cpu"
    assert str(done.parent.relative_to(tmp_path)) in found.out.replace("\n", "")


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["+hardware=local", "+policy=lru", "machine=cpu", "log=true", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command(*words, module="replay"), cwd=tmp_path, start_new_session=True)
    try:
        # The log's temporary file stands once the run is under way; the run takes much longer.
        deadline = time.monotonic() + 100
        while not list(folder.glob(f".{LOG_NAME}.*.tmp")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait(60)
    assert not {"DONE", "metrics.json", "partial.json", LOG_NAME} & {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_a_sweep_is_a_line_a_run(trace: str, tmp_path: Path) -> None:
    words = [
        "-m",
        *(word for word in ADAPTIVE if "residency" not in word),
        trace,
        "residency=0.3,0.6",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    found = replay_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    assert len(list((tmp_path / "sweep").rglob("DONE"))) == 2
