"""The real machine whose host computes experts, too: implements `expertflow.machine.HostMachine`.

What a task costs the runtime's thread is to enqueue the way of the activations; the rest is the worker's
(`replay.machine.host_worker`). Its results are reported when the host finds them in GPU memory, and a program adds them
to the GPU's before the attention, or the head, that follows.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from expertflow.forward import Forward
from expertflow.machine import HOST, Costs, HostResult, Record, Wait
from replay.lost import DeviceLostError
from replay.machine.cuda_errors import explained, told_if_lost
from replay.machine.device import Device, Program, Work
from replay.machine.figures import Figures
from replay.machine.host_worker import HostTask, HostWeights, HostWorker
from replay.machine.kernels import Kernels
from replay.machine.pools import HostPool, SlotPool
from replay.machine.real import RealMachine
from replay.machine.rows import size_class
from replay.machine.stamps import Stamps
from sim.specs.hardware import Stack
from traces.messages import cut, plain

_SWITCH_S = 20e-6
Parts = tuple[Device, Kernels, HostPool, SlotPool, Sequence[int], Stack, Stamps | None]
"""What a `RealMachine` is made of, in the order of its arguments."""


class HostedMachine(RealMachine):
    """A `RealMachine` with a worker on its host. figures: what a place is told of costs, as in a simulation. results
    [rows, hidden]: where the worker's results arrive on the device."""

    def __init__(self, *given: Any, figures: Figures, worker: HostWorker, results: torch.Tensor) -> None:
        super().__init__(*given)
        # What the host computes is added by a launch of its own, and all experts of a layer may be its.
        self.launches_ahead = False
        self._figures, self._worker, self._results = figures, worker, results
        self._sums = torch.zeros_like(results)
        self._adding: dict[int, Program] = {}
        """By number of rows, rounded up to a power of two: the program that adds the host's results."""
        self._num_tasks = self._back = 0
        """Tasks that were put; the last one whose results are in GPU memory."""
        self._num_rows = 0
        """Of the task whose results the GPU has not added yet; 0: there is none."""
        self._running = 0
        """The layer whose routing was read last."""
        self._taken: deque[HostResult] = deque()
        # The worker takes the interpreter for a moment now and then, and must not wait long for it.
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_s, _SWITCH_S))

    # -- what the runtime asks for ---------------------------------------------------------------------------

    def estimate(self, tokens: Sequence[int]) -> Costs:
        figures, last = self._figures, len(self._figures.chunk_ns) - 1
        now_ns, free_ns = self.device.now_ns(), self._copy_end_ns
        for _, chunk, _, issued_ns, _, wanted in self._chunks:
            free_ns = max(free_ns, issued_ns, wanted[0]) + figures.chunk_ns[min(chunk, last)]
        return figures.costs(tokens, self._num_tokens, max(free_ns - now_ns, 0))

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        task = self._num_tasks = self._num_tasks + 1
        self._num_rows = min(self._num_tokens, sum(tokens))
        check = None
        if self.stamps is not None:
            check = self.stamps.on_host(self._forward, self._running, keys)
        self._worker.put(HostTask(task, tuple(keys), tuple(tokens), self._num_rows, self.device.now_ns(), check))
        return task

    def attention(self, layer: int) -> int:
        self._add_results()
        self._running = layer
        return super().attention(layer)

    def head(self) -> int:
        self._add_results()
        return super().head()

    def _add_results(self) -> None:
        """What is launched from now on finds the host's results among the GPU's."""
        if not self._num_rows:
            return
        self._worker.way.follow()
        self.device.launch(self._adding[size_class(self._num_rows)])
        self._num_rows = 0

    # -- what it answers -------------------------------------------------------------------------------------

    def wait(self, wait: Wait) -> Record:
        kind, task, drain = wait
        if kind != HOST:
            return super().wait(wait)
        worker, chunks, happened = self._worker, self._chunks, self.device.happened
        first = chunks[0][2] if drain and chunks else None

        def there() -> bool:
            self._take_results()
            return self._back >= task or worker.failure is not None or (first is not None and happened(first))

        if not self.device.wait_until(there, self._read_one, worker.patience_ns):
            raise ValueError(
                f"the host's results of forward {self._forward}, layer {self._running} have not come for "
                f"{worker.patience_ns / 1e9:g} s; run it again, and with +policy/place=gpu if that stays so"
            )
        return self._record()

    def _record(self) -> Record:
        now_ns, chunks, marks = super()._record()
        self._take_results()
        if self._worker.failure is not None:
            self._raise(self._worker.failure)
        if self._taken:
            now_ns = self._now_ns = max(now_ns, self._taken[-1][3])
        return now_ns, chunks, marks

    def _take_results(self) -> None:
        """Take over what the worker has done. The last of a task counts when its results are in GPU memory."""
        done, device = self._worker.done, self.device
        while done:
            task, key, start_ns, end_ns, is_last, sent = done[0]
            if sent is not None:
                if not device.happened(sent):
                    return
                end_ns = max(end_ns, device.time_ns(sent))
            done.popleft()
            self._taken.append((task, key, start_ns, max(end_ns, start_ns)))
            if is_last:
                self._back = task

    def host_ended(self) -> Sequence[HostResult]:
        ended = list(self._taken)
        self._taken.clear()
        return ended

    def _raise(self, failure: BaseException) -> None:
        """What ended the worker: a GPU that is lost, or an error to be told in one line."""
        meaning = explained(failure) if isinstance(failure, RuntimeError) else failure
        if meaning is not failure or isinstance(failure, DeviceLostError):
            assert isinstance(meaning, Exception)
            told_if_lost(meaning)
            raise meaning from failure
        what = cut(plain(f"{type(failure).__name__}: {failure}"), 100)
        raise ValueError(
            f"the host's worker failed in forward {self._forward}, layer {self._running} ({what}); "
            "run it again, and with +policy/place=gpu if that stays so"
        ) from failure

    # -- before and after ------------------------------------------------------------------------------------

    def prepare(self, forwards: Iterable[Forward]) -> None:
        forwards = list(forwards)
        most = size_class(max((len(forward.rows) for forward in forwards), default=1))
        rows = 1
        while rows <= most:
            self._adding[rows] = self.device.program(self._adding_work(min(rows, len(self._results))))
            self.device.launch(self._adding[rows])
            rows *= 2
        self.device.synchronize()
        super().prepare(forwards)

    def _adding_work(self, num_rows: int) -> Work:
        own, results, sums = self.kernels.routed_out[:num_rows], self._results[:num_rows], self._sums[:num_rows]

        def work() -> None:
            torch.add(own, results, out=sums)

        return work

    def close(self) -> None:
        self._worker.close()
        sys.setswitchinterval(self._switch_s)


def hosted(parts: Parts, figures: Figures, max_tokens: int) -> HostedMachine:
    """A machine of `parts` with a worker for forwards of at most `max_tokens` tokens. Where there is no GPU the worker
    keeps the pace of `figures`."""
    device, kernels, host = parts[:3]
    on_gpu = device.world == "cuda"
    weights = HostWeights(kernels, host, max_tokens, on_gpu)
    results = torch.zeros_like(weights.results, device=device.torch_device)
    way = device.way((kernels.activations, weights.activations, weights.results, results))
    fault = getattr(device, "host_fault", None)
    worker = HostWorker(weights, way, device.now_ns, device.tell, None if on_gpu else figures.times, fault)
    return HostedMachine(*parts, figures=figures, worker=worker, results=results)
