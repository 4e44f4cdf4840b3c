"""Words of a command line of which one would be ignored, refused before anything is composed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sim.job.keys import GROUPS

_WORD = re.compile(r"[+~]*([\w./-]+)(?:@[\w.:@/]*)?=(.*)", re.DOTALL)
_SHOWN = 60


def _given(words: Iterable[str]) -> list[tuple[str, str]]:
    return [(match[1], match[2].strip()) for match in map(_WORD.fullmatch, words) if match]


def check_twice(words: Sequence[str]) -> None:
    """ValueError for a key that is given two values: Hydra takes the last. Of a group it says so itself."""
    seen: dict[str, str] = {}
    for key, value in _given(words):
        before = seen.setdefault(key, value)
        if before != value and key not in GROUPS and "/" not in key:
            name = key[:_SHOWN]
            raise ValueError(
                f"{name}={before[:_SHOWN]} and {name}={value[:_SHOWN]}: {name} is given twice; leave one out "
                "(to run both: -m and a comma list)"
            )


def check_trace_words(words: Sequence[str]) -> None:
    """ValueError for a trace that is named beside one whose file is given, which takes its place."""
    given = dict(_given(words))
    name, path = given.get("trace"), given.get("trace.path")
    if name is not None and name != "default" and path is not None:
        raise ValueError(f"trace={name[:_SHOWN]} and trace.path={path[:_SHOWN]} are two traces; leave one out")
