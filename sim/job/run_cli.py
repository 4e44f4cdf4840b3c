"""How a command ends: a user's mistake is one line and exit code 2, in a single run and in a sweep."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from expertflow.boundary import words_of
from expertflow.keys import plain
from sim.job.configure import check_words
from sim.job.errors import one_line
from sim.paths import check_named, use_own_folder
from traces.messages import PREFIX
from traces.processes.ending import Kept, keeping, stopped

TRACEBACK = "EXPERTFLOW_TRACEBACK"
"""Environment variable: where it is set, a command that ends with an error prints where that came from, too."""
Ending = Callable[[Exception], int | None]
"""The exit code after an error that it knows, which it has told; None for any other."""

_endings: list[Ending] = []


class Ended(SystemExit):
    """A command has told why it ends, and ends with this code."""


def on_error(ending: Ending) -> None:
    """Ask `ending` first how a command ends after an error: what `sim` must not know of may need an end of its own."""
    _endings.append(ending)


def as_job(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Run one Hydra job. In a sweep Hydra must see a failure: it names the job and lets the others finish."""
    try:
        # Here, since this may be a process of its own. Hydra itself has looked in the folder already.
        sources = HydraConfig.get().runtime.config_sources
        use_own_folder(next((one.path for one in sources if one.provider == "command-line"), None))
        with no_exit():
            return run(cfg)
    except Exception as error:
        if os.environ.get(TRACEBACK) and HydraConfig.get().mode != RunMode.MULTIRUN:
            traceback.print_exception(error)
        line = one_line(error)
        if line is None or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        print(f"{PREFIX}{line}", file=sys.stderr)
        raise Ended(2) from error


@contextmanager
def no_exit() -> Iterator[None]:
    """ValueError for code that would end the process within this block: without a result, and maybe as if all were
    well."""
    try:
        yield
    except Ended:
        raise
    except SystemExit as left:
        raise ValueError(
            f"the process was told to exit ({plain(words_of(left), 60) or 'no code'}) before there was a result; "
            f"take sys.exit out of what the run loads; {TRACEBACK}=1 in the environment shows where"
        ) from left


def run_hydra(main: Callable[[], int | None], interrupted: Kept) -> int:
    """`run_cli` for a command whose words are Hydra's."""

    def checked() -> int | None:
        check_words([word for word in sys.argv[1:] if not word.startswith("-")])
        check_named(sys.argv[1:])
        try:
            return main()
        except SystemExit as left:
            # Hydra's own, as after --help: what a job raises `as_job` has looked at.
            raise Ended(left.code) from left

    return run_cli(checked, interrupted)


def run_cli(main: Callable[[], int | None], interrupted: Kept) -> int:
    """Run a command's `main`; its exit code, which is 0 where it returns none. interrupted: what is said of what was
    done by then, and how to go on, if the command is told to stop."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints and exits by itself
    try:
        with keeping(interrupted), no_exit():
            return main() or 0
    except KeyboardInterrupt as error:
        return stopped(error)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        # Here, while the error keeps alive what it has passed.
        for code in (ending(error) for ending in _endings):
            if code is not None:
                return code
        line = one_line(error)
        if line is None:
            raise
        print(f"{PREFIX}{line}", file=sys.stderr)
        return 2
