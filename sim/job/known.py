"""What is said of a key that Hydra does not find: the nearest of those that may stand there, and where all are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from expertflow.keys import declared, near_to
from expertflow.model import ModelSpec
from sim.job.former_names import present_key
from sim.job.keys import CHOSEN_BY_NAME, STORAGE, ModelKeys, PolicyKeys, RunKeys, TraceKeys
from sim.job.parts import KINDS
from sim.paths import config_files
from sim.specs.hardware import Hardware, Stack
from sim.specs.links import LinkPreset
from sim.specs.storage import Storage
from traces.yamltext import read_yaml

LISTED = "`expertflow keys` lists them"
_PARTS = (*KINDS, "transfer", "effort")
_TABLES = {
    "trace": TraceKeys,
    "hardware": Hardware,
    "stack": Stack,
    "model": ModelSpec,
    "link": LinkPreset,
    "storage": Storage,
}
_HYDRAS_GROUPS = tuple(f"hydra/{name}" for name in ("launcher", "sweeper", "job_logging", "hydra_logging", "output"))
_beside: list[str] = []
"""Keys of the command that runs, beside those of every run."""


def known_beside(names: Iterable[str]) -> None:
    """Let messages know the keys that a command has beside those of every run."""
    _beside.extend(name for name in names if name not in _beside)


def known_at(place: str) -> Sequence[str]:
    """The keys that may stand at `place` (`trace`, `policy.horizon`; empty: at the top); none where that is unknown."""
    if not place:
        return [*CHOSEN_BY_NAME, *declared(RunKeys), *_beside]
    if place in _TABLES:
        return [*declared(_TABLES[place]), *(declared(ModelKeys) if place == "model" else ())]
    if place == "policy":
        return [*declared(PolicyKeys), *_PARTS]
    group, _, part = place.partition(".")
    if group != "policy" or part not in _PARTS:
        return []
    # Of a part whose class is not known here: those that files of the group have.
    return sorted({key for path in config_files(f"policy/{part}").values() for key in read_yaml(path)})


def is_known(key: str) -> bool:
    """Whether the dotted `key`, of a group, may be given. Of a part of a policy every name may: its class, which may be
    a user's own, says what it takes when it is made."""
    place, name = key.split(".")[:2]
    if present_key(key):
        # Its present name is told.
        return False
    if place != "policy":
        return name in known_at(place)
    return name in _PARTS and key != f"policy.{name}"


def _near_hydras(key: str) -> str:
    """The key of Hydra's that was meant, where one is near: the words down to the misspelt one are its own."""
    from hydra.conf import HydraConf

    node: Any = OmegaConf.structured(HydraConf)
    before = "hydra"
    for name in key.split(".")[1:]:
        known = [str(one) for one in node] if isinstance(node, DictConfig) else []
        if name not in known:
            return near_to(name, known, f"{before}.")
        node, before = (None if OmegaConf.is_missing(node, name) else node._get_node(name)), f"{before}.{name}"
    return ""


def no_key(key: str) -> str:
    """The message for the dotted `key`, or for the group `policy/part`."""
    shown = key if len(key) <= 60 else f"{key[:59]}…"
    if "/" in key:
        hint = near_to(key, [*(f"policy/{part}" for part in _PARTS), *_HYDRAS_GROUPS])
        return f"{shown} is no group{hint}; {LISTED}"
    if key.startswith("hydra."):
        return f"{shown} is no key of Hydra's{_near_hydras(key)}; `python -m sim --cfg hydra` lists them"
    place, _, name = key.rpartition(".")
    known = known_at(place)
    if place and not known:
        # Whatever stands there: it is the place that is misspelt, or holds no keys.
        above, _, wrong = place.rpartition(".")
        hint = near_to(wrong, known_at(above), f"{above}." if above else "")
        return f"{shown} is no key: there is no {place[:60]}{hint}; {LISTED}"
    if key == STORAGE:
        return f"{key} is a group that a run has only where it is added; say +{key}=NAME and host_memory_gb=GB"
    prefix = f"{place}." if place else ""
    if place and name in known:
        return f"{shown} is not among the keys of the file that was chosen; add it: +{shown}=VALUE"
    return f"{shown} is no key{near_to(name, known, prefix)}; {LISTED}"
