"""What a router and its experts were called with and returned: logits, chosen experts and their weights.

Implementations return them in many forms; the shapes say which tensor is what. Shape letters: n tokens, K top-k,
E experts, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from traces.recorder.taps import EXPLICIT, Tap


class Reader:
    """Tells the tensors of one model's routers apart: E = num_experts, K = top_k."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k

    def routing(
        self, tap: Tap, states: torch.Tensor, output: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Logits float32 [n,E], and the chosen ids and weights [n,K] where they can be read off."""
        num_tokens = states.numel() // states.shape[-1]
        if tap.weight is not None:
            logits = torch.nn.functional.linear(states.float(), tap.weight.float()).reshape(num_tokens, -1)
            return logits, None, None
        found = list(tensors(output))
        ids, weights = self.choice(found, num_tokens)
        if ids is None:
            ids, weights = self._scattered(found, num_tokens)
        returned = self._logits(found, num_tokens)
        return self._derived(tap, states) if returned is None else returned, ids, weights

    def choice(
        self, tensors: Iterable[torch.Tensor], num_tokens: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of some tensors the chosen ids int64 [n,K], −1 = none, and their weights float32 [n,K]."""
        tensors = list(tensors)
        ids = next((t for t in tensors if _is_whole(t) and self._has(t, num_tokens, self.top_k)), None)
        if ids is None:
            return None, None
        ids = ids.reshape(num_tokens, self.top_k).long()
        # Some implementations mark what another device computes with an id of num_experts.
        ids = torch.where((ids < 0) | (ids >= self.num_experts), -1, ids)
        floats = [t for t in tensors if t.is_floating_point()]
        narrow = [t for t in floats if self._has(t, num_tokens, self.top_k)]
        if narrow:
            # With K = E the logits have this shape too; they come first.
            return ids, narrow[-1].reshape(num_tokens, self.top_k).float()
        wide = [t for t in floats if self._has(t, num_tokens, self.num_experts) and self._is_scattered(t)]
        if wide:
            return ids, wide[0].reshape(num_tokens, -1).float().gather(1, ids.clamp(min=0))
        return ids, None

    def _scattered(
        self, tensors: Iterable[torch.Tensor], num_tokens: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The choice from a tensor [n,E] of the weights of the chosen and zeros, if there is one."""
        for tensor in tensors:
            if tensor.is_floating_point() and self._has(tensor, num_tokens, self.num_experts):
                rows = tensor.detach().reshape(num_tokens, self.num_experts).float()
                if self.top_k < self.num_experts and bool(((rows != 0).sum(dim=1) == self.top_k).all()):
                    weights, ids = rows.topk(self.top_k, dim=1)
                    return ids, weights
        return None, None

    def _logits(self, tensors: Iterable[torch.Tensor], num_tokens: int) -> torch.Tensor | None:
        for tensor in tensors:
            if tensor.is_floating_point() and self._has(tensor, num_tokens, self.num_experts):
                flat = tensor.detach().reshape(num_tokens, self.num_experts)
                if not self._is_scattered(flat):
                    return flat.float()
        return None

    def _is_scattered(self, scores: torch.Tensor) -> bool:
        """Whether the rows hold the weights of the chosen and zeros: no logits."""
        rows = scores.reshape(-1, self.num_experts)
        return self.top_k < self.num_experts and bool(((rows != 0).sum(dim=1) <= self.top_k).all())

    def _derived(self, tap: Tap, states: torch.Tensor) -> torch.Tensor:
        """Logits from the router's weight, for routers that return only what they chose."""
        for module in tap.router.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, torch.Tensor) and weight.shape == (self.num_experts, states.shape[-1]):
                extra = bias.float() if isinstance(bias, torch.Tensor) else None
                logits = torch.nn.functional.linear(states.float(), weight.float(), extra)
                return logits.reshape(-1, self.num_experts)
        problem = f"its router {type(tap.router).__name__} returns no logits [tokens, {self.num_experts}] and has no "
        raise ValueError(f"layer {tap.layer}: {problem}weight to compute them from; {EXPLICIT}")

    @staticmethod
    def _has(tensor: torch.Tensor, num_tokens: int, width: int) -> bool:
        return tensor.numel() == num_tokens * width and (tensor.shape[-1] == width or width == 1)


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and tables, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def first_tensor(args: Any, kwargs: Any) -> torch.Tensor:
    """The states that a module was called with: its first floating-point argument."""
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            return tensor
    raise ValueError(f"a router, norm or expert was called without a tensor of states; {EXPLICIT}")


def with_first_tensor(args: Any, kwargs: Any, states: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other states."""
    first = first_tensor(args, kwargs)
    return (
        tuple(states if item is first else item for item in args),
        {key: states if item is first else item for key, item in kwargs.items()},
    )
