"""`python -m tests.attack.hostile_table [FILE]`: every hostile part in each way of running, as Markdown.

Small runs of a model of 4 layers and 8 experts: a kind that is caught at all is caught in its first forwards. The times
of a replay are this machine's, so that forward and layer are shown of the simulation alone.
"""

from __future__ import annotations

import gc
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from expertflow.boundary import PartError
from expertflow.evictions.lru import LRU
from expertflow.horizons.fixed import FixedHorizon
from expertflow.orders.resident_first import ResidentFirst
from expertflow.policy import Policy
from expertflow.predictors.transition import TransitionPredictor
from expertflow.selections.top_k import TopK
from replay.lockstep.compare import check_log
from replay.lockstep.log_reader import LogReader
from replay.machine.rig import Rig
from replay.run import needs_of, replay_policy
from sim.job.setup import Transfer, Workload
from sim.machine.run import run_policy
from tests.attack.parts import BLIND, KINDS, MARKED, REFUSED, Kind
from tests.lockstep.support import Job
from tests.support.commands import tiny_trace
from tests.support.replays import TINY, Case, on_cpu

SHAPE = (4, 8)
NUM_TOKENS = 12
WORDS = ("residency=0.5", "seed=0", "+policy=fixed_1", "policy/predictor=transition", "policy.predictor.keep=0")
HONEST = ("policy.predictor.fitted_start=null", "policy/selection=top_k", "policy/eviction=lru")
"""The policy that stands in the log is that of `policy_of(None)`."""
HOST: dict[str, Any] = {
    "host_memory_gb_per_s": 40.0,
    "host_memory_efficiency": 0.8,
    "host_tflops": 0.5,
    "host_round_trip_ns": 7_000,
}
"""What the simulated host can do; only a place asks."""
SILENT = "silent"


@dataclass(frozen=True)
class Outcome:
    """How a run with a hostile part ended, and what it said."""

    how: str
    message: str = ""

    @property
    def check(self) -> str:
        """What caught it: the hook whose answer or error it was, or the attribute that was declared."""
        found = re.match(r"\w+\.(\w+) ", self.message) or re.match(r"\w+\.(\w+)=", self.message)
        if found:
            return found.group(1)
        if "memory behind view.residency" in self.message:
            return "view.residency"
        return "class" if self.message else self.how


@dataclass
class World:
    """What hostile parts run on: a workload, unscaled and as it is replayed, a device, a log of the honest run."""

    full: Workload
    work: Workload
    rig: Rig
    log: Path


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """One for all kinds; gone at the end."""
    draw = np.random.default_rng(0)
    lookahead = draw.normal(size=(NUM_TOKENS, SHAPE[0], 2, SHAPE[1])).astype(np.float16)
    lookahead[:, -1] = lookahead[:, -2, 1:] = np.nan  # past the last layer
    arrays = {
        "lookahead": lookahead,
        "embedding": draw.normal(size=(NUM_TOKENS, 4)).astype(np.float16),
        "token_ids": np.arange(NUM_TOKENS, dtype=np.int32),
    }
    path = tiny_trace(folder / "tiny.safetensors", NUM_TOKENS, prompt=3, **arrays)
    case = Case.of(*TINY, *WORDS, *HONEST, f"trace.path={path}")
    full = replace(case.full, hardware=replace(case.full.hardware, **HOST))
    tiny = [word for word in TINY if "model." in word]
    log = Job.of("+hardware=a100", *tiny, *WORDS, *HONEST, f"trace.path={path}").log(folder / "log.parquet")
    # A replay looks for garbage before it starts: not among all that tests have loaded.
    gc.collect()
    gc.freeze()
    try:
        with on_cpu(throttle_gb_per_s=1.0) as device:
            needs = needs_of(case.work, policy_of(None), Transfer(staging_slots=1))
            yield World(full, case.work, Rig(device, case.work.model, needs, 1.0), log)
    finally:
        gc.unfreeze()


