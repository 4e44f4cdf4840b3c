"""How diverse the tokens of a batch are, and what that says of the number of distinct experts.

`Dist = Σ_{i<j} ‖v_i − v_j‖²` over the token embeddings of a forward (arXiv 2510.26730), in the O(k·d) form
`k · Σ‖v‖² − ‖Σv‖²`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def embedding_distance(embeddings: npt.NDArray[np.floating]) -> float:
    """Dist of token embeddings [k, d]; 0 for one token."""
    vectors = np.asarray(embeddings, dtype=np.float64)
    if vectors.ndim != 2:
        raise ValueError(f"embeddings of shape {vectors.shape} must be [tokens, dimensions]")
    total = vectors.sum(axis=0)
    return max(0.0, float(len(vectors) * np.einsum("kd,kd->", vectors, vectors) - total @ total))


def expected_union(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Distinct experts that independent tokens pick: E · (1 − (1 − k/E)^n)."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)
