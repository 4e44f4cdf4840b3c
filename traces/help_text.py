"""Help in lines that fit the terminal: 80 characters where it does not say, and never more than `MOST`."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator

MOST = 120
"""Characters of a line, however wide the terminal is: longer ones are not read with ease."""
_LEAST = 40
_COMMANDS = ("python ", "expertflow ")
_GLUE = "\0"
_TOGETHER = re.compile(r" --[a-z][\w-]* [^ -][^ ]*|\(python -m [^ ]+\)")
"""A flag with its value in an example, and a module in a list."""


def width() -> int:
    """Characters of a line in this terminal; COLUMNS in the environment is obeyed."""
    return min(max(shutil.get_terminal_size().columns, _LEAST), MOST)


def wrapped(text: str, most: int) -> str:
    """`text` in lines of at most `most` characters.

    Lines that follow each other without an indent are a paragraph. An indented line stays one, what does not fit hangs
    below it; a command is broken so that a shell reads it as one.
    """
    return "\n".join(line for lines in _blocks(text, most) for line in lines)


def hanging(line: str, most: int, indent: int) -> list[str]:
    """One line over several, of which those after the first are indented so far. A flag and its value, and what stands
    in parentheses as `(python -m sim)` does, are not parted."""
    glued = _TOGETHER.sub(lambda found: found[0][0] + found[0][1:].replace(" ", _GLUE), line)
    lines = textwrap.wrap(glued, most, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return [one.replace(_GLUE, " ") for one in lines] or [""]


def _blocks(text: str, most: int) -> Iterator[list[str]]:
    paragraph: list[str] = []
    for line in [*text.strip("\n").splitlines(), None]:
        if line and not line.startswith(" "):
            paragraph.append(line)
            continue
        if paragraph:
            yield hanging(" ".join(paragraph), most, 0)
            paragraph = []
        if line is not None:
            yield _indented(line, most)


def _indented(line: str, most: int) -> list[str]:
    inside = line.lstrip()
    indent = len(line) - len(inside)
    if not inside.startswith(_COMMANDS) or len(line) <= most:
        return hanging(line, most, indent + 4)
    lines = hanging(line, most - 2, indent + 4)
    return [*(f"{one} \\" for one in lines[:-1]), lines[-1]]


class Wrapped(argparse.RawDescriptionHelpFormatter):
    """Description and epilog as `wrapped` has them; of a parser, `formatter_class`."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 24) -> None:
        super().__init__(prog, indent_increment, max_help_position, width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrapped(text, width)
