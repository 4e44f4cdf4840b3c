"""Every policy decides by a log as it decided when the log was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from expertflow.machine import LOAD
from replay.drive import MAX_IDLE_WAKES, drive
from replay.lockstep.compare import main
from replay.lockstep.log_format import LOG_NAME, Copy, Decided, Experts, LoggedForward, Told, Waited
from sim.machine.simulated import simulate
from sim.paths import CONF
from tests.lockstep.support import BlockingSim, Job, LostError, read_events, rewritten
from tests.support.commands import small_trace

POLICIES = sorted(path.stem for path in (CONF / "policy").glob("*.yaml"))
_FILES = {name: yaml.safe_load((CONF / "policy" / f"{name}.yaml").read_text(encoding="utf-8")) for name in POLICIES}
COMPOSED = [name for name in POLICIES if "_target_" not in _FILES[name]]
BASE = ("+hardware=a100", "trace.num_tokens=24", "residency=0.25")


def equal_twice(path: Path, *overrides: str) -> None:
    job = Job.of(*overrides)
    job.log(path, noisy=True)
    num_forwards = sum(1 for _ in job.work.batches)
    forwards = read_events(path)
    num_told = sum(isinstance(event, Told) for forward in forwards for event in forward.events)
    num_events = sum(len(forward.events) for forward in forwards)
    for _ in range(2):
        result = job.check(path)
        assert (result.difference, result.partial) == (None, None)
        assert result.num_forwards == num_forwards > 0
        assert result.num_decisions == num_events - num_told > 10 * num_forwards


def test_there_are_policies() -> None:
    assert {"lru", "adaptive", "on_demand"} <= set(COMPOSED) < set(POLICIES)


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_equal(tmp_path: Path, name: str) -> None:
    equal_twice(tmp_path / "log.parquet", *BASE, f"+policy={name}")


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_equal_in_batches(tmp_path: Path, name: str) -> None:
    equal_twice(tmp_path / "log.parquet", *BASE, f"+policy={name}", "batch_size=8", "trace.num_tokens=40")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSED)
def test_every_policy_is_equal_with_a_predictor_that_learns(tmp_path: Path, name: str) -> None:
    equal_twice(tmp_path / "log.parquet", *BASE, f"+policy={name}", "policy/predictor=transition")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("policy.transfer.staging_slots=3", "policy/eviction=lru_per_layer"),
        ("start=popular", "warmup_forwards=5"),
        ("channel_depth=1", "chunk_mib=64"),
        ("policy/predictor=noisy_oracle", "policy/horizon=stride_2"),
        ("residency=0.004",),
    ],
)
def test_settings_that_reach_the_runtime_are_kept(tmp_path: Path, words: tuple[str, ...]) -> None:
    equal_twice(tmp_path / "log.parquet", *BASE, "+policy=adaptive", *words)


@pytest.mark.slow
def test_a_log_tells_what_crossed(tmp_path: Path) -> None:
    """Counted against the run itself."""
    job = Job.of(*BASE, "+policy=adaptive")
    runtime, _ = job.runtime()
    job.log(tmp_path / "log.parquet")
    events = [event for forward in read_events(tmp_path / "log.parquet") for event in forward.events]
    runtime, machine = job.runtime()
    simulate(runtime, machine)
    counters = runtime.counters
    copies = [event for event in events if isinstance(event, Copy)]
    assert sum(one.num_bytes for one in copies) == counters.demand_bytes + counters.prefetch_bytes > 0
    assert sum(len(event.keys) for event in events if isinstance(event, Experts)) == counters.num_accesses
    # 24 layers in each of 24 forwards, but that nothing is decided in the first.
    assert sum(isinstance(event, Decided) for event in events) == runtime.policy.num_decisions == 24 * 23
    assert any(isinstance(event, Decided) and event.wants for event in events)
    assert any(isinstance(event, Waited) and event.kind == LOAD for event in events)
    assert max(event.now_ns for event in events if isinstance(event, Told)) == counters.elapsed_ns


@pytest.mark.slow
def test_logging_changes_nothing(tmp_path: Path) -> None:
    job = Job.of(*BASE, "+policy=adaptive")
    totals = []
    for log in (False, True):
        runtime, machine = job.runtime()
        if log:
            job.log(tmp_path / "log.parquet")
        drive(runtime, machine)
        totals.append(runtime.counters)
    runtime, machine = job.runtime()
    simulate(runtime, machine)
    assert totals[0] == totals[1] == runtime.counters


@pytest.mark.slow
def test_same_run_same_bytes(tmp_path: Path) -> None:
    job = Job.of(*BASE, "+policy=adaptive")
    first, second = job.log(tmp_path / "1.parquet"), job.log(tmp_path / "2.parquet")
    assert first.read_bytes() == second.read_bytes()


def test_log_is_small(tmp_path: Path) -> None:
    parts = ["policy/predictor=transition", "policy/selection=threshold", "policy/horizon=adaptive"]
    job = Job.of("+hardware=a100", "+policy=adaptive", *parts, "policy/eviction=two_level_lru", "trace.num_tokens=64")
    assert job.log(tmp_path / "log.parquet", noisy=True).stat().st_size < 150_000


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With keys in the configuration that only a replay knows."""
    job = Job.of(*BASE, "+policy=adaptive")
    job.log(tmp_path / LOG_NAME, more={"machine": "cpu", "scale": 16})
    assert main([str(tmp_path)]) == 0
    expected = job.check(tmp_path / LOG_NAME).num_decisions
    assert capsys.readouterr().out == f"lockstep: {expected} decisions in 24 forwards equal\n"


