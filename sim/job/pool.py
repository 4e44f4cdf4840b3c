"""Worker processes, of sweeps and studies, that end when the process is killed that started them."""

from __future__ import annotations

import os
import sys
from typing import Any

from joblib import register_parallel_backend
from joblib._parallel_backends import LokyBackend

from sim.job.run_count import ended
from traces.processes.lifetime import end_with_parent


class Workers(LokyBackend):  # type: ignore[misc]
    """joblib's own processes, told of their parent before they begin."""

    _started: Any = None

    def configure(self, *args: Any, **options: Any) -> Any:
        """As of LokyBackend."""
        # Those of an earlier use serve again only where they were told the same, and new ones begin in the folder and
        # with the path of this process: relative paths and parts of the current folder mean the same in both.
        told = os.getpid(), os.getcwd(), tuple(sys.path)
        number = super().configure(*args, initializer=_begin, initargs=told, **options)
        self._started = self._workers
        return number

    def submit(self, func: Any, callback: Any = None) -> Any:
        """As of LokyBackend; the calls of `func` are counted when they have ended."""
        found = super().submit(func, callback)
        found.add_done_callback(lambda _: ended(len(func)))
        return found

    def end(self, at_once: bool) -> None:
        """End the processes, which otherwise wait for more work with what they have loaded. at_once: in their work.

        A process that is killed may leave a lock that joblib warns of when the program ends: only at need.
        """
        if self._started is not None:
            self._started.shutdown(wait=True, kill_workers=at_once)


def _begin(parent: int, _folder: str, _path: tuple[str, ...]) -> None:
    """A worker's first act. Folder and path are its own already; they only tell one set of workers from another."""
    end_with_parent(parent)


def use_workers() -> None:
    """From here on what runs in joblib's processes runs in these; Hydra's launcher names no others."""
    register_parallel_backend("loky", Workers)
