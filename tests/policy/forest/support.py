"""A workload whose routing can be known: the pre-gate is misled half of the time, what earlier layers chose is not.

A request's tokens follow a topic that changes now and then; each layer chooses the topic's experts. The pre-gate shows
those of the topic, or on every other token those of another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.workloads import memory_trace
from traces.format import About, write_trace
from traces.reader import Trace

L, E, K, D = 6, 8, 2, 3
NUM_TOPICS = 4
LENGTH = 24


def topics(num_requests: int, seed: int) -> npt.NDArray[np.int64]:
    """Topic [T] of each token."""
    draws = np.random.default_rng(seed)
    found = draws.integers(NUM_TOPICS, size=num_requests * LENGTH)
    for row in range(1, len(found)):
        if row % LENGTH and draws.random() < 0.7:
            found[row] = found[row - 1]
    return found


def experts_of(topic: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Experts [T, L, K] of topics [T, 1] or [T, L]: two neighbours, elsewhere on each layer."""
    first = (2 * topic + 3 * np.arange(L)) % E
    return np.stack([first, (first + 1) % E], axis=2)


def arrays(num_requests: int, seed: int, *, listed: bool = False, random: bool = False) -> dict[str, Any]:
    """Arrays of a trace with a pre-gate. random: the routing has nothing to do with anything."""
    draws = np.random.default_rng(seed + 1000)
    topic = topics(num_requests, seed)
    shown = np.where(np.arange(len(topic)) % 2 == 0, topic, draws.integers(NUM_TOPICS, size=len(topic)))
    logits = draws.normal(scale=0.3, size=(len(topic), L, E))
    raised = experts_of(shown[:, None])
    np.put_along_axis(logits, raised, np.take_along_axis(logits, raised, 2) + 2.0, axis=2)
    ahead = np.full((len(topic), L, D, E), np.nan, np.float16)
    for layer in range(L):
        for distance in range(1, min(D, L - 1 - layer) + 1):
            ahead[:, layer, distance - 1] = logits[:, layer + distance]
    routed = experts_of(draws.integers(NUM_TOPICS, size=(len(topic), L)) if random else topic[:, None])
    made: dict[str, Any] = {
        "experts": routed.astype(np.uint8),
        "token_ids": (topic * 7 + 1).astype(np.int32),
        "embedding": draws.normal(size=(len(topic), 4)).astype(np.float16),
    }
    if not listed:
        return made | {"lookahead": ahead}
    missing = np.isnan(ahead).any(axis=3)
    ids = np.argsort(-np.nan_to_num(ahead.astype(np.float32)), axis=3)[..., : 2 * K].astype(np.uint8)
    chances = np.broadcast_to(np.array([200, 150, 40, 10], np.uint8), ids.shape).copy()
    ids[missing], chances[missing] = 255, 0
    return made | {"lookahead_ids": ids, "lookahead_scores": chances}


def knowable(num_requests: int = 12, seed: int = 0, prompt: int = 4, **kind: bool) -> Trace:
    """In memory."""
    starts = [LENGTH * index for index in range(num_requests + 1)]
    made = arrays(num_requests, seed, **kind)
    return memory_trace(made.pop("experts"), E, starts, [prompt] * num_requests, **made)


def written(
    path: Path, num_requests: int = 12, seed: int = 0, *, pregate: bool = True, model: str = "tiny", **kind: bool
) -> Path:
    """In a file."""
    made = arrays(num_requests, seed, **kind)
    if not pregate:
        made = {key: value for key, value in made.items() if not key.startswith("lookahead")}
    starts = [LENGTH * index for index in range(num_requests + 1)]
    requests = {"request_start": starts, "prompt_len": [4] * num_requests}
    return write_trace(path, made | requests, About(model, E, "tests", "none"))


def needs_fit() -> None:
    """Skips where what fitting needs is not installed."""
    pytest.importorskip("sklearn", reason="pip install 'expertflow[fit]'")
    pytest.importorskip("numba", reason="pip install 'expertflow[fit]'")


SMALL: dict[str, int] = {"distances": D, "rows": 1500, "trees": 8}


def quiet(line: str) -> None:
    """A report to nobody."""
