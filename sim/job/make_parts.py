"""The parts of a policy from their configuration, and which predictor `auto` is.

Every user error is a ValueError with one line that names the key, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object, instantiate

from sim.job.configure import check_arguments
from sim.job.fitted_start import fitted_arrays, transition_start
from traces.reader import Trace


def make_part(cfg: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """The object that the configuration at `key` describes; extra: arguments that stand in no configuration."""
    if not isinstance(cfg, Mapping) or "_target_" not in cfg:
        raise ValueError(f"{key} has no _target_; choose a part with {key.replace('.', '/')}=NAME")
    try:
        check_arguments(cfg, key)
        return instantiate(dict(cfg), **extra, _convert_="all")
    except Exception as error:
        message = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(message if message.startswith(key) else f"{key}: {message}") from error


def make_predictor(given: Any, trace: Trace, num_layers: int, seed: int) -> Any:
    """The predictor for `trace`, of a model with so many layers."""
    if not isinstance(given, Mapping):
        raise ValueError(f"policy.predictor={given!r} is no part; choose one with policy/predictor=NAME, e.g. none")
    cfg, key = dict(given), "policy.predictor"
    if "transition" in cfg and "_target_" not in cfg:
        name = _automatic(cfg, trace)
        cfg, key = dict(cfg[name]), f"{key}.{name}"
    extra: dict[str, Any] = {}
    if "fitted_start" in cfg:
        extra["fitted_start"] = transition_start(cfg.pop("fitted_start"), trace.model, key)
    if "fitted" in cfg:
        kind = _fitted_kind(cfg, "policy.predictor")
        extra["fitted"] = fitted_arrays(cfg.pop("fitted"), trace.model, kind, key)
    if cfg.get("seed", 0) is None:
        cfg["seed"] = seed
    predictor = make_part(cfg, "policy.predictor", **extra)
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


def _automatic(cfg: Mapping[str, Any], trace: Trace) -> str:
    """Which of several to take: a network fitted to what the trace holds, else a pre-gate, else the history."""
    recorded = _has_lookahead(trace)
    arrays = None
    if "hybrid" in cfg:
        kind = _fitted_kind(cfg["hybrid"], "policy.predictor.hybrid")
        arrays = fitted_arrays(cfg["hybrid"].get("fitted"), trace.model, kind, "policy.predictor.hybrid")
    if arrays is not None and ("pregate" in arrays) == recorded:
        return "hybrid"
    if not recorded:
        return "transition"
    return "forest" if "forest" in cfg else "lookahead"


def _target(cfg: Mapping[str, Any], key: str) -> Any:
    try:
        return get_object(str(cfg["_target_"]))
    except Exception as error:
        raise ValueError(f"{key}: {str(error.__cause__ or error).splitlines()[0]}") from error


def _fitted_kind(cfg: Mapping[str, Any], key: str) -> str:
    """What kind of fitted file the class that `cfg` names takes."""
    return str(getattr(_target(cfg, key), "fitted_kind", ""))


def _has_lookahead(trace: Trace) -> bool:
    return trace.lookahead is not None or trace.lookahead_ids is not None
