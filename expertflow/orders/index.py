"""Experts run in index order, as a plain loop over experts does: one that is missing holds up the rest."""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.parts import Order


class IndexOrder(Order):
    """Strictly by expert index."""

    strict = True

    def arrange(self, keys: Sequence[int]) -> Sequence[int]:
        return sorted(keys)
