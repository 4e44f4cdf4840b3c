"""Running the cells of a study, in this process or several, and keeping each finished one.

A kept cell counts only for the same configuration, trace, fitted files and code that ran (`sim.job.decided`); what only
tabulates did not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from sim.job.beside import describe, run_asked
from sim.job.configure import configure
from sim.job.decided import Decided, asked, at_start, stands
from sim.job.errors import one_line
from sim.job.limit import limited
from sim.job.output import IGNORED, to_json, write_text
from sim.job.pool import use_workers
from sim.job.run_cli import no_exit
from sim.job.setup import Workload, make_model, make_policy, make_workload, trace_of
from sim.machine.link import Link
from sim.machine.run import run_policy
from sim.paths import own_folder, use_own_folder
from sim.study.before import WrongRecordingError, check_recordings
from sim.study.estimates import run_estimates
from sim.study.phases import PhaseRecorder
from sim.study.plan import Cell
from traces.processes.locks import locked
from traces.processes.whole import clear
from traces.reader import Trace
from traces.reading import read_table

ALONE = ("compare=none",)


@dataclass(frozen=True)
class Job:
    """One cell, ready to run: its configuration, and the mark of what is asked for."""

    cell: Cell
    cfg: dict[str, Any]
    mark: str
    kind: str
    config_dir: Path | None

    def path(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.mark[:20]}.json"

    def is_kept(self, folder: Path) -> bool:
        """Whether its result is there and readable, and nothing that decided it has changed since."""
        return stands(self.decided(folder), self.mark, [self.path(folder)])

    def decided(self, folder: Path) -> Path:
        """Where it is kept what decided the result; written after that."""
        return self.path(folder).with_suffix(".done")


def plan_jobs(cells: Sequence[Cell], kind: str = "runs") -> list[Job]:
    """Compose and mark every cell; ValueError that names the cell for what cannot be composed."""
    jobs = []
    at_start()
    for cell in cells:
        try:
            cfg = configure([*cell.overrides, *ALONE])
            trace = trace_of_cell(cfg)
            check_recordings(cell, cfg, trace)
            plain = {key: value for key, value in cfg.items() if key not in IGNORED}
            mark = asked(plain, trace.sha256(), make_model(cfg["model"], trace), kind)
        except WrongRecordingError:
            # It names the parameter, which is wrong in many cells.
            raise
        except Exception as error:
            raise _named(cell, error) from error
        jobs.append(Job(cell, cfg, mark, kind, own_folder()))
    return jobs


def _named(cell: Cell, error: Exception) -> Exception:
    line = one_line(error)
    return error if line is None else ValueError(f"{cell}: {line}")


def trace_of_cell(cfg: dict[str, Any]) -> Trace:
    """The trace of a cell's configuration; several of the last ones stay open."""
    return _open_trace(to_json({key: cfg[key] for key in ("trace", "model", "batch_size")}))


@lru_cache(maxsize=4)
def _open_trace(cfg: str) -> Trace:
    return trace_of(json.loads(cfg))


def run_jobs(
    jobs: Sequence[Job], folder: Path, num_jobs: int, optional: Sequence[str] = ()
) -> tuple[dict[Cell, dict[str, Any]], dict[str, str]]:
    """The result of every cell, in order, and why cells of `optional` variants are missing.

    Results kept in `folder` are not made again. What fails does not stop the others; ValueError at the end says what
    failed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    use_workers()
    write_text(folder / ".gitignore", "*\n")
    waiting = [job for job in jobs if not job.is_kept(folder)]
    print(f"{len(jobs)} cells, {len(jobs) - len(waiting)} of them done before", flush=True)
    outcomes = Parallel(n_jobs=num_jobs, return_as="generator")(delayed(_attempt)(job, folder) for job in waiting)
    failures: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for number, (job, line) in enumerate(zip(waiting, outcomes, strict=True), start=1):
        # A cause that many cells share is said once, with the first of them, and counted at the end.
        if line is None or line not in (*failures.values(), *left_out.values()):
            print(f"{number}/{len(waiting)} {job.cell}: {line or 'done'}", flush=True)
        if line is not None:
            (left_out if job.cell.variant in optional else failures)[str(job.cell)] = line
    if failures:
        cell, line = next(iter(failures.items()))
        alike = ", all for one cause" if len(failures) > 1 and len(set(failures.values())) == 1 else ""
        kept = "the others are kept" if len(failures) + len(left_out) < len(jobs) else "none is kept"
        raise ValueError(f"{len(failures)} of {len(jobs)} cells failed{alike}, {kept}; the first: {cell}: {line}")
    there = [job for job in jobs if str(job.cell) not in left_out]
    remedy = "delete the file and run the study again: that makes this cell anew"
    return {job.cell: read_table(job.path(folder), remedy) for job in there}, left_out


def _attempt(job: Job, folder: Path) -> str | None:
    """Run one job and keep its result; a user's error as a line."""
    with locked(job.path(folder).with_suffix(".lock"), f"the cell {job.cell}"):
        if job.is_kept(folder):
            # By another process, while this one waited.
            return None
        try:
            use_own_folder(job.config_dir)
            with no_exit(), Decided(job.mark, __name__, job.cfg) as decided, limited(job.cfg["timeout_s"]):
                work = make_workload(job.cfg, trace_of_cell(job.cfg))
                result = run_estimates(work) if job.kind == "estimates" else run_cell(job.cfg, work)
        except Exception as error:
            line = one_line(error)
            if line is None:
                raise
            return line
        job.decided(folder).unlink(missing_ok=True)
        write_text(job.path(folder), to_json(result))
        write_text(job.decided(folder), decided.to_json())
    return None


def run_cell(cfg: dict[str, Any], work: Workload) -> dict[str, Any]:
    """Metrics as `python -m sim` writes them, and beside them `phases` and `costs` (what one load takes)."""
    policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    phases = PhaseRecorder(policy, work.warmup_forwards)
    found = run_asked(cfg, work, policy, transfer, partial(run_policy, work), [phases])
    metrics = describe(work, policy, cfg) | found
    load_ns = Link(work.hardware).fastest_load_ns(work.model.mean_expert_bytes, int(work.chunk_mib * 2**20))
    costs = {"load_ns": load_ns, "expert_bytes": work.model.mean_expert_bytes, "num_layers": work.model.num_layers}
    return {**metrics, "phases": phases.result(), "costs": costs}
