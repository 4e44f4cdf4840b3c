"""Composing a configuration outside the main command, and the checks that every configuration passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from expertflow.keys import Key, declared, near_to, nearest, shown
from sim.job.batches import batch_config
from sim.job.clashes import (
    check_absent_words,
    check_batch_words,
    check_model_words,
    check_stack_words,
    check_trace_words,
)
from sim.job.compose import compose
from sim.job.former_names import refuse_former
from sim.job.keys import CHOSEN_BY_NAME, DEFAULT_RESIDENCY, GROUPS, RunKeys, check_run
from sim.job.link import check_link_words, with_link
from sim.paths import config_files

KEYS = (*GROUPS, *declared(RunKeys))
"""Those that every run has."""
_OF_A_GROUP = re.compile(r"^[+~]*([\w/]+)(?:@[\w.:@/]*)?=\s*(.*)$", re.DOTALL)
_ENDLESS = re.compile(r"\d{4000}")
_NO_NAME = re.compile(r"[\[{]|(null|true|false|[-+]?[\d.][\d._e+-]*|nan|[-+]?inf|)$", re.IGNORECASE)


def configure(
    overrides: list[str], config_name: str = "config", own_keys: Mapping[str, Key] | None = None
) -> dict[str, Any]:
    """A configuration as `python -m sim` composes it, checked, as plain values.

    config_name, own_keys: another file of `conf/`, and the keys that it has beside `KEYS`.
    """
    check_words(overrides)
    cfg = compose(overrides, config_name)
    with open_dict(cfg):
        del cfg["hydra"]
    return checked(cfg, own_keys)


def check_words(words: Sequence[str]) -> None:
    """ValueError for an override that Hydra would take for something else, or of which it would not say which it was.

    Of a list of files Hydra takes each, one over the other.
    """
    for word in words:
        if word.startswith("="):
            raise ValueError(f"cannot read the override {shown(word)}: it has no key; give key=value")
        if _ENDLESS.search(word):
            raise ValueError(f"{word[:60]}… holds a number of thousands of digits; no key takes one")
        found = _OF_A_GROUP.match(word)
        if found is None or not ("/" in found[1] or found[1] in CHOSEN_BY_NAME) or found[1].startswith("hydra"):
            continue
        group = found[1]
        value = next((one for one in _items(found[2].strip()) if _NO_NAME.match(one)), None)
        if value is not None:
            names = sorted(config_files(group))
            hint = near_to(value, names)
            remedy = "" if hint else " (to sweep over several: -m and a comma list, without brackets)"
            raise ValueError(
                f"{group}={value[:60]} must be the name of one file{hint}; choose from: "
                f"{nearest(value, names, 120)}{remedy}"
            )
    check_link_words(words)
    check_trace_words(words)
    check_model_words(words)
    check_stack_words(words)
    check_batch_words(words)
    check_absent_words(words)


def _items(value: str) -> list[str]:
    """What a sweep takes one after the other: of a comma list its items, else the value alone."""
    return [value] if value[:1] in ("[", "{", "'", '"') else [one.strip() for one in value.split(",")]


def checked(
    cfg: DictConfig, own_keys: Mapping[str, Key] | None = None, own_hardware: Sequence[str] = ()
) -> dict[str, Any]:
    """Plain values of a composed configuration; ValueError for what would silently mean something else.

    own_keys: those that a command has beside the run's; own_hardware: names that it knows beside the files.
    """
    _require_groups(cfg, own_hardware)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    refuse_former(plain)
    check_run(plain, own_keys or {})
    batch_config(plain)
    return settled(plain)


def settled(plain: dict[str, Any]) -> dict[str, Any]:
    """The same with what stands for a key that is left out because another may say it."""
    plain = with_link(plain)
    if plain["residency"] is None and plain["gpu_memory_gb"] is None:
        return {**plain, "residency": DEFAULT_RESIDENCY}
    return plain


def _require_groups(cfg: DictConfig, own_hardware: Sequence[str]) -> None:
    """`hardware` and `policy` have no default: say what there is to choose from."""
    for group in ("hardware", "policy"):
        choices = [*(own_hardware if group == "hardware" else ()), *sorted(config_files(group))]
        # A file of conf/host fills in keys of the hardware that another file is of.
        is_hosts_alone = group == "hardware" and isinstance(cfg.get(group), DictConfig) and "name" not in cfg[group]
        if OmegaConf.is_missing(cfg, group) or group not in cfg or is_hosts_alone:
            raise ValueError(f"{group} is not chosen; say +{group}=NAME with one of: {nearest('', choices)}")
        if not isinstance(cfg[group], DictConfig):
            raise ValueError(
                f"{group}={shown(cfg[group])} is no choice; say +{group}=NAME with one of: {nearest('', choices)}"
            )
