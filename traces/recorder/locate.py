"""Finding the MoE layers of a Hugging Face causal language model, by shape and by behaviour rather than by name.

One probe forward of a few tokens is watched: in each decoder layer, the router is the innermost module that owns a
weight of num_experts rows and returns the chosen ids, or at least num_experts logits; the experts are the module that
holds stacked expert weights, or the list of num_experts modules; the norm is the module whose output the router was
given. A layer without experts is dense, whatever in it is num_experts wide by chance. Only the names of configuration
fields are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from traces.recorder.recording import Tap

NUM_EXPERTS_KEYS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "moe_num_routed_experts",
    "n_experts",
)
# top_k comes last: configurations of older releases also use it for sampling.
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "moe_router_topk",
    "top_k_experts",
    "top_k",
)
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_PROBE_TOKENS = 5
_REMEDY = "record it with traces.recorder.recording.Recording and explicit taps"


@dataclass(frozen=True)
class Located:
    """The taps, in order, and the sizes that all of them share."""

    taps: tuple[Tap, ...]
    num_experts: int
    top_k: int

    @property
    def moe_layer_ids(self) -> list[int]:
        """Indices of the MoE layers among all decoder layers."""
        return [tap.layer for tap in self.taps]


@dataclass(frozen=True)
class _Call:
    """One module's call in the probe; the tensors are kept, so that equal values mean one passed on the other."""

    name: str
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    args: Any
    kwargs: Any


def locate(model: nn.Module, config: Any | None = None) -> Located:
    """The MoE layers of `model`, found by running it once on a few tokens without a cache.

    config: as `model.config`. ValueError, naming what was not found, where the model is no MoE model of a kind that
    can be recognised, or draws noise in routing.
    """
    config = getattr(model, "config", None) if config is None else config
    num_experts = _field(config, NUM_EXPERTS_KEYS, "experts")
    top_k = _field(config, TOP_K_KEYS, "experts per token")
    if not 0 < top_k <= num_experts:
        raise ValueError(f"the configuration has top_k={top_k} of num_experts={num_experts}; {_REMEDY}")
    layers = _decoder_layers(model, _field(config, NUM_LAYERS_KEYS, "layers"))
    calls = _probe(model, layers)
    taps = []
    for index, layer in enumerate(layers):
        tap = _tap(index, layer, calls[index], num_experts, top_k)
        if tap is not None:
            taps.append(tap)
    if not taps:
        problem = f"no router with {num_experts} experts was found in {len(layers)} layers of {type(model).__name__}"
        raise ValueError(f"{problem}; {_REMEDY}")
    return Located(tuple(taps), num_experts, top_k)


# -- configuration -------------------------------------------------------------------------------------------


def _configs(config: Any) -> Iterator[Any]:
    """The configuration and those nested in it, text before others."""
    if config is None:
        return
    if hasattr(config, "get_text_config"):
        yield config.get_text_config()
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            yield value


def _field(config: Any, keys: Sequence[str], what: str) -> int:
    """The first whole number from 1 under one of the keys; a list counts if all its entries agree."""
    for part in _configs(config):
        for key in keys:
            value = getattr(part, key, None)
            if isinstance(value, list | tuple) and value and len(set(map(repr, value))) == 1:
                value = value[0]
            if type(value) is int and value > 0:
                return value
    raise ValueError(f"the configuration names no number of {what} (looked for {', '.join(keys)}); {_REMEDY}")


def _decoder_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} layers; {_REMEDY}")


# -- probe ---------------------------------------------------------------------------------------------------


