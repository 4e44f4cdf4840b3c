"""A file of a user's own folder, read as a run reads it, without composing anew all that the file does not change.

What Hydra makes of a file of a group is its content under the name of the group, and of the rest of a configuration
the same every time: the rest is composed once. Whatever else a file may ask of Hydra (`defaults`, a package, what it
cannot read or take in) is composed in full, and so is one file in fifty, where both ways must come to the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from sim.job.configure import checked, configure
from sim.job.keys import STORAGE
from sim.paths import CONF, use_own_folder

_ONE_IN = 50
_SMALL = ("trace.num_tokens=4", "trace.num_requests=1")


_HOST_HEAD = b"# @package hardware\n"
"""First line of a file of conf/host: its keys are of the hardware that another file is of."""


def _words(group: str, name: str) -> list[str]:
    machine = f"+hardware={name if group == 'hardware' else 'a100'}"
    if group == STORAGE:
        # A group that a run has only where it is added, with host memory above it.
        return [machine, "+policy=lru", f"+{group}={name}", "host_memory_gb=8", *_SMALL]
    chosen = {"hardware": [], "host": [f"+host={name}"]}.get(group, [f"{group}={name}"])
    return [machine, "+policy=lru", *chosen, *_SMALL]


@cache
def _rest(group: str) -> DictConfig:
    """What a run composes beside the file of `group`: with a file of the package in its place."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        if group == "host":
            return compose("config", overrides=[word for word in _words(group, "") if not word.startswith("+host")])
        return compose("config", overrides=_words(group, min(path.stem for path in (CONF / group).glob("*.yaml"))))


def _at_once(group: str, path: Path) -> DictConfig | None:
    """What Hydra would compose with the file; None where that takes Hydra itself to say."""
    try:
        content = path.read_bytes()
        if group == "host" and not content.startswith(_HOST_HEAD):
            return None
        if b"@package" in content.removeprefix(_HOST_HEAD if group == "host" else b""):
            return None
        # As Hydra's source of files reads it.
        with path.open(encoding="utf-8") as file:
            loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig) or "defaults" in loaded:
            return None
        cfg = _rest(group)
        if group == "host":
            cfg = copy.deepcopy(cfg)
            with open_dict(cfg):
                cfg.hardware.merge_with(loaded)
            return cfg
        with open_dict(cfg):
            cfg[group] = loaded
    except Exception:
        return None
    return cfg


def _in_full(group: str) -> dict[str, Any]:
    return configure(_words(group, "mine"))


def _told(configuration: Callable[[], dict[str, Any]]) -> str:
    try:
        return repr(configuration())
    except ValueError as error:
        return f"refused: {error}"


def _composed(group: str, path: Path) -> dict[str, Any]:
    cfg = _at_once(group, path)
    if cfg is None:
        return _in_full(group)
    if crc32(path.read_bytes()) % _ONE_IN == 0:
        at_once, in_full = _told(lambda: checked(cfg)), _told(lambda: _in_full(group))
        if at_once != in_full:
            raise AssertionError(f"{group}: {at_once} without Hydra, {in_full} with it")
    return checked(cfg)


@contextmanager
def own_folder(group: str, path: Path) -> Iterator[Path]:
    """The file that a run then reads: `path` as GROUP/mine.yaml of a user's own folder.

    The folder stays beside it, and is looked into anew each time.
    """
    if group == "host" and path.is_file():
        # The comment that says so is lost where a mutant is written anew, and all without it are refused.
        headed = path.with_name("headed.yaml")
        headed.write_bytes(_HOST_HEAD + path.read_bytes().removeprefix(_HOST_HEAD))
        path = headed
    folder = path.parent / "own"
    (folder / group).mkdir(parents=True, exist_ok=True)
    link = folder / group / "mine.yaml"
    if not link.is_symlink():
        link.symlink_to(path.absolute())
    try:
        use_own_folder(folder)
        yield path
    finally:
        use_own_folder(None)


def composed(group: str, path: Path) -> dict[str, Any]:
    """The checked configuration with `path` as a user's own file, as a command composes it."""
    with own_folder(group, path) as found:
        return _composed(group, found)
