"""`python -m replay`: the command line. What runs needs torch and is loaded once a run begins; `--help` needs none."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from expertflow.keys import declared
from replay.keys import ReplayKeys
from replay.packages import asked_for_by
from sim.app import kept
from sim.job.known import known_beside
from sim.job.run_cli import as_job, run_hydra
from sim.paths import CONF


@hydra.main(config_path=str(CONF), config_name="replay", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Replay what `cfg` says; returns TPOT in ms."""
    return as_job(_replay, cfg)


def _replay(cfg: DictConfig) -> float | None:
    with asked_for_by("python -m replay"):
        from replay.app import replay_configured
    return replay_configured(cfg)


def cli() -> int:
    """Entry point."""
    known_beside(declared(ReplayKeys))
    return run_hydra(main, kept(sys.argv[1:]))
