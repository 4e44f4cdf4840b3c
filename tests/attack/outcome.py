"""What became of one input, and by which rules it is judged."""

from __future__ import annotations

import re
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

REFUSED, ACCEPTED = "refused", "accepted"
TRACEBACK, MESSAGE, WARNING, HANG = "traceback", "message", "warning", "hang"
WRONG_ACCEPTED, WRONG_REFUSED, EXIT, MEMORY, DIED = "wrong accepted", "wrong refused", "exit", "memory", "died"
LOST = "lost"
FAILURES = (TRACEBACK, MESSAGE, EXIT, WARNING, HANG, MEMORY, WRONG_ACCEPTED, WRONG_REFUSED, LOST, DIED)
"""lost: what an interrupted command had done is gone. died: the process that tried the input ended."""
MOST_CHARACTERS = 300
HANG_S = 10.0
BARE = re.compile(
    r"\[Errno|codec can't|numpy\.(_core|core|exceptions|dtypes)|Unable to allocate|object at 0x|Traceback|<class "
    r"|could not convert"
)


@dataclass(frozen=True)
class Outcome:
    """verdict: refused, accepted or the kind of failure. rechecked: an oracle had a look. text: the message, or
    what is wrong with it. weight: how many inputs it stands for."""

    verdict: str
    rechecked: bool = False
    text: str = ""
    weight: int = 1

    @property
    def failed(self) -> bool:
        return self.verdict in FAILURES


class Hang(BaseException):
    """Raised in the middle of what takes too long."""


def _raise_hang(number: int, frame: FrameType | None) -> None:
    raise Hang


@contextmanager
def watchdog(seconds: float = HANG_S) -> Iterator[Callable[[], None]]:
    """Raises Hang in this thread when `seconds` have passed since the function that this gives was called last."""
    before = signal.signal(signal.SIGALRM, _raise_hang)
    try:
        # Repeated: the first may meet code that catches everything.
        yield lambda: signal.setitimer(signal.ITIMER_REAL, seconds, 1.0) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded(num_bytes: int) -> Iterator[None]:
    """No more than so much address space beyond what the process has; MemoryError in what wants more. 0: no bound."""
    if not num_bytes:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def peak_bytes() -> int:
    """The most memory that this process has had since `forget_peak`. `getrusage` also knows what the process was that
    started this one, and says that."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> None:
    """Begin to count anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Warned:
    """Counts warnings: to the user each is a stray line on stderr."""

    def __init__(self) -> None:
        self.last = ""

    @contextmanager
    def watch(self) -> Iterator[Warned]:
        """While this lasts warnings are kept, not printed."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._keep
            yield self

    def _keep(self, message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        # These Python itself does not show to users.
        if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | ResourceWarning):
            self.last = f"{category.__name__}: {message}"

    def take(self) -> str:
        """The last one, once."""
        found, self.last = self.last, ""
        return found


def fault_of_message(text: str, names: tuple[str, ...]) -> str:
    """What is wrong with a message to the user; "" if nothing. names: one of them must be in it."""
    if not text.strip():
        return "is empty"
    if len(text.splitlines()) != 1:
        return "has more than one line"
    if len(text) > MOST_CHARACTERS:
        return f"has {len(text)} characters"
    if names and not any(name in text for name in names):
        return "does not name the file"
    if found := BARE.search(text):
        return f"is text of a library ({found[0]})"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a broken character"
    return ""


def of_error(error: BaseException, names: tuple[str, ...]) -> Outcome:
    """What a raised error is: a refusal if it is the user's, with a message in order."""
    if isinstance(error, MemoryError):
        return Outcome(MEMORY, text=f"MemoryError: {error}"[:500])
    if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
        lines = traceback.format_exception(error)
        return Outcome(TRACEBACK, text="".join(lines)[-3000:])
    text = str(error)
    if problem := fault_of_message(text, names):
        return Outcome(MESSAGE, text=f"{problem}: {type(error).__name__}: {text[:600]}")
    return Outcome(REFUSED, text=text)
