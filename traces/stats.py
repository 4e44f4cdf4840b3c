"""What a routing trace looks like: reuse over time, popularity, next-layer predictability, best cache hits.

Pure functions on arrays, and the tables of `python -m traces stats`. Knows no policy, no hardware and no clock:
the cache counts here are those of an event-atomic cache at batch size 1 whose copies take no time.

Shapes: T tokens, L layers, K columns (top-k), E experts, R requests. `experts` [T,L,K] is padded with the all-ones
value of its type where a row has fewer than K experts; `request_start` [R+1] are the first rows of the requests.
"""

import argparse
import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from traces.files import replace_text
from traces.flags import whole
from traces.limits import check_pairs
from traces.processes.progress import shown
from traces.reader import open_trace
from traces.tables import console_for_tables, print_columns

LAGS = (1, 2, 4, 8, 16, 32, 64)
CAPACITY_PERCENT = (10, 20, 30, 40, 50, 60, 70, 80, 90)

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Event = tuple[int, list[int], list[int]]  # its number, the keys it demands, the events that next use them


def check_routing(experts: Integers, request_start: Integers, num_experts: int) -> Integers:
    """`experts` as an array in which padding is `num_experts`; ValueError on what is no routing."""
    if experts.ndim != 3 or 0 in experts.shape:
        raise ValueError(f"experts has shape {experts.shape}: needs [tokens, layers, top_k], none of them 0")
    starts = np.asarray(request_start)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(experts) or (np.diff(starts) < 0).any():
        raise ValueError(f"request_start must rise from 0 to the {len(experts)} tokens, one entry more than requests")
    padding = np.iinfo(experts.dtype).max
    ids = experts
    if padding >= num_experts:  # else it is an expert, and no row is padded
        ids = np.where(experts == padding, experts.dtype.type(num_experts), experts)
    if ids.min() < 0 or ids.max() > num_experts:
        raise ValueError(f"experts holds {ids.max()}: needs 0 … {num_experts - 1}, or {padding} as padding")
    if (ids == num_experts).all():
        raise ValueError("experts is nothing but padding: no expert was chosen")
    return ids


def layer_onehot(ids: Integers, num_experts: int) -> npt.NDArray[np.float32]:
    """Chosen experts of one layer [T,K] as 0/1 [T,E]; the id `num_experts` is padding."""
    hot = np.zeros((len(ids), num_experts + 1), np.float32)
    np.put_along_axis(hot, ids.astype(np.intp), 1.0, axis=1)
    return hot[:, :num_experts]


def row_positions(request_start: Integers) -> npt.NDArray[np.int64]:
    """Place [T] of each row within its request, from 0."""
    lengths = np.diff(request_start)
    return np.arange(int(request_start[-1])) - np.repeat(np.asarray(request_start[:-1]), lengths)


def reuse(experts: Integers, request_start: Integers, num_experts: int, lags: Sequence[int] = LAGS) -> Floats:
    """Mean over tokens of |S_t ∩ S_{t−lag}| / |S_t| within a request, [lags, L]; NaN where no request is so long.

    Where all rows have K experts this is the mean overlap over K; with padding, experts weigh the same, not rows.
    """
    ids = check_routing(experts, request_start, num_experts)
    position = row_positions(request_start)
    mean = np.full((len(lags), ids.shape[1]), np.nan)
    for layer in range(ids.shape[1]):
        hot = layer_onehot(ids[:, layer], num_experts)
        size = hot.sum(axis=1)
        for row, lag in enumerate(lags):
            within = position[lag:] >= lag
            chosen = size[lag:][within].sum()
            if chosen:
                overlap = np.einsum("te,te->t", hot[lag:], hot[:-lag])
                mean[row, layer] = overlap[within].sum() / chosen
    return mean


