"""Which settings of a run come nearest to the batches that a trace was recorded in, read from its `forward_id`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from traces import batching
from traces.batching import BatchConfig
from traces.trace import Trace

MOST_COMPARED = 65_536
"""Rows whose forwards are compared with a run's."""
Numbers = npt.NDArray[np.int64]


class Batches(NamedTuple):
    """Of a recording: requests that had a decoded token in one forward, at most; prompt tokens of one request in one
    forward, at most, 0 where none was recorded; whether a forward held prompt and decoded tokens at once; and whether
    one held several decoded tokens of a request, as verify steps of speculative decoding do."""

    batch_size: int
    prefill_chunk: int
    mixed: bool
    verifies: bool = False


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
    verifies = bool(decoded[1].max(initial=1) > 1)
    return Batches(int(by_forward.max(initial=1)), int(prompt[1].max(initial=0)), mixed, verifies)


def _pairs(forward: Numbers, request: Numbers, chosen: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """(forward, request) of the chosen rows [n,2], each once, and how many rows each has [n]."""
    pairs = np.stack([forward[chosen], request[chosen]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return found.reshape(-1, 2), counts.astype(np.int64)


def most_side_by_side(trace: Trace) -> int:
    """Requests that have begun and not ended at a time, at most, by the trace's forwards; 1 where it has none."""
    if trace.forward_id is None:
        return 1
    forward, starts = np.asarray(trace.forward_id[:], np.int64), np.asarray(trace.request_start, np.int64)
    first, last = np.sort(forward[starts[:-1]]), np.sort(forward[starts[1:] - 1])
    # At each begin: those that have begun by then, without those that ended before.
    begun = np.arange(1, len(first) + 1)
    return int((begun - np.searchsorted(last, first, side="left")).max(initial=1))


class _Rows:
    """What `traces.batching` asks of a trace to make forwards, without their routing."""

    num_layers, num_experts, padding, weights, context_len = 0, 1, 255, None, None

    def __init__(self, trace: Trace) -> None:
        self.num_tokens, self.num_requests = trace.num_tokens, trace.num_requests
        self.request_start, self.prompt_len = trace.request_start, trace.prompt_len
        self.experts = np.zeros((trace.num_tokens, 0, 1), np.uint8)


def first_difference(trace: Trace, config: BatchConfig) -> int | None:
    """The first forward of a run that holds other rows than one of the recorded forwards, None where there is none, or
    none is recorded. Of a long trace the first `MOST_COMPARED` rows are compared."""
    if trace.forward_id is None:
        return None
    num_rows = min(trace.num_tokens, config.max_tokens or trace.num_tokens, MOST_COMPARED)
    _, forward, counts = np.unique(
        np.asarray(trace.forward_id[:num_rows], np.int64), return_inverse=True, return_counts=True
    )
    run = batching.Batches(cast(Trace, _Rows(trace)), replace(config, max_tokens=num_rows))
    for index, made in enumerate(run):
        recorded = forward[np.asarray(made.rows)]
        if len(made.rows) != counts[recorded[0]] or (recorded != recorded[0]).any():
            return index
    return None


def settings_line(trace: Trace, path: str) -> str | None:
    """How to run a trace as it was recorded; None where it was recorded one request at a time, which is the default."""
    found = recorded_batches(trace)
    if found is None or not (found.batch_size > 1 or found.mixed or found.verifies):
        return None
    chunk = f" prefill_chunk={found.prefill_chunk}" if found.prefill_chunk > 1 else ""
    beside = " (there prompts ran beside other requests' decodes, a run takes each prompt alone)" if found.mixed else ""
    verified = ", several decoded tokens of each at once" if found.verifies else ""
    return (
        f"recorded with up to {found.batch_size} request{'' if found.batch_size == 1 else 's'} in a forward{verified}"
        f"{beside}; the nearest run: trace.path={path} batch_size={found.batch_size}{chunk}; the same forwards: "
        "batch_size=as_recorded"
    )
