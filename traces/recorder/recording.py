"""The hooks: what the routers of a model chose, forward by forward.

Works on any `nn.Module` whose MoE layers are named as `Tap`s, and knows nothing of where they were found. Reads only:
it copies what it keeps, draws no random numbers and returns nothing to the model. Shape letters: n tokens of one
forward (batch × sequence, in this order), L MoE layers, K top-k, E experts, D distances ahead, M candidates, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from traces.layout import MAX_EXPERTS
from traces.recorder.lookahead import KINDS, dense, listed, num_right
from traces.recorder.outputs import Reader, first_tensor, tensors, with_first_tensor
from traces.recorder.seen import SeenLayer
from traces.recorder.taps import EXPLICIT, Tap

__all__ = ["Recording", "Rows", "Tap"]


@dataclass(frozen=True)
class Rows:
    """One forward, a row a token.

    arrays: what `TraceWriter.append` takes: `experts` int32 [n,L,K] best first (by weight, where weights are known),
    −1 = none; where recorded `weights` float32 [n,L,K], `logits` float16 [n,L,E], and per kind of pre-gate
    `lookahead_ids@kind` and `lookahead_scores@kind` [n,L,D,M], or `lookahead@kind` float16 [n,L,D,E].
    hits: by kind, uint8 [n,L,D]: how many experts of layer l+d its guess from layer l had right.
    """

    arrays: dict[str, npt.NDArray[Any]]
    hits: dict[str, npt.NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.arrays["experts"])

    def select(self, rows: Any) -> Rows:
        """The rows with these indices, in this order."""
        return Rows({n: a[rows] for n, a in self.arrays.items()}, {k: h[rows] for k, h in self.hits.items()})

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """The rows of `parts`, one part after the other."""
        first = parts[0]
        return Rows(
            {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays},
            {kind: np.concatenate([part.hits[kind] for part in parts]) for kind in first.hits},
        )


class Recording:
    """A context manager that records every forward of `model`.

    taps: the MoE layers in the order in which they run. lookahead: D, 0 for none; `kinds` of pre-gate as in
    `traces.recorder.lookahead` (residual only if all taps have a norm). full: store all scores, not the
    best `num_listed` (default 2K). logits: keep them. on_forward: called with the `Rows` of each forward; without
    one call `take()` after each. The model must be in eval mode: routers may draw noise in training.

    Choices come from what the experts were called with; else from what the router returned; else from the tap's
    `choose`; else they are the top K of the logits. Where more than one is to be seen they must agree, and where
    experts are single modules each must have been given as many tokens as the record says. ValueError if not, or if
    a tap was not called exactly once.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        *,
        num_experts: int,
        top_k: int,
        lookahead: int = 0,
        full: bool = False,
        num_listed: int = 0,
        logits: bool = False,
        on_forward: Callable[[Rows], None] | None = None,
    ) -> None:
        if not taps or any(after.layer <= tap.layer for tap, after in pairwise(taps)):
            raise ValueError("taps must name at least one layer, in rising order; correct their layer indices")
        if not 0 < top_k <= num_experts <= MAX_EXPERTS:
            raise ValueError(f"top_k={top_k} must lie in 1 … num_experts={num_experts} (at most {MAX_EXPERTS})")
        if not 0 <= lookahead < max(len(taps), 1):
            most = len(taps) - 1
            raise ValueError(f"lookahead={lookahead} must lie in 0 … {most}: the model has {len(taps)} MoE layers")
        if not 0 <= num_listed <= num_experts:
            raise ValueError(f"lookahead_top={num_listed} must lie in 1 … num_experts={num_experts}")
        self.model, self.taps = model, tuple(taps)
        self.num_experts, self.top_k, self.lookahead, self.full = num_experts, top_k, lookahead, full
        self.num_listed = num_listed or min(2 * top_k, num_experts)
        self.keep_logits = logits
        self._reader = Reader(num_experts, top_k)
        self.kinds = KINDS if all(tap.norm is not None for tap in taps) else ("normed",)
        self.on_forward = on_forward
        self._handles: list[Any] = []
        self._layers: list[SeenLayer] = []
        self._rows: Rows | None = None

    # -- hooks -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Recording:
        if self.model.training:
            raise ValueError("the model is in training mode, where routers may draw noise; call model.eval() first")
        if self._handles:
            raise ValueError("this recording is running already; leave it before entering again")
        self._handles.append(self.model.register_forward_pre_hook(self._start))
        for index, tap in enumerate(self.taps):
            if tap.norm is not None:
                self._handles.append(tap.norm.register_forward_pre_hook(self._norm_hook(index), with_kwargs=True))
            self._handles.append(tap.router.register_forward_pre_hook(self._input_hook(index), with_kwargs=True))
            self._handles.append(tap.router.register_forward_hook(self._router_hook(index), with_kwargs=True))
            if isinstance(tap.experts, nn.ModuleList):
                for expert, module in enumerate(tap.experts):
                    hook = self._count_hook(index, expert)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif tap.experts is not None:
                self._handles.append(tap.experts.register_forward_pre_hook(self._experts_hook(index), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._finish))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers = []

    def take(self) -> Rows:
        """The rows of the forward that ended last, once. ValueError if there was none since."""
        if self._rows is None:
            raise ValueError("no forward has ended since the last take(); run the model first")
        rows, self._rows = self._rows, None
        return rows

    def _start(self, module: nn.Module, args: Any) -> None:
        self._layers = [SeenLayer() for _ in self.taps]

    def _norm_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            layer = self._layers[index]
            if layer.residual is not None:
                raise _twice(self.taps[index], "norm")
            # Copied: a model may add to its residual stream in place.
            layer.residual = first_tensor(args, kwargs).detach().clone()

        return hook

    def _input_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            layer = self._layers[index]
            if layer.normed is not None:
                raise _twice(self.taps[index], "router")
            layer.normed = first_tensor(args, kwargs).detach().clone()

        return hook

    def _router_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tap, layer = self.taps[index], self._layers[index]
            assert layer.normed is not None
            with torch.no_grad():
                layer.logits, ids, weights = self._reader.routing(tap, layer.normed, output)
                if ids is not None:
                    layer.routed = (ids, weights)
                self._guess(index, args, kwargs)

        return hook

    def _experts_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            layer = self._layers[index]
            if layer.normed is None and self.taps[index].weight is None:
                raise ValueError(f"layer {self.taps[index].layer}: its experts ran before its router; {EXPLICIT}")
            states = first_tensor(args, kwargs)
            ids, weights = self._reader.choice(tensors((args, kwargs)), states.numel() // states.shape[-1])
            if ids is None:
                return
            if layer.executed is not None:
                raise _twice(self.taps[index], "experts")
            # Copied, as a model may reuse the buffer.
            layer.executed = (ids.detach().clone(), None if weights is None else weights.detach().clone())

        return hook

    def _count_hook(self, index: int, expert: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            layer = self._layers[index]
            if layer.counts is None:
                layer.counts = torch.zeros(self.num_experts, dtype=torch.int64)
            states = first_tensor(args, kwargs)
            layer.counts[expert] += states.numel() // states.shape[-1]

        return hook

    # -- look-ahead --------------------------------------------------------------------------------------------

    def _guess(self, index: int, args: Any, kwargs: Any) -> None:
        """Apply this layer's router to the states of the D layers before it: all are at hand only now."""
        here = self._layers[index]
        assert here.normed is not None
        for distance in range(1, min(self.lookahead, index) + 1):
            source = self._layers[index - distance]
            for kind in self.kinds:
                states = self._states(index, source, kind).reshape(here.normed.shape)
                logits, chosen = self._route(self.taps[index], states, args, kwargs)
                source.guesses[kind, distance] = (chosen, *self._kept(logits, chosen))
        if index >= self.lookahead:
            past = self._layers[index - self.lookahead]
            past.residual = None
            # What is still asked of it is that it was there.
            past.normed = past.normed[..., :0] if past.normed is not None else None

    def _kept(self, logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # In place of what is none, one of the others once more: it changes no ranking.
        chosen = torch.where(chosen < 0, chosen.amax(dim=1, keepdim=True).clamp(min=0), chosen)
        if self.full:
            return (dense(logits, chosen),)
        return listed(logits, chosen, self.top_k, self.num_listed)

    def _states(self, index: int, source: SeenLayer, kind: str) -> torch.Tensor:
        """What the router of tap `index` is asked from the layer `source`."""
        norm = self.taps[index].norm
        if kind == "normed":
            assert source.normed is not None
            return source.normed
        if source.residual is None or norm is None:
            raise ValueError(f"layer {self.taps[index].layer}: its norm was not called before its router; {EXPLICIT}")
        # forward, not a call: our own hooks must not see it. A copy, as a norm may work in place.
        normed: torch.Tensor = norm.forward(source.residual.clone())
        return normed

    def _route(self, tap: Tap, states: torch.Tensor, args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n,E] and choice [n,K] of a router on states that are not its own."""
        if tap.weight is None:
            args, kwargs = with_first_tensor(args, kwargs, states.clone())
            output = tap.router.forward(*args, **kwargs)
        else:
            output = None
        logits, ids, _ = self._reader.routing(tap, states, output)
        if ids is None:
            ids = tap.choose(logits)[0] if tap.choose is not None else logits.topk(self.top_k, dim=1).indices
        return logits, ids

    # -- the end of a forward ----------------------------------------------------------------------------------

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        with torch.no_grad():
            choices = [layer.settled(tap, self._reader) for tap, layer in zip(self.taps, self._layers, strict=True)]
            rows = self._collect(choices)
        self._layers = []
        if self.on_forward is not None:
            self.on_forward(rows)
        elif self._rows is not None:
            raise ValueError("the rows of the forward before were not taken; call take() after each, or on_forward=")
        else:
            self._rows = rows

    def _collect(self, choices: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Rows:
        lengths = {len(ids) for ids, _ in choices}
        if len(lengths) > 1:
            raise ValueError(f"the layers saw different numbers of tokens ({sorted(lengths)}); record one at a time")
        arrays: dict[str, npt.NDArray[Any]] = {"experts": _host([ids.to(torch.int32) for ids, _ in choices])}
        weights = [weights for _, weights in choices if weights is not None]
        if len(weights) == len(choices):
            arrays["weights"] = _host(weights)
        if self.keep_logits:
            arrays["logits"] = _host(
                [layer.logits.to(torch.float16) for layer in self._layers if layer.logits is not None]
            )
        hits = {}
        for kind in self.kinds if self.lookahead else ():
            hits[kind] = self._gather(kind, choices, arrays)
        return Rows(arrays, hits)

    def _gather(
        self, kind: str, choices: list[tuple[torch.Tensor, torch.Tensor | None]], arrays: dict[str, npt.NDArray[Any]]
    ) -> npt.NDArray[np.uint8]:
        """Fill in the look-ahead arrays of one kind; the hits [n,L,D]."""
        shape = (len(choices[0][0]), len(self.taps), self.lookahead)
        hits = np.zeros(shape, np.uint8)
        whole = np.uint8 if self.num_experts <= np.iinfo(np.uint8).max else np.uint16
        if self.full:
            scores = arrays[f"lookahead@{kind}"] = np.full((*shape, self.num_experts), np.nan, np.float16)
        else:
            ids = np.full((*shape, self.num_listed), np.iinfo(whole).max, whole)
            scores = np.zeros((*shape, self.num_listed), np.uint8)
            arrays[f"lookahead_ids@{kind}"], arrays[f"lookahead_scores@{kind}"] = ids, scores
        for index, layer in enumerate(self._layers):
            for (of, distance), (chosen, *kept) in layer.guesses.items():
                if of == kind:
                    at = (slice(None), index, distance - 1)
                    hits[at] = num_right(chosen, choices[index + distance][0].to(chosen.device)).cpu().numpy()
                    scores[at] = kept[-1].cpu().numpy()
                    if not self.full:
                        ids[at] = kept[0].cpu().numpy()
        return hits


def _twice(tap: Tap, what: str) -> ValueError:
    return ValueError(f"layer {tap.layer}: its {what} was called twice in one forward; {EXPLICIT}")


def _host(layers: list[torch.Tensor]) -> npt.NDArray[Any]:
    """[n, …] of each layer as one array [n,L,…] in host memory."""
    joined: npt.NDArray[Any] = torch.stack([layer.cpu() for layer in layers], dim=1).numpy()
    return joined
