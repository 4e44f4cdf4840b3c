"""Which part of a policy takes a key: told where another part was chosen than the one that has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertflow.keys import arguments_of, shown, unknown_key
from sim.paths import config_files
from traces.yamltext import read_yaml

_MOST_NAMED = 3


def no_argument(found: type, key: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for the key `key`.`name`, which the class `found` does not take: it takes `known`."""
    from sim.job.parts import KINDS

    _, _, part = key.partition(".")
    if key == "policy" and name in KINDS:
        return ValueError(
            f"policy.{name}: {found.__name__} is a whole policy, which is not composed of parts; leave the key out, or "
            "choose a policy that is"
        )
    # Of a predictor that stands a level deeper, as one of several, it is known what was meant.
    others = files_with(part, name) if part in KINDS else []
    if not others:
        return unknown_key(key, name, known)
    taken = f"has {', '.join(known[:6])}" if known else "takes no keys"
    return ValueError(
        f"{key}.{name} is no key of {found.__name__}, which {taken}; it is a key of {listed(part, others)}: choose "
        "one that has it, or leave the key out"
    )


def listed(part: str, files: Sequence[str]) -> str:
    """Files of a part as the words that choose them, the first few."""
    more = f" and {len(files) - _MOST_NAMED} more" if len(files) > _MOST_NAMED else ""
    return f"policy/{part}={', '.join(files[:_MOST_NAMED])}{more}"


def files_with(part: str, name: str) -> list[str]:
    """The files of a part, by name, whose class takes the key `name`; the simplest name first."""
    found = []
    for file, path in config_files(f"policy/{part}").items():
        try:
            target = read_yaml(path).get("_target_")
        except ValueError:
            continue
        if name in _keys_of(target, part):
            found.append(file)
    return sorted(found, key=lambda file: (len(file), file))


def _keys_of(target: object, part: str) -> Mapping[str, object]:
    """What the class of a file takes; nothing of a class that cannot be had."""
    from sim.job.parts import KINDS, class_of

    if not isinstance(target, str) or part not in KINDS:
        return {}
    try:
        return arguments_of(class_of({"_target_": target}, f"policy.{part}", KINDS[part]))[0]
    except (ValueError, TypeError, NameError):
        return {}


def no_class(key: str, cfg: Mapping[str, object]) -> ValueError:
    """The error for keys of a part that was not chosen. key: of the part, as policy.place."""
    group, _, part = key.partition(".")
    choice = f"{'+' if part == 'place' else ''}{group}/{part}=NAME" if part else f"+{group}=NAME"
    name = next(iter(cfg), None)
    if name is None:
        return ValueError(f"{key} says nothing; choose a part with {choice}")
    having = files_with(part, str(name))
    hint = f" ({choice.removesuffix('NAME')}{having[0]} has this key)" if having else ""
    return ValueError(
        f"{key}.{str(name)[:60]}={shown(cfg[name])}: no {part or group} was chosen that could have it; add "
        f"{choice}{hint}, or leave it out"
    )
