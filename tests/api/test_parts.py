"""Parts given in Python: classes and objects of a program or a notebook stand where a dotted name would."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from expertflow.evictions.lru import LRU
from expertflow.future import Future
from expertflow.horizons.fixed import FixedHorizon
from expertflow.view import View
from sim import simulate, sweep
from tests.support.commands import ROOT, small_trace


class Counting(LRU):
    """LRU that counts what it was told, from where it was made."""

    def __init__(self, begin: int = 0) -> None:
        super().__init__()
        self.count = begin

    def admitted(self, key: int, cause: int) -> None:
        self.count += 1
        super().admitted(key, cause)


class Remembers(LRU):
    """Keeps in its class what it saw in an earlier run, and then decides otherwise."""

    runs = 0

    def start(self, view: View, future: Future | None) -> None:
        super().start(view, future)
        type(self).runs += 1
        self.run = self.runs

    def victim(self, key: int, cause: int) -> int | None:
        free = [one for one in range(len(self.view.residency)) if self.view.residency[one] == 2]
        found = [one for one in free if one not in self.view.pinned]
        return super().victim(key, cause) if self.run == 1 else found[-1]


class Locked(LRU):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.file = sys.stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trace = small_trace(tmp_path_factory.mktemp("parts") / "t.safetensors", 16)
    return {"hardware": "a100", "trace": trace, "compare": "none"}


def test_a_class_an_object_and_a_name_are_one_part(keys: dict[str, Any]) -> None:
    named = simulate(policy={"name": "lru", "eviction": {"_target_": f"{__name__}.Counting", "begin": 5}}, **keys)
    made = simulate(policy={"name": "lru", "eviction": {"_target_": Counting, "begin": 5}}, **keys)
    given = simulate(policy={"name": "lru", "eviction": Counting(5)}, **keys)
    dotted = simulate(policy="lru", **{"policy.eviction": Counting(5)}, **keys)
    plain = simulate(policy="lru", **keys)
    for result in (named, made, given, dotted):
        assert result.metrics == plain.metrics
        assert result.parts["eviction"].count == 5 + plain.metrics["num_misses"]  # type: ignore[attr-defined]
    assert made.title == given.title == "lru with eviction=Counting"
    assert named.title == f"lru with eviction={__name__}.Counting"
    assert str(given).startswith("lru with eviction=Counting on a100")
    assert plain.parts == {}


def test_an_object_of_this_package_is_taken_as_its_configuration_is(keys: dict[str, Any]) -> None:
    there = simulate(policy={"name": "fixed_1", "horizon": {"depth": 3}}, **keys)
    assert simulate(policy={"name": "fixed_1", "horizon": FixedHorizon(3)}, **keys).metrics == there.metrics


def test_an_object_is_as_it_was_after_a_run(keys: dict[str, Any]) -> None:
    mine = Counting()
    first = simulate(policy={"name": "lru", "eviction": mine}, count_redundant=False, **keys)
    assert mine.count == 0
    assert not hasattr(mine, "view")
    assert simulate(policy={"name": "lru", "eviction": mine}, **keys).metrics == first.metrics


def test_an_object_that_cannot_be_copied_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"policy.eviction: this Locked cannot be copied .* give the class instead"):
        simulate(policy={"name": "lru", "eviction": Locked()}, **keys)
    assert simulate(policy={"name": "lru", "eviction": Locked}, **keys).metrics["num_accesses"]


def test_a_mapping_without_a_name_changes_adaptive(keys: dict[str, Any]) -> None:
    result = simulate(policy={"horizon": FixedHorizon(1)}, **keys)
    assert result.title == "adaptive with horizon=FixedHorizon"
    assert result.metrics == simulate(policy={"name": "adaptive", "horizon": "fixed_1"}, **keys).metrics


def test_events_of_a_part_that_then_decides_otherwise_are_refused(keys: dict[str, Any]) -> None:
    Remembers.runs = 0
    result = simulate(policy={"name": "lru", "eviction": Remembers}, residency=0.2, **keys)
    with pytest.raises(ValueError, match="decides otherwise when it is run again"):
        _ = result.events


def test_results_of_objects_are_never_taken_for_others(keys: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    simulate(policy={"name": "lru", "eviction": Counting(1)}, out=folder, **keys)
    assert "Counting" in (folder / ".hydra" / "config.yaml").read_text(encoding="utf-8")
    named = {"name": "lru", "eviction": {"_target_": f"{__name__}.Counting"}}
    before = (folder / "DONE").read_bytes()
    simulate(policy=named, out=folder, skip_done=True, **keys)
    assert (folder / "DONE").read_bytes() != before


NOTEBOOK = """
from expertflow.evictions.lru import LRU
from sim import simulate, sweep


class Mine(LRU):
    def victim(self, key, cause):
        return super().victim(key, cause)


class Wrong(LRU):
    def victim(self, key, cause):
        return -1


keys = {"hardware": "a100", "trace": TRACE, "residency": 0.1, "compare": "none"}
alone = simulate(policy={"name": "lru", "eviction": Mine}, **keys)
assert alone.title == "lru with eviction=Mine", alone.title
many = sweep(policy=["lru", {"name": "lru", "eviction": Mine}, {"name": "lru", "eviction": Mine()}], jobs=2, **keys)
assert [one.metrics == alone.metrics for one in many] == [True, True, True]
print(*many.table["policy"], sep="|")
try:
    simulate(policy={"name": "lru", "eviction": Wrong}, **keys)
except ValueError as error:
    print(error)
try:
    sweep(policy=["lru", {"name": "lru", "eviction": Wrong}], jobs=2, **keys)
except ValueError as error:
    print(error, len(error.finished))
"""


@pytest.mark.slow
def test_parts_of_a_program_itself_run_and_are_checked_here_and_in_workers(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK.replace("TRACE", repr(str(keys["trace"]))), encoding="utf-8")
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    names, wrong, swept = done.stdout.splitlines()
    assert names == "lru|lru with eviction=Mine|lru with eviction=Mine #2"
    assert wrong.startswith("Wrong.victim answered -1") or "Wrong.victim" in wrong
    assert swept.startswith("1 of 2 runs failed; the first, policy=lru-with-eviction=Wrong: Wrong.victim")
    assert swept.endswith(" 1")


@pytest.mark.slow
def test_a_class_of_a_program_without_a_file_runs_into_a_folder(keys: dict[str, Any], tmp_path: Path) -> None:
    # As of a notebook: its __main__ is no file.
    program = NOTEBOOK[: NOTEBOOK.index("alone = ")].replace("TRACE", repr(str(keys["trace"])))
    program += 'print(simulate(policy={"name": "lru", "eviction": Mine}, out="run", **keys).title)\n'
    done = subprocess.run(
        [sys.executable, "-"],
        cwd=tmp_path,
        env=_environment(),
        input=program,
        capture_output=True,
        text=True,
        timeout=99,
    )
    assert (done.stdout, done.stderr) == ("lru with eviction=Mine\n", "")
    assert (tmp_path / "run" / "DONE").is_file()


@pytest.mark.slow
def test_a_named_part_of_the_current_folder_is_found_by_workers(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_part.py").write_text(
        textwrap.dedent(
            """
            from expertflow.evictions.lru import LRU


            class Mine(LRU):
                pass
            """
        ),
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"name": "lru", "eviction": {"_target_": "my_part.Mine"}}
    first, second = sweep(policy=["lru", named], jobs=2, **keys)
    assert first.metrics == second.metrics


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
