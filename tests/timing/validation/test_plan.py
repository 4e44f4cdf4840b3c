"""What a validation measures and in which order: from words to turns, without a machine."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest

from replay.validate import parser, with_defaults
from replay.validation.plan import (
    MODELS,
    POLICIES,
    Asked,
    Case,
    blocks_of,
    breadth_by_s,
    breadth_of,
    share_of_time,
    tokens_for,
)


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
        "gpt-oss-20b, deepseek-v2-lite,gpt-oss-20b",
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
    assert (args.models, args.repeat, args.tokens, args.beside) == (
        ["gpt-oss-20b", "deepseek-v2-lite"],
        2,
        9,
        False,
    )
    assert (args.quick, args.verify_executions) == (False, 5.0)
    # A stack that is named is measured whole.
    assert plan.cases("a") == [Case("a", "eager", 0.5, 4, "lru"), Case("a", "eager", 0.5, 4, "oracle")]


def test_of_a_sampled_stack_what_is_not_asked_for_is_not_measured() -> None:
    _, plan = asked("--policies", "lru,oracle", "--residency", "0.25")
    assert {case.stack for case in plan.cases("a")} == {"graph", "found"}


def test_breadth_comes_first_and_in_every_block_stacks_take_turns() -> None:
    plan = Asked(("p", "q"), (0.25, 0.5), (1, 8), ("graph", "found"))
    cases = plan.cases("m")
    blocks = [list(map(str, block)) for block in blocks_of(cases)]
    # A capacity has one stack, so that its policies have a rank; the next has the other.
    assert blocks[0] == list(map(str, breadth_of(cases)))
    assert blocks == [
        [
            "m graph 25 % batch 1 p",
            "m graph 25 % batch 1 q",
            "m found 50 % batch 1 p",
            "m found 50 % batch 1 q",
        ],
        ["m found 25 % batch 1 p", "m found 25 % batch 1 q"],
        ["m graph 50 % batch 1 p", "m graph 50 % batch 1 q"],
        [
            "m graph 25 % batch 8 p",
            "m found 25 % batch 8 p",
            "m graph 25 % batch 8 q",
            "m found 25 % batch 8 q",
        ],
        [
            "m graph 50 % batch 8 p",
            "m found 50 % batch 8 p",
            "m graph 50 % batch 8 q",
            "m found 50 % batch 8 q",
        ],
    ]
    assert Counter(case for block in blocks for case in block) == dict.fromkeys(map(str, cases), 1)


@pytest.mark.parametrize("words", [(), ("--batch-sizes", "8"), ("--stacks", "eager"), ("--residency", "0.5")])
def test_breadth_is_one_row_of_each_policy_and_capacity_and_all_are_measured_in_the_end(words: tuple[str, ...]) -> None:
    _, plan = asked(*words)
    cases = plan.cases("m")
    breadth = breadth_of(cases)
    assert len(breadth) == len(POLICIES) * len(plan.residencies)
    assert {(case.policy, case.residency) for case in breadth} == {(case.policy, case.residency) for case in cases}
    # A stack of which only some policies are measured is no part of it.
    assert {case.stack for case in breadth} == set(plan.stacks[: len(plan.residencies)])
    assert {case.batch_size for case in breadth} == {plan.batch_sizes[0]}
    assert Counter(case for block in blocks_of(cases) for case in block) == dict.fromkeys(cases, 1)


def test_a_third_of_the_replays_leaves_rows_of_each_stack() -> None:
    _, plan = asked("--minutes", "6")
    turns = [case for block in blocks_of(plan.cases("m")) for _ in range(3) for case in block]
    found = Counter(turns[: len(turns) // 3])
    assert Counter(case.stack for case, count in found.items() if count == 3) == {"graph": 6, "found": 10}


def test_half_of_the_time_is_for_breadth() -> None:
    assert breadth_by_s(6) == 180


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--stacks", "found, "), "--stacks='found, ' must be names with commas between them"),
        (("--stacks", "funnd"), "--stacks='funnd' does not exist (did you mean found?); choose from: "),
        (("--models", ",gpt-oss-20b"), "--models=',gpt-oss-20b' must be names with commas between them"),
        (("--models", "auto"), "--models='auto' does not exist"),
        (("--policies", "lru,"), "--policies='lru,' must be names of policies, POLICY or POLICY+PLACE"),
        (("--policies", "lru+"), "--policies='lru+' must be names of policies, POLICY or POLICY+PLACE"),
        (("--policies", "lru=3"), "--policies='lru=3' does not exist"),
        (("--hardware", "a100,h100"), "--hardware='a100,h100' does not exist"),
        (("--hardware", ""), "--hardware='' does not exist"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_in_words_of_its_flag(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        asked(*words)
    message = str(caught.value)
    assert message.startswith(expected)
    assert "-m" not in message.replace("--models", "").split()
    assert "stack=" not in message
    assert len(message) < 300
