"""A sweep of the command line: all its runs are checked before the first begins, on a terminal they are counted, and
those that fail are told at the end, with how to go on.

Hydra's own sweeper composes the runs, and its launcher runs them; this stands around both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict

from sim.job.configure import checked
from sim.job.errors import one_line
from sim.job.policy_keys import check_ahead
from sim.job.pool import use_workers
from sim.job.run_count import counting
from sim.paths import use_own_folder
from traces.messages import PREFIX, cut, line, plain, shortened

_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_LONGEST = 120


class SweepFailed(ValueError):
    """Some runs of a sweep have failed; the others are kept."""


@contextmanager
def sweeping() -> Iterator[None]:
    """Around a command that may be a sweep."""
    use_workers()
    # As its plugins have it: another object than what an import gives.
    kind: Any = Plugins.instance().class_name_to_class[_SWEEPER]
    with (
        patch.object(kind, "validate_batch_is_legal", _check_batch),
        patch.object(kind, "setup", _setup_of(kind.setup)),
    ):
        yield


def _check_batch(sweeper: Any, batch: Sequence[Sequence[str]]) -> None:
    """ValueError for the first of the runs that cannot be, before any begins; Hydra itself looks at less."""
    for words in batch:
        cfg: DictConfig = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(words))
        sources = cfg.hydra.runtime.config_sources
        use_own_folder(next((one.path for one in sources if one.provider == "command-line"), None))
        with open_dict(cfg):
            del cfg["hydra"]
        told = _told_apart(words, batch)
        try:
            check_ahead(checked(cfg))
        except ValueError as error:
            policy = next((word.lstrip("+") for word in told if word.lstrip("+").startswith("policy=")), "")
            # Of keys that the parts of one of the policies have, and those of another have not.
            where = f"{policy}: " if policy and str(error).startswith("policy.") else ""
            raise ValueError(f"{where}{error}") from error


def _setup_of(original: Callable[..., None]) -> Callable[..., None]:
    """`BasicSweeper.setup`, which then has a launcher that counts its runs and tells of those that failed."""

    def setup(sweeper: Any, **more: Any) -> None:
        original(sweeper, **more)
        launch = sweeper.launcher.launch

        def counted(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            with counting(len(job_overrides)):
                found: Sequence[JobReturn] = launch(job_overrides, initial_job_idx=initial_job_idx)
            _tell_failures(found, job_overrides, Path(str(sweeper.config.hydra.sweep.dir)))
            return found

        sweeper.launcher.launch = counted

    return setup


def _told_apart(words: Sequence[str], batch: Sequence[Sequence[str]]) -> list[str]:
    """Of a run's words those that not all runs of the sweep have."""
    return [word for word in words if any(word not in other for other in batch)]


def _tell_failures(found: Sequence[JobReturn], batch: Sequence[Sequence[str]], folder: Path) -> None:
    """A line for each run that failed, and SweepFailed; of a mistake of ours the error itself."""
    failed = [
        (words, one._return_value)
        for words, one in zip(batch, found, strict=True)
        if one.status == JobStatus.FAILED and isinstance(one._return_value, Exception)
    ]
    if not failed:
        return
    for words, error in failed:
        told = one_line(error)
        if told is None:
            raise error
        name = cut(plain(" ".join(_told_apart(words, batch)) or "the run"), _LONGEST)
        print(f"{PREFIX}{shortened(f'{name}: {told}')}", file=sys.stderr)
    num, most = len(failed), len(found)
    kept = (
        "none is kept"
        if most == num
        else f"the other {most - num} {'is' if most - num == 1 else 'are'} kept in {folder}"
    )
    how = f"mend that, then the same command with hydra.sweep.dir={folder} skip_done=true goes on"
    raise SweepFailed(line(f"{num} of {most} runs failed", kept, how)) from failed[0][1]
