"""The simulated machine, and jobs: what `python -m sim` composes, runs and writes."""

import expertflow  # noqa: F401 - first: it chooses whether modules of this package run compiled

try:
    from traces.installed import start
except ImportError as error:
    raise ImportError(
        "Python takes the package traces from another distribution, not from expertflow; "
        "install expertflow anew, in an environment of its own"
    ) from error

__all__ = ["start"]

start()
