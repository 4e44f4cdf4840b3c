"""What fitting needs and a plain installation lacks: a missing package is one line with the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from traces.container import TraceError
from traces.extras import install


@contextmanager
def asked_for_by(name: str) -> Iterator[None]:
    """TraceError where the body does not find a module: `name` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TraceError(_needs(name, error.name or "")) from None


def check_packages(names: Iterable[str], modules: Mapping[str, Sequence[str]]) -> None:
    """TraceError that says which of `names` need a module that is missing. modules: what each of them needs, if any.

    Before anything is fitted: to learn it of the last one costs the minutes that the others took.
    """
    needed = {name: modules.get(name, ()) for name in names}
    for module in dict.fromkeys(module for wanted in needed.values() for module in wanted):
        if _is_missing(module):
            found = [name for name, wanted in needed.items() if module in wanted]
            raise TraceError(_needs(", ".join(found), module, len(found) > 1))


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        # Of a module that stands as None among those that are loaded.
        return True


def _needs(name: str, module: str, several: bool = False) -> str:
    return f"{name} need{'' if several else 's'} {module}; {install(module.partition('.')[0], 'fit')}"
