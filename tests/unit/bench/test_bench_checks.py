"""What the checks around parts of others cost: what is compared, and what is said of it."""

from __future__ import annotations

import pytest

from expertflow.boundary import is_guarded, is_own
from expertflow.evictions.lru import LRU
from sim import bench, bench_checks
from sim.bench_checks import BAR, RUNS, Cost, as_foreign, check_cost
from sim.job.parts import KINDS


def test_a_part_made_foreign_is_checked_and_does_the_same() -> None:
    part = LRU(scope="layer")
    assert is_own(part)
    as_foreign(part)
    assert not is_own(part)
    assert is_guarded(part)
    assert isinstance(part, LRU)
    assert (part.scope, type(part).__name__) == ("layer", "LRU")


def test_both_runs_are_timed_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_checks, "TRACE", ("trace.num_tokens=8", "trace.num_requests=1", "trace.seed=0"))
    cost = check_cost(RUNS["lru"], "a100", 1)
    assert cost.ours_s > 0
    assert cost.share == pytest.approx(cost.foreign_s / cost.ours_s - 1)
    assert cost.dearest in KINDS
    run = bench_checks.run_policy

    def tampered(work: object, policy: object, transfer: object) -> dict[str, object]:
        found = run(work, policy, transfer)  # type: ignore[arg-type]
        return found | {"guarded": policy.guarded}  # type: ignore[attr-defined]

    monkeypatch.setattr(bench_checks, "run_policy", tampered)
    with pytest.raises(AssertionError, match="checks have changed the run"):
        check_cost(RUNS["lru"], "a100", 1)


@pytest.mark.parametrize("share", [BAR, BAR + 0.01])
def test_the_exit_code_is_the_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    asked = []

    def cost(words: tuple[str, ...], hardware: str, repeat: int) -> Cost:
        asked.append((words, hardware, repeat))
        return Cost(0.1, 0.1 * (1 + share), share if words == RUNS["adaptive"] else 0.0, "predictor", 0.2)

    monkeypatch.setattr(bench_checks, "check_cost", cost)
    assert bench.main(["--foreign", "--repeat", "7"]) == int(share > BAR)
    assert asked == [(words, "a100", 7) for words in RUNS.values()]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == list(RUNS)
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if "missed" in line] == [line for line in lines if "31%" in line]


@pytest.mark.parametrize("word", ["trace", "--check", "--update"])
def test_it_stands_alone(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--foreign", word])
    assert ended.value.code == 2
    assert "--foreign runs over a trace of its own" in capsys.readouterr().err
