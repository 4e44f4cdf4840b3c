"""A round: which kind is tried next, by which worker, and what came of it all."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.attack.kinds import MODULES, SEEDS_PER_ROUND, Kind
from tests.attack.outcome import DIED, HANG
from tests.attack.work import (
    ACCEPTED_AT,
    CONFIRMED,
    CPU,
    PEAK,
    RECHECKED,
    REFUSED_AT,
    SEED,
    SINCE,
    TRIED,
    Batch,
    Failure,
    serve,
)

_BATCH_S = 2.0
_GRACE_S = 5.0
"""How much longer than its watchdog a worker may take before it is ended from outside."""
_PREPARE_S = 300.0


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    target: int
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    rechecked: int = 0
    confirmed: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    handed_out: int = 0
    under_way: int = 0

    def share(self) -> float:
        """How much of its target is done or under way."""
        return (self.tried + self.under_way) / self.target


class Worker:
    """A process that tries, its line to here, and the board on which it counts."""

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.board = context.RawArray("q", 9)
        self.folder = Path(tempfile.mkdtemp(prefix="w", dir=folder))
        arguments = (theirs, self.board, str(self.folder), str(folder / "log"), tuple(modules))
        self.process = context.Process(target=serve, args=arguments, daemon=False)
        self.process.start()
        theirs.close()
        self.batch: Batch | None = None
        self.since = 0.0

    def give(self, batch: Batch) -> None:
        """Hand out a batch."""
        for place in range(len(self.board)):
            self.board[place] = 0
        self.board[SEED] = batch.start
        self.batch, self.since = batch, time.monotonic()
        self.connection.send(batch)

    def is_stuck(self, hang_s: float) -> bool:
        """Its input, or the making ready, has taken too long."""
        if self.batch is None:
            return False
        now, since = time.monotonic(), self.board[SINCE] / 1e9
        return now - since > hang_s + _GRACE_S if since else now - self.since > _PREPARE_S

    def end(self) -> None:
        """End the process, whatever it does."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Round:
    """Tries kinds until each has its target or the time is up.

    keep: called with each failure that is kept, `most_kept` of a kind and verdict. seed: of the round; no two rounds
    of different seeds have an input in common. modules: where the workers find the kinds.
    """

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        targets: Mapping[str, int],
        seed: int,
        keep: Callable[[Failure], Any],
        modules: Sequence[str] = MODULES,
    ) -> None:
        self.kinds = dict(kinds)
        self.tallies = {name: Tally(targets[kind.target]) for name, kind in kinds.items() if targets[kind.target]}
        self.first = seed * SEEDS_PER_ROUND
        self.most_kept = 5
        self._keep = keep
        self._modules = modules
        self._kept: Counter[tuple[str, str]] = Counter()
        self._todo: list[Batch] = []

    def run(self, seconds: float, jobs: int, tell: Callable[[str], Any] = lambda line: None) -> None:
        """Until all targets are met, or the time is up; a batch that has begun is finished."""
        shared = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="attack", dir=shared if shared.is_dir() else None))
        end, told = time.monotonic() + seconds, time.monotonic()
        workers = [Worker(folder, self._modules) for _ in range(jobs)]
        try:
            while True:
                self._hand_out(workers, end)
                busy = [worker for worker in workers if worker.batch is not None]
                if not busy:
                    break
                ready = wait([worker.connection for worker in busy], timeout=1.0)
                for index, worker in enumerate(workers):
                    workers[index] = self._listen(worker, worker.connection in ready, folder)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    tell(self.progress())
        finally:
            for worker in workers:
                worker.end()
            shutil.rmtree(folder, ignore_errors=True)

    def progress(self) -> str:
        """One line."""
        tried = sum(tally.tried for tally in self.tallies.values())
        failed = sum(tally.failures.total() for tally in self.tallies.values())
        least = min(self.tallies.items(), key=lambda item: item[1].tried / item[1].target)
        return f"{tried} tried, {failed} failures; least done: {least[0]}, {least[1].tried} of {least[1].target}"

    def _hand_out(self, workers: list[Worker], end: float) -> None:
        for worker in workers:
            if worker.batch is None and time.monotonic() < end and (batch := self._next()) is not None:
                worker.give(batch)

    def _next(self) -> Batch | None:
        """Of the kind that is furthest from its target, as many as take about two seconds."""
        if self._todo:
            return self._todo.pop()
        open_ = [(tally.share(), name) for name, tally in self.tallies.items() if tally.share() < 1]
        if not open_:
            return None
        name = min(open_)[1]
        tally, kind = self.tallies[name], self.kinds[name]
        rate = tally.tried / tally.seconds if tally.seconds else 0.0
        count = max(
            1, min(kind.batch, int(rate * _BATCH_S) or kind.batch, tally.target - tally.tried - tally.under_way)
        )
        batch = Batch(name, self.first + tally.handed_out, count)
        tally.handed_out += count
        tally.under_way += count
        return batch

    def _listen(self, worker: Worker, ready: bool, folder: Path) -> Worker:
        """Take what the worker says; the worker, or the one in its place."""
        batch = worker.batch
        if batch is None:
            return worker
        try:
            while ready and worker.connection.poll():
                told = worker.connection.recv()
                if told == "done":
                    self._settle(worker, batch)
                    return worker
                self._failed(told)
        except (EOFError, OSError):
            worker.process.join()
            return self._replace(worker, batch, DIED, f"the process ended with {worker.process.exitcode}", folder)
        if worker.is_stuck(self.kinds[batch.kind].hang_s):
            return self._replace(worker, batch, HANG, "did not come back and was ended", folder)
        return worker

    def _settle(self, worker: Worker, batch: Batch) -> None:
        tally, board = self.tallies[batch.kind], worker.board
        tally.tried += board[TRIED]
        tally.under_way -= batch.count
        tally.refused += board[REFUSED_AT]
        tally.accepted += board[ACCEPTED_AT]
        tally.rechecked += board[RECHECKED]
        tally.confirmed += board[CONFIRMED]
        tally.peak_bytes = max(tally.peak_bytes, board[PEAK])
        tally.cpu_seconds += board[CPU] / 1e9
        tally.seconds += time.monotonic() - worker.since
        worker.batch = None

    def _replace(self, worker: Worker, batch: Batch, verdict: str, text: str, folder: Path) -> Worker:
        """The input at which a worker died or stuck is a failure; the rest of its batch is for another."""
        seed, began = worker.board[SEED], bool(worker.board[SINCE])
        worker.end()
        self._settle(worker, batch)
        other = Worker(folder, self._modules)
        failure = Failure(batch.kind, seed, verdict, text)
        if not began:
            other.end()
            log = (folder / "log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{batch.kind} cannot be made ready: {text}\n{log[-3000:]}")
        self.tallies[batch.kind].tried += 1
        other.connection.send(failure)
        self._failed(other.connection.recv() if other.connection.poll(_PREPARE_S) else failure)
        left = batch.start + batch.count - seed - 1
        if left:
            self.tallies[batch.kind].under_way += left
            self._todo.append(Batch(batch.kind, seed + 1, left))
        return other

    def _failed(self, failure: Failure) -> None:
        self.tallies[failure.kind].failures[failure.verdict] += 1
        key = (failure.kind, failure.verdict)
        self._kept[key] += 1
        if self._kept[key] <= self.most_kept:
            self._keep(failure)