def _probe(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[_Call]]:
    """What was called in each layer, in the order in which calls ended."""
    calls: list[list[_Call]] = [[] for _ in layers]

    def hook_for(index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = tuple(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            calls[index].append(_Call(name, module, inputs, _flat(output), args, kwargs))

        return hook

    handles = [
        module.register_forward_hook(hook_for(index, name), with_kwargs=True)
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if name
    ]
    was_training = model.training
    device = next(model.parameters()).device
    tokens = torch.arange(_PROBE_TOKENS, device=device)[None]
    try:
        model.eval()
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return calls


def _flat(output: Any) -> tuple[torch.Tensor, ...]:
    items = output if isinstance(output, tuple | list) else (output,)
    return tuple(item for item in items if isinstance(item, torch.Tensor))


# -- one layer -----------------------------------------------------------------------------------------------


def _tap(index: int, layer: nn.Module, calls: list[_Call], num_experts: int, top_k: int) -> Tap | None:
    """The tap of a layer, None for a dense one."""
    containers = [
        (name, module) for name, module in layer.named_modules() if name and _holds_experts(module, num_experts)
    ]
    routers = [
        call
        for call in calls
        if _owns_router_weight(call, num_experts)
        and not any(name == call.name or name.startswith(f"{call.name}.") for name, _ in containers)
    ]
    deciding = [call for call in routers if any(_is_choice(t, num_experts, top_k) for t in call.outputs)]
    scoring = [call for call in routers if any(_is_logits(t, num_experts) for t in call.outputs)]
    # A projection can be num_experts wide by chance; a router of logits alone stands beside its experts.
    scoring = [call for call in scoring if any(_parent(call.name) == _parent(name) for name, _ in containers)]
    found = _innermost(deciding or scoring)
    if len(found) > 1:
        names = ", ".join(call.name for call in found)
        raise ValueError(f"layer {index} has {len(found)} modules that look like a router ({names}); {_REMEDY}")
    weight = None
    if not found:
        found, weight = _bare(calls, num_experts, [name for name, _ in containers])
    if not found and not containers:
        return None
    if not found:
        raise ValueError(f"layer {index} has experts ({containers[0][0]}) and no router to be seen; {_REMEDY}")
    router = found[0]
    if weight is None:
        _check_repeatable(index, router)
    near = [
        module for name, module in containers if f"{router.name}.".startswith(f"{_parent(name)}.") or not _parent(name)
    ]
    experts = near[0] if len(near) == 1 else None
    return Tap(index, router.module, _norm_of(router, calls), experts, weight)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _innermost(calls: list[_Call]) -> list[_Call]:
    return [call for call in calls if not any(other.name.startswith(f"{call.name}.") for other in calls)]


def _holds_experts(module: nn.Module, num_experts: int) -> bool:
    if isinstance(module, nn.ModuleList):
        return len(module) == num_experts and all(any(True for _ in item.parameters()) for item in module)
    # Not the kernel of a convolution over single channels, which has three dimensions as well.
    stacked = (p for p in module.parameters(recurse=False) if p.ndim >= 3 and p.shape[1] > 1)
    return any(p.shape[0] == num_experts for p in stacked)


def _owns_router_weight(call: _Call, num_experts: int) -> bool:
    if not call.inputs:
        return False
    shape = (num_experts, call.inputs[0].shape[-1])
    return any(p.shape == shape for p in call.module.parameters())


def _is_choice(tensor: torch.Tensor, num_experts: int, top_k: int) -> bool:
    return (
        not tensor.is_floating_point()
        and tensor.dtype != torch.bool
        and tensor.ndim > 0
        and tensor.numel() == _PROBE_TOKENS * top_k
        and bool(((tensor >= 0) & (tensor < num_experts)).all())
    )


def _is_logits(tensor: torch.Tensor, num_experts: int) -> bool:
    return (
        tensor.is_floating_point() and tensor.numel() == _PROBE_TOKENS * num_experts and tensor.shape[-1] == num_experts
    )


def _bare(calls: list[_Call], num_experts: int, containers: list[str]) -> tuple[list[_Call], torch.Tensor | None]:
    """A module that holds experts and, as a bare parameter, the router's weight."""
    for call in calls:
        for parameter in call.module.parameters(recurse=False):
            holds = any(name.startswith(f"{call.name}.") for name in containers)
            if holds and call.inputs and parameter.shape == (num_experts, call.inputs[0].shape[-1]):
                return [call], parameter
    return [], None


def _check_repeatable(index: int, router: _Call) -> None:
    """The same input must give the same choice: look-ahead calls the router again."""
    with torch.no_grad():
        again = _flat(router.module.forward(*router.args, **router.kwargs))
    pairs = zip(router.outputs, again, strict=False)
    if len(again) != len(router.outputs) or not all(torch.equal(one, other) for one, other in pairs):
        raise ValueError(f"layer {index}: its router {router.name} does not give the same answer twice; {_REMEDY}")


def _norm_of(router: _Call, calls: list[_Call]) -> nn.Module | None:
    """The first module that turned something else into what the router was given."""
    given = router.inputs[0]
    for call in calls:
        if call is router or not call.inputs or not call.outputs:
            continue
        made, source = call.outputs[0], call.inputs[0]
        if (
            made.numel() == given.numel() == source.numel()
            and torch.equal(made.reshape(-1), given.reshape(-1))
            and not torch.equal(source.reshape(-1), given.reshape(-1))
        ):
            return call.module
    return None
