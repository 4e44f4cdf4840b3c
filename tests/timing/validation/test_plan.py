"""What a validation measures and in which order: from words to turns, without a machine."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest

from replay.validate import parser, with_defaults
from replay.validation.plan import MODELS, POLICIES, Asked, Case, blocks_of, breadth_of, share_of_time, tokens_for


def asked(*words: str, world: str = "cuda") -> tuple[argparse.Namespace, Asked]:
    """What these words mean on a machine of `world`."""
    args = parser().parse_args(["mine", *words])
    return args, with_defaults(args, world)


def test_six_minutes_on_a_gpu_need_no_other_flag() -> None:
    args, plan = asked("--minutes", "6")
    assert args.models == ["gpt-oss-20b", "deepseek-v2-lite"] == list(MODELS["cuda"])
    assert (args.repeat, args.beside, args.tokens, args.quick) == (3, True, 64, True)
    assert args.verify_executions == 1e6
    cases = plan.cases("gpt-oss-20b")
    counts = Counter((case.stack, case.residency, case.batch_size) for case in cases)
    whole = {
        (stack, residency, batch): 6 for stack in ("graph", "found") for residency in (0.25, 0.5) for batch in (1, 8)
    }
    assert counts == whole | {("eager", 0.5, 1): 2, ("eager", 0.5, 8): 2}
    assert {case.policy for case in cases if case.stack == "eager"} == {"lru", "adaptive"}
    assert {case.policy for case in cases if case.stack == "graph"} == set(POLICIES)
    assert len(set(cases)) == 52


def test_a_cpu_machine_keeps_its_stacks_and_one_model() -> None:
    args, plan = asked(world="cpu")
    assert (args.models, args.beside, args.verify_executions, args.tokens) == (["gpt-oss-20b"], False, 0.0, 27)
    assert {case.stack for case in plan.cases("x")} == {"eager", "found"}
    # Its host keeps the pace that it is predicted by; of a GPU's host nothing is measured.
    assert {case.policy for case in plan.cases("x")} == {*POLICIES, "lru+balanced"}
    assert len(plan.cases("x")) == 56


def test_what_is_said_counts() -> None:
    args, plan = asked(
        "--models",
        "a,b",
        "--stacks",
        "eager",
        "--policies",
        "lru,oracle",
        "--residency",
        "0.5",
        "--batch-sizes",
        "4",
        "--repeat",
        "2",
        "--tokens",
        "9",
        "--no-beside",
        "--minutes",
        "20",
        "--verify-executions",
        "5",
    )
    assert (args.models, args.repeat, args.tokens, args.beside) == (["a", "b"], 2, 9, False)
    assert (args.quick, args.verify_executions) == (False, 5.0)
    # A stack that is named is measured whole.
    assert plan.cases("a") == [Case("a", "eager", 0.5, 4, "lru"), Case("a", "eager", 0.5, 4, "oracle")]


def test_of_a_sampled_stack_what_is_not_asked_for_is_not_measured() -> None:
    _, plan = asked("--policies", "lru,oracle", "--residency", "0.25")
    assert {case.stack for case in plan.cases("a")} == {"graph", "found"}


def test_breadth_comes_first_then_block_by_block() -> None:
    plan = Asked(("p", "q"), (0.25, 0.5), (1, 8), ("graph", "found"))
    cases = plan.cases("m")
    assert [str(case) for case in breadth_of(cases)] == [
        "m graph 25 % batch 1 p",
        "m graph 25 % batch 1 q",
        "m graph 50 % batch 1 p",
        "m graph 50 % batch 1 q",
    ]
    blocks = [list(block) for block in blocks_of(cases)]
    assert blocks[0] == breadth_of(cases)
    for block, (stack, batch) in zip(blocks[1:], [("graph", 8), ("found", 1), ("found", 8)], strict=True):
        assert block == [case for case in cases if (case.stack, case.batch_size) == (stack, batch)]
    assert Counter(case for block in blocks for case in block) == dict.fromkeys(cases, 1)


@pytest.mark.parametrize(
    ("world", "minutes", "tokens"),
    [
        ("cuda", 6, 64),
        ("cuda", 1, 32),
        ("cuda", 12, 128),
        ("cuda", 60, 256),
        ("cpu", 6, 20),
        ("cpu", 0, 8),
        ("cpu", 30, 64),
    ],
)
def test_more_time_longer_runs(world: str, minutes: float, tokens: int) -> None:
    assert tokens_for(world, minutes) == tokens


def test_the_first_model_gets_more_of_the_time_and_the_last_what_is_left() -> None:
    assert share_of_time(300, 2) == 200
    assert share_of_time(100, 1) == 100
    assert share_of_time(300, 3) == 150


def test_less_than_one_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        asked("--repeat", "0")
    assert "--repeat: 0 must be a whole number in [1, 10000]" in capsys.readouterr().err


def test_two_flags_of_which_one_would_be_ignored_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--throttle=2\.0 and --hardware=h100 both give the pace"):
        asked("--throttle", "2", "--hardware", "h100")
    with pytest.raises(ValueError, match="--quick is of a new calibration"):
        asked("--calibration", "there.json", "--quick")