def test_a_trace_that_has_moved_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = small_trace(tmp_path / "old.safetensors"), tmp_path / "new.safetensors"
    Job.of("+hardware=a100", "+policy=lru", f"trace.path={old}").log(tmp_path / "log.parquet")
    old.rename(new)
    assert main([str(tmp_path / "log.parquet")]) == 2
    assert "old.safetensors" in one_error(capsys)
    assert main([str(tmp_path / "log.parquet"), f"trace.path={new}"]) == 0
    other = small_trace(tmp_path / "other.safetensors", seed=1)
    capsys.readouterr()
    assert main([str(tmp_path / "log.parquet"), f"trace.path={other}"]) == 2
    assert "SHA-256" in one_error(capsys)


def test_another_policy_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Job.of(*BASE, "+policy=fixed_1", "policy/predictor=transition").log(tmp_path / "log.parquet")
    assert main([str(tmp_path / "log.parquet"), "policy.horizon.depth=2"]) == 1
    out = capsys.readouterr().out
    assert "a difference: forward 0, layer 1: logged wants [2/" in out
    assert out.count("\n") == 1


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize(
    "word",
    ["~policy", "policy/eviction=lfu", "residency=0.1,0.2", "=", "colour=red", "trace.colour=1", "batch_size=none"],
)
def test_words_that_cannot_be_put_over_a_log(tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    Job.of(*BASE, "+policy=lru").log(tmp_path / "log.parquet")
    assert main([str(tmp_path / "log.parquet"), word]) == 2
    assert one_error(capsys)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "RUN_FOLDER_OR_LOG" in capsys.readouterr().err


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# -- runs that break off -------------------------------------------------------------------------------------


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("lost_at", [0, 1, 7, 100, 333])
def test_a_run_that_broke_off_is_checked_up_to_its_end(
    tmp_path: Path, lost_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job.of(*BASE, "+policy=adaptive")
    path = job.log(tmp_path / "log.parquet", lost_at=lost_at, values_per_group=1000)
    last = read_events(path)[-1]
    result = job.check(path)
    assert result.difference is None
    assert result.partial is not None
    assert f"ends in forward {last.index}" in result.partial
    assert result.num_forwards == last.index
    assert main([str(path)]) == 0
    assert "equal; the log is partial: it ends in forward" in capsys.readouterr().out


def test_a_log_that_ends_between_forwards_is_partial(tmp_path: Path) -> None:
    job = Job.of(*BASE, "+policy=lru")

    def cut(forwards: list[LoggedForward]) -> None:
        del forwards[5:]

    result = job.check(rewritten(job.log(tmp_path / "log.parquet"), tmp_path / "cut.parquet", cut))
    assert (result.difference, result.partial, result.num_forwards) == (None, "it ends after forward 4", 5)


def test_a_run_that_was_not_logged_to_its_end_raises(tmp_path: Path) -> None:
    runtime, machine = Job.of(*BASE, "+policy=lru").runtime(lost_at=3)
    with pytest.raises(LostError):
        drive(runtime, machine)


def test_a_machine_without_progress_is_an_error() -> None:
    class Idle(BlockingSim):
        def wait(self, wait: object) -> tuple[int, tuple[()], tuple[()]]:
            self.num_waits += 1
            return (0, (), ())

    runtime, machine = Job.of(*BASE, "+policy=lru").runtime()
    machine.__class__ = Idle
    with pytest.raises(RuntimeError, match="no progress"):
        drive(runtime, machine)
    assert machine.num_waits == MAX_IDLE_WAKES + 1


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("name", COMPOSED)
def test_every_policy_is_equal_in_verify_steps(tmp_path: Path, name: str) -> None:
    equal_twice(tmp_path / "log.parquet", *BASE, f"+policy={name}", "speculate=[3,0.7]", "batch_size=2")
