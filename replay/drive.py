"""The loop that joins the runtime to a machine that blocks."""

from __future__ import annotations

from typing import Protocol

from expertflow.machine import Machine, Record, Wait
from expertflow.runtime import Runtime, StuckError

MAX_IDLE_WAKES = 1000
"""Wakes in a row that bring no news: more is a mistake of the machine, not a schedule."""


class BlockingMachine(Machine, Protocol):
    """A machine that can be waited for."""

    def wait(self, wait: Wait) -> Record:
        """Block until what `wait` names has happened; what has ended by then, each reported once."""


def drive(runtime: Runtime, machine: BlockingMachine) -> None:
    """Run `runtime`, which was built on `machine`, to its end; raises what either raises."""
    loop, block = runtime.run(), machine.wait
    idle_wakes = 0
    try:
        wait = next(loop)
        while True:
            told = block(wait)
            if told[1] or told[2] or runtime.queue.num_reading:
                # Reads end in records of their own.
                idle_wakes = 0
            else:
                idle_wakes += 1
                if idle_wakes > MAX_IDLE_WAKES:
                    raise StuckError(f"the machine makes no progress at {told[0]} ns: waiting for {wait}")
            wait = loop.send(told)
    except StopIteration:
        return
