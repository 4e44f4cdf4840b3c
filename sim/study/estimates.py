"""How well each estimate of N_e, the number of distinct experts a layer will demand, tracks the truth.

Estimates are made at layer l for layer l + d from the recorded pre-gate, or from the forward before; the truth is what
layer l + d then demanded. Simulates nothing: the recorded routing is enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from expertflow.diversity import embedding_distance, expected_union
from expertflow.forward import PREFILL, Forward
from sim.job.setup import Workload

DISTANCES = (1, 2, 4)
MASSES = (0.5, 0.7, 0.9)
EXPONENTS = (0.5, 1.0)
MEMORY = 0.9

ESTIMATES = {
    "mass_M": "experts, best first, until M of the summed chance that any token picks them is covered",
    "mass_M_of_mean": "the same over the tokens' mean probabilities",
    "tokens_top_k": "union over the tokens of each token's top-k of the pre-gate",
    "expected": "sum of the chances that any token picks an expert",
    "independent": "E (1 - (1 - k/E)^n): n tokens that pick independently",
    "threshold_0.5": "experts with a chance of one half or more",
    "last_tokens_top_k": "mean over the layers of tokens_top_k in the forward before, of any phase",
    "last_…_dist_X": "that, times (Dist per pair of tokens / its running mean)^X",
    "last_true": "mean over the layers of what the forward before demanded",
}


def run_estimates(work: Workload) -> dict[str, Any]:
    """Errors by phase, distance and estimate, and per forward its rows, Dist and mean number of distinct experts."""
    trace = work.trace
    if trace.lookahead is None and trace.lookahead_ids is None:
        raise ValueError(
            f"the trace {trace.name} has no recorded pre-gate, which the estimates of N_e are made from; "
            "record one with lookahead="
        )
    pairs: dict[tuple[str, int, str], list[tuple[int, float, float]]] = defaultdict(list)
    forwards = []
    before = _Before()
    for forward in work.batches:
        truth = [len(keys) for keys in forward.demands]
        distance = _pair_distance(forward)
        known = before.estimates(distance)
        selected = []
        for layer in range(trace.num_layers - 1):
            assert forward.recorded is not None
            chances = forward.recorded.lookahead(forward.rows, layer)
            assert chances is not None
            for ahead in DISTANCES:
                target = layer + ahead
                if target >= trace.num_layers or ahead > chances.shape[1]:
                    continue
                made = _from_pregate(chances[:, ahead - 1].astype(np.float64), trace.top_k)
                if ahead == 1:
                    selected.append(made["tokens_top_k"])
                for name, value in (made | known).items():
                    pairs[forward.phase, ahead, name].append((forward.index, truth[target], value))
        mean_true = float(np.mean(truth))
        before.learn(float(np.mean(selected)), mean_true, distance)
        forwards.append(
            {
                "phase": forward.phase,
                "rows": forward.num_tokens,
                "dist_per_pair": distance,
                "dist": None if distance is None else distance * _pairs(forward.num_tokens),
                "num_experts": mean_true,
            }
        )
    rows = [
        {"phase": phase, "distance": ahead, "estimate": name, **_errors(found)}
        for (phase, ahead, name), found in pairs.items()
    ]
    return {"rows": rows, "forwards": forwards, "trace": {"name": trace.name, "sha256": work.trace_sha256}}


def _from_pregate(chance: npt.NDArray[np.float64], top_k: int) -> dict[str, float]:
    """chance [rows, E] that a row picks an expert."""
    num_rows, num_experts = chance.shape
    union = 1.0 - np.prod(1.0 - chance, axis=0)
    best = np.argpartition(-chance, top_k - 1, axis=1)[:, :top_k]
    made = {
        "tokens_top_k": float(len(np.unique(best))),
        "expected": float(union.sum()),
        "independent": expected_union(num_experts, top_k, num_rows),
        "threshold_0.5": float((union >= 0.5).sum()),
    }
    for name, scores in (("", union), ("_of_mean", chance.mean(axis=0))):
        covered = np.cumsum(np.sort(scores)[::-1])
        for mass in MASSES:
            count = int(np.searchsorted(covered, mass * covered[-1])) + 1
            made[f"mass_{mass}{name}"] = float(min(max(count, top_k), num_experts))
    return made


class _Before:
    """What is known from the forward before; nothing at first."""

    def __init__(self) -> None:
        self.selected = self.true = 0.0
        self.pair_distance = 0.0

    def estimates(self, distance: float | None) -> dict[str, float]:
        if not self.selected:
            return {}
        found = {"last_tokens_top_k": self.selected, "last_true": self.true}
        if distance and self.pair_distance:
            ratio = distance / self.pair_distance
            found |= {f"last_tokens_top_k_dist_{power}": self.selected * ratio**power for power in EXPONENTS}
        return found

    def learn(self, selected: float, true: float, distance: float | None) -> None:
        self.selected, self.true = selected, true
        if distance:
            mean = self.pair_distance or distance
            self.pair_distance = MEMORY * mean + (1 - MEMORY) * distance


def _pairs(num_tokens: int) -> float:
    return num_tokens * (num_tokens - 1) / 2


def _pair_distance(forward: Forward) -> float | None:
    """Dist per pair of tokens; None for one token, or without recorded embeddings."""
    if forward.num_tokens < 2 or forward.recorded is None:
        return None
    vectors = forward.recorded.embedding(forward.rows)
    return None if vectors is None else embedding_distance(vectors) / _pairs(forward.num_tokens)


def _errors(found: Sequence[tuple[int, float, float]]) -> dict[str, Any]:
    index, truth, value = (np.array(column, np.float64) for column in zip(*found, strict=True))
    by_forward = pd.DataFrame({"index": index, "truth": truth, "value": value}).groupby("index").mean()
    return {
        "num_layers": len(found),
        "mean_true": float(truth.mean()),
        "mean_estimate": float(value.mean()),
        "bias": float((value - truth).mean()),
        "mean_abs_error": float(np.abs(value - truth).mean()),
        "correlation": correlation(truth, value),
        "correlation_of_forwards": correlation(by_forward["truth"].to_numpy(), by_forward["value"].to_numpy()),
    }


def correlation(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float | None:
    """Pearson's r; None where one of the two does not vary."""
    if len(left) < 3 or np.ptp(left) < 1e-9 or np.ptp(right) < 1e-9:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def estimates_table(settings: Sequence[str], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row an estimate and setting; prefill is the same at every batch size and stands once. Over all forwards
    together: how well rows and Dist alone, by rank, say how many experts there will be."""
    rows: list[dict[str, Any]] = []
    pooled: list[dict[str, Any]] = []
    for number, (setting, result) in enumerate(zip(settings, results, strict=True)):
        for row in result["rows"]:
            is_prefill = row["phase"] == PREFILL
            if number == 0 or not is_prefill:
                rows.append({"setting": PREFILL if is_prefill else f"{row['phase']} {setting}", **row})
        pooled += [one for one in result["forwards"] if number == 0 or one["phase"] != PREFILL]
    return pd.DataFrame(rows + _diversity(pd.DataFrame(pooled).dropna(subset=["dist"])))


def _diversity(forwards: pd.DataFrame) -> list[dict[str, Any]]:
    """Rank correlation of rows and of Dist with the number of experts, over forwards of two rows and more."""
    names = ("rows", "dist", "dist_per_pair")
    found = {f"rank of {name}": forwards[[name, "num_experts"]].rank() for name in names}
    # What is left to say once the number of rows is known.
    found["rank of dist, rows being equal"] = forwards.groupby("rows")[["dist", "num_experts"]].rank(pct=True)
    return [
        {
            "setting": "all forwards",
            "phase": "all",
            "distance": 1,
            "estimate": name,
            "num_layers": len(ranks),
            "correlation_of_forwards": correlation(*ranks.to_numpy(np.float64).T),
        }
        for name, ranks in found.items()
    ]
