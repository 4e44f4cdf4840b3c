"""Fits the routing model of `traces.generate` to a recorded trace: two regressions, then matching by simulation.

1. *Cross-layer dependence*, per layer: maximum likelihood of the ordered choice (Plackett-Luce: a Gumbel per expert,
   the K best, best first) given the previous layer's experts, with the request's history so far as control, so that
   what two layers share because of the topic is not counted as one suggesting the other.
2. *Topics*: shrunken log-odds of each request's usage against the whole, split into Q factors shared by all layers
   (truncated SVD) and what is each expert's own.
3. *Calibration*: traces are generated with the source's request lengths; after each, the strengths move against the
   error of the statistic that each governs (Robbins-Monro), and the later moves are averaged.

Deterministic given the seed. Knows nothing of policies.

Shapes: T tokens, L layers, K top-k, E experts, R requests, Q factors.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.flags import whole
from traces.generate import generate
from traces.limits import check_pairs
from traces.parameters import Arrays, save_params
from traces.processes.progress import shown
from traces.reader import Trace, open_trace
from traces.stats import activation, check_routing, layer_onehot, lru_distances, next_layer_recall, reuse, row_positions

_ROUND = "calibration"
_LAYER_SHARE = 0.1
"""Of the time of a round of calibration, what the dependence of a layer takes."""
MAX_FIT_TOKENS = 40_000  # of a longer trace, requests evenly spread
MIN_SIMULATED_TOKENS = 8_000  # a shorter trace is simulated several times over, against noise
MAX_SIMULATED_LENGTH = 1_024
NUM_FACTORS = 16
NUM_QUANTILES = 65
HALF_LIVES = (256.0, 5.0)  # of wander and of drift, in tokens
LAGS = (1, 2, 4, 8, 32, 64, 256)
HISTORY = (1, 16, None)  # windows of tokens whose usage is control in step 1; None = since the request began
SHRINKAGE = (1.0, 4.0, 16.0)  # tokens of average usage mixed into each window
TOPIC_SHRINKAGE = 12.0
RANGES = {  # of the strengths that calibration moves
    "topic_scale": (0.0, 5.0),
    "drift_scale": (0.0, 5.0),
    "repeat": (-1.0, 5.0),
    "cross_scale": (0.0, 3.0),
    "wander_share": (0.0, 0.95),
    "skew": (-0.5, 1.0),
}

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Progress = Callable[[str], None]


# -- 1. cross-layer dependence -------------------------------------------------------------------------------


TOPIC_SHRINK = 0.95
"""Matching reuse lag by lag leaves LRU hits in a small cache up to 0.02 too high; a twentieth less topic halves
that and costs 0.006 of reuse (measured on the train trace of README, two seeds)."""


def _history(hot: Floats, position: Integers) -> npt.NDArray[np.float32]:
    """Log usage of each expert in the tokens before, one feature per window: [windows, T, E]."""
    num_tokens = len(hot)
    total = np.concatenate([np.zeros((1, hot.shape[1])), np.cumsum(hot, axis=0, dtype=np.float64)])
    mean = total[-1] / num_tokens
    now = np.arange(num_tokens)
    features = []
    for window, shrinkage in zip(HISTORY, SHRINKAGE, strict=True):
        seen = position if window is None else np.minimum(position, window)
        count = total[now] - total[now - seen]
        features.append(np.log((count + shrinkage * mean) / (seen + shrinkage)[:, None] + 0.04))
    return np.array(features, np.float32)


def _choice_gradient(scores: Floats, ids: Integers) -> Floats:
    """Gradient [B,E] of the mean log likelihood of the ordered choices `ids` [B,K] (id E: none)."""
    num_rows, num_experts = scores.shape
    odds = np.zeros((num_rows, num_experts + 1), scores.dtype)
    odds[:, :-1] = np.exp(scores - scores.max(axis=1, keepdims=True))
    taken = np.take_along_axis(odds, ids, axis=1)
    # Rank k is drawn from what ranks 0 … k−1 left.
    left = odds.sum(axis=1, keepdims=True) - np.cumsum(taken, axis=1) + taken
    pressure = np.cumsum(np.where(ids < num_experts, 1 / np.maximum(left, 1e-6), 0), axis=1)
    gradient = -odds * pressure[:, -1:]
    np.put_along_axis(gradient, ids, 1 - taken * pressure, axis=1)
    mean: Floats = gradient[:, :-1] / num_rows
    return mean


def _fit_cross(before: Floats, ids: Integers, history: Floats, order: Integers) -> Floats:
    """Log-odds [E,E] that an expert of the layer before (row) lends to one of this layer (column), by Adam."""
    num_experts, batch, steps = before.shape[1], min(4096, len(order)), 300
    # Beside them, a bias for each expert and a strength for each kind of history: controls, not kept.
    shapes: tuple[tuple[int, ...], ...] = ((num_experts, num_experts), (num_experts,), (len(history),))
    theta, first, second = ([np.zeros(shape, np.float32) for shape in shapes] for _ in range(3))
    for step in range(steps):
        start = step * batch % (len(order) - batch + 1)
        rows = order[start : start + batch]
        seen, past = before[rows], history[:, rows]
        scores = seen @ theta[0] + theta[1] + np.einsum("h,hbe->be", theta[2], past)
        gradient = _choice_gradient(scores, ids[rows])
        slopes = [
            seen.T @ gradient - 3 / len(order) * theta[0],
            gradient.sum(axis=0),
            np.einsum("hbe,be->h", past, gradient),
        ]
        rate = 0.05 if step < 0.6 * steps else 0.005
        for value, slope, m, v in zip(theta, slopes, first, second, strict=True):
            m += 0.1 * (slope - m)
            v += 0.01 * (slope * slope - v)
            unbias = np.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            value += rate * unbias * m / (np.sqrt(v) + 1e-8)
    return theta[0]


def _fit_all_cross(ids: Integers, starts: Integers, num_experts: int, seed: int, say: Progress) -> Floats:
    """Cross-layer log-odds [L,E,E]; the first layer has none."""
    rng = np.random.Generator(np.random.PCG64(seed))
    num_tokens, num_layers, _ = ids.shape
    order = np.argsort(rng.random(num_tokens), kind="stable")
    position = row_positions(starts)
    cross = np.zeros((num_layers, num_experts, num_experts))
    before = layer_onehot(ids[:, 0], num_experts)
    for layer in range(1, num_layers):
        hot = layer_onehot(ids[:, layer], num_experts)
        chosen = ids[:, layer].astype(np.intp)
        cross[layer] = _fit_cross(before, chosen, _history(hot, position), order)
        before = hot
        say(f"cross-layer dependence: layer {layer + 1} of {num_layers}")
    return cross


# -- 2. topics -----------------------------------------------------------------------------------------------


def _fit_topics(ids: Integers, starts: Integers, num_experts: int) -> Arrays:
    """Factors of what sets requests apart: loadings [L,E,Q], residual [L,E], topics [R,Q], topic_length [R]."""
    lengths = np.diff(starts).astype(np.float64)
    layers = [layer_onehot(ids[:, layer], num_experts) for layer in range(ids.shape[1])]
    usage = np.stack([np.add.reduceat(hot, starts[:-1], axis=0, dtype=np.float64) for hot in layers], axis=1)
    mean = usage.sum(axis=0) / lengths.sum() + 0.01
    odds = np.log((usage + TOPIC_SHRINKAGE * mean) / ((lengths + TOPIC_SHRINKAGE)[:, None, None] * mean))
    share = (lengths / lengths.sum())[:, None]
    flat = odds.reshape(len(lengths), -1)
    flat = flat - (share * flat).sum(axis=0)
    left, strength, right = np.linalg.svd(flat * np.sqrt(share), full_matrices=False)
    factors = max(1, min(NUM_FACTORS, len(lengths) - 1, flat.shape[1]))
    topics = left[:, :factors] / np.sqrt(share)
    loadings = right[:factors].T * strength[:factors]
    residual = np.sqrt((share * (flat - topics @ loadings.T) ** 2).sum(axis=0))
    return {
        "topics": topics,
        "topic_length": lengths,
        "loadings": loadings.reshape(*usage.shape[1:], factors),
        # A lone request shows no topic apart from popularity; the calibration needs something to scale.
        "residual": np.maximum(residual, 0.1).reshape(usage.shape[1:]),
    }


# -- 3. calibration ------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """What is matched: reuse [lags, L], activation [L,E], recall [L] (both NaN where unknown), LRU hit rate."""

    reuse: Floats
    activation: Floats
    recall: Floats
    lru_half: float


def _look(experts: Integers, starts: Integers, num_experts: int) -> _Seen:
    try:
        recall = next_layer_recall(experts, starts, num_experts)[0]
    except ValueError:
        recall = np.full(experts.shape[1] - 1, np.nan)
    distances, _ = lru_distances(check_routing(experts, starts, num_experts), num_experts)
    return _Seen(
        reuse(experts, starts, num_experts, LAGS),
        activation(experts, starts, num_experts),
        np.concatenate([[np.nan], recall]),
        float(distances[: len(distances) // 2].sum() / distances.sum()),
    )


def _nudge(params: Arrays, source: _Seen, made: _Seen, gain: float) -> None:
    """Move each strength of `params` in the direction that lowers the error of the statistic it controls; unknown
    statistics move nothing."""
    rare = 1e-3
    params["bias"] += 0.7 * gain * np.log((source.activation + rare) / (made.activation + rare))
    error = source.reuse - made.reuse
    for row in range(1, len(error)):  # beyond the longest request: what the last known lag says
        error[row] = np.where(np.isnan(error[row]), error[row - 1], error[row])
    lag1, lag2, lag4, lag8, lag32, lag64, lag256 = np.nan_to_num(error)
    far, near = (lag32 + lag64) / 2, (lag2 + lag4 + lag8) / 3
    moves = {
        "topic_scale": 8 * far,
        "drift_scale": 12 * (near - far),
        "repeat": 6 * (lag1 - near),
        "cross_scale": 2 * np.nan_to_num(source.recall - made.recall),
        "wander_share": -5 * (lag256 - lag32).mean(),
        # More reuse brings more hits, at about this rate; skew answers for the rest.
        "skew": 10 * (source.lru_half - made.lru_half - 0.8 * far.mean()),
    }
    for name, move in moves.items():
        lowest, highest = RANGES[name]
        params[name] = np.clip(params[name] + gain * move, lowest, highest)


def _calibrate(params: Arrays, source: _Seen, lengths: Integers, rounds: int, seed: int, say: Progress) -> Arrays:
    """`params` with the bias and all strengths matched by simulation; averaged over the second half of the rounds."""
    lengths = np.minimum(lengths, MAX_SIMULATED_LENGTH)
    lengths = np.tile(lengths, -(-MIN_SIMULATED_TOKENS // int(lengths.sum())))
    num_layers, num_experts = params["bias"].shape
    start = {"topic_scale": 1.3, "drift_scale": 0.45, "repeat": 0.4, "cross_scale": 1.0}
    params = params | {name: np.full(num_layers, value) for name, value in start.items()}
    params |= {"wander_share": np.array(0.4), "skew": np.array(0.4)}
    moving = ("bias", *RANGES)
    sums = {name: np.zeros_like(params[name]) for name in moving}
    for step in range(rounds):
        scaled = params | {"cross": params["cross"] * params["cross_scale"][:, None, None]}
        arrays = generate(scaled, lengths.tolist(), seed=seed + 1 + step)
        made = _look(arrays["experts"], arrays["request_start"], num_experts)
        worst = np.abs(np.nan_to_num(source.reuse - made.reuse).mean(axis=1)).max()
        say(f"{_ROUND}: round {step + 1} of {rounds}, largest error of mean reuse {worst:.3f}")
        _nudge(params, source, made, gain=1 / (1 + step / 12))
        if step >= rounds // 2:
            sums = {name: sums[name] + params[name] for name in moving}
    params = params | {name: sums[name] / (rounds - rounds // 2) for name in moving}
    params["cross"] = params["cross"] * params.pop("cross_scale")[:, None, None]
    return params


def _fit_weights(weights: Floats, ids: Integers, num_experts: int) -> Arrays:
    """Quantiles [L,K−1,quantiles] of log w_k − log w_{k+1}, and the mean sum of a row's weights [L]."""
    real = ids < num_experts
    logs = np.log(np.maximum(weights.astype(np.float64), 1e-7))
    gaps, both = logs[:, :, :-1] - logs[:, :, 1:], real[:, :, 1:] & real[:, :, :-1]
    places = np.linspace(0.002, 0.998, NUM_QUANTILES)
    table = np.zeros((*gaps.shape[1:], NUM_QUANTILES))
    for layer, rank in np.ndindex(*gaps.shape[1:]):
        seen = gaps[both[:, layer, rank], layer, rank]
        table[layer, rank] = np.quantile(seen, places) if len(seen) else 0.0
    total = np.where(real, weights, 0).sum(axis=2, dtype=np.float64).mean(axis=0)
    return {"weight_gap": table, "weight_sum": total}


