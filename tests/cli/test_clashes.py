"""What a new user writes on a command line of which a part would be ignored, or taken for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import run_here

WORDS = ("+hardware=a100", "+policy=lru")


def refused(words: list[str], folder: Path) -> str:
    found = run_here([*WORDS, *words], folder)
    assert (found.code, found.err.count("\n"), found.done) == (2, 1, False)
    assert len(found.err) <= 301
    return found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["residency=0.5", "residency=0.2"], "residency=0.5 and residency=0.2: residency is given twice"),
        (["policy.eviction.used=0.5", "++policy.eviction.used=0.2"], "policy.eviction.used is given twice"),
        (["trace.path=a", "trace.path='b c'"], "trace.path=a and trace.path='b c': trace.path is given twice"),
        (["hydra.run.dir=elsewhere"], "hydra.run.dir is given twice"),
        (["trace=gpt-oss-20b-twin", "trace.path=mine"], "trace=gpt-oss-20b-twin and trace.path=mine are two traces"),
    ],
)
def test_words_of_which_one_would_be_ignored_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(words, tmp_path / "run")
