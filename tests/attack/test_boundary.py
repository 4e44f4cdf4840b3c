"""Around the parts: how they are made and told apart, what passes their guards, and who may end a process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertflow.boundary import Interruption, PartError
from expertflow.evictions.lru import LRU
from expertflow.horizons.fixed import FixedHorizon
from expertflow.orders.index import IndexOrder
from expertflow.orders.resident_first import ResidentFirst
from expertflow.parts import Eviction, Order, Place, Predictor
from expertflow.policy import Policy
from expertflow.predictors.transition import TransitionPredictor
from expertflow.runtime import Runtime
from expertflow.selections.top_k import TopK
from sim.job.beside import answerable
from sim.job.limit import TimeoutReached
from sim.job.parts import make_part
from sim.job.predictor import make_predictor
from sim.job.run_cli import Ended, run_cli
from sim.job.setup import Transfer
from sim.machine.run import run_policy
from sim.study import cells
from sim.study.cells import plan_jobs, run_jobs
from sim.study.plan import Cell
from tests.attack.hostile_hooks import OwnHorizon, OwnLRU, OwnOrder, OwnPredictor, OwnSelection, raises
from tests.lockstep.support import Job
from tests.support.commands import TINY_MODEL_WORDS, run_here, tiny_trace

HERE = "tests.attack.test_boundary"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 8, prompt=2)
    return ["+hardware=a100", *TINY_MODEL_WORDS, "+policy=lru", "compare=none", "residency=0.5", f"trace.path={path}"]


@pytest.fixture(scope="module")
def job(words: list[str]) -> Job:
    return Job.of(*words)


def policy_of(**changed: Any) -> Policy:
    parts: dict[str, Any] = {
        "predictor": OwnPredictor(),
        "horizon": FixedHorizon(1),
        "selection": TopK(),
        "eviction": LRU(),
        "order": ResidentFirst(),
    }
    return Policy(**{**parts, **changed})


def with_hook(base: type[Any], hook: str, does: Callable[..., Any]) -> Any:
    return type("Own", (base,), {hook: does, "__module__": __name__})()


# -- what passes the guards ------------------------------------------------------------------------------------------

STOPPED = [
    ("predictor", OwnPredictor, "predict"),
    ("horizon", OwnHorizon, "distances"),
    ("selection", OwnSelection, "select"),
    ("eviction", OwnLRU, "touched"),
    ("eviction", OwnLRU, "victim"),
    ("order", OwnOrder, "start"),
    ("order", OwnOrder, "arrange"),
]


@pytest.mark.parametrize("stop", [TimeoutReached(), KeyboardInterrupt()], ids=["time", "signal"])
@pytest.mark.parametrize(("place", "base", "hook"), STOPPED, ids=[f"{one[0]}.{one[2]}" for one in STOPPED])
def test_what_ends_a_run_from_outside_is_no_fault_of_a_part(
    place: str, base: type[Any], hook: str, stop: BaseException, job: Job
) -> None:
    policy = policy_of(**{place: with_hook(base, hook, raises(stop))})
    with pytest.raises(type(stop)):
        run_policy(job.work, policy, Transfer())


class StoppedInside(OwnOrder):
    def __init__(self) -> None:
        raise Interruption


class StoppedDeclared(OwnOrder):
    strict = property(raises(Interruption()))  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["StoppedInside", "StoppedDeclared"])
def test_nor_while_it_is_made(name: str) -> None:
    with pytest.raises(Interruption):
        make_part({"_target_": f"{HERE}.{name}"}, "policy.order", Order)


# -- how they are made -----------------------------------------------------------------------------------------------


class Closes(OwnOrder):
    def __init__(self) -> None:
        raise GeneratorExit("x")


class RaisesBare(OwnOrder):
    def __init__(self) -> None:
        raise BaseException("odd")


class RaisesUntold(OwnOrder):
    def __init__(self) -> None:
        class Untold(Exception):
            def __str__(self) -> str:
                raise SystemExit(0)

        raise Untold


class MakesText(OwnOrder):
    def __new__(cls) -> Any:
        return "text"


class Pretends(OwnOrder):
    def __new__(cls) -> Any:
        return type("Pretender", (), {"__class__": property(lambda self: OwnOrder)})()


class FutureRaises(OwnOrder):
    uses_future = property(lambda self: 1 / 0)  # type: ignore[assignment]


class FutureIsArray(OwnOrder):
    uses_future = np.zeros(3)  # type: ignore[assignment]


class SetsHook(OwnOrder):
    def __init__(self) -> None:
        self.landed = print  # type: ignore[assignment]


class ScopeIsArray(OwnLRU):
    def __init__(self) -> None:
        super().__init__()
        self.scope = np.array(["global", "layer"])  # type: ignore[assignment]


class PregateRaises(OwnPredictor):
    needs_pregate = property(lambda self: 1 / 0)  # type: ignore[assignment]


class PregateIsArray(OwnPredictor):
    needs_pregate = np.zeros(3)  # type: ignore[assignment]


class PredictsRaises(OwnPredictor):
    predicts = property(lambda self: 1 / 0)  # type: ignore[assignment]


MADE_AT = r"when it was made at attack/test_boundary\.py:\d+; mend the part"
MADE = [
    ("order", "Closes", rf"policy\.order: Closes raised GeneratorExit {MADE_AT}"),
    ("order", "RaisesBare", rf"policy\.order: RaisesBare raised BaseException {MADE_AT}"),
    ("order", "RaisesUntold", rf"policy\.order: RaisesUntold raised Untold {MADE_AT}"),
    ("order", "MakesText", r"str is no Order; the class of an order derives from expertflow\.parts\.Order"),
    ("order", "Pretends", r"Pretender is no Order; .*"),
    ("order", "FutureRaises", r"FutureRaises\.uses_future raised ZeroDivisionError: division by zero"),
    ("order", "FutureIsArray", r"FutureIsArray\.uses_future=an? ndarray must be True or False; .*"),
    ("order", "SetsHook", r"SetsHook\.landed is set on the object, .*; define it in the class"),
    ("eviction", "ScopeIsArray", r"ScopeIsArray\.scope=an? ndarray is unknown; choose global or layer"),
    ("predictor", "PregateRaises", r"PregateRaises\.needs_pregate raised ZeroDivisionError: division by zero"),
    ("predictor", "PregateIsArray", r"PregateIsArray\.needs_pregate=an? ndarray must be True or False; .*"),
    ("predictor", "PredictsRaises", r"PredictsRaises\.predicts raised ZeroDivisionError: division by zero"),
]
BASES: dict[str, type[Any]] = {"order": Order, "eviction": Eviction, "predictor": Predictor}


@pytest.mark.parametrize(("place", "name", "told"), MADE, ids=[one[1] for one in MADE])
def test_what_cannot_be_made_or_declared_is_one_line(place: str, name: str, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^{told}$") as caught:
        make_part({"_target_": f"{HERE}.{name}"}, f"policy.{place}", BASES[place])
    assert len(str(caught.value)) < 290


@pytest.mark.parametrize("name", ["PregateRaises", "PredictsRaises"])
def test_a_predictor_is_looked_at_before_it_is_asked(name: str, job: Job) -> None:
    with pytest.raises(PartError, match=f"^{name}"):
        make_predictor({"_target_": f"{HERE}.{name}"}, job.work.trace, 4, 0)


class FittedIsNumber(OwnPredictor):
    fitted_kind = 3  # type: ignore[assignment]


def test_the_kind_of_a_fitted_file_is_text_before_the_file_is_looked_for(job: Job) -> None:
    with pytest.raises(ValueError, match=r"^FittedIsNumber\.fitted_kind=3 must be text"):
        make_predictor({"_target_": f"{HERE}.FittedIsNumber", "fitted": "auto"}, job.work.trace, 4, 0)


@pytest.mark.parametrize("name", ["Closes", "MakesText", "FutureRaises"])
def test_a_command_says_it_and_has_no_result(name: str, words: list[str], tmp_path: Path) -> None:
    found = run_here([*words, f"policy.order._target_={HERE}.{name}"], tmp_path / "run")
    assert (found.code, found.done) == (2, False)
    assert re.fullmatch(r"error: .*\n", found.err)


# -- told apart ------------------------------------------------------------------------------------------------------


class SameAsAll(OwnOrder):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")


def test_parts_are_not_compared(job: Job) -> None:
    own, others = policy_of(order=OwnOrder()), policy_of(order=SameAsAll())
    assert run_policy(job.work, own, Transfer()) == run_policy(job.work, others, Transfer())


class Empty(Place):
    def __len__(self) -> int:
        return 0


class NoTruth(Place):
    def __bool__(self) -> bool:
        raise RuntimeError("bool")


@pytest.mark.parametrize("kind", [Empty, NoTruth])
def test_a_place_is_the_one_given_whatever_its_truth(kind: type[Place]) -> None:
    place = kind()
    assert policy_of(place=place).place is place


class SetsHookLater(OwnLRU):
    def start(self, view: Any, future: Any) -> None:
        super().start(view, future)
        self.landed = print  # type: ignore[assignment]


def test_a_hook_set_when_it_starts_is_not_ignored(job: Job) -> None:
    with pytest.raises(PartError, match=r"^SetsHookLater\.landed is set on the object, .*; define it in the class$"):
        run_policy(job.work, policy_of(eviction=SetsHookLater()), Transfer())


# -- books that do not balance ---------------------------------------------------------------------------------------


def drops_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Runtime._launch
    monkeypatch.setattr(
        Runtime, "_launch", lambda self, forward, layer, keys, shared: launch(self, forward, layer, keys[:-1], shared)
    )


def test_they_are_a_line_where_a_users_parts_have_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    drops_launches(monkeypatch)
    with pytest.raises(PartError, match=r"^OwnPredictor, OwnOrder: the run's books do not balance \(identity broken: "):
        run_policy(job.work, policy_of(order=OwnOrder()), Transfer())


def test_and_in_runs_beside_theirs(job: Job) -> None:
    ours = Policy(TransitionPredictor(), FixedHorizon(1), TopK(), LRU(), IndexOrder())
    with pytest.raises(AssertionError, match=r"^3 != 4$"), answerable(ours):
        raise AssertionError("3 != 4")
    with (
        pytest.raises(PartError, match=r"^OwnPredictor: the run's books do not balance \(3 != 4\)"),
        answerable(policy_of()),
    ):
        raise AssertionError("3 != 4")


# -- who may end the process -----------------------------------------------------------------------------------------


def exits(*values: Any, **more: Any) -> Any:
    raise SystemExit(0)


def test_an_exit_within_a_job_is_an_error(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.app.run_job", exits)
    found = run_here(words, tmp_path / "run")
    assert (found.code, found.done) == (2, False)
    assert re.fullmatch(r"error: the process was told to exit \(0\) before there was a result; .*\n", found.err)


def test_and_within_a_cell_of_a_study(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "run_cell", exits)
    jobs = plan_jobs([Cell((("stack", "eager"),), "exits", tuple(words))])
    with pytest.raises(ValueError, match=r"^1 of 1 cells failed, .*: the process was told to exit \(0\)"):
        run_jobs(jobs, tmp_path / "cells", 1)


def test_and_within_any_command_but_the_end_that_it_has_told(capsys: pytest.CaptureFixture[str]) -> None:
    def ends() -> int:
        raise Ended(3)

    assert run_cli(exits, "nothing") == 2
    assert re.fullmatch(r"error: the process was told to exit \(0\) .*\n", capsys.readouterr().err)
    with pytest.raises(Ended) as caught:
        run_cli(ends, "nothing")
    assert caught.value.code == 3
