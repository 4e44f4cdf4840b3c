"""Where to listen in a model: the modules of one MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

EXPLICIT = "give the layer as an explicit Tap (traces.recorder.recording)"


@dataclass(frozen=True)
class Tap:
    """One MoE layer.

    layer: its index among the model's layers. router: the module that is called once a forward with the router's
    input [..., d]; it returns the logits [..., E], alone or in a tuple, and may return the chosen ids [..., K]
    and their weights beside them, or the weights among zeros [..., E]. norm: the module whose output is that input,
    called once with the residual stream (None: there is none, or it is of no interest). experts: the module that is
    called with the chosen ids (and weights) as the router's choice is carried out, or a list of E modules, one an
    expert, called with their tokens. weight: the router's weight [E,d], where it is a bare parameter of `router`,
    which is then a larger module that is never called for look-ahead. choose: logits float32 [n,E] → (ids [n,K],
    weights [n,K]), for a router that returns logits alone; without one its choice is the top K of the logits, and
    weights are not recorded.
    """

    layer: int
    router: nn.Module
    norm: nn.Module | None = None
    experts: nn.Module | None = None
    weight: torch.Tensor | None = None
    choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
