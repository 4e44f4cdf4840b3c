"""Composing a configuration without Hydra's global state: who asks for it may be a Hydra application of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sim.job.overrides import words_add
from sim.paths import CONF, config_files, own_folder
from traces.yamltext import read_yaml

VERSION_BASE = "1.3"
_COMPOSING = RLock()


def compose(words: Sequence[str], config_name: str = "config") -> DictConfig:
    """A file of `conf/` with these overrides, Hydra's own node `hydra` included; files of the user's own folder too.

    HydraException or OmegaConfBaseException for what cannot be composed.
    """
    with _COMPOSING, _version_base(), words_add():
        told = [*words, *_search_path(config_name)]
        found: DictConfig = _loader().load_configuration(config_name, told, RunMode.RUN, from_shell=False)
        return found


def composed_file(group: str, name: str) -> dict[str, Any]:
    """The keys of a file of a group of `conf/`, or of the user's own folder, with what its `defaults` take from others.

    ValueError, HydraException or OmegaConfBaseException for what cannot be read or composed.
    """
    table = read_yaml(config_files(group)[name])
    if "defaults" not in table:
        return table
    found: dict[str, Any] = OmegaConf.to_container(compose([f"{group}={name}"])[group], resolve=True)  # type: ignore[assignment]
    return found


@lru_cache(maxsize=1)
def _loader() -> Any:
    search_path = create_config_search_path(str(CONF))
    loader = ConfigLoaderImpl(search_path)
    loader.repository = Remembering(search_path)
    return loader


_MOST_REMEMBERED = 1000
_remembered: dict[tuple[str, ...], ConfigResult | None] = {}
"""What was made of a file, by the name that asked for it, its place and its text."""


class Remembering(ConfigRepository):
    """Hydra's, which parses no file again whose text is what it was: that is a third of what composing takes."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        if source is None or (text := _text(source, config_path)) is None:
            return super().load_config(config_path)
        key = (config_path, source.provider, source.path, text)
        if key not in _remembered:
            if len(_remembered) >= _MOST_REMEMBERED:
                _remembered.clear()
            _remembered[key] = super().load_config(config_path)
        # A copy: composing changes it.
        return deepcopy(_remembered[key])


def _text(source: ConfigSource, config_path: str) -> str | None:
    """What a file of a folder says, "" of Hydra's own, which stay; None for what is neither, or cannot be read."""
    if source.scheme() == "pkg" and source.path == "hydra.conf":
        return ""
    if source.scheme() != "file":
        return None
    try:
        return Path(source.path, source._normalize_file_name(config_path)).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


@contextmanager
def _version_base() -> Iterator[None]:
    """Hydra composes as of one version for the whole process: here as of ours, afterwards as of the program's."""
    base = version.VersionBase.instance()
    before = base.version_base
    version.setbase(VERSION_BASE)
    try:
        yield
    finally:
        base.version_base = before


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
