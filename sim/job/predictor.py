"""The predictor of a policy from its configuration, which may leave the choice to what the trace holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertflow.boundary import is_own_class
from expertflow.keys import arguments_of, literal, near_to, plain, shown, unknown_key
from expertflow.parts import Part, Predictor
from sim.job.fitted_start import fitted_arrays, transition_start
from sim.job.part_keys import files_with, listed
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
    _check_candidate(cfg, key)
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
    _check_candidates(cfg)
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


def check_predictor(given: Any) -> None:
    """ValueError for a key of the predictor that its class does not take. What files hold is not read."""
    if isinstance(given, Mapping) and "_target_" not in given and "transition" in given:
        _check_candidates(given)
    else:
        _check_candidate(given, "policy.predictor")


def _check_candidates(cfg: Mapping[str, Any]) -> None:
    """Of those too that are not taken: which one is depends on the trace."""
    for name, part in cfg.items():
        if name not in CANDIDATES:
            raise _no_candidate(str(name), [one for one in CANDIDATES if one in cfg])
        _check_candidate(part, f"policy.predictor.{name}")


def _no_candidate(name: str, held: list[str]) -> ValueError:
    """The error for a key beside the candidates; one of theirs is told where it belongs."""
    having = [one for one in files_with("predictor", name) if one in held]
    if not having or near_to(name, CANDIDATES):
        return unknown_key("policy.predictor", name, CANDIDATES)
    return ValueError(
        f"policy.predictor.{name[:60]} is a key of {listed('predictor', having)}, and this policy takes the predictor "
        f"that suits the trace; say policy.predictor.{having[0]}.{name[:60]}=VALUE, or choose policy/predictor="
        f"{having[0]}"
    )


def _check_candidate(cfg: object, key: str) -> None:
    found = class_of(cfg, key, Predictor)
    assert isinstance(cfg, Mapping)
    if isinstance(cfg["_target_"], Part):
        # An object, made already.
        return
    try:
        known, open_ended = arguments_of(found)
    except (TypeError, ValueError, NameError):
        known, open_ended = {}, True
    # What names a file is looked at when that is read.
    filled = [name for name in ("fitted", "fitted_start") if name in cfg and (open_ended or name in known)]
    given = {name: value for name, value in cfg.items() if name not in ("_target_", *filled)}
    if given.get("seed", 0) is None:
        # It stands for the run's.
        given["seed"] = 0
    check_arguments(found, given, key, tuple(filled))


def _has_lookahead(trace: Trace) -> bool:
    return trace.lookahead is not None or trace.lookahead_ids is not None
