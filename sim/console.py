"""`expertflow COMMAND …`: the same as `python -m MODULE …`, under one name."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from expertflow.core import ROOT, described
from expertflow.keys import near_to
from traces.flags import called_as
from traces.help_text import hanging, width
from traces.processes.ending import begin

COMMANDS = {
    "sim": ("sim", "simulate one configuration, or with -m a sweep of them"),
    "study": ("sim.study", "run a study of many configurations, and write its report"),
    "published": ("sim.published", "hold a simulation against seconds that others have published"),
    "collect": ("sim.collect", "make one table of a sweep's runs"),
    "regress": ("sim.regress", "pin the metrics of chosen runs, and say what moved"),
    "bench": ("sim.bench", "measure the simulator's speed"),
    "traces": ("traces", "check, describe, import, record, fit and generate traces"),
    "twin": ("traces.twin", "train a narrow model of a routing topology, and record it"),
    "replay": ("replay", "run one configuration on this machine"),
    "calibrate": ("replay.calibrate", "measure this machine, for simulations of it"),
    "validate": ("replay.validate", "hold simulations against this machine"),
    "model": ("sim.model", "a model of your own: its config.json as a file of conf/model"),
    "keys": ("replay.keys", "list every key of a configuration: type, range, unit"),
    "lockstep": ("replay.lockstep", "feed a replay's log to a fresh policy"),
    "bench-decide": ("replay.bench_decide", "measure what a policy's decisions take"),
    "bench-host": ("replay.bench_host", "measure what a replay's host takes"),
}
"""Name, module, and what it does."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    given = list(sys.argv[1:] if words is None else words)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(version_line())
        return 0
    name, *rest = given
    if name not in COMMANDS:
        hint, known = near_to(name, COMMANDS), ", ".join(COMMANDS)
        print(f"error: {name[:60]!r} is no command{hint}; choose one of: {known}", file=sys.stderr)
        return 2
    if words is None:
        # This process is the command.
        begin()
    if not sys.flags.safe_path:
        _import_own_parts_from_here()
    sys.argv[1:] = rest
    module = COMMANDS[name][0]
    with called_as(f"python -m {module}", f"expertflow {name}"):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _import_own_parts_from_here() -> None:
    """A user's own parts are imported from the current folder, as `python -m` has it, but behind the folder of this
    package: a `sim.py` or `traces/` of theirs stands in nobody's way, in worker processes neither."""
    del sys.path[0]
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    sys.path.insert(sys.path.index(str(ROOT)) + 1, os.getcwd())


def usage() -> str:
    """What there is to choose from."""
    told = [f"  {name:<13} {about} (python -m {module})" for name, (module, about) in COMMANDS.items()]
    lines = [line for one in told for line in hanging(one, width(), 16)]
    return "\n".join(["usage: expertflow COMMAND …", "       expertflow COMMAND --help", "", *lines])


def version_line() -> str:
    """What `--version` prints: of the installed distribution, and which core runs."""
    return f"expertflow {installed_version()}, {described()}"


def installed_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("expertflow")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


if __name__ == "__main__":
    sys.exit(main())
