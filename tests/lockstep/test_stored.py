"""Logs stored in the past: today's policies decide as those did that were driven by a machine then."""

from __future__ import annotations

from pathlib import Path

import pytest

from replay.lockstep.compare import check
from replay.lockstep.log_reader import LogReader
from sim.job.former_names import with_present_names
from tests.lockstep.store import STORED

FROM_A_GPU = Path(__file__).parents[2] / "results" / "validation-h200" / "graph" / "logs"
"""Recorded on an H200. Of policies that are settled alone: nobody can make them anew without such a card."""
LOGS = [
    *sorted(STORED.glob("*.parquet")),
    *(FROM_A_GPU / f"cuda-{name}.parquet" for name in ("on_demand", "lru", "two_level")),
]


def test_there_are_logs() -> None:
    assert "sim-lru" in [path.stem for path in LOGS]


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_stored_log_is_equal(path: Path) -> None:
    result = check(path)
    assert result.difference is None, result.line()
    with LogReader(path) as reader:
        whole = reader.num_forwards
    assert result.num_forwards in (whole, whole - 1)
    assert (result.num_forwards == whole) or result.partial is not None
    assert result.num_decisions > 0


def test_a_log_with_keys_by_former_names_is_read_by_the_present_ones() -> None:
    of = "expertflow.predictors.transition.TransitionPredictor"
    selection = "expertflow.selections.stall_saved.StallSaved"
    own = {"_target_": "mine.MRU", "warm": 2, "twin": 1, "price": 3}
    config = {
        "twin": True,
        "policy": {
            "predictor": {"transition": {"_target_": of, "warm": "auto"}},
            "selection": {"_target_": selection, "price": 0.5, "queue": 4},
            "eviction": own,
        },
        "seed": 3,
    }
    assert with_present_names(config) == {
        "count_redundant": True,
        "policy": {
            "predictor": {"transition": {"_target_": of, "fitted_start": "auto"}},
            "selection": {"_target_": selection, "copy_weight": 0.5, "queue": 4},
            "eviction": own,
        },
        "seed": 3,
    }
    # Those that are stored do have them.
    with LogReader(STORED / "cpu-adaptive.parquet") as reader:
        config = reader.header.config
        policy = with_present_names(config)["policy"]
    assert "twin" in config
    assert config["policy"]["horizon"]["worth"] == policy["horizon"]["decision_share"] == 0.4
    assert config["policy"]["selection"]["price"] == policy["selection"]["copy_weight"] == 1.0
