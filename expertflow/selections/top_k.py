"""As many experts as will be demanded, plus a margin."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from expertflow.diversity import expected_union
from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import Scores, Selection
from expertflow.view import View


class CountingSelection(Selection):
    """Keeps the mean number selected per predicted layer of the last forward: the N_e of the horizon."""

    def start(self, view: View, future: Future | None) -> None:
        self.top_k = view.top_k
        self.num_experts = view.num_experts
        self.num_selected = 0
        self.num_layers = 0
        self.mean = 0.0

    def mean_selected(self) -> float:
        if self.num_layers:
            self.mean = self.num_selected / self.num_layers
            self.num_selected = self.num_layers = 0
        return self.mean

    def selected(self, num_keys: int, num_layers: int) -> None:
        self.num_selected += num_keys
        self.num_layers += num_layers


class TopK(CountingSelection):
    """The `top_k + extra` best at one token; at n tokens the expected union E(1 - (1 - k/E)^n), plus `extra`."""

    def __init__(self, extra: int = 0) -> None:
        if extra < 0:
            raise ValueError(f"TopK extra={extra} must be 0 or more")
        self.extra = extra

    def select(self, scores: Scores, forward: Forward) -> Sequence[int]:
        count = self.top_k
        if forward.num_tokens > 1:
            count = ceil(expected_union(self.num_experts, self.top_k, forward.num_tokens) - 1e-9)
        keys = scores[0][: count + self.extra]
        self.num_selected += len(keys)
        self.num_layers += 1
        return keys
