"""What happened in prefill and in decode, apart: the metrics of a run add the two up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertflow.forward import DECODE, PREFILL, Forward
from expertflow.observer import LATE, Observer
from expertflow.policy import Policy

KEYS = (
    "num_forwards",
    "num_rows",
    "num_tokens",
    "elapsed_ns",
    "stall_ns",
    "late_stall_ns",
    "num_accesses",
    "num_hits",
    "num_late",
    "num_misses",
)


class PhaseRecorder(Observer):
    """Sums by phase, without the first `begin_after` forwards, and the mean N_e that the policy's horizon was told."""

    def __init__(self, policy: Policy, begin_after: int = 0) -> None:
        self.policy = policy
        self.begin_after = begin_after
        self.sums = {phase: dict.fromkeys(KEYS, 0) for phase in (PREFILL, DECODE)}
        self._this = dict.fromkeys(KEYS, 0)
        self._began_ns = 0
        self._expected = 0.0
        self._num_expected = 0
        self._num_forwards = 0

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        self._this["stall_ns"] += end_ns - start_ns
        if kind == LATE:
            self._this["late_stall_ns"] += end_ns - start_ns

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        this = self._this
        this["num_accesses"] += len(forward.demands[layer])
        this["num_hits"] += len(hits)
        this["num_late"] += len(late)
        this["num_misses"] += len(missing)

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        this, self._this = self._this, dict.fromkeys(KEYS, 0)
        this["elapsed_ns"], self._began_ns = now_ns - self._began_ns, now_ns
        self._num_forwards += 1
        if self._num_forwards <= self.begin_after:
            return
        this["num_forwards"] = 1
        this["num_rows"] = forward.num_tokens
        this["num_tokens"] = forward.num_out
        total = self.sums[forward.phase]
        for key, value in this.items():
            total[key] += value
        expected = self.policy.num_expected
        if self.policy.prefetches and expected > 0:
            self._expected += expected
            self._num_expected += 1

    def result(self) -> dict[str, Any]:
        """Sums by phase, and `num_expected`: mean N_e per forward, null where nothing was predicted."""
        expected = self._expected / self._num_expected if self._num_expected else None
        return {**self.sums, "num_expected": expected}
