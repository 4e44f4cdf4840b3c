"""The forwards of a run, told beforehand to who computes ahead what no timing can change."""

from __future__ import annotations

import os
from collections.abc import Iterator

from expertflow.forward import Forward
from expertflow.parts import Announced
from expertflow.policy import Policy
from sim.job.setup import Workload
from traces.batching import Batches
from traces.kept import KeptArrays, code_hash
from traces.shipped import cache_folder

KEEP_SCORES = "EXPERTFLOW_KEEP_SCORES"
"""Environment variable: 0 = nothing that a predictor computes is kept in the user's cache for the next run."""
LEAST_KEPT = 256
"""Forwards of a run whose scores are kept."""


def forwards_for(policy: Policy, work: Workload, block: int = 64) -> Iterator[Forward]:
    """The forwards of the workload, announced to the policy in blocks: it may compute ahead what no timing
    can change."""
    takes = policy.announced()
    if takes is None or _prepared_all(takes, work.batches, work.trace_sha256):
        yield from work.batches
        return
    pending: list[Forward] = []
    for forward in work.batches:
        pending.append(forward)
        if len(pending) == block:
            takes.prepare(pending)
            yield from pending
            pending = []
    if pending:
        takes.prepare(pending)
        yield from pending


def _prepared_all(takes: Announced, batches: Batches, trace_sha256: str) -> bool:
    """Whether what `takes` says of all forwards is at hand, kept from an earlier run or for later ones.

    Not for few forwards, which are scored sooner than a file is written, and not where `KEEP_SCORES` is 0.
    """
    num_forwards = batches.num_tokens
    few = not batches.config.one_by_one or num_forwards < LEAST_KEPT
    if few or not takes.code or os.environ.get(KEEP_SCORES) == "0":
        return False
    try:
        folder = cache_folder() / "scores"
    except RuntimeError:
        return False
    code = code_hash(
        "traces.batching", "traces.speculation", "traces.reader", "traces.trace", "traces.layout", *takes.code
    )
    return takes.prepare_all(batches, num_forwards, KeptArrays(folder), f"{trace_sha256} {batches.config} {code}")
