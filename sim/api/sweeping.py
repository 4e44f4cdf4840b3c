"""Many simulations: every combination of lists, in worker processes, and one table of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
from joblib import Parallel, delayed, effective_n_jobs

from expertflow.keys import plain, shown
from sim.api.result import Recorded, Result
from sim.api.simulating import Job, as_library, check_folder, folder_of, plan, run
from sim.api.words import label_of, refuse_array
from sim.collect import frame_of, row_of
from sim.execute import slug
from sim.job.assumed import PAGE
from sim.job.markdown_table import range_of, rows_of
from sim.job.policy_keys import check_ahead
from sim.job.pool import Workers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger("expertflow")
MOST_RUNS = 100_000
_ASSUMED = "assumed.routing"
_SHOWN = ("tpot_ms", "stall_ms_per_token", "hit_rate", "link_utilisation")


class Sweep(Sequence[Result]):
    """What a sweep answers: its results in the order of the combinations, the last key changing first.

    results: one a run. swept: the keys that were lists.
    """

    def __init__(self, runs: Sequence[tuple[Place, Result]], swept: Sequence[str]) -> None:
        self._places = [place for place, _ in runs]
        self.results = [result for _, result in runs]
        self.swept = tuple(swept)

    @property
    def table(self) -> pd.DataFrame:
        """A row a run: `run`, its name; what was given for each swept key; and every column of `python -m sim.collect`.

        A swept key takes the place of a column of its name (`capacity.residency` is what `residency` came to).
        """
        rows = []
        for place, result in zip(self._places, self.results, strict=True):
            row = row_of(result.metrics, place.name)
            others = {key: value for key, value in row.items() if key not in place.labels}
            rows.append({"run": others.pop("run"), **place.labels, **others})
        return frame_of(rows)

    def plot(self, value: str = "stall_ms_per_token") -> Figure:
        """A picture: `value` by residency, a line a policy, where residency was swept; else bars of the time per
        token. A panel for each hardware and stack."""
        from sim.api.pictures import plot_sweep

        return plot_sweep(self.table, self.swept, value)

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> list[Result]: ...
    def __getitem__(self, index: int | slice) -> Result | list[Result]:
        return self.results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def _short(self) -> pd.DataFrame:
        table = self.table
        shown = table[[name for name in dict.fromkeys((*self.swept, *_SHOWN)) if name in table.columns]]
        if _ASSUMED not in table.columns:
            return shown
        # Of routing that nobody recorded the time is a range.
        ranges = [range_of(row, "tpot_ms") for row in rows_of(table)]
        texts = [f"{one[0]:.4g}–{one[1]:.4g}" if one else "–" for one in ranges]
        shown.insert(list(shown.columns).index("tpot_ms") + 1, "tpot_ms_range", texts)
        return shown

    def _note(self) -> str:
        """What stands below the table, if anything."""
        table = self.table
        if _ASSUMED not in table.columns:
            return ""
        kinds = ", ".join(dict.fromkeys(table[_ASSUMED].dropna()))
        return f"tpot_ms_range: {kinds}; the range is by how local the routing is, which is not recorded: {PAGE}"

    def __str__(self) -> str:
        """What was swept, and the figures that are read first."""
        text = self._short().to_string(index=False, float_format=lambda value: f"{value:.4g}")
        return "\n".join(filter(None, (text, self._note())))

    def __repr__(self) -> str:
        return f"<Sweep over {', '.join(self.swept) or 'nothing'}: {len(self)} runs>"

    def _repr_html_(self) -> str:
        text = self._short().to_html(index=False, float_format=lambda value: f"{value:.4g}")
        return f"{text}<p>{escape(note)}</p>" if (note := self._note()) else str(text)


class SweepError(ValueError):
    """Some runs of a sweep failed. finished: those that did not; failures: a line for each that did, by its name."""

    def __init__(self, message: str, finished: Sweep, failures: Mapping[str, str]) -> None:
        super().__init__(message)
        self.finished = finished
        self.failures = dict(failures)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.finished, self.failures)


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was interrupted. finished: the runs that were done by then."""

    def __init__(self, finished: Sweep) -> None:
        super().__init__(f"{len(finished)} runs had finished; they are in .finished of this exception")
        self.finished = finished

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.finished,)


@dataclass(frozen=True)
class Place:
    """A run of a sweep: its name, what each swept key shows, the run itself, and the folder that it is written to."""

    name: str
    labels: Mapping[str, Any]
    job: Job
    folder: Path | None


@dataclass(frozen=True)
class _Outcome:
    """What a worker sends back: a result without the job, which is here already; or the line of its error."""

    metrics: dict[str, Any]
    recorded: Recorded
    line: str | None = None
    notes: tuple[str, ...] = ()


