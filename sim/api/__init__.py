"""Simulations from Python: `simulate` and `sweep`, with the command line's keys as arguments (docs/api.md).

Runs what `python -m sim` runs, and writes nothing unless it is told where.
"""

from sim.api.result import Result
from sim.api.simulating import simulate
from sim.api.sweeping import Sweep, SweepError, SweepInterrupted, sweep

__all__ = ["Result", "Sweep", "SweepError", "SweepInterrupted", "simulate", "sweep"]
