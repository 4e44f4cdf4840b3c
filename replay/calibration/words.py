"""How a policy is named where many are measured: POLICY, or POLICY+PLACE for one with a place."""

from __future__ import annotations

HOST = "desktop"
"""The host that policies with a place are given unless told otherwise."""


def policy_words(name: str) -> list[str]:
    """The words that choose the policy called `name`."""
    policy, plus, place = name.partition("+")
    return [f"+policy={policy}", *([f"+policy/place={place}"] if plus else [])]
