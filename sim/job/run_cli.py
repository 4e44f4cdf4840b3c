"""How a command ends: a user's mistake is one line and exit code 2, in a single run and in a sweep."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from expertflow.boundary import words_of
from expertflow.keys import plain
from sim.job.clashes import check_folders, check_twice, prepared
from sim.job.configure import check_words
from sim.job.errors import one_line
from sim.paths import check_named, use_own_folder
from traces.messages import PREFIX
from traces.processes.ending import Kept, keeping, stopped
from traces.processes.streams import prepare_streams

TRACEBACK = "EXPERTFLOW_TRACEBACK"
"""Environment variable: where it is set, a command that ends with an error prints where that came from, too."""
_NO_FOLDER = re.compile(r"""\+*(hydra\.(?:run\.dir|sweep\.dir|sweep\.subdir))=\s*(?:"\s*"|'\s*')?\s*""")
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
    # Here, since this may be a process of its own.
    prepare_streams()
    try:
        # Hydra itself has looked in the folder already.
        sources = HydraConfig.get().runtime.config_sources
        use_own_folder(next((one.path for one in sources if one.provider == "command-line"), None))
        with no_exit():
            return run(cfg)
    except Exception as error:
        if os.environ.get(TRACEBACK) and HydraConfig.get().mode != RunMode.MULTIRUN:
            traceback.print_exception(error)
        line = one_line(error, _output_remedy(sweep=False))
        _remove_unused()
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


def _remove_unused() -> None:
    """Remove the folder that Hydra has made for a single run which wrote nothing, unless the user named it: by its time
    of day it is this run's alone. With it goes the folder of the day, if nothing else is in it."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN or any("hydra.run.dir" in word for word in hydra.overrides.hydra):
        return
    folder = Path(hydra.runtime.output_dir)
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def is_sweep(words: Sequence[str]) -> bool:
    """Whether the words of a command ask for more than one run."""
    return any(word == "-m" or word.startswith("--m") or "hydra.mode" in word for word in words)


def run_hydra(main: Callable[[], int | None], interrupted: Kept) -> int:
    """`run_cli` for a command whose words are Hydra's."""

    def checked() -> int | None:
        words = prepared(sys.argv[1:])
        sys.argv = [*sys.argv[:1], *words]
        named = _check_flags(words)
        overrides = [word for word in words if not word.startswith("-")]
        check_words(overrides)
        for word in words:
            if found := _NO_FOLDER.fullmatch(word):
                raise ValueError(f"{found[1]} is empty, which is the current folder; give {found[1]}=FOLDER")
        check_twice(overrides)
        check_folders(overrides, is_sweep(words))
        if named is not None:
            check_named(named)
        try:
            return main()
        except SystemExit as left:
            # Hydra's own, as after --help: what a job raises `as_job` has looked at.
            raise Ended(left.code) from left

    return run_cli(checked, interrupted, _output_remedy(is_sweep(sys.argv[1:])))


def _check_flags(words: Sequence[str]) -> str | None:
    """ValueError for flags that Hydra does not take, of which it would print its usage; what --config-dir names."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            named: str | None = get_args_parser().parse_args(list(words)).config_dir
    except SystemExit as end:
        message = said.getvalue().partition("error: ")[2].strip()
        if not message:
            # It was asked for the version, and has printed that.
            raise
        raise ValueError(f"{message}; --help shows what there is") from end
    return named


def _output_remedy(sweep: bool) -> str:
    return f"choose an output folder with hydra.{'sweep' if sweep else 'run'}.dir=FOLDER"


def run_cli(main: Callable[[], int | None], interrupted: Kept, remedy: str = "") -> int:
    """Run a command's `main`; its exit code, which is 0 where it returns none. interrupted: what is said of what was
    done by then, and how to go on, if the command is told to stop. remedy: of `one_line`."""
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
        line = one_line(error, remedy)
        if line is None:
            raise
        print(f"{PREFIX}{line}", file=sys.stderr)
        return 2
