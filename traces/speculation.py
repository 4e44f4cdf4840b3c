"""Speculative decoding over a recorded trace: how many of the drafted tokens the model accepts.

A verify step runs the last token and a few drafted ones of a request in one forward. From the first rejected one on
nothing counts; the model's own token there does (Leviathan et al., arXiv 2211.17192). With an acceptance of α for each
token by itself, of k drafted ones (1 - α^(k+1)) / (1 - α) come out in the mean, the model's own included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_DRAFTED = 64


@dataclass(frozen=True)
class Speculation:
    """num_drafted: tokens of a request that are drafted for each forward, as far as the request goes. acceptance: the
    chance that a drafted token is accepted, each by itself. draft_ns: what the draft model takes before the forward.
    seed: of the draws."""

    num_drafted: int
    acceptance: float
    draft_ns: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_drafted <= MOST_DRAFTED:
            raise ValueError(f"num_drafted={self.num_drafted} must be in [1, {MOST_DRAFTED}]")
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance={self.acceptance} must be in [0, 1]")

    def accepts(self, request: int, num_rows: int) -> npt.NDArray[np.bool_]:
        """Whether each row [num_rows] of a request is accepted where it is drafted: its own draw, whichever forward
        drafts it, and however many are drafted or decoded together."""
        return np.random.default_rng([self.seed, request]).random(num_rows) < self.acceptance


def num_accepted(accepts: npt.NDArray[np.bool_]) -> int:
    """Of drafted tokens in order, those before the first rejection."""
    return len(accepts) if accepts.all() else int(np.argmin(accepts))
