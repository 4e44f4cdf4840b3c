"""`python -m sim`: one configuration, one run, one folder; or with -m a sweep of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sim.console import version_line
from sim.execute import Kept, run_job, run_kept, slug
from sim.job.configure import checked
from sim.job.help import register
from sim.job.output import begin_folder
from sim.job.overrides import let_words_add
from sim.job.report import notes_of, print_line, print_report, remarks_of, report_console
from sim.job.run_cli import as_job, is_sweep, run_hydra
from sim.job.run_count import clear_line
from sim.job.setup import make_workload
from sim.job.title import policy_title
from sim.paths import CONF

OmegaConf.register_new_resolver("slug", slug, replace=True)
let_words_add()
register()


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Run what `cfg` says; returns TPOT in ms, so that Hydra's optimisers can use it."""
    return as_job(run_configured, cfg)


def run_configured(cfg: DictConfig) -> float | None:
    """One job: check, run, write, print."""
    started = time.perf_counter()
    folder = Path(HydraConfig.get().runtime.output_dir)
    plain = checked(cfg)
    work = make_workload(plain)
    words = list(HydraConfig.get().overrides.task)
    console = report_console()
    where = Kept(folder, __name__, lambda: begin_folder(folder, cfg), words, started)
    # The runs of a sweep have the cores among them.
    alone = HydraConfig.get().mode != RunMode.MULTIRUN
    metrics = run_kept(where, plain, work, lambda: run_job(plain, work, folder, workers=alone))
    if not alone:
        clear_line()
    if metrics is None:
        console.print(f"done before: {folder}", highlight=False, soft_wrap=True)
        return None
    title = policy_title(plain["policy"])
    if alone:
        print_report(console, metrics, relative(folder), title, plain, remarks_of(plain, work))
    else:
        print_line(console, metrics, relative(folder), title, plain, notes_of(work))
    mean = metrics["tpot_ms"]["mean"]
    return None if mean is None else float(mean)


def kept(words: Sequence[str]) -> str:
    """What is said when the command of these words is told to stop."""
    if not is_sweep(words):
        return "the run has no result; give the same command again"
    key = "hydra.sweep.dir="
    folder = next(
        (word.removeprefix(key) for word in words if word.startswith(key)), "FOLDER, the last one in multirun,"
    )
    return f"finished runs are kept: the same command with {key}{folder} skip_done=true goes on"


def relative(folder: Path) -> str:
    """`folder` as seen from here, if it lies below."""
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def cli() -> int:
    """Entry point. Of `--version`, Hydra would tell its own."""
    words = sys.argv[1:]
    if words == ["--version"]:
        print(version_line())
        return 0
    if is_sweep(words):
        # Only now, since it loads joblib.
        from sim.job.sweeping import sweeping

        with sweeping():
            return run_hydra(main, kept(words))
    return run_hydra(main, kept(words))


__all__ = ["cli", "main", "run_job", "slug"]
