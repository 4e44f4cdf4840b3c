"""An adaptive step that costs more host time than the device hides is halved; one that is hidden, or pays, is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from expertflow.horizons.adaptive import AdaptiveHorizon
from expertflow.view import Feedback
from tests.policies.support import view_of
from tests.runtime.support import forward_of

BASE_NS = 100_000
"""A layer without stall, whose decision is hidden."""


def sizes(layer_ns: Callable[[int], int], stall_ns: int = 0, worth: float = 0.02, num_tokens: int = 1,
          forwards: int = 400, late: bool = False) -> list[int]:  # fmt: skip
    """The step at each forward, where layers take `layer_ns` of the step, and stall beside that. The formula asks for
    8. late: a layer of each forward waits for an expert on its way, which asks for a longer step."""
    view = view_of(24, 10, 1)
    view.expert_bytes = 1_000_000
    horizon = AdaptiveHorizon(worth=worth, retry_forwards=128)
    horizon.num_expected = 8
    horizon.start(view, None)
    found = []
    for index in range(forwards):
        view.forward = index
        horizon.begin_forward(forward_of(index, [[[0]] * 24] * num_tokens, 10))
        step = horizon.distances()[-1]
        found.append(step)
        view.link_bytes += 1_000_000
        view.link_busy_ns += 1_000_000
        view.layer_time_ns += 24 * layer_ns(step)
        view.num_layers_timed += 24
        view.now_ns += 24 * (layer_ns(step) + stall_ns)
        if late:
            feedback = Feedback()
            feedback.stall_ns, feedback.num_late = 10, 1
            for _ in range(4):
                horizon.feedback(feedback)
    return found


def over(free: int, each_ns: int) -> Callable[[int], int]:
    """`free` layers ahead are predicted unseen, each one more takes so long."""
    return lambda step: BASE_NS + max(step - free, 0) * each_ns


def test_a_step_whose_decisions_are_hidden_stays() -> None:
    found = sizes(over(8, 10_000))
    # Half of it is tried now and then, for four whole forwards.
    assert found[1] == 8
    assert set(found[20:]) <= {8, 4}
    assert found[20:].count(4) < 0.1 * len(found[20:])


@pytest.mark.parametrize(("free", "kept"), [(1, 1), (2, 2), (4, 4)])
def test_a_step_that_is_too_dear_is_halved_until_it_is_hidden(free: int, kept: int) -> None:
    found = sizes(over(free, 10_000))
    assert max(found[40:120]) <= kept
    assert found[40:120].count(kept) > 60
    # After a time all of it is tried again, and found too dear again.
    assert max(found[120:200]) == 8
    assert max(found[230:260]) <= kept


def test_what_it_costs_is_held_against_all_of_a_layers_time() -> None:
    """Six layers at 1 us each: too dear beside 100 us, not beside 100 us and 400 us of stall."""
    assert max(sizes(over(2, 1_000))[60:120]) < 8
    assert sizes(over(2, 1_000), stall_ns=400_000)[60:120].count(8) > 50


def test_late_experts_lengthen_it_again_and_that_is_judged_again() -> None:
    found = sizes(over(2, 10_000), late=True)
    assert sum(found[60:]) / len(found[60:]) < 4.5


def test_it_is_off_by_default_and_for_forwards_of_several_tokens() -> None:
    assert set(sizes(over(1, 10_000), worth=0.0)[1:]) == {8}
    assert set(sizes(over(1, 10_000), num_tokens=3)[1:]) == {8}


@pytest.mark.parametrize("settings", [{"worth": -0.1}, {"retry_forwards": 0}])
def test_nonsense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="AdaptiveHorizon worth"):
        AdaptiveHorizon(**settings)  # type: ignore[arg-type]
