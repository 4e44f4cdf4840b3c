"""Counting transitions by command: the file that it writes is a start for the predictor, and what was counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from expertflow.transitions import TransitionCounts
from sim.job.fitted_start import transition_start
from sim.paths import DATA
from tests.support.traces import check_error, run
from traces.fitting.transition import to_arrays
from traces.format import About, write_trace

E = 4


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three tokens of one request, two layers of four experts, one each: expert t in layer 0, t + 1 in layer 1."""
    experts = np.array([[[token], [token + 1]] for token in range(3)], np.uint8)
    arrays = {"experts": experts, "request_start": [0, 3], "prompt_len": [0]}
    return write_trace(tmp_path / "chain.safetensors", arrays, About("toy", E, "made by hand", "none"))


def test_the_command_counts_what_follows_what(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy.transition.safetensors"
    assert run(capsys, "fit-predictor", chain, out, "kind=transition", "distances=1")[0] == 0
    arrays = load_file(out)
    assert arrays["num_forwards"].tolist() == [3.0]
    assert arrays["frequency"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    inside, wrapped = arrays["cross"][0]
    # From layer 0 to layer 1 of the same token; from layer 1 to layer 0 of the next.
    assert np.argwhere(inside).tolist() == [[0, 1], [1, 2], [2, 3]]
    assert np.argwhere(wrapped).tolist() == [[1, 1], [2, 2]]
    assert np.argwhere(arrays["persistence"][0]).tolist() == [[0, 1], [1, 2]]
    with safe_open(out, "np") as file:
        header = file.metadata()
    assert (header["format"], header["model"], header["num_tokens"]) == ("expertflow-transition", "toy", "3")
    counts = TransitionCounts(2, E, 1)
    counts.load(transition_start(str(out), "toy") or {})
    assert counts.num_forwards == 3


def test_the_shipped_training_recording_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "twin.transition.safetensors"
    assert run(capsys, "fit-predictor", DATA / "gpt-oss-20b-twin-train.safetensors", out, "kind=transition")[0] == 0
    arrays = load_file(out)
    assert arrays["cross"].shape == (8, 24, 32, 32)
    # Each token chooses four experts in each layer; a prompt's tokens share one forward.
    assert arrays["frequency"].sum() == pytest.approx(24 * 4 * arrays["num_forwards"][0], rel=0.01)


def test_counts_beyond_sixteen_bits_are_scaled_down() -> None:
    counts = TransitionCounts(1, 2, 0)
    counts.num_forwards = 4.0 * 65535
    counts.frequency += 2.0 * 65535
    arrays = to_arrays(counts)
    assert arrays["num_forwards"].tolist() == [65535.0]
    assert arrays["frequency"].tolist() == [[32768, 32768]]


def test_no_distance_is_refused(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none.safetensors"
    found = run(capsys, "fit-predictor", chain, out, "kind=transition", "distances=0")
    check_error(found, "distances=0", "whole number from 1")