def sweep(
    hardware: Any = None,
    policy: Any = None,
    *,
    jobs: Any = -1,
    out: Any = None,
    config_dir: Any = None,
    **keys: Any,
) -> Sweep:
    """Run every combination of the arguments that are lists, and return the results.

    The arguments are those of `simulate`; a list of lists gives a key that takes a list several. `compare` is `none`
    unless it is given. jobs: worker processes, -1 = one a core, 1 = this process. out: a folder with one folder for
    each run, as `python -m sim -m` writes them; with skip_done=True those that are done are not made again.

    What cannot be composed is a ValueError before anything runs. A run that fails does not stop the others: SweepError,
    a ValueError, at the end. Ctrl-C ends the workers: SweepInterrupted, a KeyboardInterrupt. Both hold what finished.
    """
    asked = {"hardware": hardware, "policy": policy, "compare": "none", **keys}
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0 or jobs < -1:
        raise ValueError(f"jobs={plain(repr(jobs), 60)} must be a number of processes, or -1 for one a core")
    for key, value in asked.items():
        refuse_array(key, value)
    axes = {key: _values(key, value) for key, value in asked.items() if _is_axis(value)}
    folder = folder_of("out", out)
    with as_library(folder_of("config_dir", config_dir)):
        planned = _planned(asked, axes, folder)
        check_folder(planned[0].job, folder)
    if jobs == 1 or len(planned) == 1:
        return _gathered(planned, (_attempt(one.job, one.folder, False) for one in planned), tuple(axes))
    backend = Workers()
    workers = Parallel(n_jobs=min(effective_n_jobs(jobs), len(planned)), backend=backend, return_as="generator")
    outcomes = workers(delayed(_attempt)(one.job, one.folder, True) for one in planned)
    all_ended = False

    def until_all_ended() -> Iterator[Any]:
        nonlocal all_ended
        yield from outcomes
        all_ended = True

    try:
        with closing(outcomes):
            return _gathered(planned, until_all_ended(), tuple(axes))
    finally:
        # The next sweep must not find modules in them that have been edited since.
        backend.end(at_once=not all_ended)


def _is_axis(value: Any) -> bool:
    """Whether an argument is a list of what its key takes."""
    return isinstance(value, list | tuple | range | np.ndarray | pd.Series | pd.Index)


def _values(key: str, value: Any) -> list[Any]:
    found = list(value)
    if not found:
        raise ValueError(f"{plain(key, 60)} is an empty list: there is nothing to run")
    return found


def _planned(asked: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], out: Path | None) -> list[Place]:
    """Every run, composed and checked."""
    number = int(np.prod([len(values) for values in axes.values()], dtype=float))
    if number > MOST_RUNS:
        raise ValueError(f"a sweep of {number} runs is more than {MOST_RUNS}; sweep over less")
    labels = {key: _distinct([label_of(value) for value in values]) for key, values in axes.items()}
    planned: dict[str, Place] = {}
    for chosen in itertools.product(*(range(len(values)) for values in axes.values())):
        shown = {key: labels[key][index] for key, index in zip(axes, chosen, strict=True)}
        name = slug(",".join(f"{key}={label}" for key, label in shown.items()))
        if name in planned:
            # What is no part of a folder's name was all the difference.
            name = f"{name}-{len(planned) + 1}"
        keys = {**asked, **{key: axes[key][index] for key, index in zip(axes, chosen, strict=True)}}
        try:
            job = plan(keys)
            check_ahead(job.cfg)
        except ValueError as error:
            raise _with_hint(error, keys) from error
        planned[name] = Place(name, shown, job, None if out is None else out / name)
    return list(planned.values())


def _with_hint(error: ValueError, keys: Mapping[str, Any]) -> ValueError:
    """The error, with how to sweep over a list that stands inside a mapping, where it is of one."""
    for group, value in keys.items():
        for name, one in value.items() if isinstance(value, Mapping) else ():
            key = f"{group}.{name}"
            if _is_axis(one) and f"{key}=" in str(error):
                remedy = f"to sweep over it: **{{{key!r}: {plain(shown(list(one)), 60)}}} beside {group}"
                return ValueError(f"{plain(str(error), 290 - len(remedy))}; {remedy}")
    return error


def _distinct(labels: Sequence[Any]) -> list[Any]:
    """The labels, a number behind each that was there before: two objects of one class are two."""
    seen: dict[Any, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return found


def _attempt(job: Job, folder: Path | None, is_worker: bool) -> _Outcome:
    """Run one job; a user's error as its line."""
    try:
        with as_library(job.config_dir):
            result = run(job, folder, may_end=is_worker)
    except ValueError as error:
        return _Outcome({}, Recorded(), str(error))
    return _Outcome(result.metrics, result.recorded, notes=result.notes)


def _gathered(planned: Sequence[Place], outcomes: Iterator[_Outcome], swept: Sequence[str]) -> Sweep:
    """The results, as they come."""
    finished: list[tuple[Place, Result]] = []
    failures: dict[str, str] = {}
    try:
        for number, (one, outcome) in enumerate(zip(planned, outcomes, strict=True), start=1):
            LOG.info("%d/%d %s: %s", number, len(planned), one.name, outcome.line or "done")
            if outcome.line is not None:
                failures[one.name] = outcome.line
                continue
            result = Result(outcome.metrics, one.job, one.folder, recorded=outcome.recorded, notes=outcome.notes)
            finished.append((one, result))
    except KeyboardInterrupt as error:
        raise SweepInterrupted(Sweep(finished, swept)) from error
    if failures:
        name, line = next(iter(failures.items()))
        told = plain(f"{len(failures)} of {len(planned)} runs failed; the first, {plain(name, 80)}: {line}", 290)
        raise SweepError(told, Sweep(finished, swept), failures)
    return Sweep(finished, swept)
