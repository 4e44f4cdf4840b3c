"""Hostile parts: every kind is caught in every way of running, in one line, and gains nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from expertflow.boundary import CHECKING, MOST_CHARACTERS, is_own
from expertflow.evictions.lru import LRU
from expertflow.forward import Forward, Unveiling
from expertflow.horizons.fixed import FixedHorizon
from expertflow.orders.index import IndexOrder
from expertflow.policy import Policy
from expertflow.predictors.transition import TransitionPredictor
from expertflow.runtime import Runtime
from expertflow.selections.top_k import TopK
from replay.lockstep.compare import check_log
from replay.lockstep.log_reader import LogReader
from replay.run import replay_policy
from sim.job.setup import Transfer
from sim.machine.run import run_policy
from sim.regress import differences, read_pins, run_once
from sim.study.cells import plan_jobs, run_jobs
from sim.study.plan import Cell
from tests.attack import hostile_table
from tests.attack.hostile_hooks import OwnLRU, OwnOrder
from tests.attack.hostile_table import HONEST, WORDS, World, in_lockstep, policy_of, replayed, simulated, world
from tests.attack.parts import CLASSES, KINDS, REFUSED, Kind
from tests.lockstep.support import Job
from tests.support.commands import TINY_MODEL_WORDS, run_here, tiny_trace
from tests.support.replays import TINY, replay_here

HERE = "tests.attack.parts"
GOLDEN = Path(__file__).parents[1] / "golden" / "runs.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as made:
        yield made


def named(kind: Kind) -> str:
    return kind.name


def assert_one_line(message: str, name: str) -> None:
    """The part's class first; then the rule, where, and what to do."""
    assert "\n" not in message
    assert len(message) <= MOST_CHARACTERS
    assert re.match(rf"{name}\b", message)


# -- every kind ------------------------------------------------------------------------------------------------------


def test_there_are_many_kinds_each_with_a_name_of_its_own() -> None:
    assert len(KINDS) == len(CLASSES) >= 60
    assert {kind.place for kind in KINDS} == {"predictor", "horizon", "selection", "eviction", "order", "place"}


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_it_is_caught_in_a_simulation(kind: Kind, made: World) -> None:
    found = simulated(kind, made)
    assert found.how == kind.ends
    if kind.ends == REFUSED:
        assert_one_line(found.message, kind.name)
        where = r"\((forward \d+, (before )?layer \d|before the first forward)\); "
        declared = rf"{kind.name}(\.\w+=.+ (must|unknown)|\.scope raised| is no Order)"
        assert re.search(where, found.message) or re.match(declared, found.message)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_it_is_caught_in_a_replay_that_verifies(kind: Kind, made: World) -> None:
    found = replayed(kind, made)
    expected = simulated(kind, made).check
    # A replay has no host to place experts on, and does not ask.
    assert (found.how, found.check) == (kind.ends, "on_host" if expected == "for_later" else expected)
    if kind.ends == REFUSED:
        assert_one_line(found.message, kind.name)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_lockstep_with_an_honest_log_finds_it(kind: Kind, made: World) -> None:
    assert in_lockstep(kind, made).how in (REFUSED, "another decision")


def test_the_honest_run_is_equal_to_its_log(made: World) -> None:
    with LogReader(made.log) as reader:
        assert check_log(reader, made.full, policy_of(None)).difference is None


def test_honest_parts_of_a_users_own_run_as_ours_do(made: World) -> None:
    own = policy_of(None)
    others = Policy(TransitionPredictor(), FixedHorizon(1), TopK(), OwnLRU(), OwnOrder())
    assert (own.guarded, others.guarded) == (False, True)
    assert run_policy(made.full, own, Transfer()) == run_policy(made.full, others, Transfer())


def test_what_writes_to_recorded_values_changes_them_for_nobody(made: World) -> None:
    forward = next(forward for forward in made.full.batches if forward.phase == "decode")
    recorded = forward.recorded
    assert recorded is not None
    before = [recorded.lookahead(forward.rows, 0), recorded.embedding(forward.rows), recorded.token_ids(forward.rows)]
    kept = [np.array(one) for one in before]
    unveiling = Unveiling(forward, copies=True)
    unveiling.reveal(0)
    shown: Any = unveiling.known.recorded
    rows = unveiling.known.rows
    for found in (shown.lookahead(rows, 0), shown.embedding(rows), shown.token_ids(rows)):
        assert found.base is None
        found.fill(1)
    assert all(np.array_equal(one, other) for one, other in zip(before, kept, strict=True))


