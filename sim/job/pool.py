"""Worker processes, of sweeps and studies, that end when the process is killed that started them."""

from __future__ import annotations

import os
from typing import Any

from joblib import register_parallel_backend
from joblib._parallel_backends import LokyBackend

from traces.processes.lifetime import end_with_parent


class Workers(LokyBackend):  # type: ignore[misc]
    """joblib's own processes, told of their parent before they begin."""

    def configure(self, *args: Any, **options: Any) -> Any:
        """As of LokyBackend."""
        return super().configure(*args, initializer=end_with_parent, initargs=(os.getpid(),), **options)


def use_workers() -> None:
    """From here on what runs in joblib's processes runs in these; Hydra's launcher names no others."""
    register_parallel_backend("loky", Workers)
