"""What a user is told when something goes wrong: one line, at most `MOST` characters, with file, fault and remedy.

The one place that turns the system's errors into words. Every command prints what `told` gives, so that no line is
longer, holds a control character, or is the bare text of a library.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

MOST = 300
"""Characters of a line, `PREFIX` included."""
PREFIX = "error: "
_ROOM = MOST - len(PREFIX)

_WHY: Mapping[int, tuple[str, str]] = {
    errno.ENOENT: ("does not exist", "check the path"),
    errno.EACCES: ("no permission", "check the rights of file and folder"),
    errno.EPERM: ("no permission", "check the rights of file and folder"),
    errno.EEXIST: ("something of that name is there already", "choose another name, or remove it"),
    errno.EISDIR: ("is a folder", "name a file"),
    errno.ENOTDIR: ("part of the path is no folder", "check the path"),
    errno.ENAMETOOLONG: ("the name is too long", "use a shorter one"),
    errno.ELOOP: ("symbolic links that lead in a circle", "check the path"),
    errno.ENOSPC: ("the disk is full", "free space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free space, or write to another disk"),
    errno.EFBIG: ("larger than the file system or ulimit -f allows", "write it elsewhere, or raise the limit"),
    errno.EROFS: ("the file system is read-only", "write it elsewhere"),
    errno.EIO: ("the disk reports a fault", "check the disk, or use another"),
    errno.EMFILE: ("too many files are open", "close some, or raise ulimit -n"),
    errno.ENFILE: ("too many files are open", "close some programs"),
    errno.ENOMEM: ("there is too little memory", "close other programs, or use a smaller file"),
    errno.ETXTBSY: ("it is being run", "write it elsewhere"),
    errno.ESTALE: ("the network drive has lost it", "check the drive"),
}
_OTHER = ("the system refuses", "check path, rights and space")
_NUMBER = re.compile(r"\[?(?:errno|os error) (\d+)\]?", re.IGNORECASE)


class TraceError(ValueError):
    """A file of a user's that cannot be used or written: one line that names file, place, fault and remedy."""


def fault(path: Path | str, where: str, problem: str, remedy: str) -> TraceError:
    """The one form of all messages about files: `file: place: fault; remedy`."""
    return TraceError(line(f"{path}: {where}", problem, remedy))


def why(error: BaseException) -> tuple[str, str]:
    """What the system says, and what to do about it, in plain words."""
    number = getattr(error, "errno", None)
    if number is None:
        # Arrow hands the number on in its text alone.
        found = _NUMBER.search(str(error))
        number = int(found[1]) if found else 0
    if int(number) in _WHY:
        return _WHY[int(number)]
    reason = plain(str(getattr(error, "strerror", None) or ""))
    return (f"the system says: {reason[:80]}", _OTHER[1]) if reason else _OTHER


def plain(text: str) -> str:
    """The text in one line, without characters that are not printed."""
    words = " ".join(text.split())
    return words if words.isprintable() else "".join(c if c.isprintable() else "?" for c in words)


def cut(text: str, most: int) -> str:
    """At most so many characters: begin and end, with … between."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[-end:]}" if end else text[:most]


def line(place: str, problem: str, remedy: str) -> str:
    """`place: problem; remedy`, cut where it is too long: the remedy stays whole, and of a path its end."""
    place, problem, remedy = plain(place), plain(problem), cut(plain(remedy), _ROOM // 2)
    room = _ROOM - len(remedy) - 4
    if len(place) + len(problem) > room:
        problem = cut(problem, max(room - len(place), room // 2))
        place = cut(place, room - len(problem))
    return f"{place}: {problem}; {remedy}"


def told(error: BaseException) -> str | None:
    """The line for a user, without `PREFIX`; None for an error that is a mistake of ours and deserves its traceback."""
    if isinstance(error, OSError):
        problem, remedy = why(error)
        place = str(error.filename2 or error.filename or "a file")
        return line(place, problem, remedy)
    if isinstance(error, MemoryError):
        return "there is too little memory for this; use a smaller file or fewer tokens, or close other programs"
    if isinstance(error, RecursionError):
        return "a file or configuration is nested too deeply, or includes itself; make it flatter"
    if isinstance(error, ValueError):
        return shortened(str(error)) or type(error).__name__
    return None


def shortened(text: str) -> str:
    """Any message in one line of at most `MOST` characters."""
    return cut(plain(text), _ROOM)
