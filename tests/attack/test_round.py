"""A round notices whatever goes wrong, goes on behind it, and keeps the input so that it can be tried again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.attack import broken_kinds, report
from tests.attack.__main__ import main
from tests.attack.kinds import SEEDS_PER_ROUND, registry
from tests.attack.outcome import DIED, HANG, MEMORY, MESSAGE, TRACEBACK, WARNING
from tests.attack.round import Round
from tests.attack.work import Failure

MODULES = ("broken_kinds",)
TRIED = 20
WRONG = {3, 10, 17}


def run(only: list[str], jobs: int = 1, seed: int = 0) -> tuple[Round, list[Failure]]:
    """A round of some of the broken kinds, 20 inputs each."""
    kinds = registry(MODULES)
    kept: list[Failure] = []
    attack = Round({name: kinds[name] for name in only}, {"each": TRIED}, seed, kept.append, MODULES)
    attack.run(120, jobs)
    return attack, kept


@pytest.mark.slow
def test_each_way_to_go_wrong_is_told_apart_and_counted() -> None:
    expected = {"sleeps": HANG, "dies": DIED, "grows": MEMORY, "warns": WARNING, "raises": TRACEBACK}
    attack, kept = run(["sound", "swells", *expected], jobs=2)
    assert {name: tally.tried for name, tally in attack.tallies.items()} == dict.fromkeys(attack.tallies, TRIED)
    assert attack.tallies["sound"].failures == attack.tallies["swells"].failures == {}
    assert attack.tallies["swells"].peak_bytes > 30 << 20 > attack.tallies["sound"].peak_bytes
    for name, verdict in expected.items():
        tally = attack.tallies[name]
        assert (name, dict(tally.failures), tally.accepted) == (name, {verdict: len(WRONG)}, TRIED - len(WRONG))
        assert {failure.seed for failure in kept if failure.kind == name} == WRONG
        assert {failure.steps for failure in kept if failure.kind == name} == {(f"input {seed}",) for seed in WRONG}


@pytest.mark.slow
def test_what_no_signal_reaches_is_ended_from_outside() -> None:
    attack, kept = run(["deaf"])
    assert dict(attack.tallies["deaf"].failures) == {HANG: len(WRONG)}
    assert attack.tallies["deaf"].tried == TRIED
    assert {failure.text for failure in kept} == {"did not come back and was ended"}


@pytest.mark.slow
def test_a_message_is_one_short_line_that_names_the_file() -> None:
    names = [kind.name for kind in broken_kinds.kinds() if kind.name.startswith("says")]
    attack, kept = run(names, seed=1)
    good, *bad = names
    assert attack.tallies[good].failures == {}
    assert attack.tallies[good].refused > 2
    assert attack.tallies[good].accepted > 2
    for name, problem in zip(bad, ("more than one line", "characters", "does not name the file"), strict=True):
        assert set(attack.tallies[name].failures) == {MESSAGE}
        assert all(problem in failure.text for failure in kept if failure.kind == name)
    # Smaller than as it was found: steps that do not matter are left out.
    assert all(len(failure.steps) >= 1 for failure in kept)
    assert {failure.seed // SEEDS_PER_ROUND for failure in kept} == {1}


def test_rounds_of_one_seed_try_the_same_and_of_others_do_not(tmp_path: Path) -> None:
    kind, twin = (registry(("kinds_of_traces",))["trace"] for _ in range(2))
    for name, one in (("a", kind), ("b", twin)):
        (tmp_path / name).mkdir()
        one.prepare(tmp_path / name)
    first = [kind.describe(seed) for seed in range(200)]
    assert first == [twin.describe(seed) for seed in range(200)]
    other = {kind.describe(SEEDS_PER_ROUND + seed) for seed in range(200)}
    assert len(other & set(first)) < 20


@pytest.mark.slow
def test_the_command_prints_a_table_and_tries_a_kept_input_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = [tmp_path / "table.md", tmp_path / "table.json"]
    words = ["--only", "trace", "--traces", "300", "--jobs", "1", "--keep", str(tmp_path / "kept")]
    assert main([*words, *(word for path in out for word in ("--out", str(path)))]) == 0
    assert "trace" in capsys.readouterr().out
    assert "| trace | 300 | 300 |" in out[0].read_text()
    assert json.loads(out[1].read_text())["kinds"]["trace"]["tried"] == 300
    kind = registry(("kinds_of_traces",))["trace"]
    kind.prepare(tmp_path)
    content, steps = kind.describe(5)
    path = report.Kept(tmp_path)(Failure("trace", 5, TRACEBACK, "made up", steps, (), content))
    assert report.load(path).content == content
    assert main(["--replay", str(path)]) == 0
    assert "was traceback, now" in capsys.readouterr().out


@pytest.mark.slow
def test_a_round_goes_on_where_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, out = tmp_path / "state.json", tmp_path / "table.json"
    kept = ["--keep", str(tmp_path / "kept"), "--jobs", "1", "--state", str(state)]
    for target in (200, 300, 300):
        assert main([*kept, "--only", "prompts-txt", "--each", str(target)]) == 0
        assert json.loads(state.read_text())["kinds"]["prompts-txt"]["tried"] == target
    assert main([*kept, "--only", "prompts-txt", "--each", "300", "--out", str(out)]) == 0
    told = json.loads(out.read_text())["kinds"]["prompts-txt"]
    assert (told["tried"], told["handed_out"], told["refused"] + told["accepted"]) == (300, 300, 300)
    with pytest.raises(SystemExit):
        main([*kept, "--only", "prompts-txt", "--seed", "1"])
    assert "is of a round with --seed 0" in capsys.readouterr().err


def test_a_wrong_word_is_told() -> None:
    for words in (["--only", "nosuch"], ["--out", "table.txt"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
