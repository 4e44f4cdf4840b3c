"""The place of a policy from its configuration, which may leave the choice of experts to another trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from expertflow.keys import shown
from expertflow.parts import Place
from expertflow.places.host_experts import HostExperts
from sim.job import reads
from sim.job.parts import class_of, make_part
from traces.reader import Trace, open_trace

_ROWS = 4096
"""Of a trace that are counted at once."""


def make_place(cfg: Any, trace: Trace) -> Place:
    """The place for a run over `trace`. ValueError names key, value and remedy."""
    extra: dict[str, Any] = {}
    if isinstance(cfg, Mapping) and class_of(cfg, "policy.place", Place) is HostExperts:
        given = dict(cfg)
        used_on = given.pop("used_on", None)
        if used_on is not None:
            if not isinstance(used_on, str) or not used_on:
                raise ValueError(f"policy.place.used_on={shown(used_on)} must be the file of a trace, or null")
            extra["used_on"], cfg = uses_in(used_on, trace), given
    place: Place = make_part(cfg, "policy.place", Place, **extra)
    return place


def uses_in(path: str, trace: Trace) -> list[int]:
    """How often each expert is used in the trace at `path` [num_layers * num_experts], a model of the shape of
    `trace`; a token's use counts once."""
    other = open_trace(path)
    reads.note(path)
    shape = (trace.num_layers, trace.num_experts)
    if (other.num_layers, other.num_experts) != shape:
        raise ValueError(
            f"policy.place.used_on={shown(path)} has {other.num_layers} layers of {other.num_experts} experts, "
            f"the trace {trace.name} has {shape[0]} of {shape[1]}; give a trace of the same model"
        )
    num_layers, num_experts = shape
    counts = np.zeros(num_layers * num_experts, np.int64)
    first = np.arange(num_layers)[:, None] * num_experts
    for start in range(0, len(other.experts), _ROWS):
        ids = np.asarray(other.experts[start : start + _ROWS]).astype(np.int64)
        # The value that pads a row is above every expert.
        counts += np.bincount((ids + first)[ids < num_experts], minlength=len(counts))
    return [int(count) for count in counts]
