"""No bad configuration passes: each is one line that names the key, and nothing that it names is called."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from expertflow.keys import shown
from sim.job.configure import configure
from sim.job.errors import one_line
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from tests.attack import trap
from tests.attack.configurations import (
    ADAPTIVE,
    LRU,
    REPLAY,
    Bad,
    Place,
    bad,
    bad_words,
    edges,
    faults,
    judge,
    judge_words,
    literal,
    places,
    ready,
    trace_at_hand,
)
from tests.cli.test_bad_input import assert_refused
from tests.support.commands import run_here, run_there
from tests.support.replays import replay_here

CASES = bad()


def wrong(cases: Sequence[Bad]) -> list[str]:
    """What is wrong with the refusal of each."""
    found = []
    for case in cases:
        try:
            line = judge(case)
        except Exception as error:
            found.append(f"{case}: {type(error).__name__}: {error}")
            continue
        found += [f"{case}: {fault}: {line}" for fault in faults(line, case.names)]
    return found


def test_there_are_many_of_every_kind_and_none_twice() -> None:
    assert len(CASES) >= 3_000
    assert [text for text, number in Counter(map(str, CASES)).items() if number > 1] == []
    tried = {key for case in CASES for key, _ in case.edits}
    assert [place.dotted for place in places() if place.dotted not in tried] == []


def test_some_bad_configurations_are_refused_in_one_line() -> None:
    assert wrong(CASES[::60]) == []


@pytest.mark.slow
def test_every_bad_configuration_is_refused_in_one_line_and_nothing_it_names_is_called() -> None:
    trap.CALLS.clear()
    assert wrong(CASES) == []
    assert trap.CALLS == []


@pytest.mark.mostly_slow(keep=6)
@pytest.mark.parametrize("words", bad_words(), ids=lambda words: words[0][-1][:40])
def test_what_hydra_reads_is_refused_in_one_line(words: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    told, names = words
    assert faults(judge_words(told), names) == []


COMMANDS = [case for case in CASES if case.world == "sim" and case.edits[0][1] != {}][::90]
"""Hydra merges mappings: an empty one changes nothing."""


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.edits[0][0])
def test_a_command_says_the_same(case: Bad, tmp_path: Path) -> None:
    assert_refused(run_here(case.words, tmp_path / "run"), case.names)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.world == "replay"][::25], ids=lambda c: c.edits[0][0])
def test_a_replay_says_the_same(case: Bad, tmp_path: Path) -> None:
    assert_refused(replay_here(case.words, tmp_path / "run"), case.names)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS[::7], ids=lambda case: case.edits[0][0])
def test_a_process_says_the_same_with_code_2(case: Bad, tmp_path: Path) -> None:
    words = [*case.words, f"hydra.run.dir={tmp_path / 'run'}"]
    assert_refused(run_there(words, tmp_path / "run", cwd=tmp_path), case.names)


@pytest.mark.slow
@pytest.mark.parametrize("told", [words for words, _ in bad_words()][::6], ids=lambda words: words[-1][:40])
def test_a_process_refuses_what_hydra_reads(told: tuple[str, ...], tmp_path: Path) -> None:
    names = dict(bad_words())[told]
    found = run_there([*told, f"hydra.run.dir={tmp_path / 'run'}"], tmp_path / "run", cwd=tmp_path)
    assert_refused(found, names)


# -- what is allowed -----------------------------------------------------------------------------------------

RUNNING = [
    place for place in places() if place.world == "sim" and not place.dotted.endswith(("fitted", "fitted_start"))
]


OUTCOMES: dict[tuple[tuple[str, ...], str, str], str | None] = {}
"""What became of each run: two tests ask for the same ones."""


def run_at(place: Place, value: Any) -> str | None:
    """Run eight tokens with that value, once; the message if it is refused."""
    asked = (place.base, place.dotted, repr(value))
    if asked not in OUTCOMES:
        OUTCOMES[asked] = run_anew(place, value)
    return OUTCOMES[asked]


def run_anew(place: Place, value: Any) -> str | None:
    """The same, whether it has run before or not."""
    short = {"max_tokens": 8, **{place.dotted: value}}
    try:
        plain = ready(Bad(place.base, tuple(short.items()), ()))
        work = make_workload(plain, trace_at_hand())
        policy, transfer = make_policy(plain["policy"], work, plain["seed"])
        metrics = run_policy(work, policy, transfer)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        return line
    assert 0 < metrics["elapsed_ns"] < 2**63
    assert math.isfinite(metrics["stall_ns"])
    return None


@pytest.mark.mostly_slow(keep=12)
@pytest.mark.parametrize("place", RUNNING, ids=lambda place: f"{place.base[-1]}-{place.dotted}")
def test_the_ends_of_a_range_are_allowed_and_the_run_ends(place: Place) -> None:
    for value in edges(place.key):
        line = run_at(place, value)
        # Another key may refuse it, but not its own range.
        told, rule = f"{place.dotted}={shown(value)}", place.key.rule
        assert line is None or not line.startswith((f"{told} is outside {rule.range}", f"{told} must be")), line


@pytest.mark.slow
def test_most_ends_are_accepted_as_they_are() -> None:
    outcomes = [run_at(place, value) for place in RUNNING for value in edges(place.key)]
    assert sum(line is None for line in outcomes) > len(outcomes) // 2


def leaves(value: Any, place: str = "") -> list[tuple[str, Any]]:
    """Every key of a configuration with its value, outermost lists whole."""
    if not isinstance(value, dict):
        return [(place, value)]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{place}.{key}" if place else key)]


@pytest.mark.parametrize("base", [LRU, ADAPTIVE, (*LRU, "gpu_memory_gb=20"), (*ADAPTIVE, "trace.num_tokens=64")])
def test_every_value_said_again_changes_nothing(base: tuple[str, ...]) -> None:
    plain = configure(list(base))
    told = [f"{key}={literal(value)}" for key, value in leaves(plain) if not key.startswith("hardware.sources")]
    assert len(told) > 50
    assert configure([*base, *told]) == plain


def test_the_bases_are_sound() -> None:
    for place in places():
        if place.base != REPLAY:
            assert run_at(Place(place.base, "seed", place.key), 0) is None
            break
    assert judge(Bad(LRU, (), ())) is None
    assert judge(Bad(ADAPTIVE, (), ())) is None
    assert judge(Bad(REPLAY, (), (), "replay")) is None
