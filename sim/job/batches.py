"""How the rows of a trace become forwards, as a configuration says it; and what is said of that below a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from expertflow.keys import shown
from sim.job.keys import AS_RECORDED
from traces.batching import BatchConfig, Batches
from traces.recorded_batches import first_difference, most_side_by_side, recorded_batches
from traces.speculation import MOST_DRAFTED, Speculation
from traces.trace import Trace


def batch_config(cfg: Mapping[str, Any]) -> BatchConfig:
    """Of a checked configuration."""
    as_recorded = cfg["batch_size"] == AS_RECORDED
    batch_size = 1 if as_recorded else cfg["batch_size"]
    return BatchConfig(batch_size, cfg["prefill_chunk"], cfg["max_tokens"], as_recorded, speculation_of(cfg))


def speculation_of(cfg: Mapping[str, Any]) -> Speculation | None:
    """What `speculate` asks for. ValueError, one line, for anything but a number of tokens and an acceptance, and for
    keys that do not go with it."""
    told, draft_ms = cfg["speculate"], cfg["draft_ms"]
    if told is None:
        if draft_ms:
            raise ValueError(f"draft_ms={shown(draft_ms)} is of drafted tokens, and none are; say speculate=4,0.8")
        return None
    is_pair = isinstance(told, list | tuple) and len(told) == 2
    if not is_pair or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in told):
        raise ValueError(f"speculate={shown(told)} must be drafted tokens and their acceptance, as speculate=4,0.8")
    num, acceptance = told
    if not isinstance(num, int) or not 1 <= num <= MOST_DRAFTED:
        raise ValueError(f"speculate={shown(told)}: drafted tokens must be a whole number in [1, {MOST_DRAFTED}]")
    if not 0 <= acceptance <= 1:
        raise ValueError(f"speculate={shown(told)}: the acceptance of a drafted token must be in [0, 1]")
    if cfg["batch_size"] == AS_RECORDED:
        raise ValueError(
            f"speculate={shown(told)} and batch_size={AS_RECORDED}: recorded forwards are replayed as they were; leave "
            "one out"
        )
    return Speculation(num, float(acceptance), round(draft_ms * 1e6), cfg["seed"])


def requests_kept(trace: Trace, config: BatchConfig) -> int:
    """Requests whose KV is in GPU memory at a time, at most."""
    return most_side_by_side(trace) if config.as_recorded else config.batch_size


def batch_notes(trace: Trace, config: BatchConfig) -> list[str]:
    """What is said of a run's forwards: what speculation leaves out, and where they are others than were recorded."""
    if config.speculation is not None:
        return [_speculation_note(config.speculation)]
    found = None if config.as_recorded else recorded_batches(trace)
    if found is None or not (found.batch_size > 1 or found.mixed or found.verifies or config.batch_size == 1):
        # Requests that were recorded one by one are batched by whoever runs them so.
        return []
    at = first_difference(trace, config)
    if at is None:
        return []
    num = len(np.unique(np.asarray(trace.forward_id[:], np.int64)))  # type: ignore[index]
    return [
        f"batch_size={config.batch_size} prefill_chunk={config.prefill_chunk} makes other forwards than the {num} that "
        f"were recorded (from forward {at} on); batch_size={AS_RECORDED} replays these"
    ]


def decode_notes(batches: Batches) -> list[str]:
    """Why a run has no TPOT, where that is known from its trace: no request decodes a token after one that came out."""
    trace, num_tokens = batches.trace, batches.num_tokens
    starts = np.asarray(trace.request_start, np.int64)
    kept = np.clip(num_tokens - starts[:-1], 0, np.diff(starts))
    # The last row of a prompt makes the first token; where there is no prompt the first row does.
    before = np.maximum(np.asarray(trace.prompt_len, np.int64), 1)
    if np.any(kept > before):
        return []
    most = batches.config.max_tokens
    if most is None or num_tokens < most:
        return ["no request has two tokens that come out one after the other, so that there is no TPOT"]
    if batches.num_requests == 1:
        return [
            f"no token was decoded: max_tokens={most} ends within the first prompt, of {before[0]} tokens; "
            f"max_tokens={before[0] + 1} is the least that has a TPOT"
        ]
    return [f"no token was decoded: max_tokens={most} ends before a request has two tokens; raise it for a TPOT"]


def _speculation_note(told: Speculation) -> str:
    draft = (
        "costs no time (draft_ms=0)" if not told.draft_ns else f"takes {told.draft_ns / 1e6:g} ms before each forward"
    )
    return (
        f"speculate: the draft model {draft}; a rejected token demands the experts of the trace's own next token, "
        "which stands for the one that was drafted"
    )
