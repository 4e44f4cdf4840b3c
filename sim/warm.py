"""Fitted predictors, shipped or of the user's own, as safetensors files: warm counts, networks, forests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from sim.paths import DATA

Arrays = dict[str, npt.NDArray[np.generic]]


def warm_counts(source: object, model: str) -> Arrays | None:
    """Transition counts. `auto`: what is shipped for `model`, if anything; null: a cold start; else a file's path."""
    return _read(source, "policy.predictor.warm", _shipped(model, "transition"), "python -m traces fit-predictor")


def fitted_arrays(source: object, model: str, kind: str) -> Arrays | None:
    """A fitted predictor of that kind. `auto`: what is shipped for `model`, None if nothing; else a file's path."""
    return _read(source, "policy.predictor.fitted", _shipped(model, kind), "python -m traces fit-predictor")


def _shipped(model: str, kind: str) -> Path:
    """Where a fitted file of that kind stands, if one is shipped."""
    return DATA / f"{model}.{kind}.safetensors"


def _read(source: object, key: str, at_hand: Path, writer: str) -> Arrays | None:
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{key}={source!r} must be auto, null, or a file")
    path = at_hand if source == "auto" else Path(source)
    if source == "auto" and not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{key}={source!r}: no such file; give auto, null, or a file written by {writer}")
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"{key}={source!r} is not a readable safetensors file ({error})") from error
