"""How much memory a file of unknown origin may make us take: stated here, and set by one variable.

A file is believed about its own size only up to a bound, which is checked before anything is allocated. Mapped arrays
do not count: a trace may be larger than memory.
"""

from __future__ import annotations

import os
from pathlib import Path

from traces.messages import fault

MAX_BYTES = "EXPERTFLOW_MAX_BYTES"
"""Environment variable: how many bytes of memory what is read from one file may take."""
DEFAULT_MAX_BYTES = 4 << 30
EXPANSION = 1 << 14
"""What a small file may grow to, as a multiple of its size, beyond `EXPANSION_FREE`. Where `MAX_BYTES` is set, that
alone counts. A prompt of 131,072 tokens in one event of an event CSR is a factor of 5,000."""
EXPANSION_FREE = 16 << 20
_REMEDY = f"split it, or allow more with {MAX_BYTES}=<bytes>"


def max_bytes() -> int:
    """The bound; ValueError where the variable holds no whole number above 0."""
    text = os.environ.get(MAX_BYTES, "").strip()
    if not text:
        return DEFAULT_MAX_BYTES
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) > 0):
        raise ValueError(f"{MAX_BYTES}={text[:40]!r} must be a whole number of bytes above 0, such as 8000000000")
    return int(text)


def check_bytes(path: Path | str, where: str, num_bytes: int) -> None:
    """TraceError where `num_bytes` of memory are more than what is read from one file may take."""
    if num_bytes > (most := max_bytes()):
        raise fault(path, where, f"would take {num_bytes} bytes of memory, at most {most} are allowed", _REMEDY)


def check_pairs(path: Path | str, num_layers: int, num_experts: int, tables: int) -> None:
    """TraceError where so many float64 tables [L, E, E] take too much: so far is a header's num_experts believed."""
    check_bytes(path, f"num_experts {num_experts}", 8 * tables * num_layers * num_experts**2)


def check_expansion(path: Path | str, where: str, num_bytes: int, file_bytes: int) -> None:
    """The same for what is far larger in memory than in a file of `file_bytes`: counts are not believed unseen."""
    check_bytes(path, where, num_bytes)
    most = EXPANSION_FREE + EXPANSION * file_bytes
    if num_bytes > most and not os.environ.get(MAX_BYTES, "").strip():
        problem = f"would take {num_bytes} bytes of memory, of a file of {file_bytes} at most {most} are allowed"
        raise fault(path, where, problem, f"check its counts, or allow it with {MAX_BYTES}=<bytes>")


class Budget:
    """What one file may still take, where it is read piece by piece."""

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._taken = 0
        self._most = max_bytes()

    def take(self, where: str, num_bytes: int) -> None:
        """Count `num_bytes` more; TraceError where that is too much in all."""
        self._taken += num_bytes
        if self._taken > self._most:
            problem = f"brings what is read to {self._taken} bytes of memory, at most {self._most} are allowed"
            raise fault(self._path, where, problem, _REMEDY)
