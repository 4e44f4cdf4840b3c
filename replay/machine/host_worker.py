"""Experts that the host of a replay computes: a thread that multiplies their weights where they lie.

On a GPU machine it takes what the CPU takes. On a machine without a GPU the streams are threads on the same few cores:
there it reads every weight of an expert once, for a single row, and then keeps the pace that the figures of a host set,
as the link of that machine keeps a stated one. Such a host and such a link do not slow each other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch

from replay.machine.device import Event, Way
from replay.machine.figures import HostTimes
from replay.machine.kernels import Kernels
from replay.machine.pools import HostPool
from replay.machine.products import products

LATE_NS = 2_000_000
"""ns by which what a pace sets may end late. If it is later, the pace goes on from the time of the thread."""
PATIENCE_NS = 60_000_000_000
"""How long a result is waited for."""

Check = Callable[[int, torch.Tensor], None]
"""(key, bytes that are read for it): counts what is wrong with them."""


class HostTask(NamedTuple):
    """Experts of one layer. put_ns: when the runtime asked for it. num_rows: of the activations, once for all experts.
    check: called before and after each expert, if stamps are checked."""

    number: int
    keys: Sequence[int]
    tokens: Sequence[int]
    num_rows: int
    put_ns: int
    check: Check | None


class Computed(NamedTuple):
    """An expert that was computed, in ns of the device's clock. is_last: of its task; then `sent` is the event at which
    the results are in GPU memory, None where they are there already."""

    task: int
    key: int
    start_ns: int
    end_ns: int
    is_last: bool
    sent: Event


class HostFault(Protocol):
    """A fault on purpose (`replay.machine.faults`)."""

    patience_ns: int

    def strikes(self, key: int) -> int | None:
        """The key whose weights are read for `key`; None: its result never comes. It may raise."""


class HostWeights:
    """The weights of all experts as matrices in host memory, and room for what is multiplied with them.

    activations [max_tokens, hidden]: as they came from the device. results [max_tokens, hidden]: sums over the experts.
    """

    def __init__(self, kernels: Kernels, host: HostPool, num_rows: int, pinned: bool) -> None:
        self._host = host
        self._rows_of = kernels.rows
        block = self._block = kernels.host_block(num_rows)
        shape = (max(block.max_rows, num_rows), block.feed.hidden)
        self.activations = torch.empty(shape, dtype=block.out.dtype, pin_memory=pinned)
        self.activations.fill_(0.02)
        self.results = torch.zeros((num_rows, shape[1]), dtype=block.out.dtype, pin_memory=pinned)
        self.row_bytes = shape[1] * self.results.element_size()
        self._feed_forward = products("cpu").feed_forward

    def bytes_of(self, key: int) -> torch.Tensor:
        """What is read for `key` [expert_bytes] uint8."""
        return self._host.buffer(key)

    def compute(self, weights: torch.Tensor, num_tokens: int, num_rows: int) -> None:
        """The products of one expert over `num_rows` rows, as they stand for `num_tokens` tokens; added to the results.

        weights: as of `bytes_of`.
        """
        block = self._block
        first, second = block.split(
            weights[: block.feed.num_values * self.results.element_size()].view(block.out.dtype)
        )
        self._feed_forward(self.activations, [first], [second], [num_rows], block.up, block.middle, block.out)
        rows = min(num_tokens, num_rows)
        self.results[:rows].add_(block.out[:rows])

    def rows_of(self, num_tokens: int) -> int:
        """Rows that bring the operations of an expert's products to those of so many tokens."""
        return self._rows_of(num_tokens)


class HostWorker(threading.Thread):
    """Computes tasks in the order in which they are put. clock: the device's, ns. news: called when anything is done.

    pace: what experts take; None = what they take. failure: what ended the thread's last task, if anything did.
    """

    def __init__(
        self,
        weights: HostWeights,
        way: Way,
        clock: Callable[[], int],
        news: Callable[[], None],
        pace: HostTimes | None = None,
        fault: HostFault | None = None,
    ) -> None:
        super().__init__(name="host's worker", daemon=True)
        self.weights, self.way = weights, way
        self.done: deque[Computed] = deque()
        self.failure: BaseException | None = None
        self.patience_ns = PATIENCE_NS if fault is None else fault.patience_ns
        self._clock, self._news, self._pace, self._fault = clock, news, pace, fault
        self._tasks: SimpleQueue[HostTask | None] = SimpleQueue()
        self._due_ns = 0
        """Up to when the pace has taken the host."""
        self.start()

    def put(self, task: HostTask) -> None:
        """Enqueue `task`, whose activations are on their way."""
        self.way.fetch(task.num_rows * self.weights.row_bytes)
        self._tasks.put(task)

    def close(self) -> None:
        """End the thread, if it is not stuck."""
        self._tasks.put(None)
        self.join(1.0)

    def run(self) -> None:
        """Serve tasks until `close`; one that fails is told to who waits for it."""
        try:
            self.way.begin_thread()
            # Compiled products run as they are: the optimiser would compile anew for every shape that it meets.
            with torch.jit.optimized_execution(False), torch.inference_mode():  # type: ignore[attr-defined]
                while (task := self._tasks.get()) is not None:
                    self._serve(task)
        except BaseException as error:
            self.failure = error
            self._news()

    def _serve(self, task: HostTask) -> None:
        weights, clock, pace, last = self.weights, self._clock, self._pace, len(task.keys) - 1
        num_bytes = task.num_rows * weights.row_bytes
        self.way.await_fetched()
        there_ns = 0
        if pace is not None:
            there_ns = pace.there_ns(task.num_rows)
            self._due_ns = max(self._due_ns, task.put_ns + there_ns)
        weights.results[: task.num_rows].zero_()
        for place, (key, num_tokens) in enumerate(zip(task.keys, task.tokens, strict=True)):
            read: int | None = key if self._fault is None else self._fault.strikes(key)
            if read is None:
                return
            start_ns = clock()
            self._compute(task, key, weights.bytes_of(read), num_tokens)
            if pace is not None:
                start_ns = self._due_ns
                self._keep_pace(pace.expert_ns(num_tokens) + (there_ns if place == last else 0))
            sent = self.way.send(num_bytes) if place == last else None
            end_ns = clock() if pace is None else self._due_ns
            self.done.append(Computed(task.number, key, start_ns, end_ns, place == last, sent))
            self._news()

    def _compute(self, task: HostTask, key: int, read: torch.Tensor, num_tokens: int) -> None:
        if task.check is not None:
            task.check(key, read)
        self.weights.compute(read, num_tokens, 1 if self._pace is not None else self.weights.rows_of(num_tokens))
        if task.check is not None:
            task.check(key, read)

    def _keep_pace(self, lasting_ns: int) -> None:
        """Wait until what takes `lasting_ns` by the pace has ended.

        A thread wakes late; a host that computed all the while would not, and goes on from when it was due.
        """
        due_ns = self._due_ns + lasting_ns
        left_ns = due_ns - self._clock()
        if left_ns > 0:
            time.sleep(left_ns * 1e-9)
        now_ns = self._clock()
        self._due_ns = due_ns if now_ns - due_ns < LATE_NS else now_ns
