"""The trace that needs no download: generated in memory from the shipped parameter file."""

from __future__ import annotations

from traces.reader import Trace


def generated_trace(num_tokens: int, num_requests: int, seed: int, params: str | None) -> Trace:
    """A generated trace; its hash is of its content, as a file's is."""
    raise NotImplementedError