def policy_of(kind: Kind | None, future: Any = None) -> Policy:
    """A policy with one hostile part; all honest without."""
    makers: dict[str, Callable[[], Any]] = {
        "predictor": TransitionPredictor,
        "horizon": partial(FixedHorizon, 1),
        "selection": TopK,
        "eviction": LRU,
        "order": ResidentFirst,
    }
    if kind is not None:
        makers |= kind.beside | {kind.place: kind.made()}
    return Policy(**{name: make() for name, make in makers.items()}, future=future)


def _ends(kind: Kind, run: Callable[[Policy], Any], future: Any) -> Outcome:
    """How `run` ends with a policy of that kind. What is raised is a PartError, or it is not caught as it should be."""
    try:
        policy = policy_of(kind, future)
        found = run(policy)
    except PartError as error:
        return Outcome(REFUSED, str(error))
    if found is not None:
        return Outcome("another decision", found)
    if policy.uses_future:
        return Outcome(MARKED)
    saw = getattr(getattr(policy, kind.place), "saw", None)
    return Outcome(BLIND if kind.ends == BLIND and saw == 0 else SILENT)


def simulated(kind: Kind, world: World) -> Outcome:
    """In a simulation."""

    def run(policy: Policy) -> None:
        run_policy(world.full, policy, Transfer(serial=kind.serial))

    return _ends(kind, run, world.full.future)


def replayed(kind: Kind, world: World) -> Outcome:
    """In a replay on a CPU that verifies."""

    def run(policy: Policy) -> None:
        replay_policy(world.rig, world.work, policy, Transfer(serial=kind.serial), verify=True)

    return _ends(kind, run, world.full.future)


def in_lockstep(kind: Kind, world: World) -> Outcome:
    """Against the log of the honest run."""

    def run(policy: Policy) -> str | None:
        with LogReader(world.log) as reader:
            return check_log(reader, world.full, policy).difference

    return _ends(kind, run, world.full.future)


def rows(world: World) -> Iterator[tuple[Kind, Outcome, Outcome, Outcome]]:
    """Every kind with its three outcomes."""
    for kind in KINDS:
        yield kind, simulated(kind, world), replayed(kind, world), in_lockstep(kind, world)


def table(world: World) -> str:
    """All of them as Markdown."""
    found = list(rows(world))
    silent = sum(SILENT in (one.how, other.how, third.how) for _, one, other, third in found)
    lines = [
        "# Hostile parts",
        "",
        "Made by `python -m tests.attack.hostile_table results/attack/parts.md`. Each part breaks one rule of",
        "docs/contract.md, or wishes for more than it may have. A column says what caught it there: the hook whose",
        "answer or error was refused, or the attribute. *Sees nothing*: it runs, and has learned and changed nothing.",
        "In lockstep, against an honest policy's log, it may differ (*another decision*) before it breaks its rule.",
        "",
        f"{len(found)} kinds: {sum(one.how == REFUSED for _, one, _, _ in found)} refused, "
        f"{sum(one.how == MARKED for _, one, _, _ in found)} marked as a reference, "
        f"{sum(one.how == BLIND for _, one, _, _ in found)} see nothing; {silent} silent.",
        "",
        "| Part | Kind | What it does | Simulation | Replay | Lockstep | Message |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, one, other, third in found:
        in_step = third.check if third.how == REFUSED else third.how
        cells = [kind.place, kind.name, kind.told, one.check, other.check, in_step]
        message = one.message.replace("|", "\\|")
        lines.append(f"| {' | '.join(cells)} | {message} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    """Print the table, or write it to a file. 1: a kind was silent."""
    words = sys.argv[1:] if words is None else words
    with tempfile.TemporaryDirectory() as folder, world(Path(folder)) as made:
        text = table(made)
    if words:
        Path(words[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(words[0]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return int("; 0 silent." not in text)


if __name__ == "__main__":
    sys.exit(main())
