"""The parts of a policy from their configuration: which class, whether it is one of the right kind, its arguments.

Nothing that a configuration names is called before it is known to be a class of the kind that was asked for, and
nothing in its arguments is called at all. To find a class its module must be imported.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from expertflow import parts
from expertflow.boundary import INTERRUPTIONS, declared, is_own_class, line_of, words_of
from expertflow.keys import REQUIRED, arguments_of, plain, shown
from expertflow.parts import (
    Eviction,
    Horizon,
    Order,
    Part,
    Place,
    Predictor,
    Selection,
    fault_of,
    faults_put_off,
)
from sim.job.former_names import refuse_former
from sim.job.part_keys import no_argument, no_class

KINDS: Mapping[str, type] = {
    "predictor": Predictor,
    "horizon": Horizon,
    "selection": Selection,
    "eviction": Eviction,
    "order": Order,
    "place": Place,
}
"""The parts of a policy by key, and what the class of each derives from."""
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def class_of(cfg: object, key: str, kind: type) -> type:
    """The class that `cfg` names; ValueError that names `key` unless it derives from `kind`."""
    if not isinstance(cfg, Mapping) or "_target_" not in cfg:
        if isinstance(cfg, Mapping):
            raise no_class(key, cfg)
        raise ValueError(f"{key}={shown(cfg)} is no part; choose a part with {key.replace('.', '/')}=NAME")
    target, name = cfg["_target_"], f"{key}._target_"
    wanted = f"must name a class that derives from {kind.__module__}.{kind.__name__}"
    if isinstance(target, Part | type):
        # Given in Python: no file can hold one.
        return _given(target, key, kind)
    if not isinstance(target, str) or len(target) > 500 or not _DOTTED.fullmatch(target):
        raise ValueError(f"{name}={shown(target)} {wanted}, as package.module.Class")
    found = _looked_up(target, name)
    if not isinstance(found, type):
        raise ValueError(f"{name}={shown(target)} {wanted}; it is a {type(found).__name__}, and was not called")
    if not issubclass(found, kind) or found is kind or found.__module__ == parts.__name__:
        raise ValueError(f"{name}={shown(target)} {wanted}; this one does not, and was not called")
    if fault := fault_of(found):
        raise ValueError(f"{name}={shown(target)}: {fault}")
    return found


def _given(target: Part | type, key: str, kind: type) -> type:
    """The class of an object, or the class itself, under the same condition."""
    found = target if isinstance(target, type) else type(target)
    if not issubclass(found, kind) or found is kind or found.__module__ == parts.__name__:
        wanted = f"a class that derives from {kind.__module__}.{kind.__name__}"
        raise ValueError(f"{key}={plain(dotted(found), 80)} must be {wanted}, or an object of one; this one is not")
    if fault := fault_of(found):
        raise ValueError(f"{key}: {fault}")
    return found


def dotted(found: type) -> str:
    """What a configuration calls a class."""
    return f"{found.__module__}.{found.__qualname__}"


def _looked_up(target: str, name: str) -> Any:
    """What `target` names: the longest module in it that is there, and attributes from there on."""
    words = target.split(".")
    module = None
    for number in range(1, len(words)):
        path = ".".join(words[:number])
        try:
            with faults_put_off():
                module = importlib.import_module(path)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and error.name is not None and path.startswith(error.name):
                if module is None:
                    raise ValueError(
                        f"{name}={shown(target)}: there is no module {words[0]}; it is looked for in the current "
                        "folder and among what is installed"
                    ) from None
                break
            line = plain(words_of(error), 120)
            raise ValueError(
                f"{name}={shown(target)}: importing {path} failed: {type(error).__name__}: {line}"
            ) from error
        if not hasattr(module, "__path__"):
            break
    found, place = module, module.__name__ if module is not None else ""
    for word in words[place.count(".") + 1 :]:
        try:
            found = getattr(found, word)
        except AttributeError:
            raise ValueError(f"{name}={shown(target)}: {place} has no {word}; check the name") from None
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            told = f"{place}.{word} raised {type(error).__name__}: {plain(words_of(error), 120)}"
            raise ValueError(f"{name}={shown(target)}: {told}") from error
        place = f"{place}.{word}"
    return found


def make_part(cfg: object, key: str, kind: type, **extra: Any) -> Any:
    """The part that `cfg` describes, of a class that derives from `kind`. extra: arguments that no configuration gives.

    ValueError, one line that names the key, for a wrong class or a wrong argument; for what was made, if it is of
    another class, or declares what it may not, one line that names the class.
    """
    found = class_of(cfg, key, kind)
    assert isinstance(cfg, Mapping)
    given = {name: value for name, value in cfg.items() if name != "_target_"}
    if isinstance(cfg["_target_"], Part):
        return _copied(cfg["_target_"], [*given, *extra], key, kind)
    check_arguments(found, given, key, tuple(extra))
    try:
        made = found(**given, **extra)
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        raise _not_made(found, error, key) from error
    if kind in KINDS.values():
        declared(made, kind)
    return made


def _not_made(found: type, error: BaseException, key: str) -> ValueError:
    """The error for a part whose constructor has raised `error`: of a class of ours what it says of its arguments."""
    line = words_of(error) if isinstance(error, Exception) else ""
    if line and (line.startswith(key) or (isinstance(error, ValueError) and is_own_class(found))):
        return ValueError(line if line.startswith(key) else f"{key}: {line}")
    where = line_of(error, found)
    head = f"{key}: {plain(found.__name__, 60)} raised {plain(type(error).__name__, 60)} when it was made"
    at = f" at {where}" if where else ""
    return ValueError(f"{head}{at}{f': {plain(line, 120)}' if line else ''}; mend the part")


def _copied(part: Part, given: list[str], key: str, kind: type) -> Part:
    """An object that was made already, anew for each run: what one run leaves in it, no other finds."""
    name = plain(type(part).__name__, 60)
    if given:
        raise ValueError(f"{key}.{given[0]} would have no effect: {key} is an object; give it to {name} itself")
    try:
        made = deepcopy(part)
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        told = f"{type(error).__name__}: {plain(words_of(error), 100)}"
        raise ValueError(f"{key}: this {name} cannot be copied for the run ({told}); give the class instead") from error
    declared(made, kind)
    return made


def check_arguments(found: type, given: Mapping[str, Any], key: str, extra: tuple[str, ...] = ()) -> None:
    """ValueError that names `key`.argument unless the class takes `given`, by what its constructor declares."""
    refuse_former({"_target_": f"{found.__module__}.{found.__qualname__}", **given}, key)
    try:
        known, open_ended = arguments_of(found)
    except (TypeError, ValueError, NameError) as error:
        raise ValueError(f"{key}: the arguments of {found.__name__} cannot be read: {error}") from error
    for name, value in given.items():
        _refuse_code(value, f"{key}.{name}", name)
        if name in extra or (name not in known and not open_ended):
            raise no_argument(found, key, name, [one for one in known if one not in extra])
        if name in known:
            known[name].check(value, f"{key}.{name}")
    for name, one in known.items():
        if one.default is REQUIRED and name not in given and name not in extra:
            raise ValueError(f"{key}.{name} is missing: {found.__name__} needs it; say +{key}.{name}=VALUE")


def _refuse_code(value: Any, place: str, name: str) -> None:
    """ValueError for a key such as `_partial_`, or a `_target_` inside an argument: an argument is a plain value."""
    if name.startswith("_"):
        raise ValueError(f"{place}={shown(value)} is no argument: of a part's keys only _target_ begins with _")
    if isinstance(value, Mapping):
        for inner, one in value.items():
            _refuse_code(one, f"{place}.{inner}", str(inner))
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            _refuse_code(one, f"{place}.{index}", "")
