"""Statistics of a routing trace, counted with sets and dictionaries, independent of `traces.stats`.

`python -m tests.conformance.figures TRACE...` counts each trace and writes its figures into `statistics.json` under
the file's name. The figures of a recording that is not shipped stand there too, so that what is generated from
parameters fitted to it can be held against it on any machine.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.conformance import STATISTICS_FILE
from tests.support.reference import count_hits_fast, trace_events

LAGS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.25, 0.5, 0.75)
Rows = list[list[frozenset[int]]]  # of each layer, the experts of each token


def mean_reuse(layers: Rows, requests: list[range]) -> list[float]:
    """For each lag, the mean over layers of the share of a token's experts that the token `lag` before also chose."""
    result = []
    for lag in LAGS:
        shares = []
        for rows in layers:
            pairs = [(rows[t], rows[t - lag]) for request in requests for t in request[lag:]]
            shares.append(sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs))
        result.append(sum(shares) / len(shares))
    return result


def mean_entropy(layers: Rows) -> float:
    """Mean over layers of the entropy of expert popularity, bits."""
    total = 0.0
    for rows in layers:
        counts = Counter(expert for row in rows for expert in row)
        chosen = counts.total()
        total -= sum(count / chosen * math.log2(count / chosen) for count in counts.values())
    return total / len(layers)


def lru_hit_rates(experts: np.ndarray[Any, np.dtype[Any]], num_experts: int) -> list[float]:
    """Hit rate of one LRU cache over all layers at each share of the experts, cold start, batch 1."""
    num_layers = experts.shape[1]
    events = list(trace_events(experts))
    size: dict[str, Any] = {"num_layers": num_layers, "num_experts": num_experts, "policy": "lru", "scope": "global"}
    return [
        count_hits_fast(events, capacity=int(share * num_layers * num_experts), **size).hit_rate for share in SHARES
    ]


def mean_recall(layers: Rows, requests: list[range], num_experts: int, top_k: int) -> float:
    """Mean over layers of recall@K by naive Bayes on the layer before: the first half fits, the second is scored.

    Ranks expert e by log n(e) + sum over f of log (n(f, e) + 1) / (n(e) + 2), where n(e) counts e one more than seen.
    """
    cut = requests[len(requests) // 2].start
    recalls = []
    for before, now in pairwise(layers):
        used = Counter(e for row in now[:cut] for e in row)
        both = Counter((f, e) for a, b in zip(before[:cut], now[:cut], strict=True) for f in a for e in b)
        chance = [[math.log((both[f, e] + 1) / (used[e] + 2)) for e in range(num_experts)] for f in range(num_experts)]
        prior = [math.log(used[e] + 1) for e in range(num_experts)]
        hits = 0
        for a, b in zip(before[cut:], now[cut:], strict=True):
            score = [sum(column) for column in zip(prior, *(chance[f] for f in a), strict=True)]
            named = sorted(range(num_experts), key=score.__getitem__)[-top_k:]
            hits += len(b.intersection(named))
        recalls.append(hits / sum(len(row) for row in now[cut:]))
    return sum(recalls) / len(recalls)


def figures(path: Path, num_experts: int) -> dict[str, Any]:
    """Request lengths and statistics of a trace without padding."""
    arrays = load_file(path)
    experts, start = arrays["experts"], arrays["request_start"].tolist()
    layers = [[frozenset(row) for row in experts[:, layer].tolist()] for layer in range(experts.shape[1])]
    requests = [range(a, b) for a, b in pairwise(start)]
    return {
        "request_lengths": [len(request) for request in requests],
        "reuse": mean_reuse(layers, requests),
        "entropy": mean_entropy(layers),
        "lru": lru_hit_rates(experts, num_experts),
        "recall": mean_recall(layers, requests, num_experts, experts.shape[2]),
    }


def main(paths: list[str]) -> None:
    """Write the figures of the traces of gpt-oss-20b or its twin, keeping those of other files."""
    known = json.loads(STATISTICS_FILE.read_text(encoding="utf-8")) if STATISTICS_FILE.exists() else {}
    known |= {Path(path).stem: figures(Path(path), num_experts=32) for path in paths}
    STATISTICS_FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
