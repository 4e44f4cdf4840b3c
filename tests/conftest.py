"""For all tests: how long an example takes says something of the machine, not of the code; and which are slow."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: libraries that start a thread for each core would fight over them. Before they are loaded.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

# Read when the hub's client is first imported: no test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# What one test computes must not be what the next one finds; those of the kept scores say where they are.
os.environ["EXPERTFLOW_KEEP_SCORES"] = "0"

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Mark as slow all cases of a `mostly_slow(keep=N)` test but N, evenly spaced in the order of its parameters.

    Here, where all cases of one function are made, so that it does not depend on which of them are asked for.
    """
    made = yield
    cases = [item for item in made if item.get_closest_marker("mostly_slow")] if isinstance(made, list) else []
    if cases:
        keep = min(cases[0].get_closest_marker("mostly_slow").kwargs["keep"], len(cases))
        kept = {index * len(cases) // keep for index in range(keep)}
        for index, item in enumerate(cases):
            if index not in kept:
                item.add_marker(pytest.mark.slow)
    return made
