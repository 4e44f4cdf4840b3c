"""The quick round of the attack: every kind, one seed, no failure."""

from __future__ import annotations

import pytest

from tests.attack import report
from tests.attack.kinds import FileKind, registry
from tests.attack.round import Round
from tests.attack.work import Failure

TARGETS = {"traces": 3_000, "each": 100, "slow": 40, "configurations": 150, "parts": 30, "kills": 1}
"""Of each kind, by its `target`: below a minute on one core, all together."""
NEVER_REFUSES = {"done", "kept-scores", "prompts-txt"}
"""What they cannot read is made anew, or all text is right."""
FEW = 6
"""Of a hundred mutants of a file so many at least are refused, and so many accepted: else it misses the reader."""
MOST_MIB = 512


@pytest.mark.slow
def test_every_kind_of_input_is_tried_and_none_fails() -> None:
    kinds, kept = registry(), list[Failure]()
    attack = Round(kinds, TARGETS, 20, kept.append)
    attack.run(600, 1)
    told = report.text_table(attack.tallies)
    assert [(failure.kind, failure.seed, failure.verdict, failure.text) for failure in kept] == [], told
    assert attack.tallies.keys() == kinds.keys()
    for name, tally in attack.tallies.items():
        assert tally.tried >= tally.target >= 1, told
        assert tally.tried == tally.refused + tally.accepted, told
        assert tally.peak_bytes < MOST_MIB << 20, told
        if isinstance(kinds[name], FileKind) and kinds[name].target != "slow":
            assert tally.accepted >= FEW, told
            assert tally.refused >= FEW or name in NEVER_REFUSES, told
        if name.startswith("trace"):
            assert 0.2 < tally.accepted / tally.tried < 0.6, told
            assert (tally.rechecked, tally.confirmed) == (tally.accepted, tally.refused), told
