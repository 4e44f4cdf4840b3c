"""`python -m tests.lockstep.store`: writes stored/sim-lru.parquet anew, which only a new format or policy asks for."""

from __future__ import annotations

from pathlib import Path

from tests.lockstep.support import Job

STORED = Path(__file__).parent / "stored"
"""Logs of past runs, of any machine, over generated traces (others would have to be there as well)."""


def main() -> None:
    """32 tokens on the simulated machine with uneven times."""
    job = Job.of("+hardware=a100", "+policy=lru", "trace.num_tokens=32", "residency=0.25")
    print(job.log(STORED / "sim-lru.parquet", noisy=True))


if __name__ == "__main__":
    main()
