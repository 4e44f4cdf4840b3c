"""What a run's policy and its hardware are called where they are shown: by name, and by what the command changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from expertflow.keys import shown

_OF_A_KEY = re.compile(r"[+~]*policy\.")
_OF_A_PART = re.compile(r"[+~]*policy/(\w+)[^=]*=(.*)", re.DOTALL)
Composed = Callable[[Sequence[str]], Mapping[str, Any]]
"""The group `policy` of the configuration that overrides give."""


def policy_title(policy: Mapping[str, Any]) -> str:
    """The name of the running job's policy, with its file where that is called otherwise, and with what differs from
    it. policy: its composed configuration.

    Equal to the name alone if and only if the policy is as the file of that name has it.
    """
    job = HydraConfig.get()
    name, words = str(job.job.config_name), list(job.overrides.task)
    return titled(policy, str(job.runtime.choices["policy"]), words, lambda other: _composed(other, name))


def titled(policy: Mapping[str, Any], file: str, words: Sequence[str], composed: Composed) -> str:
    """The same of any composition: its file of `conf/policy`, and the overrides that it was composed of."""
    name = str(policy["name"])
    title = name if file == name else f"{name} of {file}.yaml"
    changed = _changes(policy, words, composed)
    return f"{title} with {', '.join(changed)}" if changed else title


def hardware_title(metrics: Mapping[str, Any]) -> str:
    """The name of the hardware, with the link where one was chosen, and what was asked for where that is more."""
    name, link = str(metrics["hardware"]), metrics.get("link_preset")
    if link is None:
        return name
    asked = "" if link["asked"] == link["name"] else f" of {link['asked']}"
    return f"{name} (link {link['name']}{asked}, {link['gb_per_s']:.3g} GB/s)"


def stack_title(metrics: Mapping[str, Any]) -> str:
    """The name of the stack, with the time that its overheads were solved from, if they were."""
    name, solved = str(metrics["stack"]), metrics.get("stack_solved")
    return name if solved is None else f"{name} (resident {solved['resident_tpot_ms']:g} ms)"


def _changes(policy: Mapping[str, Any], words: Sequence[str], composed: Composed) -> list[str]:
    """`part=FILE` where another file of a part was chosen, `part=CLASS` where another class, else `part.key=value`."""
    others = [word for word in words if not _OF_A_KEY.match(word) and not _OF_A_PART.match(word)]
    parts = [word for word in words if _OF_A_PART.match(word)]
    if len(others) == len(words):
        return []
    file = composed(others)
    chosen = composed([*others, *parts]) if parts else file
    found = []
    for match in filter(None, map(_OF_A_PART.match, parts)):
        if file.get(match[1]) != chosen.get(match[1]):
            found.append(f"{match[1]}={match[2]}")
    return found + [
        f"{key.removesuffix('._target_')}={value}" for key, value in _differences(chosen, policy) if key != "name"
    ]


def _composed(words: Sequence[str], config_name: str) -> dict[str, Any]:
    """The group `policy` of a configuration, read as the running job's was."""
    cfg = GlobalHydra.instance().config_loader().load_configuration(config_name, list(words), RunMode.RUN)
    found: dict[str, Any] = OmegaConf.to_container(cfg.policy, resolve=True)  # type: ignore[assignment]
    return found


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value, as text, of each entry that `now` has otherwise; a key that is gone is null, but for an
    argument of a class in whose place there is another."""
    gone = [key for key in before if key not in now] if before.get("_target_") == now.get("_target_") else []
    for key in (*now, *gone):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif isinstance(new, Mapping):
            yield from _differences({}, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, new[:60] if isinstance(new, str) else shown(new)
