"""The predictor of a policy from its configuration, which may leave the choice to what the trace holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertflow.boundary import is_own_class
from expertflow.keys import literal, plain, shown, unknown_key
from expertflow.parts import Predictor
from sim.job.fitted_start import fitted_arrays, transition_start
from sim.job.parts import check_arguments, class_of, make_part
from traces.reader import Trace

CANDIDATES = ("hybrid", "forest", "lookahead", "transition")
"""Predictors of which an automatic choice takes one."""


def make_predictor(given: Any, trace: Trace, num_layers: int, seed: int) -> Any:
    """The predictor for `trace`, of a model with so many layers. ValueError names key, value and remedy."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"policy.predictor={shown(given)} is no part; choose one with policy/predictor=NAME, e.g. none"
        )
    cfg, key = dict(given), "policy.predictor"
    if "_target_" not in cfg and "transition" in cfg:
        name = _automatic(cfg, trace)
        cfg, key = dict(cfg[name]), f"{key}.{name}"
    found = class_of(cfg, key, Predictor)
    extra: dict[str, Any] = {}
    if "fitted_start" in cfg:
        extra["fitted_start"] = transition_start(cfg.pop("fitted_start"), trace.model, key)
    if "fitted" in cfg:
        extra["fitted"] = fitted_arrays(cfg.pop("fitted"), trace.model, _fitted_kind(found), key)
    if cfg.get("seed", 0) is None:
        cfg["seed"] = seed
    predictor = make_part(cfg, key, Predictor, **extra)
    if predictor.needs_pregate and not _has_lookahead(trace):
        # A predictor's file is called like its configuration.
        name = type(predictor).__module__.rpartition(".")[2]
        raise ValueError(
            f"policy/predictor={name} needs a recorded pre-gate; the trace {trace.name} has none; "
            "choose policy/predictor=transition or auto"
        )
    if not predictor.predicts or num_layers > 1:
        return predictor
    raise ValueError(f"{type(predictor).__name__} looks at later layers, the model has one; use policy/predictor=none")


def chooses_by_trace(policy: Mapping[str, Any]) -> bool:
    """Whether the policy of that configuration leaves it to the trace which predictor it has."""
    cfg = policy.get("predictor")
    return "_target_" not in policy and isinstance(cfg, Mapping) and "_target_" not in cfg


def predictor_name(policy: Mapping[str, Any], trace: Trace) -> str | None:
    """What predicts in the policy of that configuration over `trace`, called as its file is: a class of a user's own by
    its dotted name; None in a policy that has no parts."""
    cfg = policy.get("predictor")
    if "_target_" in policy or not isinstance(cfg, Mapping):
        return None
    if chooses_by_trace(policy):
        return _automatic(cfg, trace)
    found = class_of(cfg, "policy.predictor", Predictor)
    module = found.__module__.rpartition(".")[2]
    return module if is_own_class(found) else f"{found.__module__}.{found.__qualname__}"


def _automatic(cfg: Mapping[str, Any], trace: Trace) -> str:
    """Which of several to take: a network fitted to what the trace holds, else a pre-gate, else the history."""
    for name, part in cfg.items():
        if name not in CANDIDATES:
            raise unknown_key("policy.predictor", name, CANDIDATES)
        # Those that are not taken, too: which one is depends on the trace.
        _check_candidate(part, f"policy.predictor.{name}")
    recorded = _has_lookahead(trace)
    arrays = None
    if "hybrid" in cfg:
        kind = _fitted_kind(class_of(cfg["hybrid"], "policy.predictor.hybrid", Predictor))
        arrays = fitted_arrays(cfg["hybrid"].get("fitted"), trace.model, kind, "policy.predictor.hybrid")
    if arrays is not None and ("pregate" in arrays) == recorded:
        return "hybrid"
    if not recorded:
        return "transition"
    return "forest" if "forest" in cfg else "lookahead"


def _fitted_kind(found: type[Predictor]) -> str:
    """What the class declares; its object is not made yet."""
    kind: object = found.fitted_kind
    if type(kind) is not str:
        name = plain(found.__name__, 60)
        raise ValueError(f"{name}.fitted_kind={literal(kind)} must be text: the kind of a fitted file, or empty")
    return kind


def _check_candidate(cfg: object, key: str) -> None:
    found = class_of(cfg, key, Predictor)
    assert isinstance(cfg, Mapping)
    filled = [name for name in ("fitted", "fitted_start") if name in cfg]
    given = {name: value for name, value in cfg.items() if name not in ("_target_", *filled)}
    check_arguments(found, given, key, tuple(filled))


def _has_lookahead(trace: Trace) -> bool:
    return trace.lookahead is not None or trace.lookahead_ids is not None
