"""The experts of a layer that the host computes: asks the place, gives them to the machine and takes the results back.

Of the runs of a policy whose place may answer anything but the GPU; a run of any other has none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from expertflow.boundary import PartError
from expertflow.copy_queue import CopyQueue
from expertflow.counters import Counters
from expertflow.forward import Forward
from expertflow.keys import plain
from expertflow.machine import HostMachine, Machine
from expertflow.observer import Watch
from expertflow.parts import Placing
from expertflow.policy import Policy
from expertflow.view import ABSENT, RESIDENT, Progress


def check_machine(machine: object, policy: Policy) -> None:
    """PartError where `policy` may place experts on the host of a machine that computes none there."""
    if policy.places and not hasattr(machine, "on_host"):
        raise PartError(
            f"{plain(type(policy.place).__name__, 60)}.on_host may place experts on the host, where this machine "
            "computes none; leave policy.place out, or simulate it with python -m sim"
        )


class Hosting:
    """keys: of the layer that runs, those that the host computes. task: the machine's number of their task.
    ended_ns, last_key: when the results of the last task were in GPU memory, and the expert that was computed last.
    num_results: of the whole run.
    """

    def __init__(
        self, machine: Machine, policy: Policy, queue: CopyQueue, counters: Counters, watch: Watch | None
    ) -> None:
        check_machine(machine, policy)
        self.machine = cast(HostMachine, machine)
        self.policy = policy
        self.queue = queue
        self.counters = counters
        self.watch = watch
        self.keys: Sequence[int] = ()
        self.task = 0
        self.num_left = 0
        """Results that are still to come."""
        self.ended_ns = 0
        self.last_key = -1
        self.num_results = 0

    def ask(self, forward: Forward, layer: int) -> Sequence[int]:
        """Which of the experts that `layer` demands, and that are not on the GPU, the host computes. It begins
        with them at once, before copies are issued and kernels launched."""
        self.keys = ()
        state = self.queue.state
        missing = [key for key in forward.issue_order[layer] if state[key] == ABSENT]
        counts = forward.counts
        tokens = [1] * len(missing) if counts is None else [counts[layer][key] for key in missing]
        resident = [key for key in forward.demands[layer] if state[key] == RESIDENT]
        in_flight = [key for key in forward.demands[layer] if state[key] not in (ABSENT, RESIDENT)]
        placing = Placing(layer, resident, in_flight, missing, tokens, self.machine.estimate(tokens))
        keys = self.policy.place_experts(placing)
        if not keys:
            return ()
        self.keys = keys
        self.counters.num_host += len(keys)
        queued = [key for key in keys if key in self.queue.wanted] if self.queue.wanted else []
        self.queue.leave_to_host(keys, self.policy.fetched_later(keys, queued))
        tokens_of = dict(zip(missing, tokens, strict=True))
        self.task = self.machine.on_host(keys, [tokens_of[key] for key in keys])
        self.num_left = len(keys)
        return keys

    def is_done(self) -> bool:
        """Whether all results of the layer are there, by the last record."""
        if not self.num_left:
            return True
        for _, key, start_ns, end_ns in self.machine.host_ended():
            self.num_left -= 1
            self.num_results += 1
            self.counters.host_busy_ns += end_ns - start_ns
            self.last_key, self.ended_ns = key, end_ns
            if self.watch is not None:
                self.watch.computed_on_host(key, start_ns, end_ns)
        return not self.num_left


class Aside:
    """What the eviction does not hear of: `fixed`, which never leaves its slots, and what is computed on the host.

    keys: what the layer that runs demands of the GPU. heard: the same without `fixed`.
    """

    def __init__(
        self,
        fixed: frozenset[int],
        hosting: Hosting | None,
        progress: Progress,
        touched: Callable[[Sequence[int]], None],
    ) -> None:
        self.fixed = fixed
        self.keys: list[int] = []
        self.heard: list[int] = []
        self._hosting = hosting
        self._progress = progress
        self._touched = touched

    def demanded(self, forward: Forward, layer: int) -> list[int]:
        """What `layer` demands of the GPU, when the place was asked; pins it, and tells the eviction of it."""
        keys = forward.demands[layer]
        on_host: Sequence[int] = () if self._hosting is None else self._hosting.ask(forward, layer)
        if on_host:
            keys = [key for key in keys if key not in on_host]
        self.keys = keys
        self.heard = [key for key in keys if key not in self.fixed] if self.fixed else keys
        self._progress.pinned = self.fixed.union(keys)
        if self.heard:
            self._touched(self.heard)
        return keys
