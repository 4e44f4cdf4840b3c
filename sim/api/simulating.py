"""One simulation, called from a program: what the command does, without its words, its folder and its end.

Runs of one process take turns: what a run has global, as the folder of one's own configuration, is its own for so long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from expertflow.keys import plain, shown
from expertflow.observer import Observer
from expertflow.policy import Policy
from sim.api.result import Recorded, Result
from sim.api.words import Asked, asked
from sim.execute import Kept, run_job, run_kept
from sim.job.compose import compose
from sim.job.configure import check_words, checked
from sim.job.errors import one_line
from sim.job.limit import limited
from sim.job.output import clear_results, write_text
from sim.job.parts import dotted
from sim.job.report import remarks_of
from sim.job.results import read_metrics
from sim.job.run_cli import TRACEBACK, no_exit
from sim.job.setup import Transfer, Workload, make_policy, make_workload
from sim.job.title import titled
from sim.machine.run import run_policy
from sim.paths import own_folder, use_own_folder
from sim.views.events import Events
from sim.views.timeline import Timeline

_turn = [RLock()]
"""Held by the run that goes on; another one in a process that was forked meanwhile."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _turn.__setitem__(0, RLock()))


def simulate(
    hardware: Any = None,
    policy: Any = None,
    *,
    out: Any = None,
    config_dir: Any = None,
    **keys: Any,
) -> Result:
    """Run one configuration, and those beside it as `compare` says, and return its result.

    hardware, policy, **keys: the keys of the command line (`expertflow keys` lists them), those with a dot or a slash
    as `**{"policy.horizon.max": 4}`. hardware, host, policy, model, stack, link, storage and trace are the name of a
    file, or a mapping of `name` and what differs; a part of the policy may be a class or an object. trace may be a
    path, a list of them, an opened trace, or a mapping of arrays. out: a folder to write what the command writes; None:
    nothing is written. config_dir: a folder of your own configuration.

    ValueError with the command's one line for whatever is wrong, a part that breaks a rule or raises included.
    """
    # Of any type to a type checker, which would else refuse keys that are given as **{"a.key": 4}.
    folder = folder_of("out", out)
    with as_library(folder_of("config_dir", config_dir)):
        return run(plan({"hardware": hardware, "policy": policy, **keys}), folder)


def folder_of(name: str, given: object) -> Path | None:
    """An argument that names a folder, from the current one. ValueError where it is no path."""
    if given is None:
        return None
    if not isinstance(given, str | Path) or not str(given):
        raise ValueError(f"{name}={plain(shown(given), 60)} must be the path of a folder, or None")
    return Path(given).absolute()


@contextmanager
def as_library(config_dir: Path | None) -> Iterator[None]:
    """Around all that a call does: its turn, its folder of configuration, and errors as a ValueError of one line."""
    with _turn[0]:
        before = own_folder()
        try:
            use_own_folder(config_dir)
            with no_exit():
                yield
        except Exception as error:
            line = one_line(error)
            if line is None:
                raise
            told = copy(error) if isinstance(error, ValueError) and str(error) == line else ValueError(line)
            if os.environ.get(TRACEBACK):
                raise told from error
            # The line says where; what this package did on the way there is nobody's concern.
            raise told from None
        finally:
            use_own_folder(before)


@dataclass(frozen=True)
class Job:
    """One run, ready: its configuration, parts given in Python included; and what its policy is called."""

    words: tuple[str, ...]
    cfg: dict[str, Any]
    given: Asked
    title: str
    config_dir: Path | None

    def workload(self) -> Workload:
        """What is run, on what."""
        return make_workload(self.cfg, self.given.trace)

    def record(self, metrics: Mapping[str, Any]) -> Recorded:
        """Events and timeline of this run, whose metrics are given: it is run again, without those beside it.

        ValueError where the policy then decides otherwise.
        """
        with as_library(self.config_dir):
            cfg, work = self.cfg, self.workload()
            policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
            recorders = _Recorders(cfg, work, True, True)
            with limited(cfg["timeout_s"], may_end=False):
                found = run_policy(work, policy, transfer, recorders.observers)
        if any(found[key] != metrics[key] for key in ("elapsed_ns", "stall_ns", "num_hits", "num_evictions", "bytes")):
            raise ValueError(
                f"{plain(self.title, 80)} decides otherwise when it is run again: the trace has changed, or a part "
                "keeps state in its class or module; give events=True and timeline=True to the run itself"
            )
        return recorders.recorded()

    def described(self) -> dict[str, Any]:
        """The configuration as it may be written: classes and objects by what a configuration calls a class."""
        policy = dict(self.cfg["policy"])
        for name in self.given.parts:
            target = policy[name]["_target_"]
            kind = target if isinstance(target, type) else type(target)
            policy[name] = {**policy[name], "_target_": target if isinstance(target, str) else dotted(kind)}
        trace = dict(self.cfg["trace"])
        if self.given.trace is not None:
            trace["path"] = [str(path) for path in self.given.trace.paths]
        return {**self.cfg, "policy": policy, "trace": trace}


