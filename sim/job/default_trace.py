"""Traces that need no download: a twin's recording, and what is generated in memory from fitted parameters."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from traces.generate import generate, shipped_params, split_tokens
from traces.parameters import load_params
from traces.reader import Trace

SHIPPED_TRACE = "gpt-oss-20b-twin-eval.safetensors"
"""What is run where no trace is named."""
SHIPPED_TOPOLOGY = (24, 32, 4)
"""Its layers, experts of a layer, and top-k."""
GENERATED = {"num_tokens": 1024, "num_requests": 8, "seed": 0}
"""What a generated trace is like in what is not said."""


class GeneratedTrace(Trace):
    """A trace that is in no file; its hash is that of its arrays."""

    def sha256(self) -> str:
        """SHA-256 over the arrays' names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name, array in sorted(self.layout_arrays().items()):
            values = np.ascontiguousarray(array)
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode() + values.tobytes())
        return digest.hexdigest()


def generated_trace(num_tokens: int, num_requests: int, seed: int, params: str | None) -> Trace:
    """`num_tokens` tokens in `num_requests` requests of equal length, from the parameter file `params`."""
    if num_requests > num_tokens:
        raise ValueError(
            f"trace.num_requests={num_requests} is more than trace.num_tokens={num_tokens}; "
            "a request has at least one token"
        )
    if not isinstance(params, str | None) or params == "":
        raise ValueError(f"trace.params={params!r} must be a parameter file, written by python -m traces fit")
    path = Path(params) if params is not None else shipped_params()
    fitted, header = load_params(path)
    arrays = generate(fitted, split_tokens(num_tokens, num_requests), seed)
    _, num_layers, top_k = arrays["experts"].shape
    return GeneratedTrace(
        [Path(f"{path.name.split('.params')[0]}-generated-{num_tokens}x{num_requests}-seed{seed}.trace")],
        {
            "model": header.get("model", "unknown"),
            "num_layers": str(num_layers),
            "num_experts": str(fitted["bias"].shape[1]),
            "top_k": str(top_k),
            "num_requests": str(num_requests),
            "num_tokens": str(num_tokens),
        },
        arrays,
    )
