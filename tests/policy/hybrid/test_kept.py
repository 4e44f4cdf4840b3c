"""Scores kept from run to run are those of the run itself, and nothing fails because of where they are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertflow.forward import Forward
from expertflow.predictors.hybrid import HybridPredictor
from expertflow.predictors.hybrid_compiled import arrays_hash
from sim.job.configure import configure
from sim.job.forwards import KEEP_SCORES, LEAST_KEPT
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from tests.policy.hybrid.support import PROMPTS, answers, arrays, forwards, started
from tests.policy.hybrid.test_fused import WINDOWS, InheritedSelection, World, run
from tests.policy.hybrid.test_predictor import without_numba
from traces.kept import KeptArrays

pytest.importorskip("numba")

ALONE = (0, 0, 0, 0)


def prepared(predictor: HybridPredictor, some: Sequence[Forward], folder: Path, name: str = "trace") -> bool:
    takes = predictor.announced()
    assert takes is not None
    return takes.prepare_all(some, len(some), KeptArrays(folder), name)


def changed(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.stat().st_ino) for path in folder.glob("*"))


@pytest.mark.parametrize("keep", [0, 4])
def test_kept_predictions_are_those_of_one_forward_after_another(keep: int, tmp_path: Path) -> None:
    some = forwards(prompts=ALONE)
    alone = list(answers(started(arrays(), keep=keep), some))
    found = []
    for _ in range(2):
        predictor = started(arrays(), keep=keep)
        assert prepared(predictor, some, tmp_path)
        assert list(answers(predictor, some)) == alone
        assert predictor.block.num_taken == 0
        found.append(changed(tmp_path))
    assert found[0] == found[1] != []


def test_kept_decisions_are_those_of_the_online_step(tmp_path: Path) -> None:
    """Of the one that makes them, of the one that finds them, and of the one that the replay takes."""
    fitted, some = arrays(6), forwards(seed=4, prompts=ALONE)
    alone, asked, *kept = World(fitted), World(fitted, InheritedSelection()), World(fitted), World(fitted)
    for world in kept:
        predictor = world.policy.predictor
        assert isinstance(predictor, HybridPredictor)
        assert prepared(predictor, some, tmp_path)
    run([alone, asked, *kept], some, 3, WINDOWS)
    assert [world.num_steps for world in kept] == [alone.num_steps] * 2


def test_what_scores_depend_on_is_in_the_name(tmp_path: Path) -> None:
    some = forwards(prompts=ALONE)
    for number, (fitted, name) in enumerate([(arrays(), "a"), (arrays(1), "a"), (arrays(), "b")], 1):
        assert prepared(started(fitted), some, tmp_path, name)
        assert len(changed(tmp_path)) == number
    bias = arrays()["bias"]
    bias[0, 0, 0] += 1
    assert prepared(started(arrays(bias=bias)), some, tmp_path, "a")
    assert len(changed(tmp_path)) == 4


@pytest.mark.parametrize(
    ("fitted", "some"),
    [
        (arrays(), forwards(prompts=PROMPTS)),
        (arrays(pregate=True), forwards(pregate=True, prompts=ALONE)),
        (arrays(), forwards(2, prompts=ALONE)),
        (arrays(), forwards(prompts=ALONE)[1:]),
    ],
)
def test_prompts_batches_and_pregates_are_not_kept(fitted: dict[str, Any], some: list[Forward], tmp_path: Path) -> None:
    assert not prepared(started(fitted), some, tmp_path)
    assert changed(tmp_path) == []


def test_what_is_broken_is_made_anew(tmp_path: Path) -> None:
    some = forwards(prompts=ALONE)
    alone = list(answers(started(arrays()), some))
    assert prepared(started(arrays()), some, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[:-7], b"nonsense" * 40):
        file.unlink()
        file.write_bytes(broken)
        predictor = started(arrays())
        assert prepared(predictor, some, tmp_path)
        assert list(answers(predictor, some)) == alone
        assert file.read_bytes() == whole


def test_where_nothing_can_be_kept_all_goes_on(tmp_path: Path) -> None:
    taken = tmp_path / "a file"
    taken.write_text("")
    some = forwards(prompts=ALONE)
    predictor = started(arrays())
    assert not prepared(predictor, some, taken)
    assert list(answers(predictor, some, 8)) == list(answers(started(arrays()), some))


SHAPE = (4, 8)
ROWS = [np.full((2, 8), 1, np.int16), np.full((2, 8), 2, np.int16)]


def test_the_oldest_make_room(tmp_path: Path) -> None:
    kept = KeptArrays(tmp_path, 5 * 200)
    for number in range(5):
        assert kept.keep(str(number), SHAPE, np.int16, ROWS)
        os.utime(kept._path(str(number)), (number, number))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    assert kept.find("0", SHAPE, np.int16) is not None
    assert kept.keep("5", SHAPE, np.int16, ROWS)
    assert kept.find("1", SHAPE, np.int16) is None
    assert kept.find("0", SHAPE, np.int16) is not None
    assert not KeptArrays(tmp_path, 3 * 64).keep("too large", SHAPE, np.int16, ROWS)


def test_two_that_make_the_same_at_once_and_one_that_is_cut_off(tmp_path: Path) -> None:
    kept = KeptArrays(tmp_path)

    others = []

    def never() -> Iterator[Any]:
        raise AssertionError("the other one has made it")
        yield

    def meanwhile() -> Iterator[Any]:
        yield ROWS[0]
        assert kept.find("name", SHAPE, np.int16) is None
        others.append(pool.submit(KeptArrays(tmp_path).keep, "name", SHAPE, np.int16, never()))
        assert not others[0].done()
        yield ROWS[1]

    def cut_off() -> Iterator[Any]:
        yield ROWS[0]
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        assert kept.keep("name", SHAPE, np.int16, meanwhile())
        assert others[0].result(60)
    found = kept.find("name", SHAPE, np.int16)
    assert found is not None
    whole = np.zeros(SHAPE, np.int16)
    assert found.read(0, whole) == len(whole)
    assert whole.tolist() == np.concatenate(ROWS).tolist()
    assert found.read(3, whole) == 1
    assert whole[0].tolist() == ROWS[1][-1].tolist()
    with pytest.raises(KeyboardInterrupt):
        kept.keep("other", SHAPE, np.int16, cut_off())
    assert not kept.keep("other", SHAPE, np.int16, ROWS[:1])
    assert kept.find("other", SHAPE, np.int16) is None
    assert kept.find("name", (4, 9), np.int16) is None
    assert kept.find("name", SHAPE, np.int32) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_types_and_shapes_tell_arrays_apart() -> None:
    zeros = [np.zeros(shape, dtype) for shape, dtype in [((2, 2), "i4"), (4, "i4"), (4, "f4"), (2, "i8")]]
    assert len({arrays_hash([array]) for array in zeros}) == len(zeros)


def test_a_run_that_finds_scores_is_the_run_that_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run that keeps nothing, which writes nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["+hardware=a100", "+policy=adaptive", "residency=0.4", "trace.num_requests=2"]
    cfg = configure([*words, f"trace.num_tokens={LEAST_KEPT + 3}"])
    work = make_workload(cfg)
    scores = tmp_path / "expertflow" / "scores"
    told = []
    for keeps in ("0", "1", "1"):
        monkeypatch.setenv(KEEP_SCORES, keeps)
        policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
        told.append(run_policy(work, policy, transfer))
        assert scores.is_dir() is (keeps == "1")
    assert told[0] == told[1] == told[2]
    assert told[0]["prefetch"]["issued"] > 100
    (file,) = scores.iterdir()
    without_numba(monkeypatch)
    policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    assert run_policy(work, policy, transfer) == told[0]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(KEEP_SCORES, "1")
    few = make_workload(cfg | {"max_tokens": LEAST_KEPT - 1})
    policy, transfer = make_policy(cfg["policy"], few, cfg["seed"])
    run_policy(few, policy, transfer)
    assert list(scores.iterdir()) == [file]


def test_a_file_that_is_removed_can_be_read_on_and_one_that_is_cut_short_says_so(tmp_path: Path) -> None:
    kept = KeptArrays(tmp_path)
    assert kept.keep("name", SHAPE, np.int16, ROWS)
    path, some = kept._path("name"), np.zeros((2, 8), np.int16)
    found = kept.find("name", SHAPE, np.int16)
    assert found is not None
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(OSError, match="cut short while it was read; run again") as error:
        found.read(2, some)
    assert error.value.filename == str(path)
    path.unlink()
    assert found.read(0, some) == 2
    assert some.tolist() == ROWS[0].tolist()


@pytest.mark.parametrize("place", [8, 9, 40, -5, -1])
def test_a_kept_array_that_was_damaged_is_not_found(place: int, tmp_path: Path) -> None:
    """In its header, its values or its checksum; so is one that a power cut has left empty but of the right size."""
    kept = KeptArrays(tmp_path)
    assert kept.keep("name", SHAPE, np.int16, ROWS)
    path = kept._path("name")
    whole = path.read_bytes()
    assert kept.find("name", SHAPE, np.int16) is not None
    damaged = bytearray(whole)
    damaged[place] ^= 0x10
    for content in (bytes(damaged), b"PK\x03\x04" + whole[4:], whole[:128] + bytes(len(whole) - 128), b""):
        path.write_bytes(content)
        assert kept.find("name", SHAPE, np.int16) is None
