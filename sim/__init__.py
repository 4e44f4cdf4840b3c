"""The simulated machine, and jobs: what `python -m sim` composes, runs and writes."""

import os
import sys

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

__all__ = ["start"]

start()
