"""Fitted predictors, shipped or of the user's own, as safetensors files: warm counts, networks, forests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sim.job import reads
from traces.reading import check_finite, read_arrays
from traces.shipped import shipped


class FittedArrays(Mapping[str, npt.NDArray[np.generic]]):
    """The arrays of a file, by name. origin: the file, for messages of what checks them later."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]], origin: str) -> None:
        self._arrays = arrays
        self.origin = origin

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def transition_start(source: object, model: str, key: str = "policy.predictor") -> FittedArrays | None:
    """Transition counts. `auto`: what is shipped for `model`, if anything; null: a cold start; else a file's path.

    key: of the predictor, for messages.
    """
    return _read(source, f"{key}.fitted_start", f"{model}.transition.safetensors", "python -m traces fit-predictor")


def fitted_arrays(source: object, model: str, kind: str, key: str = "policy.predictor") -> FittedArrays | None:
    """A fitted predictor of that kind. `auto`: what is shipped for `model`, None if nothing; else a file's path.

    key: of the predictor, for messages.
    """
    return _read(source, f"{key}.fitted", f"{model}.{kind}.safetensors", "python -m traces fit-predictor")


def _read(source: object, key: str, at_hand: str, writer: str) -> FittedArrays | None:
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{key}={source!r} must be auto, null, or a file")
    path = _found(at_hand, key) if source == "auto" else Path(source)
    reads.note(reads.SHIPPED + at_hand if source == "auto" else source)
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"{key}={source!r}: no such file; give auto, null, or a file written by {writer}")
    remedy = f"write it anew with {writer}"
    arrays, _ = read_arrays(path, remedy)
    check_finite(path, arrays, remedy)
    return FittedArrays(arrays, str(path))


def _found(name: str, key: str) -> Path | None:
    """The shipped file of that name, None if nothing is fitted to that model."""
    try:
        return shipped(name)
    except ValueError as error:
        raise ValueError(f"{key}=auto: {error}, or null") from None
