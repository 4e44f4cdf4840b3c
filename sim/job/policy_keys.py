"""A policy's keys, held against what its parts take: before anything runs, and before there is a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertflow.keys import from_mapping, unknown_key
from expertflow.parts import Effort, Part
from expertflow.policy import Policy
from sim.job.keys import STORAGE
from sim.job.parts import KINDS, check_arguments, class_of
from sim.job.predictor import check_predictor
from sim.job.setup import OPTIONAL, Transfer
from sim.specs.hardware import hardware_from_dict, stack_from_dict
from sim.specs.storage import storage_from_dict

_FILE_OF = "used_on"
"""Of a place: a trace, which is read when the place is made."""


def check_ahead(cfg: Mapping[str, Any]) -> None:
    """ValueError, one line, for what is wrong with a checked configuration whatever its trace and its model hold."""
    hardware_from_dict(cfg["hardware"])
    stack_from_dict(cfg["stack"])
    if cfg.get(STORAGE) is not None:
        storage_from_dict(cfg[STORAGE])
    check_policy(cfg["policy"])


def check_policy(policy: Mapping[str, Any]) -> None:
    """ValueError, one line, for a key that no part of a composed policy takes, or whose value it does not.

    Of what only the trace can tell nothing is said.
    """
    if "_target_" in policy:
        own = {key: value for key, value in policy.items() if key not in ("name", "transfer", "place", "_target_")}
        check_arguments(class_of(policy, "policy", Policy), own, "policy", ("future",))
    else:
        for key in policy:
            if key not in (*KINDS, *OPTIONAL):
                raise unknown_key("policy", key, [*KINDS, *OPTIONAL])
    for part, kind in KINDS.items():
        if part == "predictor" and part in policy:
            check_predictor(policy[part])
        elif part in policy:
            _check_part(policy[part], f"policy.{part}", kind)
    for name, table in (("transfer", Transfer), ("effort", Effort)):
        if isinstance(policy.get(name), Mapping):
            from_mapping(table, policy[name], f"policy.{name}")


def _check_part(cfg: Any, key: str, kind: type) -> None:
    found = class_of(cfg, key, kind)
    if isinstance(cfg["_target_"], Part):
        # An object, made already.
        return
    filled = (_FILE_OF,) if _FILE_OF in cfg else ()
    given = {name: value for name, value in cfg.items() if name not in ("_target_", *filled)}
    check_arguments(found, given, key, filled)
