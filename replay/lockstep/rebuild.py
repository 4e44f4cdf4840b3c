"""From the header of a log to the workload and the fresh policy that it was written with.

A log is data of unknown origin: it holds plain values only, and code that it names is run only if it is this package's
or if the user names it as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import OmegaConf

from expertflow.policy import Policy
from replay.lockstep.log_format import LogError
from replay.lockstep.log_reader import LogReader
from sim.job.configure import KEYS, checked
from sim.job.former_names import with_present_names
from sim.job.keys import STORAGE
from sim.job.setup import Workload, make_policy, make_workload
from sim.specs.links import PROFILE


def rebuild(reader: LogReader, overrides: Sequence[str] = ()) -> tuple[Workload, Policy]:
    """Workload and fresh policy of the logged configuration, with `overrides` (key=value) put over it.

    A log is data of unknown origin: code that it names is run only if it is this package's, or if an override names
    it as well. ValueError says which override is wanted.
    """
    logged = with_present_names(reader.header.config)
    # Keys that came later, as they were before.
    plain: dict[str, Any] = {
        "timeout_s": None,
        "link": {"name": PROFILE},
        "speculate": None,
        "draft_ms": 0,
        "host_memory_gb": None,
    } | {key: value for key, value in logged.items() if key in (*KEYS, STORAGE)}
    if STORAGE not in plain:
        # Of a replay it is the budget of buffers, which decides nothing.
        plain["host_memory_gb"] = None
    if plain.get("gpu_memory_gb") is not None:
        # Logs once held the default of the one beside the other.
        plain["residency"] = None
    for place, text in _texts(plain, ""):
        if "${" in text:
            raise LogError(f"{reader.path}: {place}={text!r:.80} holds an interpolation; a log holds plain values only")
    cfg = OmegaConf.create(plain)
    trusted = set()
    for key, value in _parsed(overrides):
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        if key.rpartition(".")[2] == "_target_":
            trusted.add((key, value))
    config = checked(cfg)
    for place, target in _texts(config["policy"], "policy"):
        if place.rpartition(".")[2] == "_target_" and (place, target) not in trusted and not _is_own(target):
            raise ValueError(
                f"{reader.path}: {place}={target!r:.120} is no code of this package; if you trust it, "
                f"say so: {place}={target:.120}"
            )
    work = make_workload(config)
    policy, _ = make_policy(config["policy"], work, config["seed"])
    return work, policy


def _parsed(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        key = override.key_or_group
        if override.is_delete() or override.is_sweep_override() or "/" in key or override.package is not None:
            raise ValueError(f"{text} cannot be put over a log; give key=value, such as trace.path=FILE")
        yield key, override.value()


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text and every key inside `value`."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield place, str(key)
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}.{index}")


def _is_own(target: str) -> bool:
    """Whether `target` is defined in this package; importing it to see runs nothing else."""
    if not re.fullmatch(r"expertflow(\.[A-Za-z_][A-Za-z0-9_]*)+", target):
        return False
    try:
        module = getattr(get_object(target), "__module__", None)
    except Exception:
        # What cannot be imported cannot run; the composition says why.
        return True
    return isinstance(module, str) and module.split(".")[0] == "expertflow"
