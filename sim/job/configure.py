"""Composing a configuration outside the main command, and the checks that every configuration passes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from sim.job.former_names import refuse_former
from sim.paths import CONF, config_files, own_folder

COMPARE = ("full", "floor", "none")
_SWITCHES = ("count_redundant", "timeline", "events", "skip_done")
KEYS = (
    "hardware",
    "policy",
    "model",
    "stack",
    "trace",
    "residency",
    "gpu_memory_gb",
    "batch_size",
    "prefill_chunk",
    "max_tokens",
    "chunk_mib",
    "channel_depth",
    "start",
    "warmup_forwards",
    "seed",
    "compare",
    *_SWITCHES,
)


def configure(overrides: list[str], config_name: str = "config", own_keys: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration as `python -m sim` composes it, checked, as plain values.

    config_name, own_keys: another file of `conf/`, and the keys that it has beside `KEYS`.
    """
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose(config_name=config_name, overrides=[*overrides, *_search_path(config_name)])
    return checked(cfg, own_keys)


def _search_path(config_name: str) -> list[str]:
    """The override that lets Hydra find the user's own files, as its flag --config-dir does."""
    own = own_folder()
    if own is None:
        return []
    # An override takes the place of what the file itself names.
    named = OmegaConf.select(OmegaConf.load(CONF / f"{config_name}.yaml"), "hydra.searchpath") or []
    places = [str(place).replace("\\", "\\\\").replace("'", "\\'") for place in [*named, f"file://{own}"]]
    quoted = ",".join(f"'{place}'" for place in places)
    return [f"hydra.searchpath=[{quoted}]"]


def checked(cfg: DictConfig, own_keys: Sequence[str] = (), own_hardware: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values of a composed configuration; ValueError for what would silently mean something else."""
    _require_groups(cfg, own_hardware)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    known = (*KEYS, *own_keys)
    refuse_former(plain)
    for key in plain:
        if key not in known:
            raise ValueError(f"{key} is no key; known: {', '.join(known)}")
    for key in known:
        if key not in plain:
            raise ValueError(f"{key} is missing; it cannot be taken out, only given another value")
    for key in ("hardware", "policy", "model", "stack", "trace"):
        if not isinstance(plain[key], dict):
            raise ValueError(f"{key}={plain[key]!r} must be the name of a file in conf/{key}")
    if plain["compare"] not in COMPARE:
        raise ValueError(f"compare={plain['compare']!r} is unknown; choose one of: {', '.join(COMPARE)}")
    for key in _SWITCHES:
        if not isinstance(plain[key], bool):
            raise ValueError(f"{key}={plain[key]!r} must be true or false")
    if not isinstance(plain["seed"], int) or isinstance(plain["seed"], bool) or plain["seed"] < 0:
        raise ValueError(f"seed={plain['seed']!r} must be a whole number of at least 0")
    return plain


def _require_groups(cfg: DictConfig, own_hardware: Sequence[str]) -> None:
    """`hardware` and `policy` have no default: say what there is to choose from."""
    for group in ("hardware", "policy"):
        more = own_hardware if group == "hardware" else ()
        choices = ", ".join([*more, *sorted(config_files(group))])
        if OmegaConf.is_missing(cfg, group) or group not in cfg:
            raise ValueError(f"{group} is not chosen; say +{group}=NAME with one of: {choices}")
        if not isinstance(cfg[group], DictConfig):
            raise ValueError(f"{group}={cfg[group]!r} is no choice; say +{group}=NAME with one of: {choices}")


def check_arguments(cfg: Mapping[str, Any], key: str) -> None:
    """Names, types and finiteness of a part's arguments, by the annotations of its constructor."""
    target = get_object(cfg["_target_"])
    if not inspect.isclass(target):
        return
    refuse_former(cfg, key)
    hints = get_type_hints(target.__init__)
    for name, value in cfg.items():
        expected = hints.get(name)
        if expected is float and not (_is_number(value) and math.isfinite(value)):
            raise ValueError(f"{key}.{name}={value!r} must be a finite number")
        if expected is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{key}.{name}={value!r} must be a whole number")
        if expected is bool and not isinstance(value, bool):
            raise ValueError(f"{key}.{name}={value!r} must be true or false")
        if expected is str and not isinstance(value, str):
            raise ValueError(f"{key}.{name}={value!r} must be text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
