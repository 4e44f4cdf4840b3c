"""`python -m tests.lockstep.store`: writes the logs of simulated machines anew, which only a new format or policy asks
for."""

from __future__ import annotations

from pathlib import Path

from tests.lockstep.support import Job

STORED = Path(__file__).parent / "stored"
"""Logs of past runs, of any machine, over generated traces (others would have to be there as well)."""


def main() -> None:
    """A few tokens on the simulated machine with uneven times, and on one whose host computes experts."""
    job = Job.of("+hardware=a100", "+policy=lru", "trace.num_tokens=32", "residency=0.25")
    print(job.log(STORED / "sim-lru.parquet", noisy=True))
    words = ("+hardware=a100", "+host=workstation", "+policy=adaptive", "+policy/place=balanced")
    job = Job.of(*words, "trace.num_tokens=24", "trace.num_requests=4", "batch_size=2", "residency=0.25")
    print(job.log(STORED / "sim-balanced.parquet", noisy=True))


if __name__ == "__main__":
    main()
