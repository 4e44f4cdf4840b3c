"""What `--help` lists of a command whose words are Hydra's: the groups, and the files there are of each."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from traces.shipped import RECORDINGS, is_here

WIDTH = 80
_CHECKOUT = " (in a checkout only)"
_NO_CHOICE = ("study",)
"""A folder of files that no run takes: `python -m sim.study NAME` does."""


def groups_text() -> str:
    """A line or more for each group: those that come with the package, and of the folder of --config-dir."""
    found: dict[str, set[str]] = defaultdict(set)
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "hydra" or source.schema not in ("file", "pkg"):
            continue
        folder = Path(source.path) if source.schema == "file" else Path(str(files(source.path)))
        for path in folder.rglob("*.yaml"):
            place = path.relative_to(folder).parent
            if place.parts and place.parts[0] not in _NO_CHOICE:
                found[place.as_posix()].add(path.stem)
    if "trace" in found:
        found["trace"] = {f"{name}{_CHECKOUT if _is_elsewhere(name) else ''}" for name in found["trace"]}
    lines = [f"{group}: {', '.join(sorted(names))}" for group, names in sorted(found.items())]
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
        for line in lines
    )


def _is_elsewhere(name: str) -> bool:
    return name in RECORDINGS and not is_here(name)


def register() -> None:
    """Let a help text of conf/ say `${groups:}`."""
    OmegaConf.register_new_resolver("groups", groups_text, replace=True)
