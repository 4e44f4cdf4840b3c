"""For all tests: how long an example takes says something of the machine, not of the code; and which are slow."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: libraries that start a thread for each core would fight over them. Before they are loaded.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all cases of a `mostly_slow(keep=N)` test but N, evenly spaced in the order of its parameters."""
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("mostly_slow"):
            cases[item.nodeid.split("[")[0]].append(item)
    for of_one_test in cases.values():
        marker = of_one_test[0].get_closest_marker("mostly_slow")
        assert marker is not None
        keep = min(marker.kwargs["keep"], len(of_one_test))
        kept = {index * len(of_one_test) // keep for index in range(keep)}
        for index, item in enumerate(of_one_test):
            if index not in kept:
                item.add_marker(pytest.mark.slow)
