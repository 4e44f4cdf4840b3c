"""Assumed routing with a reuse that somebody has published, in place of a setting."""

from __future__ import annotations

import numpy as np
import pytest

from traces.assumed.families import SETTINGS, family_of, shipped_families
from traces.assumed.routing import Topology, make_routing

LENGTHS = [96] * 6


def seen(topology: Topology, reuse: float) -> float:
    """The share of its experts that a token has in common with the one before, counted in what is made."""
    family = family_of("usual", reuse, topology.top_k / topology.num_experts)
    experts = np.asarray(make_routing(family, topology, LENGTHS, seed=3))
    shared = []
    for start in np.cumsum([0, *LENGTHS[:-1]]):
        for token in range(start + 1, start + LENGTHS[0]):
            for before, now in zip(experts[token - 1], experts[token], strict=True):
                shared.append(len(set(before) & set(now)) / topology.top_k)
    return float(np.mean(shared))


@pytest.mark.parametrize(
    ("topology", "reuse"), [(Topology(6, 128, 8), 0.45), (Topology(6, 128, 8), 0.2), (Topology(6, 32, 4), 0.4)]
)
def test_what_is_made_has_the_reuse_that_was_asked_for(topology: Topology, reuse: float) -> None:
    assert seen(topology, reuse) == pytest.approx(reuse, abs=0.025)


def test_families_between_the_settings_meet_them_and_rise() -> None:
    share = 8 / 128
    asked = [0.14, 0.25, 0.35, 0.48]
    found = [family_of("usual", reuse, share) for reuse in asked]
    assert [one.next_token for one in found] == sorted(one.next_token for one in found)
    for one in found:
        shares = one.popularity + one.request + one.slow + one.fast + one.fresh
        assert shares == pytest.approx(1.0)
    for name in SETTINGS:
        assert family_of(name, None, share) == shipped_families()[name]


@pytest.mark.parametrize("reuse", [0.05, 0.8])
def test_a_reuse_beyond_the_settings_is_refused_and_told_their_range(reuse: float) -> None:
    with pytest.raises(ValueError, match=rf"trace.reuse={reuse} is not between 0\.1\d and 0\.\d\d, .*low and high"):
        family_of("usual", reuse, 8 / 128)
