"""Units that arrays of whole numbers are in, wherever they come from."""

from __future__ import annotations

SCORE_ONE = 1 << 16
"""One, of scores, chances and shares: integers in 2^-16, so that a log made elsewhere sorts the same."""
NAT = 1024
"""Log-odds are integers in 1/1024 nat."""
TAKEN = 1 << 40
"""More than any score: the worth of what may not leave."""
