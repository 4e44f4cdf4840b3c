"""What a command prints, wherever that goes: a closed stream, a poor encoding, a full disk, a reader that has left.

None of it undoes work. A character that the encoding lacks becomes `?`, a closed stream swallows what is printed, and
so does one whose reader has left (`| head`). What a full disk does not take is lost, too: that is said once, and the
command ends with exit code 1 (`code_of_loss`).
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from traces.messages import PREFIX, line, why
from traces.processes.progress import erase

LOST = 1
"""Exit code of a command whose printed lines could not all be written."""

_lost: list[int] = []
"""Numbers of the errors that stdout met, broken pipes left out."""


class _Raw(io.FileIO):
    """A stream's file, to which writing never fails."""

    def __init__(self, number: int, told: bool) -> None:
        super().__init__(number, "wb", closefd=False)
        self._told, self._gone = told, False

    def write(self, content: Any) -> int:
        """As of FileIO; all of it is taken where the system takes nothing any more."""
        if not self._gone:
            erase()
            try:
                return super().write(content)
            except BrokenPipeError:
                self._gone = True
            except OSError as error:
                self._gone = True
                if self._told:
                    _tell(error)
        return memoryview(content).nbytes


def prepare_streams() -> None:
    """Make stdout and stderr of this process such as is said above. Again: nothing."""
    _open_closed()
    sys.stdout, sys.stderr = _safe(sys.stdout, 1), _safe(sys.stderr, 2)


def code_of_loss() -> int:
    """`LOST` if something that was to be printed is lost for another reason than that nobody reads it; else 0."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return LOST if _lost else 0


def _open_closed() -> None:
    """Give the numbers of closed streams to the null device, before a file that is written gets one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)


def _safe(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        # As Python has it where the stream was closed when the process began.
        return io.TextIOWrapper(_Raw(number, False), encoding="utf-8", errors="replace", write_through=True)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if type(stream) is not io.TextIOWrapper or type(raw) is not io.FileIO or raw.fileno() != number:
        # Not the system's own: a console of Windows, or what a caller has put in its place.
        if isinstance(stream, io.TextIOWrapper) and not isinstance(raw, _Raw):
            stream.reconfigure(errors="replace")
        return stream
    stream.flush()
    unbuffered = buffer is raw
    own = _Raw(number, number == 1)
    return io.TextIOWrapper(
        own if unbuffered else io.BufferedWriter(own),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )


def _tell(error: OSError) -> None:
    _lost.append(error.errno or 0)
    problem, remedy = why(error)
    said = f"what is printed is lost ({problem}), files that are written stand"
    with suppress(OSError):
        print(f"{PREFIX}{line('stdout', said, remedy)}", file=sys.stderr, flush=True)