def _select_rows(request_start: Integers) -> tuple[Integers, Integers]:
    """Rows to fit on and the first row of each request among them: evenly spread requests, MAX_FIT_TOKENS in all."""
    starts = np.asarray(request_start, np.int64)
    starts, stops = starts[:-1][np.diff(starts) > 0], starts[1:][np.diff(starts) > 0]
    every = -(-int((stops - starts).sum()) // MAX_FIT_TOKENS)
    starts, stops = starts[:: max(1, every)], np.minimum(stops, starts + MAX_FIT_TOKENS)[:: max(1, every)]
    rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])[:MAX_FIT_TOKENS]
    edges = np.concatenate([[0], np.cumsum(stops - starts)])
    return rows, np.append(edges[edges < len(rows)], len(rows))


def fit_trace(trace: Trace, *, seed: int = 0, rounds: int = 60, say: Progress = lambda _: None) -> Arrays:
    """Parameters for `traces.generate.generate`, float32. About 3 minutes for 30,000 tokens of 24 × 32 experts.

    `rounds` is the number of calibrating simulations, `say` hears of progress. ValueError on an empty trace.
    """
    if trace.num_tokens == 0 or rounds < 1:
        raise ValueError(f"a fit needs a token and a round, got {trace.num_tokens} tokens and rounds={rounds}")
    check_pairs(trace.paths[0], trace.num_layers, trace.num_experts, 2)
    rows, starts = _select_rows(trace.request_start)
    experts, num_experts = np.asarray(trace.experts)[rows], trace.num_experts
    ids = check_routing(experts, starts, num_experts)
    source = _look(experts, starts, num_experts)
    size = (ids < num_experts).sum(axis=2)
    row_size = [np.bincount(size[:, layer], minlength=ids.shape[2] + 1) / len(ids) for layer in range(ids.shape[1])]
    params: Arrays = {
        "bias": np.log(source.activation + 1e-3),
        "cross": _fit_all_cross(ids, starts, num_experts, seed, say),
        "half_lives": np.array(HALF_LIVES),
        "row_size": np.array(row_size),
        **_fit_topics(ids, starts, num_experts),
    }
    params = _calibrate(params, source, np.diff(starts), rounds, seed, say)
    if trace.weights is not None:
        params |= _fit_weights(np.asarray(trace.weights)[rows], ids, num_experts)
    fitted: Arrays = {name: np.array(array, np.float32, order="C") for name, array in params.items()}
    fitted["topic_scale"] = fitted["topic_scale"] * np.float32(TOPIC_SHRINK)
    return fitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m traces fit`."""
    parser.add_argument("path", help="the trace to fit (.safetensors)")
    parser.add_argument("output", help="the parameter file to write (.safetensors)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument("--rounds", type=whole(0, 100_000), default=60, help="calibrating simulations (default: 60)")


def run(args: argparse.Namespace) -> int:
    """Fit and write a parameter file. Errors are ValueErrors."""
    trace = open_trace(args.path)
    said: list[float] = []

    def say(line: str) -> None:
        said.append(1.0 if line.startswith(_ROUND) else _LAYER_SHARE)
        if not sys.stderr.isatty():
            # On a terminal the line of progress tells it.
            print(line, file=sys.stderr, flush=True)

    total = (trace.num_layers - 1) * _LAYER_SHARE + args.rounds
    with shown(f"fitting to {trace.name}", lambda: sum(said), total):
        params = fit_trace(trace, seed=args.seed, rounds=args.rounds, say=say)
    save_params(
        args.output,
        params,
        model=trace.model,
        source=trace.header["source"],
        license=trace.header["license"],
        fitted_to=f"{trace.name}: {trace.num_tokens} tokens in {trace.num_requests} requests",
        command=f"python -m traces fit {trace.name}.safetensors {Path(args.output).name} --seed {args.seed}",
    )
    print(f"wrote {args.output}: fitted to {trace.name}; python -m traces generate --params {args.output} takes it")
    return 0
