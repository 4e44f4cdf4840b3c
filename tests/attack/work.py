"""A worker: tries one seed after the other of what it is told, under a watchdog and a bound on memory."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.attack.kinds import MODULES, Kind, registry
from tests.attack.outcome import (
    ACCEPTED,
    DIED,
    HANG,
    MEMORY,
    REFUSED,
    TRACEBACK,
    WARNING,
    Hang,
    Outcome,
    Warned,
    bounded,
    forget_peak,
    of_error,
    peak_bytes,
    watchdog,
)

SEED, SINCE, TRIED, REFUSED_AT, ACCEPTED_AT, RECHECKED, CONFIRMED, PEAK, CPU = range(9)
"""Places on the board, which outlives the worker: the seed it is at, since when (monotonic ns), and its counts."""
_NOT_SMALLER = (HANG, MEMORY, DIED)
_MOST_MINIMISED = 3


@dataclass(frozen=True)
class Batch:
    """Seeds `start` to `start + count` of a kind."""

    kind: str
    start: int
    count: int


@dataclass(frozen=True)
class Failure:
    """An input that met a failure, by what makes it again."""

    kind: str
    seed: int
    verdict: str
    text: str
    steps: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
    content: bytes = b""


class Bench:
    """Kinds made ready in a folder, and the trying of their inputs."""

    def __init__(self, folder: Path, board: MutableSequence[int], modules: Sequence[str] = MODULES) -> None:
        self.folder = folder
        self.board = board
        self.kinds = registry(modules)
        self._ready: set[str] = set()
        self._minimised: Counter[tuple[str, str]] = Counter()

    def kind(self, name: str) -> Kind:
        """The kind, ready."""
        kind = self.kinds[name]
        if name not in self._ready:
            own = self.folder / name
            own.mkdir(parents=True)
            kind.prepare(own)
            self._ready.add(name)
        return kind

    def run(self, batch: Batch, tell: Any) -> None:
        """Try a batch; each failure is told at once, the counts are on the board."""
        kind = self.kind(batch.kind)
        for place in (TRIED, REFUSED_AT, ACCEPTED_AT, RECHECKED, CONFIRMED, PEAK, CPU):
            self.board[place] = 0
        forget_peak()
        cpu = time.process_time_ns()
        before = peak_bytes()
        with Warned().watch() as warned, bounded(kind.most_bytes), watchdog(kind.hang_s) as begin:
            for seed in range(batch.start, batch.start + batch.count):
                self.board[SEED], self.board[SINCE] = seed, time.monotonic_ns()
                begin()
                outcome = attempt(kind, seed, warned)
                self._count(outcome)
                if outcome.failed:
                    begin()
                    tell(self._failure(kind, seed, outcome, warned))
                self.board[CPU] = time.process_time_ns() - cpu
        # Of the batch: to ask after each input takes as long as to try one.
        self.board[PEAK] = max(peak_bytes() - before, 0)
        self.board[SINCE] = 0

    def _count(self, outcome: Outcome) -> None:
        self.board[TRIED] += outcome.weight
        if outcome.verdict == REFUSED:
            self.board[REFUSED_AT] += outcome.weight
            self.board[CONFIRMED] += outcome.weight * outcome.rechecked
        elif outcome.verdict == ACCEPTED:
            self.board[ACCEPTED_AT] += outcome.weight
            self.board[RECHECKED] += outcome.weight * outcome.rechecked

    def _failure(self, kind: Kind, seed: int, outcome: Outcome, warned: Warned) -> Failure:
        """The failure with its input, made smaller where that is cheap."""
        found = Failure(kind.name, seed, outcome.verdict, outcome.text)
        left_out: list[int] = []
        try:
            _, steps = kind.describe(seed)
            self._minimised[kind.name, outcome.verdict] += 1
            cheap = self._minimised[kind.name, outcome.verdict] <= _MOST_MINIMISED
            if cheap and len(steps) > 1 and outcome.verdict not in _NOT_SMALLER:
                for index in range(len(steps)):
                    if attempt(kind, seed, warned, (*left_out, index)).verdict == outcome.verdict:
                        left_out.append(index)
            content, steps = kind.describe(seed, left_out)
        except (Exception, Hang):
            return found
        return replace(found, steps=steps, left_out=tuple(left_out), content=content)


def attempt(kind: Kind, seed: int, warned: Warned, left_out: tuple[int, ...] = ()) -> Outcome:
    """One input; whatever it raises is an outcome."""
    return _guarded(kind, lambda: kind.attempt(seed, left_out), warned)


def retry(kind: Kind, content: bytes, warned: Warned) -> Outcome:
    """An input that was saved; whatever it raises is an outcome."""
    return _guarded(kind, lambda: kind.retry(content), warned)


def _guarded(kind: Kind, run: Callable[[], Outcome], warned: Warned) -> Outcome:
    warned.take()
    try:
        outcome = run()
    except Hang:
        return Outcome(HANG, text=f"took more than {kind.hang_s:.0f} s")
    except Exception as error:
        told = of_error(error, ())
        # Raised by the attack itself: by a mutator or an oracle.
        return Outcome(MEMORY if told.verdict == MEMORY else TRACEBACK, text=traceback.format_exc()[-3000:])
    if (stray := warned.take()) and not outcome.failed:
        return Outcome(WARNING, text=stray[:500])
    return outcome


def serve(connection: Connection, board: MutableSequence[int], folder: str, log: str, modules: Sequence[str]) -> None:
    """The life of a worker process: batches in, failures and "done" out; None ends it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # What a reader needs for a moment lies where the worker has its files: in memory, where there is such a folder.
    tempfile.tempdir = f"{folder}/scratch"
    os.mkdir(tempfile.tempdir)
    bench = Bench(Path(folder), board, modules)
    while (batch := connection.recv()) is not None:
        if isinstance(batch, Failure):
            connection.send(described(bench, batch))
            continue
        bench.run(batch, connection.send)
        connection.send("done")


def described(bench: Bench, failure: Failure) -> Failure:
    """A failure of a worker that is gone, with its input made again."""
    content, steps = bench.kind(failure.kind).describe(failure.seed)
    return replace(failure, content=content, steps=steps)
