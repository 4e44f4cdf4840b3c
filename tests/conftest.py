"""For all tests: how long an example takes says something of the machine, not of the code; and which are slow."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings

from traces.processes import ending

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    # A worker for each core: libraries that start a thread for each core would fight over them. Before they are loaded.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

# What a report is printed in: the library that reads lines, once loaded, tells child processes 80, past os.environ.
with suppress(ImportError):
    import readline  # noqa: F401
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")

# Read when the hub's client is first imported: no test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# What one test computes must not be what the next one finds; those of the kept scores say where they are.
os.environ["EXPERTFLOW_KEEP_SCORES"] = "0"

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist hand out files in the order below: by number of tests, files of few long ones would come last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of most slow tests: with short ones left for the end, no core waits long for another."""
    if WORKER:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What all imported libraries hold is there to stay: no collection of garbage need walk it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


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


@pytest.fixture(autouse=True)
def _commands_say_how_they_end() -> None:
    """A process that is a command says once how it was stopped; one in which a test began a command runs others too."""
    ending._told.clear()
