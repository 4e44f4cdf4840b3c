"""For all tests: how long an example takes says something of the machine, not of the code."""

from __future__ import annotations

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: libraries that start a thread for each core would fight over them. Before they are loaded.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
