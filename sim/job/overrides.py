"""What a word of a command line may change beyond what Hydra allows by itself.

Hydra changes only keys that the chosen file has. Here a key may also be given that its group knows and the file leaves
out (`hardware.link_slowdown=1.5`), in a sweep over that group too; and a part's `_target_` may be given alone: of the
file's arguments those stay that the other class takes. A word that says how large experts are takes the place of sizes
that a file or the trace gives. Every composition goes this way, also those of worker processes and of the title of a
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict

from expertflow.expert_sizes import BY_BITS
from expertflow.keys import arguments_of
from sim.job.keys import CHOSEN_BY_NAME
from sim.job.known import is_known
from sim.job.parts import KINDS, class_of

_APPLY = "_apply_overrides_to_config"
_EXPERT_WIDTHS = ("hidden_size", "expert_intermediate", "expert_hidden", "expert_matrices")
_hydras_own = ConfigLoaderImpl._apply_overrides_to_config


def let_words_add() -> None:
    """From here on Hydra applies words as this module says, in the whole process: for commands."""
    setattr(ConfigLoaderImpl, _APPLY, staticmethod(_apply))


@contextmanager
def words_add() -> Iterator[None]:
    """Hydra applies words as this module says for so long: for who composes in another's program."""
    before = ConfigLoaderImpl.__dict__[_APPLY]
    let_words_add()
    try:
        yield
    finally:
        setattr(ConfigLoaderImpl, _APPLY, before)


def _apply(overrides: Sequence[Override], cfg: DictConfig) -> None:
    words = list(_as_meant(overrides, cfg))
    left = dict(_of_other_classes(words, cfg))
    is_by_bits = _is_by_bits(words, cfg)
    _hydras_own(words, cfg)
    if is_by_bits:
        with open_dict(cfg.model):
            cfg.model.expert_bytes = BY_BITS
    for part, names in left.items():
        _leave_out(cfg.policy[part], part, names)


def _as_meant(overrides: Sequence[Override], cfg: DictConfig) -> Iterator[Override]:
    for one in overrides:
        group, dot, _ = one.key_or_group.partition(".")
        if (
            one.type is not OverrideType.CHANGE
            or not dot
            or group not in CHOSEN_BY_NAME
            or not is_known(one.key_or_group)
        ):
            yield one
        elif isinstance(OmegaConf.select(cfg, group, throw_on_missing=False), DictConfig):
            added = copy(one)
            added.type = OverrideType.FORCE_ADD
            yield added
        # Else the group is swept over, and this is what its runs have in common: each of them applies the word anew.


def _is_by_bits(words: Sequence[Override], cfg: DictConfig) -> bool:
    """Whether words say what the size of experts follows from, and not that size itself. Widths of a model that words
    alone describe change nothing: there is no other size."""
    table = OmegaConf.select(cfg, "model", throw_on_missing=False)
    if not isinstance(table, DictConfig):
        return False
    given = {
        one.key_or_group.removeprefix("model."): one.value()
        for one in words
        if one.key_or_group.startswith("model.") and not one.is_delete()
    }
    if given.get("expert_bytes") is not None:
        return False
    is_file = "num_layers" in table or table.get("path") is not None or given.get("path") is not None
    if "expert_bits" in given:
        return is_file or "num_layers" in given
    return is_file and any(key in given for key in _EXPERT_WIDTHS)


def _of_other_classes(words: Sequence[Override], cfg: DictConfig) -> Iterator[tuple[str, list[str]]]:
    """Each part to which a word gives another class, with the arguments that its file gives and no word does."""
    given = {one.key_or_group: one.value() for one in words if not one.is_delete()}
    for part in KINDS:
        key = f"policy.{part}"
        table = OmegaConf.select(cfg, key, throw_on_missing=False)
        target = given.get(f"{key}._target_")
        if not isinstance(table, DictConfig) or target is None or table.get("_target_") == target:
            continue
        told = {name.removeprefix(f"{key}.").partition(".")[0] for name in given if name.startswith(f"{key}.")}
        yield part, [str(name) for name in table if name != "_target_" and name not in told]


def _leave_out(table: DictConfig, part: str, names: Sequence[str]) -> None:
    """Take those of `names` out that the part's class does not take. What is wrong with the class is said later."""
    plain: Mapping[str, Any] = {"_target_": table.get("_target_")}
    try:
        known, open_ended = arguments_of(class_of(plain, f"policy.{part}", KINDS[part]))
    except (ValueError, TypeError, NameError):
        return
    with open_dict(table):
        for name in names:
            if name not in known and not open_ended:
                del table[name]
