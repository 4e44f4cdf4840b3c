"""As many experts as will be demanded, plus a margin."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Annotated

from expertflow.diversity import expected_union
from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Prediction, Selection
from expertflow.view import View


class TopK(Selection):
    """The `top_k + extra` best at one token; at n tokens the expected union E(1 - (1 - k/E)^n), plus `extra`."""

    def __init__(
        self, extra: Annotated[int, Rule(0, 65_535, unit="experts", about="beyond the model's top_k")] = 0
    ) -> None:
        if extra < 0:
            raise ValueError(f"TopK extra={extra} must be 0 or more")
        self.extra = extra

    def start(self, view: View, future: Future | None) -> None:
        self.top_k = view.top_k
        self.num_experts = view.num_experts

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        count = self.top_k
        if forward.num_tokens > 1:
            count = ceil(expected_union(self.num_experts, self.top_k, forward.num_tokens) - 1e-9)
        return prediction.keys[: count + self.extra]
