"""What a sweep says when its runs have ended. Hydra calls it, since `hydra.callbacks` in conf/ names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sim.job.run_count import ended


class Told(Callback):
    """One line with the folder; printed by the process that started the runs, so that a stream that takes nothing
    decides its exit code as that of a single run."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """One more has ended, where it ran in the process that counts them; runs of other processes the pool counts."""
        ended()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Where the runs are, and how to make one table of them."""
        folder = Path(str(config.hydra.sweep.dir))
        print(f"written to {folder}; python -m sim.collect {folder} makes one table of the runs")
