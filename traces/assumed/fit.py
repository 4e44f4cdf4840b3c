"""Fits the families to recordings: quantiles over layers of how local they are, then shares that bring that about.

1. Each recording is measured (`measure`), layer by layer. The layers of all are pooled, each recording with the same
   weight; a setting is a quantile of every quantity: of `QUANTILES`.
2. The correlations by distance of a setting are decomposed into the shares of a `Family` by non-negative least
   squares; fresh is what is left.
3. Choosing exactly K of E is not the same as passing a threshold, so what is made is measured, too, at the topology
   of the recordings, and shares and depth are moved until it shows what was asked (`ROUNDS` times).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from traces.assumed.families import FAST, SETTINGS, SLOW, Family
from traces.assumed.latent import Floats
from traces.assumed.measure import LAGS, Locality, measure
from traces.assumed.routing import Topology, make_routing
from traces.reader import Trace

QUANTILES = dict(zip(SETTINGS, (0.1, 0.5, 0.9), strict=True))
ROUNDS = 8
_TOKENS, _REQUESTS, _LAYERS, _SEED = 144, 64, 4, 12345
_LEAST_FRESH = 0.02
_DISTANCES = np.array(LAGS, np.float64)
_DECAYS = np.stack([np.ones(len(LAGS)), 0.5 ** (_DISTANCES / SLOW), 0.5 ** (_DISTANCES / FAST)], axis=1)


class Target(NamedTuple):
    """What a setting is to show: as `Locality`, without layers."""

    popularity: float
    lags: Floats
    depth: float


def targets(seen: Sequence[Locality]) -> dict[str, Target]:
    """The settings of recordings that were measured. ValueError where none tells one of the quantities."""
    popularity = _pooled([one.popularity[None] for one in seen])
    lags = _pooled([one.lags for one in seen])
    depth = _pooled([one.depth[None] for one in seen])
    if np.isnan(popularity).any() or np.isnan(lags[:, 0]).any() or np.isnan(depth).any():
        raise ValueError("the recordings must have two requests and two layers: popularity and depth cannot be told")
    found = {}
    for place, name in enumerate(SETTINGS):
        found[name] = Target(max(float(popularity[place, 0]), 0.0), lags[place], max(float(depth[place, 0]), 0.0))
    return found


def _pooled(tables: Sequence[Floats]) -> Floats:
    """`QUANTILES` [settings, rows] of tables [rows, layers], each table with the same weight; NaN where not all tell:
    a row that only some recordings are long enough for would be theirs alone."""
    found = np.full((len(QUANTILES), len(tables[0])), np.nan)
    for row in range(len(tables[0])):
        values = [table[row][~np.isnan(table[row])] for table in tables]
        weights = np.concatenate([np.full(len(one), 1 / max(len(one), 1)) for one in values])
        flat = np.concatenate(values)
        if not all(map(len, values)):
            continue
        order = np.argsort(flat, kind="stable")
        reached = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
        found[:, row] = np.interp(list(QUANTILES.values()), reached, flat[order])
    return found


def fit_families(traces: Sequence[Trace]) -> dict[str, Family]:
    """The family of each setting. ValueError on recordings that are too few or too short."""
    seen = [measure(np.asarray(trace.experts), np.asarray(trace.request_start), trace.num_experts) for trace in traces]
    topology = Topology(_LAYERS, traces[0].num_experts, traces[0].top_k)
    return {name: _fit(target, topology) for name, target in targets(seen).items()}


def _fit(wanted: Target, topology: Topology) -> Family:
    """The family whose routing, made for `topology`, shows what is wanted."""
    popularity, lags, depth = wanted.popularity, wanted.lags.copy(), 0.5
    starts = np.arange(_REQUESTS + 1) * _TOKENS
    for _ in range(ROUNDS):
        family = _family(popularity, lags, depth)
        made = make_routing(family, topology, [_TOKENS] * _REQUESTS, _SEED)
        found = measure(made, starts, topology.num_experts)
        popularity = float(np.clip(popularity + wanted.popularity - np.mean(found.popularity), 0, 0.9))
        lags = lags + np.nan_to_num(wanted.lags - np.nan_to_num(found.lags.mean(axis=1), nan=0.0))
        depth = float(np.clip(depth + wanted.depth - np.mean(found.depth), 0, 0.98))
    return _family(popularity, lags, depth)


def _family(popularity: float, lags: Floats, depth: float) -> Family:
    """Shares whose correlations by distance are nearest to `lags`, where those are known."""
    known = ~np.isnan(lags)
    shares = _least_squares(_DECAYS[known], lags[known] - popularity)
    total = popularity + float(shares.sum())
    scale = min(1.0, (1 - _LEAST_FRESH) / total)
    request, slow, fast = (round(float(scale * share), 4) for share in shares)
    popularity = round(scale * popularity, 4)
    fresh = round(1 - popularity - request - slow - fast, 4)
    return Family(popularity, request, slow, fast, fresh, round(depth, 4))


def _least_squares(columns: Floats, values: Floats) -> Floats:
    """Non-negative least squares over a few columns: the best of all sets of columns whose solution is no less than 0
    (Lawson and Hanson's conditions, by enumeration)."""
    num = columns.shape[1]
    best, least = np.zeros(num), float(values @ values)
    for chosen in range(1, 1 << num):
        some = [place for place in range(num) if chosen >> place & 1]
        found = np.linalg.lstsq(columns[:, some], values, rcond=None)[0]
        error = float(np.sum((columns[:, some] @ found - values) ** 2))
        if (found >= 0).all() and error < least - 1e-15:
            best, least = np.zeros(num), error
            best[some] = found
    return best
