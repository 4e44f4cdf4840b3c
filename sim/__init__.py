"""The simulated machine, and jobs: what `python -m sim` composes, runs and writes.

`simulate` and `sweep` do the same from Python (docs/api.md); they are loaded when they are first asked for.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

# The package beside this one, not what bears its name in the current folder: from then on it finds them all.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import expertflow  # noqa: F401 - first: it chooses whether modules of this package run compiled

del sys.path[0]

try:
    from traces.installed import start
except ImportError as error:
    raise ImportError(
        "Python takes the package traces from another distribution, not from expertflow; "
        "install expertflow anew, in an environment of its own"
    ) from error

if TYPE_CHECKING:
    from sim.api import Result, Sweep, SweepError, SweepInterrupted, simulate, sweep

_FROM_PYTHON = ("Result", "Sweep", "SweepError", "SweepInterrupted", "simulate", "sweep")
__all__ = ["Result", "Sweep", "SweepError", "SweepInterrupted", "simulate", "start", "sweep"]

start()


def __getattr__(name: str) -> Any:
    if name not in _FROM_PYTHON:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_PYTHON})
