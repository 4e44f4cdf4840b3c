"""The matrix products that kernels are made of, as plain functions over buffers.

On a GPU they are called as they are. On a CPU, where the streams are threads of one interpreter, they are compiled by
TorchScript: each call then leaves the interpreter once, and the threads of a machine do not wait for each other at
every product. All results go to buffers: nothing that is computed may be left out as unused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, List, NamedTuple  # noqa: UP035  (TorchScript reads typing.List)

import torch


def feed_forward(
    inputs: torch.Tensor,
    first: List[torch.Tensor],  # noqa: UP006  (TorchScript reads typing.List)
    second: List[torch.Tensor],  # noqa: UP006  (TorchScript reads typing.List)
    rows: List[int],  # noqa: UP006  (TorchScript reads typing.List)
    up: torch.Tensor,
    middle: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One block after the other, each over the first `rows` of `inputs` [max_rows, hidden].

    first [hidden, up], second [middle, hidden]; `up` twice as wide as `middle` is gate and up of a gated block.
    """
    width = middle.size(1)
    for place in range(len(first)):
        count = rows[place]
        torch.mm(inputs[:count], first[place], out=up[:count])
        if up.size(1) > width:
            torch.mul(torch.nn.functional.silu(up[:count, :width]), up[:count, width:], out=middle[:count])
        else:
            torch.clamp(up[:count], min=0.0, out=middle[:count])
        torch.mm(middle[:count], second[place], out=out[:count])


def attend(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    columns: int,
    scores: torch.Tensor,
    attended: torch.Tensor,
) -> None:
    """The projections, then scores and weighted values over the cache, `columns` queries in pieces of what there is."""
    torch.mm(inputs, weights, out=out)
    rows = keys.size(0)
    widest = queries.size(1)
    first = 0
    while first < columns:
        count = min(widest, columns - first)
        piece = scores[: rows * count].view(rows, count)
        torch.mm(keys, queries[:, :count], out=piece)
        torch.mm(piece.t(), values, out=attended[:count, : values.size(1)])
        first += widest


def route(
    inputs: torch.Tensor, router: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor, routing: torch.Tensor
) -> None:
    """Router logits and the best of them: `chosen` (values) and `routing` (experts) [tokens, top_k]."""
    torch.mm(inputs, router, out=logits)
    best, experts = torch.topk(logits, routing.size(1))
    chosen.copy_(best)
    routing.copy_(experts)


class Products(NamedTuple):
    """The three functions, plain or compiled."""

    feed_forward: Callable[..., Any]
    attend: Callable[..., Any]
    route: Callable[..., Any]


@cache
def products(device: str) -> Products:
    """Those for a device of type `device` (cuda, cpu)."""
    plain = (feed_forward, attend, route)
    if device != "cpu" or not hasattr(torch.jit, "script"):
        return Products(*plain)
    with warnings.catch_warnings():
        # What is to take its place (torch.compile) needs a C++ compiler on every machine.
        warnings.simplefilter("ignore", DeprecationWarning)
        return Products(*(torch.jit.script(one) for one in plain))
