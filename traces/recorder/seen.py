"""What the hooks have seen of one MoE layer in the running forward, and which experts ran by that."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from traces.recorder.outputs import Reader
from traces.recorder.taps import EXPLICIT, Tap


@dataclass
class SeenLayer:
    """Of one tap; None for what was not seen yet.

    residual: what its norm was called with; normed: what its router was called with. logits float32 [n,E]. routed:
    ids and weights [n,K] that the router returned; executed: those that the experts were called with. counts [E]:
    tokens that each expert was called with. guesses: by kind of pre-gate and distance, what it guesses of later layers.
    """

    residual: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    routed: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    executed: tuple[torch.Tensor, torch.Tensor | None] | None = None
    counts: torch.Tensor | None = None
    guesses: dict[tuple[str, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def settled(self, tap: Tap, reader: Reader) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The experts that ran [n,K] best first, and their weights. ValueError where what was seen contradicts."""
        if self.normed is None or self.logits is None:
            raise ValueError(f"layer {tap.layer}: its router was not called; {EXPLICIT}")
        ids, weights = self.routed
        if self.executed is not None:
            executed, applied = self.executed
            if ids is not None and not torch.equal(ids.sort(dim=1).values, executed.sort(dim=1).values):
                problem = "its experts were given other ids than its router returned"
                raise ValueError(f"layer {tap.layer}: {problem}; {EXPLICIT}")
            same_order = ids is not None and torch.equal(ids, executed)
            ids, weights = executed, weights if applied is None and same_order else applied
        elif ids is None and tap.choose is not None:
            ids, weights = tap.choose(self.logits)
            ids, weights = ids.long(), weights.float()
        elif ids is None:
            ids = self.logits.topk(reader.top_k, dim=1).indices
        if self.counts is not None:
            counts = torch.bincount(ids[ids >= 0].cpu(), minlength=reader.num_experts)
            if not torch.equal(counts, self.counts):
                expert = int((counts != self.counts).nonzero()[0])
                problem = f"expert {expert} ran {int(self.counts[expert])} tokens, the record says {counts[expert]}"
                raise ValueError(f"layer {tap.layer}: {problem}; give its Tap a `choose` that routes as the model does")
        if weights is None:
            return ids, None
        # What is not there goes last, whatever its weight.
        key = torch.where(ids >= 0, weights, torch.full_like(weights, -torch.inf))
        order = torch.argsort(key, dim=1, descending=True, stable=True)
        ids, weights = ids.gather(1, order), weights.gather(1, order)
        return ids, torch.where(ids >= 0, weights, 0.0)
