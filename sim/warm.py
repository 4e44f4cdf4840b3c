"""Fitted transition counts: the predictor's warm start, shipped or of the user's own, as a safetensors file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from sim.paths import DATA


def warm_counts(source: object, model: str) -> dict[str, npt.NDArray[np.generic]] | None:
    """`auto`: what is shipped for `model`, if anything; null: a cold start; else a file's path."""
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"policy.predictor.warm={source!r} must be auto, null, or a file")
    path = DATA / f"{model}.transition.safetensors" if source == "auto" else Path(source)
    if source == "auto" and not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"policy.predictor.warm={source!r}: no such file; give auto, null, or a file written by "
                         "python -m sim.fit_transition")  # fmt: skip
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"policy.predictor.warm={source!r} is not a readable safetensors file ({error})") from error
