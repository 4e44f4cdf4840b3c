"""Whole runs: the default trace without one wrong stamp, and every policy in lockstep with its log, twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from replay.lockstep.compare import check_log
from replay.lockstep.log_reader import LogReader
from tests.lockstep.test_equal import POLICIES
from tests.support.replays import SMALL, Case

pytestmark = pytest.mark.slow


def test_the_default_trace_reads_nothing_wrong() -> None:
    case = Case.of(*SMALL, "+policy=lru")
    with case.rig() as rig:
        metrics, found = case.replay(rig, verify=True)
    assert found is not None
    # 7 requests of 64 prompt tokens, each answered with 129. Four chunks an expert, looked at before and after.
    assert (found.num_wrong, found.first, metrics["num_tokens"]) == (0, None, 903)
    assert found.num_executions == metrics["num_accesses"] >= 90_000
    assert found.num_checks == 2 * 4 * found.num_executions


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_equal_to_its_log_twice(name: str, tmp_path: Path) -> None:
    """The log of a real machine, with times that nobody chose; the second run starts where the first has been."""
    case = Case.of(*SMALL, f"+policy={name}", "trace.num_tokens=16", "residency=0.25")
    with case.rig() as rig:
        for number in range(2):
            path = tmp_path / f"{number}.parquet"
            metrics, found = case.replay(rig, verify=True, log=path)
            assert found is not None
            assert (found.num_wrong, found.num_executions) == (0, metrics["num_accesses"])
            with LogReader(path) as reader:
                result = check_log(reader, case.full, case.policy()[0])
            assert (result.difference, result.partial) == (None, None)
            assert result.num_forwards == metrics["num_forwards"] == 16
            assert result.num_decisions > 16 * 24 * 3
