"""Worker processes that end with the process that started them, even if that one is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from traces.processes.progress import never_here

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5


def end_with_parent(parent: int) -> None:
    """Called in a worker: from here on it ends when its parent, the process `parent`, has ended.

    On Linux the kernel sees to it at once, on other POSIX systems a thread that looks twice a second. Ctrl-C in a
    terminal reaches workers too: they leave it to their parent, which ends them.
    """
    never_here()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.name != "posix":
        # There a process keeps the number of a parent that has ended, and may have a launcher's.
        return
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)
