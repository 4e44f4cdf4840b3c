"""A fixed step: always the same distances (the baseline that arXiv 2510.26730 argues against)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Horizon
from expertflow.view import View


class FixedHorizon(Horizon):
    """Either `depth` d, the distances 1 … d, or an explicit set of `distances` (e.g. [2]: a stride)."""

    def __init__(
        self,
        depth: Annotated[
            int | None,
            Rule(1, 9_999, unit="layers", null="distances says it", about="ahead, at most the model's layers less one"),
        ] = None,
        distances: Annotated[
            Sequence[int] | None, Rule(1, 9_999, unit="layers", null="depth says it", about="that are predicted")
        ] = None,
    ) -> None:
        if (depth is None) == (distances is None):
            raise ValueError("FixedHorizon takes either depth or distances, not both and not neither")
        chosen = list(range(1, depth + 1)) if depth is not None else sorted(set(distances or ()))
        if not chosen or chosen[0] < 1:
            raise ValueError(f"FixedHorizon depth={depth} distances={distances}: distances must be 1 or more")
        self._distances = chosen

    def start(self, view: View, future: Future | None) -> None:
        limit = view.num_layers - 1
        if self._distances[-1] > limit:
            raise ValueError(
                f"FixedHorizon looks {self._distances[-1]} layers ahead, but the model has {view.num_layers} MoE "
                f"layers: at most {limit}"
            )

    def distances(self) -> Sequence[int]:
        return self._distances
