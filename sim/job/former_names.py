"""Keys of the configuration that have been given other names: a log is older than the program that reads it, and a user
who says a former name is told the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Former(NamedTuple):
    """A key that is called `present` now. place: where it stands (`policy.horizon`; empty: at the top). target: the
    class whose argument it is (empty: none); those of a user's own keep all their keys."""

    place: str
    target: str
    former: str
    present: str


FORMER = (
    Former("", "", "twin", "count_redundant"),
    Former("model", "", "window_every", "attention_pattern"),
    Former("policy.horizon", "expertflow.horizons.adaptive.AdaptiveHorizon", "worth", "decision_share"),
    Former("policy.selection", "expertflow.selections.stall_saved.StallSaved", "price", "copy_weight"),
    Former("policy.predictor", "expertflow.predictors.oracle.OraclePredictor", "outlook", "forecast"),
    Former("policy.predictor", "expertflow.predictors.transition.TransitionPredictor", "warm", "fitted_start"),
)


def present_key(key: str) -> str | None:
    """What the dotted `key` is called now; None if it was never called so."""
    place, _, name = key.rpartition(".")
    for one in FORMER:
        # A predictor may stand a level deeper, as one of those that `auto` takes.
        if one.former == name and (place == one.place or (one.place and place.startswith(f"{one.place}."))):
            return key.removesuffix(name) + one.present
    return None


def refuse_former(cfg: Mapping[str, Any], key: str = "") -> None:
    """ValueError for a former name among the keys of `cfg`, the map that stands at `key`."""
    target = str(cfg.get("_target_", ""))
    for one in FORMER:
        if one.target == target and one.former in cfg and bool(one.target) == bool(key):
            before = f"{key}." if key else ""
            raise ValueError(renamed(before + one.former, before + one.present))


def renamed(former: str, present: str) -> str:
    """What a user is told who says a former name."""
    return f"{former} is called {present} now; say {present}=VALUE"


def with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the past, with its keys by their present names. Parts of a user's own keep all their keys."""
    names = {one.former: one.present for one in FORMER if not one.target}
    return {names.get(key, key): _present(value) for key, value in config.items()}


def _present(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    target = value.get("_target_")
    names = {one.former: one.present for one in FORMER if one.target and one.target == target}
    return {names.get(key, key): _present(one) for key, one in value.items()}
