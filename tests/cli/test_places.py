"""Places and static starts at the command line: what is run beside, what is printed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from replay.lockstep.compare import main as lockstep
from sim.views.timeline import load_timeline
from tests.support.commands import TINY_MODEL_WORDS, run_here, tiny_trace
from tests.support.replays import TINY, replay_here

WORDS = ["+hardware=rtx4090", "+host=desktop", "+policy=lru", *TINY_MODEL_WORDS]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 16, prompt=3)


def test_beside_a_place_runs_are_made_with_it_and_with_the_gpu(trace: Path, tmp_path: Path) -> None:
    words = [*WORDS, "+policy/place=balanced", f"trace.path={trace}", "residency=0.3", "events=true", "timeline=true"]
    found = run_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    metrics = found.metrics()
    names = ("on_demand", "lru", "clairvoyant")
    assert list(metrics["compare"]) == [*names, *(f"{name}_placed" for name in names)]
    for name, one in (("", metrics), *metrics["compare"].items()):
        on_host = one.get("num_host", 0)
        assert ("num_host" in one) == (not name or name.endswith("_placed"))
        assert one["num_accesses"] == one["num_hits"] + one["num_late"] + one["num_misses"] + on_host
        stalls = ("late_stall_ns", "miss_stall_ns", "host_stall_ns")
        assert one["stall_ns"] == sum(one.get(key, 0) for key in stalls)
        assert one["elapsed_ns"] == one["compute_ns"] + one["stall_ns"] + one["overhead_ns"]
        assert one["elapsed_ns"] >= metrics["bounds"]["floor_ns"]
        reasons = one["prefetch"]["dropped_by_reason"]
        assert one["prefetch"]["dropped"] == sum(reasons.values())
    assert metrics["num_host"] > 0
    assert metrics["compare"]["lru_placed"]["elapsed_ns"] == metrics["elapsed_ns"]
    assert metrics["bounds"]["clairvoyant_placed_ns"] == metrics["compare"]["clairvoyant_placed"]["elapsed_ns"]
    # What does not fit into a line of the table follows in a second one.
    headers = [line.split() for line in found.out.splitlines() if line.startswith("policy")]
    assert headers[0][-1] == "host"
    assert headers[1] == ["policy", "on", "host"]
    assert "…_placed: with this run's place" in found.out
    again = run_here(words, tmp_path / "again")
    assert (again.folder / "metrics.json").read_bytes() == (found.folder / "metrics.json").read_bytes()


def test_a_pinned_start_with_runs_beside_it(trace: Path, tmp_path: Path) -> None:
    words = [*WORDS, "start=pinned", "policy.transfer.staging_slots=2", f"trace.path={trace}", "residency=0.3"]
    metrics = run_here(words, tmp_path / "run").metrics()
    assert metrics["uses_future"] is True
    assert metrics["elapsed_ns"] > 0
    found = run_here([*WORDS, "start=pinned", f"trace.path={trace}", "residency=0.3"], tmp_path / "none")
    assert found.code == 2
    assert "policy.transfer.staging_slots=1 or more" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+policy/place=host_layers", "policy.place.layers=99"],
            "policy.place.layers=99 is more than the model's MoE",
        ),
        (["+policy/place=host_experts"], "policy.place takes either experts, a list of keys, or used_on, a trace"),
        (["+policy/place=host_experts", "policy.place.used_on=none.x"], "none.x"),
        (["+policy/place=capped", "policy.place.uploads=-1"], "policy.place.uploads=-1 is outside [0, 65535] experts"),
        (
            ["hardware.host_memory_efficiency=2", "+policy/place=cheaper"],
            "hardware.host_memory_efficiency=2 is outside",
        ),
        (["start=pinned_layers", "residency=0.05"], "start=pinned_layers: there are"),
        (["~hardware.host_tflops", "+policy/place=cheaper"], "lacks host_tflops, which a place on the host needs"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words: list[str], message: str, trace: Path, tmp_path: Path) -> None:
    found = run_here([*WORDS, f"trace.path={trace}", *words], tmp_path / "run")
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1
    assert len(found.err) <= 301


def test_a_start_that_is_dropped_says_so(trace: Path, tmp_path: Path) -> None:
    words = ["+hardware=a100", "+policy=on_demand", *TINY_MODEL_WORDS, f"trace.path={trace}", "compare=none"]
    assert "start=popular: on_demand gives up every expert" in run_here([*words, "start=popular"], tmp_path / "a").out
    assert "gives up" not in run_here(words, tmp_path / "b").out


def test_a_replay_on_hardware_without_figures_refuses_a_place_on_the_host(trace: Path, tmp_path: Path) -> None:
    words = [*TINY, "+policy=lru", "+policy/place=cheaper", f"trace.path={trace}"]
    found = replay_here(words, tmp_path / "run")
    assert found.code == 2
    assert found.err.startswith(
        "error: hardware=local has no figures to weigh a place on the host by; give the profile"
    )
    assert found.err.count("\n") == 1
    found = replay_here([*words, "+host=desktop"], tmp_path / "host")
    assert found.code == 2
    assert "hardware=local is the machine that this runs on, of which no figure is known" in found.err
    assert replay_here([*TINY, "+policy=lru", "+policy/place=gpu", f"trace.path={trace}"], tmp_path / "gpu").code == 0


@pytest.mark.slow
def test_a_replay_computes_on_its_host_and_says_so(trace: Path, tmp_path: Path) -> None:
    """The same keys as a simulation's, the host's row of the timeline, and the runs beside it with its place."""
    replayed = ["machine=cpu", "scale=8", "stack=found", "compare=full", "timeline=true", "events=true", "log=true"]
    # By which the host is cheaper for some experts of so small a model.
    fast = ["hardware.host_unpack_gweights_per_s=null", "hardware.host_round_trip_ns=20000"]
    words = [*WORDS, *fast, "+policy/place=cheaper", f"trace.path={trace}", "residency=0.3", *replayed]
    found = replay_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    assert found.done
    metrics = found.metrics()
    assert list(metrics["compare"]) == ["on_demand", "lru", "on_demand_placed", "lru_placed"]
    for name, one in (("", metrics), *metrics["compare"].items()):
        placed = not name or name.endswith("_placed")
        assert ("num_host" in one) == ("host" in one) == ("host_stall_ns" in one) == placed
        on_host = one.get("num_host", 0)
        assert (on_host > 0) == placed
        assert one["num_accesses"] == one["num_hits"] + one["num_late"] + one["num_misses"] + on_host
        assert one["elapsed_ns"] == one["compute_ns"] + one["stall_ns"] + one["overhead_ns"]
    assert "the host's processor was busy for" in found.out
    events = pd.read_parquet(found.folder / "events.parquet")
    assert (events["class"] == "host").sum() == metrics["num_host"]
    frames = load_timeline(found.folder / "timeline.json")
    assert len(frames.host) == metrics["num_host"]
    assert int((frames.host["end_ns"] - frames.host["start_ns"]).sum()) == metrics["host"]["busy_ns"]
    assert lockstep([str(found.folder)]) == 0
