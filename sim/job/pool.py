"""Worker processes, of sweeps and studies, that end when the process is killed that started them."""

from __future__ import annotations

import os
from typing import Any

from joblib import register_parallel_backend
from joblib._parallel_backends import LokyBackend

from traces.processes.lifetime import end_with_parent


class Workers(LokyBackend):  # type: ignore[misc]
    """joblib's own processes, told of their parent before they begin."""

    _started: Any = None

    def configure(self, *args: Any, **options: Any) -> Any:
        """As of LokyBackend."""
        number = super().configure(*args, initializer=end_with_parent, initargs=(os.getpid(),), **options)
        self._started = self._workers
        return number

    def end(self) -> None:
        """End the processes, which otherwise wait for more work with what they have loaded."""
        if self._started is not None:
            self._started.shutdown(wait=True, kill_workers=True)


def use_workers() -> None:
    """From here on what runs in joblib's processes runs in these; Hydra's launcher names no others."""
    register_parallel_backend("loky", Workers)
