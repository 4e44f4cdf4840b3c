"""Lists in the flags of a validation: what is wrong with one is said in words of that flag."""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.keys import near_to, shown
from sim.paths import config_files

_LISTED = 150


def numbers(flag: str, text: str, kind: type[float] | type[int]) -> list[float]:
    """The numbers of a comma list; ValueError naming the flag."""
    try:
        return [kind(one) for one in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{flag}={text!r} must be {'whole ' if kind is int else ''}numbers, with commas between them"
        ) from None


def names(flag: str, text: str, group: str) -> list[str]:
    """The names of a comma list, each once, all of them files of `group`; ValueError naming the flag."""
    found = [one.strip() for one in text.split(",")]
    if not all(found):
        raise ValueError(f"{flag}={text!r} must be names with commas between them; leave none of them empty")
    for name in found:
        check_named(f"{flag}=", name, group)
    return list(dict.fromkeys(found))


def policies(flag: str, text: str) -> list[str]:
    """The same of policies, and of those with a place: POLICY+PLACE."""
    found = [one.strip() for one in text.split(",")]
    for one in found:
        policy, plus, place = one.partition("+")
        if not policy or (plus and not place):
            raise ValueError(
                f"{flag}={text!r} must be names of policies, POLICY or POLICY+PLACE, with commas between them; leave "
                "none of them empty"
            )
        check_named(f"{flag}=", policy, "policy")
        if plus:
            check_named(f"{flag}={one}: place ", place, "policy/place")
    return list(dict.fromkeys(found))


def check_named(said: str, name: str, group: str) -> None:
    """ValueError if there is no file `name` in the configuration's `group`; `auto` stands for no model of its own.

    said: what stands before the name.
    """
    known = sorted(set(config_files(group)) - {"auto"})
    if name not in known:
        raise ValueError(f"{said}{shown(name)} does not exist{near_to(name, known)}; choose from: {_few(known)}")


def _few(known: Sequence[str]) -> str:
    """As many as a line of a message holds."""
    listed = list(known)
    while len(", ".join(listed)) > _LISTED:
        listed.pop()
    more = len(known) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")
