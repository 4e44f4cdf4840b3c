"""What a run's policy is called where it is shown: its name, and what the command changed of the file it is from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from expertflow.keys import shown

_OF_A_KEY = re.compile(r"[+~]*policy\.")
_OF_A_PART = re.compile(r"[+~]*policy/(\w+)[^=]*=(.*)", re.DOTALL)


def policy_title(policy: Mapping[str, Any]) -> str:
    """The name of the running job's policy, with its file where that is called otherwise, and with what differs from
    it. policy: its composed configuration.

    Equal to the name alone if and only if the policy is as the file of that name has it.
    """
    job = HydraConfig.get()
    name, file, words = str(policy["name"]), str(job.runtime.choices["policy"]), list(job.overrides.task)
    title = name if file == name else f"{name} of {file}.yaml"
    changed = _changes(policy, words, str(job.job.config_name))
    return f"{title} with {', '.join(changed)}" if changed else title


def _changes(policy: Mapping[str, Any], words: Sequence[str], config_name: str) -> list[str]:
    """`part=FILE` where another file of a part was chosen, `part=CLASS` where another class, else `part.key=value`."""
    others = [word for word in words if not _OF_A_KEY.match(word) and not _OF_A_PART.match(word)]
    parts = [word for word in words if _OF_A_PART.match(word)]
    if len(others) == len(words):
        return []
    file = _composed(others, config_name)
    chosen = _composed([*others, *parts], config_name) if parts else file
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
