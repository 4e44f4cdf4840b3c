"""The keys that a replay has beside those of a simulation, and `python -m replay.keys`: every key there is.

Prints the page of docs/keys.md: each key with its type, range, unit and default, read from where it is declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from expertflow.keys import Rule
from sim.specs.hardware import LEAST_GB_PER_S

MACHINES = ("auto", "cuda", "cpu")
FAULTS = ("delayed", "failed", "reordered", "duplicated", "early_reuse", "lost")
"""See `replay.machine.faults`."""
DEFAULT_FAULT_AT = 100


@dataclass(frozen=True)
class ReplayKeys:
    """A replay's own keys, as they are composed; `replay.settings.Settings` is what becomes of them."""

    machine: Annotated[str, Rule(choices=MACHINES, about="auto takes a GPU if there is one")]
    host_memory_gb: Annotated[
        float | None,
        Rule(0, 1e6, above=True, unit="GB", null="what is prudent", about="of pinned memory for the experts"),
    ]
    verify: Annotated[bool, Rule(about="check every chunk's stamp around every kernel")]
    log: Annotated[bool, Rule(about="write records.parquet, for python -m replay.lockstep")]
    fault: Annotated[str | None, Rule(choices=FAULTS, null="none", about="a fault on purpose")]
    fault_at: Annotated[
        int | None, Rule(1, 2**31 - 1, null=str(DEFAULT_FAULT_AT), about="at which copy; only with fault")
    ]
    scale: Annotated[
        int | None, Rule(1, 1024, null="1 on a GPU, 16 on a CPU", about="the model's widths are divided by it")
    ]
    throttle_gb_per_s: Annotated[
        float | None,
        Rule(
            LEAST_GB_PER_S,
            1e6,
            unit="GB/s",
            null="the profile's, at the experts' scale; none for local",
            about="pace of a CPU machine's link",
        ),
    ]
