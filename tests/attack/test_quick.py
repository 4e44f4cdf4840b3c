"""The quick round of the attack: every kind, one seed, no failure."""

from __future__ import annotations

import pytest

from tests.attack import report
from tests.attack.kinds import MODULES, registry
from tests.attack.round import Round
from tests.attack.work import Failure

TARGETS = {"traces": 3_000, "each": 100, "slow": 3, "configurations": 200, "parts": 45, "kills": 1}
"""Of each kind, by its `target`: below a minute on one core, all together."""
NEVER_REFUSES = {"done", "kept-scores", "prompts-txt"}
"""What they cannot read is made anew, or all text is right."""
MOST_MIB = 512


@pytest.mark.slow
def test_every_kind_of_input_meets_no_failure() -> None:
    kept: list[Failure] = []
    attack = Round(registry(), TARGETS, 20, kept.append)
    attack.run(600, 1)
    told = report.text_table(attack.tallies)
    assert [(failure.kind, failure.seed, failure.verdict, failure.text) for failure in kept] == [], told
    assert {name: tally.tried >= tally.target for name, tally in attack.tallies.items()} == dict.fromkeys(
        registry(), True
    )
    assert max(tally.peak_bytes for tally in attack.tallies.values()) < MOST_MIB << 20, told


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES[:2])
def test_mutants_of_every_file_are_refused_and_accepted(module: str) -> None:
    kinds = {name: kind for name, kind in registry((module,)).items() if kind.target != "slow"}
    attack = Round(kinds, dict.fromkeys(TARGETS, 150), 21, lambda failure: None, (module,))
    attack.run(600, 1)
    for name, tally in attack.tallies.items():
        # Neither nearly all nor hardly any: then the mutator would miss the reader.
        assert tally.accepted >= 8, (name, tally)
        assert tally.refused >= (0 if name in NEVER_REFUSES else 8), (name, tally)
    traces = [tally for name, tally in attack.tallies.items() if name.startswith("trace")]
    for tally in traces:
        assert 0.2 < tally.accepted / tally.tried < 0.6
        assert (tally.rechecked, tally.confirmed) == (tally.accepted, tally.refused)
