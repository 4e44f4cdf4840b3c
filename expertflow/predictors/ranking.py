"""Scores in order: best first, ties by expert, the same on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rank_scores(
    scores: npt.NDArray[np.int64], first_key: npt.NDArray[np.int64] | int, num_kept: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The `num_kept` best of integer scores [..., E] as (keys, scores) [..., num_kept]; lower expert first on a tie.

    scores in 0 … 2^16. first_key: key of expert 0, broadcast against [..., num_kept]. One sort of (score,
    expert) packed into an integer: several times faster than an argsort.
    """
    num_experts = scores.shape[-1]
    bits = max(int(num_experts - 1).bit_length(), 1)
    last = (1 << bits) - 1
    packed = (scores << bits) | (last - np.arange(num_experts))
    if bits <= 13:
        packed = packed.astype(np.int32)
    packed.sort(axis=-1)
    best = packed[..., : -num_kept - 1 : -1].astype(np.int64)
    return first_key + last - (best & last), best >> bits