def test_the_table_names_every_kind_and_none_that_is_silent(
    made: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hostile_table, "KINDS", KINDS[::20])
    text = hostile_table.table(made)
    assert text.count("\n| ") == len(KINDS[::20]) + 1
    assert f"{len(KINDS[::20])} kinds: " in text
    assert "; 0 silent." in text


# -- whose class it is -----------------------------------------------------------------------------------------------


def test_a_class_is_ours_only_if_a_module_of_ours_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_own(LRU())
    assert is_own(IndexOrder())
    beside = ModuleType("expertflow_x.orders")
    beside.__dict__["PassesBeside"] = CLASSES["PassesBeside"]
    monkeypatch.setitem(sys.modules, "expertflow_x.orders", beside)
    for part in (OwnLRU(), *(CLASSES[name]() for name in ("PassesAsOurs", "PassesAsOne", "PassesBeside"))):
        assert not is_own(part)
    assert not is_own(type("LRU", (LRU,), {"__module__": LRU.__module__})())


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("name", read_pins(GOLDEN))
def test_a_pinned_run_is_the_same_where_our_parts_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHECKING, "own", True)
    pin = read_pins(GOLDEN)[name]
    assert differences(pin["metrics"], run_once(pin["overrides"], GOLDEN.parent)) == []


# -- commands --------------------------------------------------------------------------------------------------------


def words_of(folder: Path, *more: str) -> list[str]:
    path = tiny_trace(folder / "tiny.safetensors", 12, prompt=3)
    return [*WORDS, *HONEST, "compare=none", f"trace.path={path}", *more]


COMMANDS = [
    (
        "policy.order._target_",
        "DropsLast",
        r"DropsLast\.arrange leaves out key \d+ \(forward \d+, layer \d\); answer exactly",
    ),
    ("policy.eviction._target_", "EvictsPinned", r"EvictsPinned\.victim answered key \d+, which is pinned"),
    (
        "policy.eviction._target_",
        "VictimExits",
        r"VictimExits\.victim raised SystemExit: 0 at attack/hostile_hooks\.py:\d+ \(forward \d+, layer \d\)",
    ),
    ("policy.order._target_", "StrictIsText", r"StrictIsText\.strict='no' must be True or False"),
]


@pytest.mark.parametrize(("key", "name", "told"), COMMANDS, ids=[name for _, name, _ in COMMANDS])
def test_a_simulation_ends_with_one_line_and_is_not_done(key: str, name: str, told: str, tmp_path: Path) -> None:
    found = run_here(
        ["+hardware=a100", *TINY_MODEL_WORDS, *words_of(tmp_path, f"{key}={HERE}.{name}")], tmp_path / "run"
    )
    assert (found.code, found.done) == (2, False)
    assert re.fullmatch(rf"error: {told}.*\n", found.err)


@pytest.mark.parametrize(("key", "name", "told"), COMMANDS[:1], ids=["DropsLast"])
def test_a_replay_ends_with_one_line_and_is_not_done(key: str, name: str, told: str, tmp_path: Path) -> None:
    words = [*TINY, *words_of(tmp_path, "verify=true", f"{key}={HERE}.{name}")]
    found = replay_here(words, tmp_path / "run")
    assert (found.code, found.done) == (2, False)
    assert re.fullmatch(rf"error: {told}.*\n", found.err)


@pytest.mark.slow
def test_a_sweep_names_the_part_and_keeps_the_other_runs(tmp_path: Path) -> None:
    choice = f"policy.order._target_=expertflow.orders.index.IndexOrder,{HERE}.DropsLast"
    words = [
        "-m",
        "+hardware=a100",
        *TINY_MODEL_WORDS,
        *words_of(tmp_path, choice),
        f"hydra.sweep.dir={tmp_path / 'all'}",
    ]
    found = run_here(words, tmp_path / "run")
    assert found.code == 2
    assert re.search(r"error: .*DropsLast\.arrange leaves out key \d+", found.err)
    assert len(list((tmp_path / "all").rglob("DONE"))) == 1


