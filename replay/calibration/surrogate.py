"""Routing of another shape, for a model of which no recording is at hand: made of a recorded model's, for timing only.

The experts are split into groups as large as the source's layers have experts; each group follows one layer of the
source. Reuse from token to token stays as recorded; what the layers have to do with each other does not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from expertflow.model import ModelSpec
from sim.job.default_trace import GeneratedTrace
from traces.reader import Trace


def surrogate_trace(trace: Trace, model: ModelSpec) -> Trace:
    """`trace` itself if it has the model's shape, else a stand-in with as many tokens, named as one."""
    if (trace.num_layers, trace.num_experts, trace.top_k) == (model.num_layers, model.num_experts, model.top_k):
        return trace
    groups = -(-model.num_experts // trace.num_experts)
    source = np.asarray(trace.experts).astype(np.int64)
    columns = []
    for layer in range(model.num_layers):
        chosen: list[npt.NDArray[np.int64]] = []
        for group in range(groups):
            share = model.top_k // groups + (group < model.top_k % groups)
            size = min(trace.num_experts, model.num_experts - group * trace.num_experts)
            at = (layer + 7 * group) % trace.num_layers
            ids = source[:, at, : min(share, trace.top_k)]
            chosen.append(_fill(ids, share, size) + group * trace.num_experts)
        columns.append(np.concatenate(chosen, axis=1))
    experts = np.stack(columns, axis=1).astype(np.uint8 if model.num_experts <= 255 else np.uint16)
    shape = {"num_layers": model.num_layers, "num_experts": model.num_experts, "top_k": model.top_k}
    header = {**trace.header, "model": model.name, "source": f"stand-in made of {trace.name}"}
    arrays = {"experts": experts, "request_start": trace.request_start, "prompt_len": trace.prompt_len}
    if trace.context_len is not None:
        arrays["context_len"] = trace.context_len
    return GeneratedTrace(
        [Path(f"{trace.name}-as-{model.name}.trace")],
        header | {key: str(value) for key, value in shape.items()},
        arrays,
    )


def _fill(ids: npt.NDArray[np.int64], count: int, size: int) -> npt.NDArray[np.int64]:
    """[T, count] different experts below `size`: those given, then the next free numbers."""
    out = ids % size
    rows = []
    for row in out:
        seen = list(dict.fromkeys(row.tolist()))
        candidate = (seen[-1] if seen else 0) + 1
        while len(seen) < count:
            if candidate % size not in seen:
                seen.append(candidate % size)
            candidate += 1
        rows.append(seen[:count])
    return np.asarray(rows, dtype=np.int64)
