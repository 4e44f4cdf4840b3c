"""What lockstep is for: policies that decide by more than the records, and logs that tell of another run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertflow.boundary import PartError
from expertflow.machine import GATE
from replay.lockstep.compare import LockstepResult, main
from replay.lockstep.log_format import Attention, Copy, Decided, Experts, LoggedForward, Told, Waited
from tests.lockstep import bad_policies
from tests.lockstep.support import Job, edited, read_events, rewritten

BASE = ("+hardware=a100", "+policy=fixed_1", "policy/predictor=transition", "trace.num_tokens=16", "residency=0.25")
BAD = "tests.lockstep.bad_policies"


def with_horizon(name: str) -> Job:
    return Job.of(*BASE, f"policy.horizon._target_={BAD}.{name}")


def with_predictor(name: str) -> Job:
    return Job.of(*BASE, "policy/predictor=none", f"policy.predictor._target_={BAD}.{name}", "policy/selection=top_k")


def assert_told(result: LockstepResult, what: str = "") -> None:
    """A difference, with where, what was and what is."""
    assert result.difference is not None
    assert re.fullmatch(r"forward \d+, layer \d+: logged .+; now .+", result.difference)
    assert what in result.difference
    assert result.difference in result.line()
    assert "\n" not in result.line()


# -- policies ------------------------------------------------------------------------------------------------


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(lambda: with_horizon("WallClockHorizon"), id="wall clock"),
        pytest.param(lambda: with_horizon("ModuleStateHorizon"), id="module state"),
        pytest.param(lambda: with_predictor("UnseededPredictor"), id="random"),
        pytest.param(lambda: with_predictor("UnseededArrayPredictor"), id="numpy"),
    ],
)
def test_policies_that_decide_by_more_are_caught(tmp_path: Path, job: Callable[[], Job]) -> None:
    made = job()
    assert_told(made.check(made.log(tmp_path / "log.parquet")), "wants [")


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(lambda: with_horizon("ViewClockHorizon"), id="time of the records"),
        pytest.param(lambda: with_predictor("SeededPredictor"), id="seeded"),
    ],
)
def test_their_honest_kin_is_equal(tmp_path: Path, job: Callable[[], Job]) -> None:
    made = job()
    result = made.check(made.log(tmp_path / "log.parquet", noisy=True))
    assert (result.difference, result.partial, result.num_forwards) == (None, None, 16)


def test_a_policy_that_raises_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted from here, whichever tests ran before: it is started twice for the log, and raises in the start after.
    monkeypatch.setattr(bad_policies, "_runs", 1)
    job = with_horizon("RaisingHorizon")
    path = job.log(tmp_path / "log.parquet")
    with pytest.raises(
        PartError, match=r"^RaisingHorizon.distances raised KeyError: 'no such layer' at \S+:\d+ \(forward \d, layer"
    ):
        job.check(path)


@pytest.mark.slow
def test_first_difference_is_the_one_told(tmp_path: Path) -> None:
    job = with_horizon("ViewClockHorizon")
    path = job.log(tmp_path / "log.parquet")

    def change(forwards: list[LoggedForward]) -> None:
        for forward, layer in ((9, 3), (4, 7), (12, 0)):
            change_wants(forwards[forward], layer)

    result = job.check(rewritten(path, tmp_path / "other.parquet", change))
    assert_told(result, "forward 4, layer 7: logged wants [0/1, 0/0")
    before = [event for forward in read_events(path)[:4] for event in forward.events]
    assert result.num_decisions > sum(not isinstance(event, Told) for event in before)
    assert result.num_forwards == 4


# -- logs ----------------------------------------------------------------------------------------------------


def place_of(forward: LoggedForward, kind: type[Any], layer: int) -> int:
    """Of the first event of a kind in a layer."""
    start = next(i for i, one in enumerate(forward.events) if isinstance(one, Attention) and one.layer == layer)
    return next(i for i, one in enumerate(forward.events) if i >= start and isinstance(one, kind))


def change_wants(forward: LoggedForward, layer: int) -> None:
    place = place_of(forward, Decided, layer)
    old = forward.events[place]
    assert isinstance(old, Decided)
    forward.events[place] = Decided((1, 0, *old.wants))


def change_copy(forward: LoggedForward) -> None:
    place = next(i for i, one in enumerate(forward.events) if isinstance(one, Copy))
    old = forward.events[place]
    assert isinstance(old, Copy)
    forward.events[place] = old._replace(slot=(old.slot + 1) % 8)


def change_experts(forward: LoggedForward) -> None:
    place = place_of(forward, Experts, 5)
    old = forward.events[place]
    assert isinstance(old, Experts)
    forward.events[place] = old._replace(shared=not old.shared)


def change_chunk(forward: LoggedForward) -> None:
    """Another load has ended."""
    place, old = next((i, one) for i, one in enumerate(forward.events) if isinstance(one, Told) and one.chunks)
    load, chunk, start_ns, end_ns = old.chunks[0]
    forward.events[place] = old._replace(chunks=((load + 1, chunk, start_ns, end_ns), *old.chunks[1:]))


def lose_chunk(forward: LoggedForward) -> None:
    place, old = next((i, one) for i, one in enumerate(forward.events) if isinstance(one, Told) and one.chunks)
    forward.events[place] = old._replace(chunks=old.chunks[1:])


def change_wait(forward: LoggedForward) -> None:
    place = next(i for i, one in enumerate(forward.events) if isinstance(one, Waited))
    old = forward.events[place]
    assert isinstance(old, Waited)
    forward.events[place] = old._replace(drain=not old.drain)


def lose_event(forward: LoggedForward) -> None:
    del forward.events[place_of(forward, Decided, 6)]


def lose_record(forward: LoggedForward) -> None:
    del forward.events[place_of(forward, Told, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [change_copy, change_experts, change_chunk, lose_chunk, change_wait, lose_event, lose_record]
)
def test_logs_of_another_run_are_caught(tmp_path: Path, change: Callable[[LoggedForward], None]) -> None:
    job = Job.of(*BASE)
    path = job.log(tmp_path / "log.parquet")
    assert job.check(path).difference is None
    result = job.check(rewritten(path, tmp_path / "other.parquet", lambda forwards: change(forwards[2])))
    assert result.difference is not None
    assert re.match(r"forward (2|3)(, layer \d+)?: logged .+; now .+", result.difference)


def test_one_time_that_is_another_is_caught(tmp_path: Path) -> None:
    """Sealed anew, so that nothing but the decisions can tell."""
    job = with_horizon("ViewClockHorizon")

    def later(forwards: list[LoggedForward]) -> None:
        events = forwards[3].events
        gate = next(i for i, one in enumerate(events) if isinstance(one, Waited) and one.kind == GATE and i > 40)
        place = next(i for i, one in enumerate(events) if i > gate and isinstance(one, Told) and one.marks)
        old = events[place]
        assert isinstance(old, Told)
        events[place] = old._replace(now_ns=old.now_ns + 1)

    path = rewritten(job.log(tmp_path / "log.parquet"), tmp_path / "other.parquet", later)
    assert_told(job.check(path), "forward 3, layer")


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("how", ["swap", "drop", "more"])
def test_forwards_that_are_not_the_workloads(tmp_path: Path, how: str) -> None:
    job = Job.of(*BASE)

    def change(forwards: list[LoggedForward]) -> None:
        if how == "swap":
            forwards[2:4] = [LoggedForward(2, forwards[3].events), LoggedForward(3, forwards[2].events)]
        elif how == "drop":
            del forwards[5]
        else:
            forwards.append(LoggedForward(16, [Attention(0, 1)]))

    result = job.check(rewritten(job.log(tmp_path / "log.parquet"), tmp_path / "other.parquet", change))
    expected = {
        "swap": "forward 2",
        "drop": "logged the begin of forward 6; now the begin of forward 5",
        "more": "logged the begin of forward 16; now the end of the run",
    }
    assert result.difference is not None
    assert expected[how] in result.difference


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("stream", ["time", "load", "key", "op", "mark", "slot", "small", "size", "after", "layer"])
def test_one_number_changed_in_the_file_is_refused(
    tmp_path: Path, stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[stream][2][0] += 1

    path = edited(Job.of(*BASE).log(tmp_path / "log.parquet"), tmp_path / "other.parquet", change)
    assert main([str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{path}: forward 2 is damaged or edited" in err
    assert err.count("\n") == 1


# -- code that a log names -----------------------------------------------------------------------------------


def test_foreign_code_runs_only_if_it_is_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_horizon("ModuleStateHorizon").log(tmp_path / "log.parquet")
    assert main([str(path)]) == 2
    word = f"policy.horizon._target_={BAD}.ModuleStateHorizon"
    assert f"if you trust it, say so: {word}\n" in capsys.readouterr().err
    assert main([str(path), word]) == 1
    assert re.match(r"lockstep: \d+ decisions equal, then a difference: forward \d+, layer", capsys.readouterr().out)


@pytest.mark.mostly_slow(keep=3)
@pytest.mark.parametrize("target", ["os.getcwd", "expertflow.runtime.dataclass", "expertflow", "builtins.print"])
@pytest.mark.parametrize("place", ["horizon", "nested"])
def test_code_of_others_is_not_run(tmp_path: Path, target: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job.of(*BASE)
    policy = job.config["policy"]
    horizon = {"_target_": target} if place == "horizon" else {**policy["horizon"], "depth": {"_target_": target}}
    path = job.log(tmp_path / "log.parquet", more={"policy": {**policy, "horizon": horizon}})
    assert main([str(path)]) == 2
    assert "is no code of this package" in capsys.readouterr().err


def test_interpolations_in_a_log_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Job.of(*BASE).log(tmp_path / "log.parquet", more={"start": "${oc.env:HOME}"})
    assert main([str(path)]) == 2
    assert "holds an interpolation" in capsys.readouterr().err
