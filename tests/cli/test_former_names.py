"""A user who says a key by a former name is told the present one, wherever it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf.errors import OmegaConfBaseException

from sim.job.configure import check_arguments, configure
from sim.job.errors import one_line
from sim.job.former_names import FORMER, Former, present_key, with_present_names
from sim.paths import config_files

RENAMED = [
    ("twin", "count_redundant", []),
    ("policy.horizon.worth", "policy.horizon.decision_share", []),
    ("policy.selection.price", "policy.selection.copy_weight", []),
    ("policy.predictor.outlook", "policy.predictor.forecast", ["policy/predictor=oracle"]),
    ("policy.predictor.transition.warm", "policy.predictor.transition.fitted_start", []),
    ("policy.predictor.warm", "policy.predictor.fitted_start", ["policy/predictor=transition"]),
]


def told(words: list[str]) -> str | None:
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as error:
        configure(words)
    return one_line(error.value)


@pytest.mark.parametrize(("former", "present", "more"), RENAMED)
def test_an_override_by_a_former_name_is_told_the_present_one(former: str, present: str, more: list[str]) -> None:
    line = told(["+hardware=a100", "+policy=adaptive", *more, f"{former}=1"])
    assert line == f"{former} is called {present} now; say {present}=VALUE"


@pytest.mark.parametrize("one", [one for one in FORMER if one.target], ids=lambda one: one.former)
def test_a_part_with_a_former_key_is_refused_and_the_class_takes_the_present_one(one: Former) -> None:
    names = get_object(one.target).__init__.__annotations__
    assert one.present in names
    assert one.former not in names
    with pytest.raises(ValueError, match=rf"^{one.place}.{one.former} is called {one.place}.{one.present} now"):
        check_arguments({"_target_": one.target, one.former: 1}, one.place)


def test_at_the_top_too() -> None:
    assert told(["+hardware=a100", "+policy=lru", "+twin=true"]) == (
        "twin is called count_redundant now; say count_redundant=VALUE"
    )


def test_a_part_of_a_users_own_keeps_its_keys() -> None:
    own: dict[str, Any] = {"_target_": "collections.Counter", "worth": 1, "price": 2}
    check_arguments(own, "policy.horizon")
    assert with_present_names({"policy": {"horizon": own}}) == {"policy": {"horizon": own}}
    assert present_key("policy.eviction.worth") is None
    assert present_key("hardware.twin") is None


def test_no_file_of_conf_says_a_former_name() -> None:
    def walk(value: object, path: Path) -> None:
        if isinstance(value, dict):
            for one in FORMER:
                assert one.former not in value or value.get("_target_") != one.target, (path, one.former)
            for inner in value.values():
                walk(inner, path)

    for group in ("policy", *(f"policy/{part}" for part in ("horizon", "selection", "predictor"))):
        for path in config_files(group).values():
            walk(yaml.safe_load(path.read_text(encoding="utf-8")), path)
