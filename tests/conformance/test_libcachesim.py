"""LRU of the runtime against the libcachesim package, which knows accesses only: here every access is an event."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.recordings import named, recordings
from tests.support.runs import decode, run_counts
from traces.reader import open_trace

pytest.importorskip("libcachesim", reason="libcachesim (GPL) is a test extra")

from tests.support.reference import libcachesim_lru


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("path", recordings("eval"), ids=named)
@pytest.mark.parametrize("num_slots", [192, 384])
def test_with_per_access_semantics_lru_equals_libcachesim(path: Path, num_slots: int) -> None:
    trace = open_trace(path, validate=False)
    keys = np.asarray(trace.experts[:400]) + (np.arange(24) * 32)[:, None]
    accesses = [int(key) for key in keys.ravel()]
    forwards = decode([[[key]] for key in accesses], 768)
    found = run_counts(forwards, num_experts=768, num_slots=num_slots, eviction="lru")
    assert found == tuple(libcachesim_lru(accesses, num_slots))
