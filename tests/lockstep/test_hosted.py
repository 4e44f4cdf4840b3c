"""Runs whose host computes experts: what places are told and answer stands in the log, and is held against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from expertflow.machine import HOST
from replay.lockstep.compare import main
from replay.lockstep.log_format import (
    ESTIMATE,
    HOST_ENDED,
    ON_HOST,
    STREAMS,
    STRETCH_OF_ONE,
    Decided,
    Estimated,
    HostEnded,
    LoggedForward,
    OnHost,
    Told,
    Waited,
    decode,
)
from tests.lockstep.support import Job, read_events, rewritten

BASE = ("+hardware=a100", "+host=workstation", "trace.num_tokens=12", "residency=0.25")
PLACES = [
    ("+policy=lru", "+policy/place=cheaper"),
    ("+policy=adaptive", "+policy/place=balanced", "batch_size=2", "trace.num_requests=4"),
    ("+policy=adaptive", "+policy/place=capped"),
    ("+policy=lru", "+policy/place=host_layers", "policy.place.layers=9"),
]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("words", PLACES)
def test_a_place_decides_by_its_log_as_it_did(words: tuple[str, ...], tmp_path: Path) -> None:
    job = Job.of(*BASE, *words)
    path = job.log(tmp_path / "log.parquet", noisy=True)
    events = [event for forward in read_events(path) for event in forward.events]
    answers = sum(isinstance(event, Told | HostEnded) for event in events)
    assert sum(isinstance(event, OnHost) for event in events) > 10
    # Every expert that was given to the host came back, in order.
    given = [(event.task, key) for event in events if isinstance(event, OnHost) for key in event.keys]
    assert given == [result[:2] for event in events if isinstance(event, HostEnded) for result in event.results]
    result = job.check(path)
    assert (result.difference, result.partial) == (None, None)
    assert result.num_decisions == len(events) - answers


def _dearer(forward: LoggedForward) -> None:
    """The host would have taken longer than it was said to."""
    for place, event in enumerate(forward.events):
        if isinstance(event, Estimated) and event.tokens:
            costs = event.costs._replace(host_ns=[1 << 40] * len(event.tokens))
            forward.events[place] = event._replace(costs=costs)
            return


def _another(forward: LoggedForward) -> None:
    place, event = next((place, one) for place, one in enumerate(forward.events) if isinstance(one, OnHost))
    forward.events[place] = event._replace(tokens=tuple(num + 1 for num in event.tokens))


def _fewer(forward: LoggedForward) -> None:
    """One expert is given to nobody."""
    place, event = next((place, one) for place, one in enumerate(forward.events) if isinstance(one, OnHost))
    forward.events[place] = event._replace(keys=event.keys[1:], tokens=event.tokens[1:])


def _unasked(forward: LoggedForward) -> None:
    place = next(place for place, one in enumerate(forward.events) if isinstance(one, Estimated))
    forward.events[place] = Decided(())


def _unheard(forward: LoggedForward) -> None:
    place = next(place for place, one in enumerate(forward.events) if isinstance(one, HostEnded))
    del forward.events[place]


def _not_waited(forward: LoggedForward) -> None:
    place, event = next(
        (place, one) for place, one in enumerate(forward.events) if isinstance(one, Waited) and one.kind == HOST
    )
    forward.events[place] = event._replace(ident=event.ident + 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_dearer, "on the host; now"),
        (_another, "tokens on the host; now experts"),
        (_fewer, "on the host; now experts"),
        (_unasked, "; now a place that is asked"),
        (_unheard, "now a wait for the host's results"),
        (_not_waited, "a wait for the host's results of task"),
    ],
)
def test_a_log_of_other_work_on_the_host_is_caught(
    change: Callable[[LoggedForward], None], told: str, tmp_path: Path
) -> None:
    job = Job.of(*BASE, "+policy=lru", "+policy/place=cheaper", "max_tokens=3")
    path = job.log(tmp_path / "log.parquet")
    other = rewritten(path, tmp_path / "other.parquet", lambda forwards: change(forwards[1]))
    difference = job.check(other).difference
    assert difference is not None
    assert "forward 1" in difference
    assert told in difference


def test_a_log_without_a_place_is_none_of_one_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job.of(*BASE, "+policy=lru", "max_tokens=3")
    path = job.log(tmp_path / "log.parquet")
    assert main([str(path), "policy.place={_target_: expertflow.places.cheaper.Cheaper}"]) == 1
    said = capsys.readouterr().out
    assert "then a difference" in said
    assert "a place that is asked" in said


@pytest.mark.parametrize("left_out", ["small", "key", "time"])
@pytest.mark.parametrize(
    ("op", "small", "key", "time"),
    [
        (ESTIMATE, [2, 1, 1, STRETCH_OF_ONE], [], [1, 2, 3, 4, 5, 6, 7]),
        (ON_HOST, [1, 2, 1, 1], [4, 5], []),
        (HOST_ENDED, [2, 1, 1], [4, 5], [1, 2, 2, 3]),
    ],
)
def test_a_stream_that_ends_within_an_event_is_told(
    op: int, small: list[int], key: list[int], time: list[int], left_out: str
) -> None:
    """And with all its numbers the event is whole."""
    row: dict[str, list[int]] = {name: [] for name in STREAMS} | {"op": [op], "small": small, "key": key, "time": time}
    _, left = decode(row)
    assert not any(left.values())
    if row[left_out]:
        row[left_out] = row[left_out][:-1]
        with pytest.raises(ValueError, match="a stream ends too soon"):
            decode(row)
