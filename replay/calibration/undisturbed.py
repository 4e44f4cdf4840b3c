"""What to do about a measurement that something else disturbed: measure again, and refuse what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Measured = TypeVar("Measured")

_TRIES = 3
"""How often something is measured before what cannot be ends a calibration."""


class MeasurementError(ValueError):
    """What was measured is impossible: something else disturbed it. Nothing is written."""


def undisturbed(measure: Callable[[], Measured], say: Callable[[str], None]) -> Measured:
    """What `measure` returns, asked again where a neighbour disturbed it: such loads come and go.

    say: told why it is measured again. The MeasurementError of the last of three times.
    """
    for _ in range(_TRIES - 1):
        try:
            return measure()
        except MeasurementError as error:
            say(f"measured again: {str(error).partition(';')[0]}")
    return measure()
