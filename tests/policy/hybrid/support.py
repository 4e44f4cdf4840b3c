"""Small random networks, routing, and forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.forward import Forward
from expertflow.network import NUM_OWN, SHIFTS
from expertflow.parts import Prediction
from expertflow.predictors.hybrid import HybridPredictor
from tests.support.commands import routing
from tests.support.workloads import memory_trace, view_of
from traces.batching import BatchConfig, Batches

L, E, K, H, M, D = 5, 12, 3, 16, 10, 4
STARTS = (0, 7, 8, 20, 30)
PROMPTS = (0, 0, 4, 0)


def arrays(seed: int = 0, pregate: bool = False, **changes: Any) -> dict[str, npt.NDArray[Any]]:
    """What a fitted file holds, drawn."""
    draw = np.random.default_rng(seed)

    def whole(low: int, high: int, *shape: int, kind: type = np.int32) -> npt.NDArray[Any]:
        return draw.integers(low, high, shape).astype(kind)

    made: dict[str, npt.NDArray[Any]] = {
        "rank_weights": np.array([14, 10, 8], np.int32),
        "tables": whole(-3000, 3000, L * E, (2 + len(SHIFTS)) * H, kind=np.int16),
        "table_bits": np.array([8], np.int32),
        "place": whole(-5000, 5000, L + 1, H),
        "prior": whole(-900_000, 900_000, len(SHIFTS), H, kind=np.int64),
        "mix": whole(-127, 128, L, H, M, kind=np.int8),
        "mix_scale": whole(20, 400, L, M),
        "mix_bias": whole(-9000, 9000, D, L, M),
        "out": whole(-127, 128, L, M, E, kind=np.int8),
        "out_scale": whole(1000, 9000, L, E),
        "bias": whole(-2500, 500, D, L, E),
        "own": whole(-400, 400, D, NUM_OWN, L, E),
        "frequency": whole(0, 40_000, L, E),
        "forecast": whole(-127, 128, H, L * E, kind=np.int8),
        "forecast_scale": whole(1000, 9000, L * E),
        "forecast_bias": whole(-2500, 500, L * E),
        "forecast_own": whole(-400, 400, NUM_OWN, L * E),
    }
    if pregate:
        made["pregate"] = whole(-500, 1500, D, L, 2)
    return {**made, **changes}


def forwards(
    batch_size: int = 1, pregate: bool = False, seed: int = 3, prompts: Sequence[int] = PROMPTS
) -> list[Forward]:
    """Forwards of 30 tokens in four requests, one of which has a prompt unless told otherwise."""
    experts = routing((L, E, K), STARTS[-1], seed)
    extra: dict[str, Any] = {}
    if pregate:
        scores = np.random.default_rng(seed).normal(0, 2, (STARTS[-1], L, D, E)).astype(np.float16)
        for layer in range(L):
            scores[:, layer, max(L - 1 - layer, 0) :] = np.nan
        extra["lookahead"] = scores
    return list(Batches(memory_trace(experts, E, STARTS, prompts, **extra), BatchConfig(batch_size)))


def started(fitted: dict[str, npt.NDArray[Any]], **settings: Any) -> HybridPredictor:
    """A predictor ready to run."""
    return started_for(fitted, L, E, K, **settings)


def started_for(
    fitted: dict[str, npt.NDArray[Any]], num_layers: int, num_experts: int, top_k: int, **settings: Any
) -> HybridPredictor:
    """A predictor ready to run on a model of that shape."""
    predictor = HybridPredictor(fitted, **settings)
    predictor.start(view_of(num_layers, num_experts, top_k), None)
    return predictor


def answers(predictor: HybridPredictor, some: Sequence[Forward], block: int = 0) -> Iterator[Any]:
    """All it says over the forwards: predictions of every layer and distance, and the forecasts."""
    for index, forward in enumerate(some):
        if block and index % block == 0:
            takes = predictor.announced()
            assert takes is not None
            takes.prepare(some[index : index + block])
        predictor.begin_forward(forward)
        for layer in range(L):
            for distance in range(1, D + 2):
                yield plain(predictor.predict(forward, layer, distance))
        predictor.end_forward(forward)
        yield predictor.forecast().tolist()


def plain(found: Prediction | None) -> Any:
    """A prediction as lists, which compare."""
    if found is None:
        return None
    return list(found.keys), list(found.scores), None if found.chances is None else found.chances.tolist()