def test_a_study_names_the_part_and_keeps_no_result(tmp_path: Path) -> None:
    words = ("+hardware=a100", *TINY_MODEL_WORDS, *words_of(tmp_path, f"policy.order._target_={HERE}.DropsLast"))
    told = r"1 of 1 cells failed, .+: DropsLast\.arrange leaves out key \d+ \(forward \d+, layer \d\)"
    with pytest.raises(ValueError, match=told):
        run_jobs(plan_jobs([Cell((("stack", "eager"),), "hostile", words)]), tmp_path / "cells", 1)
    assert not list((tmp_path / "cells").glob("*.done"))


def test_the_environment_shows_where_a_part_has_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["+hardware=a100", *TINY_MODEL_WORDS]
    words += words_of(tmp_path, f"policy.eviction._target_={HERE}.VictimDivides")
    quiet = run_here(words, tmp_path / "run").err
    monkeypatch.setenv("EXPERTFLOW_TRACEBACK", "1")
    loud = run_here(words, tmp_path / "run").err
    assert "Traceback" not in quiet
    told = r"error: VictimDivides\.victim raised ZeroDivisionError: division by zero at \S+:\d+ \(forward 0, layer "
    assert re.match(told, quiet)
    assert "hostile_hooks.py" in loud
    assert loud.endswith(quiet)


def test_a_policy_that_is_not_made_of_parts_must_be_ours(tmp_path: Path) -> None:
    own = tmp_path / "conf" / "policy" / "whole.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: whole\n_target_: tests.attack.test_parts.Whole\n", encoding="utf-8")
    words = ["--config-dir", str(tmp_path / "conf"), "+hardware=a100", "+policy=whole", "compare=none", "max_tokens=4"]
    found = run_here(words, tmp_path / "run")
    assert (found.code, found.done) == (2, False)
    assert "policy._target_=tests.attack.test_parts.Whole is no policy of this package; compose one" in found.err


class Whole(Policy):
    """A policy of a user's own."""


# -- a dropped launch ------------------------------------------------------------------------------------------------


def drop_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours: of several experts launched at once in layer 2 the last is forgotten."""
    launch = Runtime._launch

    def forgetful(self: Runtime, forward: Forward, layer: int, keys: Sequence[int], shared: bool) -> int:
        return launch(self, forward, layer, keys[:-1] if layer == 2 and len(keys) > 1 else keys, shared)

    monkeypatch.setattr(Runtime, "_launch", forgetful)


def test_a_dropped_launch_breaks_an_identity(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_launches(monkeypatch)
    with pytest.raises(AssertionError, match=r"experts launched . computed on the host = experts demanded"):
        run_policy(made.full, policy_of(None), Transfer())


def test_a_replay_that_verifies_finds_a_dropped_launch(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sound = replay_policy(made.rig, made.work, policy_of(None), Transfer(), verify=True)
    drop_launches(monkeypatch)
    _, found = replay_policy(made.rig, made.work, policy_of(None), Transfer(), verify=True)
    assert sound is not None
    assert found is not None
    assert (sound.sound, sound.num_mislaunched, sound.first_mislaunched) == (True, 0, None)
    assert (found.sound, found.num_wrong) == (False, 0)
    assert found.num_mislaunched > 0
    first = found.first_mislaunched
    assert first is not None
    # In which forward a layer's experts are launched several at once, and in how many groups, depends on how fast this
    # machine copies; one of each group is dropped.
    assert (first.layer, first.too_often) == (2, ())
    assert len(first.left_out) >= 1


def test_lockstep_finds_a_launch_that_the_log_lacks_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_launches(monkeypatch)
    job = Job.of("+hardware=a100", *TINY_MODEL_WORDS, *words_of(tmp_path))
    found = job.check(job.log(tmp_path / "log.parquet"))
    told = r"forward 0, layer 2: logged launches; now a demand from which they differ in experts 2/\d"
    assert found.difference is not None
    assert re.fullmatch(told, found.difference)
