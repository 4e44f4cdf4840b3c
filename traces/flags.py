"""The flags of a command line: errors of one line, and numbers with a range."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from expertflow.keys import NUMBER, WHOLE, Key, Rule
from traces.messages import PREFIX, shortened

Number = TypeVar("Number", int, float)


_called: list[tuple[str, str]] = []


@contextmanager
def called_as(module: str, name: str) -> Iterator[None]:
    """Within this block an error of the command `module` (`python -m sim.study`) names it as the user has: `name`."""
    _called.append((module, name))
    try:
        yield
    finally:
        _called.pop()


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with exit code 2."""
        prog = self.prog
        for module, name in _called:
            # Of a sub-command the words after it stay.
            prog = f"{name}{prog.removeprefix(module)}" if f"{prog} ".startswith(f"{module} ") else prog
        print(f"{PREFIX}{shortened(f'{message}; see {prog} --help')}", file=sys.stderr)
        raise SystemExit(2)


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag that takes a whole number in [low, high]."""
    return _within(Key("", WHOLE, Rule(low, high)), int)


def number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """The type of a flag that takes a number in [low, high], or (low, high] where `above`."""
    return _within(Key("", NUMBER, Rule(low, high, above=above)), float)


def _within(key: Key, kind: type[Number]) -> Callable[[str], Number]:
    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} must be {key.allowed}") from None
        if not key.fits(value):
            raise argparse.ArgumentTypeError(f"{text[:60]} must be {key.allowed}")
        return value

    return read