def activation(experts: Integers, request_start: Integers, num_experts: int) -> Floats:
    """Share of the tokens that chose each expert, [L,E]; a layer sums to its mean number of experts."""
    ids = check_routing(experts, request_start, num_experts)
    counts = [np.bincount(ids[:, layer].ravel(), minlength=num_experts + 1) for layer in range(ids.shape[1])]
    return np.array(counts)[:, :num_experts] / len(ids)


def popularity_entropy(experts: Integers, request_start: Integers, num_experts: int) -> Floats:
    """Entropy of each layer's expert popularity in bits, [L]: log2(E) when used evenly; 0 for an unused layer."""
    share = activation(experts, request_start, num_experts)
    share = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-300)
    entropy: Floats = -(share * np.log2(np.maximum(share, 1e-300))).sum(axis=1)
    return np.abs(entropy)  # no −0


def next_layer_recall(experts: Integers, request_start: Integers, num_experts: int) -> Floats:
    """Recall@K of layers 1 … L−1, [2, L−1]: naive Bayes on the previous layer's experts; popularity alone.

    Counted on the first half of the requests, scored on the second. Bayes ranks expert e by
    log n(e) + Σ_{f ∈ previous} log (n(f, e)+1)/(n(e)+2). ValueError with one layer or one request.
    """
    ids = check_routing(experts, request_start, num_experts)
    num_tokens, num_layers, top_k = ids.shape
    cut = int(request_start[(len(request_start) - 1) // 2])
    if num_layers < 2 or not 0 < cut < num_tokens:
        raise ValueError("next-layer recall needs two layers and two requests, to fit on one and score the other")
    recall = np.full((2, num_layers - 1), np.nan)
    before = layer_onehot(ids[:, 0], num_experts)
    for layer in range(1, num_layers):
        hot = layer_onehot(ids[:, layer], num_experts)
        used = hot[:cut].sum(axis=0)
        score = before[cut:] @ np.log((before[:cut].T @ hot[:cut] + 1) / (used + 2)) + np.log(used + 1)
        chosen = hot[cut:].sum()
        if chosen:
            named = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
            recall[0, layer - 1] = np.take_along_axis(hot[cut:], named, axis=1).sum() / chosen
            recall[1, layer - 1] = hot[cut:, np.argsort(-used, kind="stable")[:top_k]].sum() / chosen
        before = hot
    return recall


def lru_distances(ids: Integers, num_experts: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How often each LRU stack distance occurs: over all experts [L·E+1], and within each layer [L,E+1].

    The distance of an access is the number of other experts touched since, as seen at the start of its event; a cold
    one counts as the last entry. An LRU cache of C slots holds the C latest touched, so it hits where distance < C:
    one pass answers all capacities.
    """
    num_tokens, num_layers, top_k = ids.shape
    num_keys = num_layers * num_experts
    # One column more, for padding: it is written, never counted.
    last = np.full((num_layers, num_experts + 1), -1, np.int64)
    layers, columns = np.arange(num_layers)[:, None], np.arange(top_k)
    layer_of = np.repeat(np.arange(num_layers), top_k)
    earlier = layer_of[:, None] > layer_of[None, :]
    everywhere, by_layer = np.zeros(num_keys + 1, np.int64), np.zeros((num_layers, num_experts + 1), np.int64)
    for token in range(num_tokens):
        row = ids[token].astype(np.intp)
        real = row < num_experts
        seen = last[layers, row]
        known = last[:, :num_experts]
        inside = (known[:, None, :] > seen[:, :, None]).sum(axis=2)
        flat, valid = seen.ravel(), real.ravel()
        # Newer than the access before this token; then those that earlier layers of this token brought to the front.
        newer = num_keys - np.searchsorted(np.sort(known, axis=None), flat, side="right")
        newer += ((flat[None, :] <= flat[:, None]) & earlier & valid[None, :]).sum(axis=1)
        everywhere += np.bincount(np.where(flat < 0, num_keys, newer)[valid], minlength=num_keys + 1)
        np.add.at(by_layer, (layers.repeat(top_k, 1)[real], np.where(seen < 0, num_experts, inside)[real]), 1)
        last[layers, row] = (token * num_layers + layers) * top_k + columns
    return everywhere, by_layer


def demand_events(ids: Integers, num_experts: int) -> list[Event]:
    """One event per (token, layer), in order; a key never used again has the number of events as its next."""
    num_tokens, num_layers, top_k = ids.shape
    upcoming = np.full(ids.shape, num_tokens * num_layers, np.int64)
    for layer in range(num_layers):
        flat = ids[:, layer].ravel()
        order = np.argsort(flat, kind="stable")
        same = flat[order][1:] == flat[order][:-1]
        token, column = np.divmod(order, top_k)
        upcoming[token[:-1][same], layer, column[:-1][same]] = token[1:][same] * num_layers + layer
    keys = (ids + np.arange(num_layers)[:, None] * num_experts).reshape(-1, top_k).tolist()
    width = (ids < num_experts).sum(axis=2).ravel().tolist()  # padding comes last
    rows = zip(keys, upcoming.reshape(-1, top_k).tolist(), width, strict=True)
    return [(number, demand[:size], uses[:size]) for number, (demand, uses, size) in enumerate(rows)]


def belady_hits(events: Iterable[Event], capacity: int, num_keys: int) -> int:
    """Hits of a cold cache that admits every demand and evicts the furthest next use (ties do not change the count).

    An event that demands more than `capacity` keeps the nearest next uses among its own.
    """
    if capacity < 1:
        return 0
    resident = bytearray(num_keys)
    held, hits, heap = 0, 0, list[int]()  # of −(next use · num_keys + key): the furthest next use pops first
    for number, keys, upcoming in events:
        found = sum(resident[key] for key in keys)
        hits, held = hits + found, held + len(keys) - found
        for key in keys:
            resident[key] = 1
        # A key touched again left an older entry behind. Its next use is not after now, so it sinks below all valid
        # ones: as many residents outside the event as must leave are always nearer the top.
        for _ in range(min(held - capacity, held - len(keys))):
            resident[-heapq.heappop(heap) % num_keys] = 0
            held -= 1
        for key, use in zip(keys, upcoming, strict=True):
            heapq.heappush(heap, -(use * num_keys + key))
        while held > capacity:
            resident[-heapq.heappop(heap) % num_keys] = 0
            held -= 1
        if len(heap) > 16 * num_keys:
            heap = [entry for entry in heap if -entry // num_keys > number]
            heapq.heapify(heap)
    return hits


def cache_table(experts: Integers, request_start: Integers, num_experts: int) -> list[dict[str, int]]:
    """Hits of LRU and Belady at each of `CAPACITY_PERCENT` of all L·E experts, one shared cache or one a layer.

    Event-atomic: one event per (token, layer), judged against the residents at its start; every demand is admitted;
    the last column is the most recent. Slots are rounded down; a layer has an equal share, the first ones one more.
    """
    ids = check_routing(experts, request_start, num_experts)
    num_layers, num_keys = ids.shape[1], ids.shape[1] * num_experts
    events = demand_events(ids, num_experts)
    everywhere, by_layer = lru_distances(ids, num_experts)
    table = []
    for percent in CAPACITY_PERCENT:
        slots = num_keys * percent // 100
        share, left_over = divmod(slots, num_layers)
        rooms = [share + (layer < left_over) for layer in range(num_layers)]
        row = {"percent": percent, "slots": slots}
        row["lru_global"] = int(everywhere[:slots].sum())
        row["belady_global"] = belady_hits(events, slots, num_keys)
        row["lru_per_layer"] = sum(int(by_layer[layer, :room].sum()) for layer, room in enumerate(rooms))
        row["belady_per_layer"] = sum(belady_hits(events[i::num_layers], n, num_keys) for i, n in enumerate(rooms))
        table.append(row)
    return table


def _numbers(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def compute_stats(experts: Integers, request_start: Integers, num_experts: int) -> dict[str, Any]:
    """All statistics of this module as plain numbers; null where the trace is too short or too flat to tell."""
    ids = check_routing(experts, request_start, num_experts)
    overlaps = reuse(experts, request_start, num_experts)
    entropy = popularity_entropy(experts, request_start, num_experts)
    try:
        recall = next_layer_recall(experts, request_start, num_experts)
    except ValueError:
        recall = np.full((2, ids.shape[1] - 1), np.nan)
    return {
        "num_tokens": len(ids),
        "num_requests": len(request_start) - 1,
        "num_layers": ids.shape[1],
        "num_experts": num_experts,
        "top_k": ids.shape[2],
        "num_accesses": int((ids < num_experts).sum()),
        "reuse": dict(zip(map(str, LAGS), _numbers(overlaps.mean(axis=1)), strict=True)),
        "reuse_lag1_by_layer": _numbers(overlaps[0]),
        "entropy_bits": round(float(entropy.mean()), 6),
        "entropy_bits_by_layer": _numbers(entropy),
        "next_layer_recall": _numbers(recall.mean(axis=1) if recall.size else np.full(2, np.nan)),
        "next_layer_recall_by_layer": _numbers(recall[0]),
        "cache": cache_table(experts, request_start, num_experts),
    }


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    cells = [["–" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    print_columns(console, headings, cells, title=f"\n[italic]{title}[/italic]")


def print_stats(stats: dict[str, Any], console: Console) -> None:
    """The tables a person reads."""
    recall = [None, *stats["next_layer_recall_by_layer"]]
    by_layer = zip(stats["reuse_lag1_by_layer"], stats["entropy_bits_by_layer"], recall, strict=True)
    kinds = ("lru_global", "belady_global", "lru_per_layer", "belady_per_layer")
    rates = [[row[kind] / stats["num_accesses"] for kind in kinds] for row in stats["cache"]]
    cache = [[row["percent"], row["slots"], *rate] for row, rate in zip(stats["cache"], rates, strict=True)]
    console.print("{num_tokens} tokens, {num_requests} requests, {num_layers} layers, ".format_map(stats), end="")
    console.print("{top_k} of {num_experts} experts".format_map(stats))
    _print_table(console, "Reuse of a token's experts after … tokens", list(stats["reuse"]), [stats["reuse"].values()])
    means = [stats["entropy_bits"], *stats["next_layer_recall"]]
    _print_table(console, "Mean over layers", ["entropy (bits)", "next-layer recall@K", "from popularity"], [means])
    headings = ["layer", "reuse after 1 token", "entropy (bits)", "recall@K from the layer before"]
    _print_table(console, "Layers", headings, [[layer, *row] for layer, row in enumerate(by_layer)])
    headings = ["% of experts", "slots", *(kind.replace("_", " ") for kind in kinds)]
    _print_table(console, "Hit rate of a cold cache", headings, cache)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m traces stats`."""
    parser.add_argument("path", help="the trace (.safetensors)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--max-tokens", type=whole(1), help="look at the first so many tokens only")


def run(args: argparse.Namespace) -> int:
    """Print the statistics of a trace. Errors are ValueErrors."""
    trace = open_trace(args.path)
    tokens = trace.num_tokens if args.max_tokens is None else min(args.max_tokens, trace.num_tokens)
    if tokens < 1:
        raise ValueError(f"--max-tokens={args.max_tokens} leaves no token: needs at least 1, in a trace that has one")
    starts = np.asarray(trace.request_start)
    starts = np.append(starts[starts < tokens], tokens)
    check_pairs(trace.paths[0], 1, trace.num_experts, 2)
    with shown(f"counting {trace.name}"):
        stats = compute_stats(np.asarray(trace.experts[:tokens]), starts, trace.num_experts)
    print_stats(stats, console_for_tables())
    if args.json is not None:
        replace_text(args.json, json.dumps(stats, indent=1) + "\n")
        print(f"wrote {args.json}")
    return 0
