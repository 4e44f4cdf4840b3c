"""A trace that is given in Python: its arrays, checked as the file that they would make is checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from expertflow.keys import near_to, nearest, plain, shown
from sim.job.compose import composed_file
from sim.paths import config_files
from traces.format import About, checked_trace, file_sha256
from traces.layout import ARRAYS
from traces.trace import Trace

NAME = "given"
_FIELDS = ("name", "model", "num_experts", "source", "license")


class GivenTrace(Trace):
    """A trace that is in no file; its hash is that of the file that `traces.format.write_trace` would write."""

    def sha256(self) -> str:
        """SHA-256 in hex."""
        if not self._sha256:
            self._sha256 = file_sha256(self)
        return self._sha256


def given_trace(given: Mapping[str, Any]) -> Trace:
    """The trace of these arrays, by their names in a file: experts [T,L,K] best first, and whatever else is there.

    `model` names the model and is needed; where the argument `model` says it, `sim.api.words` has filled it in.
    `request_start` is one request and `prompt_len` 0 where they are not given; `num_experts` is the model's; `name`,
    `source`, `license` are texts. ValueError for what is no trace.
    """
    for key in given:
        if key not in ARRAYS and key not in _FIELDS:
            names = [*ARRAYS, *_FIELDS]
            near, known = near_to(str(key), names), nearest(str(key), names)
            raise ValueError(f"trace: {plain(str(key), 60)} is no array of a trace{near}; there are: {known}")
    if "experts" not in given:
        raise ValueError("trace: experts is missing, the array of what was chosen [tokens, layers, top_k]; give it")
    model = given.get("model")
    if not isinstance(model, str):
        raise ValueError(f"trace: model={shown(model)} must be the name of the model that was recorded")
    arrays = {name: given[name] for name in ARRAYS if given.get(name) is not None}
    # Copies: what the caller does to its own arrays afterwards changes no run.
    arrays = {name: np.array(array) for name, array in arrays.items()}
    num_tokens = arrays["experts"].shape[0] if arrays["experts"].ndim else 0
    starts = arrays.setdefault("request_start", np.array([0, num_tokens]))
    arrays.setdefault("prompt_len", np.zeros(max(starts.size - 1, 0), np.int32))
    texts = {name: str(given.get(name, default)) for name, default in _TEXTS.items()}
    about = About(model, _num_experts(given, model), texts["source"], texts["license"])
    # Its stem is the name of the trace in results.
    path = Path(f"{Path(texts['name']).name or NAME}.trace")
    trace = checked_trace(path, arrays, about)
    for array in (stored := trace.layout_arrays()).values():
        array.flags.writeable = False
    return GivenTrace(trace.paths, trace.header, stored)


_TEXTS: Mapping[str, str] = {"name": NAME, "source": "arrays given in Python", "license": "none"}


def _num_experts(given: Mapping[str, Any], model: str) -> int:
    """Of a layer: as given, else the model's, of which a twin has the topology."""
    told = given.get("num_experts")
    if told is None:
        name = model.removesuffix("-twin")
        told = composed_file("model", name).get("num_experts") if name in config_files("model") else None
    if isinstance(told, bool) or not isinstance(told, int | np.integer) or told < 1:
        raise ValueError(f"trace: num_experts={shown(told)} must be given for a model of which no sizes are known")
    return int(told)
