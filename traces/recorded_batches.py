"""Which settings of a run come nearest to the batches that a trace was recorded in, read from its `forward_id`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from traces.trace import Trace

Numbers = npt.NDArray[np.int64]


class Batches(NamedTuple):
    """Of a recording: requests that had a decoded token in one forward, at most; prompt tokens of one request in one
    forward, at most, 0 where none was recorded; and whether a forward held prompt and decoded tokens at once."""

    batch_size: int
    prefill_chunk: int
    mixed: bool


def recorded_batches(trace: Trace) -> Batches | None:
    """What the trace's forwards were; None where it does not say which forward a token ran in."""
    if trace.forward_id is None:
        return None
    forward = np.asarray(trace.forward_id[:], np.int64)
    starts = np.asarray(trace.request_start, np.int64)
    request = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    in_prompt = np.arange(len(forward)) - starts[request] < np.asarray(trace.prompt_len, np.int64)[request]
    decoded, prompt = _pairs(forward, request, ~in_prompt), _pairs(forward, request, in_prompt)
    mixed = bool(np.intersect1d(decoded[0][:, 0], prompt[0][:, 0]).size)
    by_forward = np.unique(decoded[0][:, 0], return_counts=True)[1]
    return Batches(int(by_forward.max(initial=1)), int(prompt[1].max(initial=0)), mixed)


def _pairs(forward: Numbers, request: Numbers, chosen: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """(forward, request) of the chosen rows [n,2], each once, and how many rows each has [n]."""
    pairs = np.stack([forward[chosen], request[chosen]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return found.reshape(-1, 2), counts.astype(np.int64)


def settings_line(trace: Trace, path: str) -> str | None:
    """How to run a trace as it was recorded; None where it was recorded one request at a time, which is the default."""
    found = recorded_batches(trace)
    if found is None or (found.batch_size == 1 and not found.mixed):
        return None
    chunk = f" prefill_chunk={found.prefill_chunk}" if found.prefill_chunk > 1 else ""
    beside = " (there prompts ran beside other requests' decodes, a run takes each prompt alone)" if found.mixed else ""
    return (
        f"recorded with up to {found.batch_size} request{'' if found.batch_size == 1 else 's'} in a forward{beside}; "
        f"the nearest run: trace.path={path} batch_size={found.batch_size}{chunk}"
    )