def plan(keys: Mapping[str, Any]) -> Job:
    """Compose and check what the arguments ask for. ValueError or Hydra's own for what cannot be run."""
    given = asked({key: value for key, value in keys.items() if value is not None or key not in ("hardware", "policy")})
    words = list(given.words)
    check_words(words)
    composed = compose(words)
    file = str(composed.hydra.runtime.choices.get("policy"))
    cfg = checked(_without_hydra(composed))
    policy = cfg["policy"]
    title = titled(policy, file, words, _policy_of)
    if given.parts:
        named = ", ".join(f"{name}={_class_name(part['_target_'])}" for name, part in given.parts.items())
        title = f"{title}{', ' if ' with ' in title else ' with '}{named}"
        cfg = {**cfg, "policy": {**policy, **{name: dict(part) for name, part in given.parts.items()}}}
    if cfg["skip_done"] and _has_objects(given):
        raise ValueError(
            "skip_done=true cannot tell whether a class or an object of Python is what it was; name the part by "
            "_target_='module.Class', or leave skip_done out"
        )
    return Job(given.words, cfg, given, title, own_folder())


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _policy_of(words: Any) -> dict[str, Any]:
    found: dict[str, Any] = OmegaConf.to_container(compose(words).policy, resolve=True)  # type: ignore[assignment]
    return found


def _class_name(target: Any) -> str:
    kind = target if isinstance(target, type) else type(target)
    return target if isinstance(target, str) else str(kind.__qualname__)


def run(job: Job, out: Path | None, may_end: bool = False) -> Result:
    """The result of a job, written to `out` if there is one. may_end: of `limited`, where the process is a worker."""
    started = time.perf_counter()
    check_folder(job, out)
    cfg, work = job.cfg, job.workload()
    notes = tuple(remarks_of(cfg, work))
    made: list[tuple[Policy, Transfer]] = []
    recorders = _Recorders(cfg, work, cfg["events"], cfg["timeline"])

    def metrics_of() -> dict[str, Any]:
        made.append(make_policy(cfg["policy"], work, cfg["seed"]))
        return run_job(cfg, work, out, made[0], recorders.observers)

    found: dict[str, Any] | None
    if out is None:
        with limited(cfg["timeout_s"], may_end):
            found = metrics_of()
    else:
        out.mkdir(parents=True, exist_ok=True)
        kept = Kept(out, "sim.execute", partial(_begin, out, job), job.words, started, _has_objects(job.given))
        found = run_kept(kept, job.described(), work, metrics_of)
        if found is None:
            return Result(read_metrics(out / "metrics.json"), job, out, notes=notes)
    parts = {name: getattr(made[0][0], name) for name in job.given.parts}
    return Result(found, job, out, parts, recorders.recorded(), notes)


class _Recorders:
    """Events and timeline in memory, where they are asked for."""

    def __init__(self, cfg: Mapping[str, Any], work: Workload, events: bool, timeline: bool) -> None:
        num_experts = work.model.num_experts
        self._events = Events(num_experts, work.storage is not None) if events else None
        self._timeline = Timeline(cfg["policy"]["name"], num_experts) if timeline else None
        self.observers: list[Observer] = [one for one in (self._events, self._timeline) if one is not None]

    def recorded(self) -> Recorded:
        """What they hold, as tables."""
        return Recorded(
            None if self._events is None else self._events.frame(),
            None if self._timeline is None else self._timeline.frames(),
        )


def check_folder(job: Job, out: Path | None) -> None:
    """ValueError where a job asks for what only a folder can give."""
    if job.cfg["skip_done"] and out is None:
        raise ValueError("skip_done=true means nothing without a folder; give out=FOLDER, or leave it out")


def _has_objects(given: Asked) -> bool:
    """Whether a part is a class or an object: no hash can tell whether it is the same the next time."""
    return any(not isinstance(part["_target_"], str) for part in given.parts.values())


def _begin(folder: Path, job: Job) -> None:
    """Nothing in the folder counts from here on; it says what is run."""
    clear_results(folder)
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, content in (("config", job.described()), ("overrides", list(job.words))):
        write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
