"""What crosses between the runtime and a machine whose host computes experts, written down like everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from expertflow.machine import Costs, HostMachine, HostResult
from replay.drive import BlockingMachine
from replay.lockstep.log import LoggingMachine, LogWriter
from replay.lockstep.log_format import ESTIMATE, HOST_ENDED, ON_HOST, STRETCH_OF_ONE


class HostLoggingMachine(LoggingMachine):
    """A `LoggingMachine` around a `HostMachine`, whose calls it writes down as well."""

    def __init__(self, machine: BlockingMachine, writer: LogWriter) -> None:
        super().__init__(machine, writer)
        self._host = cast(HostMachine, machine)
        self._times = self._buffer.streams["time"].extend
        self._smalls = self._buffer.streams["small"].extend

    def estimate(self, tokens: Sequence[int]) -> Costs:
        costs = self._host.estimate(tokens)
        stretch = round(costs.stretch * STRETCH_OF_ONE)
        self._smalls([len(tokens), *tokens, stretch])
        self._times([costs.copy_ns, costs.link_wait_ns, costs.round_trip_ns, *costs.gpu_ns, *costs.host_ns])
        self._op(ESTIMATE)
        # As it will be read: a policy must not see what a log cannot hold.
        return costs._replace(stretch=stretch / STRETCH_OF_ONE)

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        task = self._host.on_host(keys, tokens)
        self._keys(keys)
        self._smalls([task, len(keys), *tokens])
        self._op(ON_HOST)
        return task

    def host_ended(self) -> Sequence[HostResult]:
        ended = self._host.host_ended()
        self._small(len(ended))
        for task, key, start_ns, end_ns in ended:
            self._small(task)
            self._key(key)
            self._times((start_ns, end_ns))
        self._op(HOST_ENDED)
        return ended


def logging_machine(machine: BlockingMachine, writer: LogWriter) -> LoggingMachine:
    """The one for `machine`: only a machine that computes experts on its host may seem to."""
    return (HostLoggingMachine if hasattr(machine, "on_host") else LoggingMachine)(machine, writer)
