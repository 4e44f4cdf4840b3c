"""From how often two choices coincide to the correlation behind it, and back.

Think of every expert as scored, and of the K best of E as those whose score, a standard normal, lies above the
threshold that the share K/E exceeds. Two scores of correlation r then both lie above it with the probability of the
bivariate normal; given the one, the other is chosen too with `overlap(r, K/E)`. Its inverse is the tetrachoric
correlation (Pearson 1900), which unlike the overlap itself means the same whatever E and K are.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LOWEST, HIGHEST = -0.5, 0.995
"""Correlations that are told apart."""
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)
_GRID = np.linspace(LOWEST, HIGHEST, 300)


def overlap(correlation: npt.ArrayLike, share: float) -> Floats:
    """Probability that one score is among the best `share`, in (0, 1), given that the other is.

    The bivariate normal's tail by Plackett's identity: its derivative by the correlation is the density at the
    threshold, integrated here from 0 by 40 Gauss-Legendre nodes.
    """
    given = np.asarray(correlation, np.float64)
    threshold = NormalDist().inv_cdf(1 - share)
    inner = given[..., None] * (_NODES + 1) / 2
    density = np.exp(-(threshold**2) / (1 + inner)) / (2 * np.pi * np.sqrt(1 - inner * inner))
    both: Floats = share * share + given / 2 * (density * _WEIGHTS).sum(axis=-1)
    return both / share


def correlation(seen: npt.ArrayLike, share: float) -> Floats:
    """The correlation at which `overlap` is what was seen, within `LOWEST` … `HIGHEST`; NaN stays NaN."""
    found: Floats = np.interp(np.asarray(seen, np.float64), overlap(_GRID, share), _GRID)
    return found
