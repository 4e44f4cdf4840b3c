"""Was routing learned, and did it not collapse? A twin's recording against the same twin with new routers.

The control keeps everything but the routers, which are drawn anew: what a figure of the control shows is owed to the
residual stream and the text, not to routing. Reads full traces of `traces.twin.record`, and runs the control itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from traces.container import fault
from traces.files import replace_text
from traces.reader import Trace, open_trace
from traces.recorder.lookahead import KINDS, Recall
from traces.recorder.recording import Rows
from traces.stats import activation, next_layer_recall, popularity_entropy, reuse
from traces.tables import print_columns
from traces.twin import checkpoint
from traces.twin.model import Twin, draw
from traces.twin.record import make_recording, paths_of
from traces.twin.train import open_device

LAGS = (1, 8)
_CONTROL_SEED = 7919
_BLOCK_ROWS = 256
_EVEN_SHARE = 0.6


@dataclass(frozen=True)
class Sample:
    """Routing of some requests: experts [T,L,K], request_start [R+1], recall of each pre-gate by distance, nats."""

    experts: npt.NDArray[Any]
    request_start: npt.NDArray[np.int64]
    recall: dict[str, list[float]]
    loss: float


def pregate_recall(trace: Trace, tokens: int) -> list[float]:
    """Recall@K at 1 … D layers ahead, over the first rows: of what layer l+d chose, the share among its K best."""
    assert trace.lookahead is not None
    distances = trace.lookahead.shape[2]
    right, chosen = np.zeros(distances, np.int64), np.zeros(distances, np.int64)
    for row in range(0, tokens, _BLOCK_ROWS):
        stop = min(row + _BLOCK_ROWS, tokens)
        scores, experts = np.asarray(trace.lookahead[row:stop]), np.asarray(trace.experts[row:stop]).astype(np.int64)
        for ahead in range(1, distances + 1):
            named = np.argsort(-scores[:, :-ahead, ahead - 1].astype(np.float32), axis=-1, kind="stable")
            actual = experts[:, ahead:]
            found = named[..., None, : trace.top_k] == actual[..., None]
            right[ahead - 1] += int(found.sum())
            chosen[ahead - 1] += actual.size
    return [float(value) for value in right / np.maximum(chosen, 1)]


def describe(sample: Sample, num_experts: int) -> dict[str, Any]:
    """The figures of one side, as plain numbers."""
    entropy = popularity_entropy(sample.experts, sample.request_start, num_experts)
    overlaps = reuse(sample.experts, sample.request_start, num_experts, LAGS)
    transition = next_layer_recall(sample.experts, sample.request_start, num_experts).mean(axis=1)
    highest = activation(sample.experts, sample.request_start, num_experts).max(axis=1)
    even = sample.experts.shape[2] / num_experts
    return {
        "loss": _round(sample.loss),
        "entropy_bits_by_layer": [_round(value) for value in entropy],
        "entropy_bits": {"min": _round(entropy.min()), "mean": _round(entropy.mean()), "max": _round(entropy.max())},
        "highest_load": _round(highest.max() / even),
        "reuse": {str(lag): _round(row.mean()) for lag, row in zip(LAGS, overlaps, strict=True)},
        "reuse_by_layer": [_round(value) for value in overlaps[0]],
        "next_layer_recall": {"transition": _round(transition[0]), "popularity": _round(transition[1])},
        "pregate_recall": {kind: [_round(value) for value in values] for kind, values in sample.recall.items()},
    }


def _round(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


def check(folder: Path, tokens: int, device: str, console: Console) -> dict[str, Any]:
    """Compare, print one table, write `check.json` beside the traces; what it holds.

    Looks at the first `tokens` rows, rounded to whole requests, of the eval split. even: no layer's popularity entropy
    is below 60 % of log2 E. learned: the text is predicted better with the routers that were trained than with new
    ones.
    """
    settings = checkpoint.read_settings(folder)
    traces = {kind: _open(path) for kind, path in paths_of(folder, settings.config.name, "eval").items()}
    first = traces[KINDS[0]]
    _check_same(traces, settings)
    requests = int(np.searchsorted(first.request_start, tokens, side="left"))
    requests = min(max(requests, 2), first.num_requests)
    if requests < 2:
        raise ValueError("the eval recording has one request, two are needed; record with more --eval-tokens")
    starts = first.request_start[: requests + 1]
    stop = int(starts[-1])
    model, state = checkpoint.read_model(folder, settings)
    model.to(open_device(device))
    if first.header.get("training_steps") != str(state["step"]):
        problem = f"was recorded after {first.header.get('training_steps')} steps, the checkpoint has {state['step']}"
        raise fault(first.paths[0], "header", problem, "record it again")
    assert first.token_ids is not None
    ids = np.asarray(first.token_ids[:stop]).astype(np.int64)
    recalls = {kind: pregate_recall(trace, stop) for kind, trace in traces.items()}
    again = run_again(model, ids, starts, len(recalls[KINDS[0]]))
    trained = Sample(np.asarray(first.experts[:stop]), starts, recalls, again.loss)
    renew_routers(model)
    control = run_again(model, ids, starts, len(recalls[KINDS[0]]))
    num_experts = settings.config.num_experts
    sides = {"trained": describe(trained, num_experts), "control": describe(control, num_experts)}
    most = math.log2(num_experts)
    result = {
        "twin": settings.config.name,
        "steps": state["step"],
        "tokens": stop,
        "requests": requests,
        "max_entropy_bits": _round(most),
        "chance": _round(settings.config.top_k / num_experts),
        **sides,
        "even": sides["trained"]["entropy_bits"]["min"] >= _EVEN_SHARE * most,
        "learned": trained.loss < control.loss,
    }
    print_table(result, console)
    replace_text(folder / "check.json", json.dumps(result, indent=1) + "\n")
    return result


def _open(path: Path) -> Trace:
    trace = open_trace(path)
    if trace.lookahead is None or trace.token_ids is None:
        raise fault(path, "lookahead", "or token_ids is missing", "record it again: python -m traces.twin record")
    return trace


def _check_same(traces: dict[str, Trace], settings: checkpoint.Settings) -> None:
    first, config = traces[KINDS[0]], settings.config
    for trace in traces.values():
        found = (trace.num_layers, trace.num_experts, trace.top_k, trace.num_tokens)
        if found != (config.num_layers, config.num_experts, config.top_k, first.num_tokens):
            raise fault(trace.paths[0], "header", "is not that of this twin's recording", "record it again")
        assert trace.token_ids is not None
        ids = np.asarray(trace.token_ids[:])
        if ids.max() >= config.vocab_size:
            raise fault(trace.paths[0], "token_ids", f"holds {ids.max()}, past the vocabulary", "record it again")
    if int(np.diff(first.request_start).max()) > config.context:
        raise fault(first.paths[0], "request_start", "has a request longer than the context", "record it again")


def run_again(model: Twin, ids: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], distances: int) -> Sample:
    """Run requests through the model, each in one forward, teacher-forced; its routing and its loss in nats a token."""
    forwards, recall = list[Rows](), Recall(model.config.num_layers, distances)
    experts, losses = [], []
    device = next(model.parameters()).device
    with torch.no_grad(), make_recording(model, distances, forwards.append):
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            tokens = torch.from_numpy(ids[start:stop]).to(device)
            logits = model(tokens[None])[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").cpu())
            rows = forwards.pop()
            recall.add(rows.hits, rows.arrays["experts"])
            experts.append(rows.arrays["experts"])
    return Sample(np.concatenate(experts), starts, recall.by_distance(), float(torch.cat(losses).mean()))


def renew_routers(model: Twin) -> None:
    """Give all routers first values again, others than those they began with."""
    generator = torch.Generator().manual_seed(_CONTROL_SEED)
    for name, parameter in model.named_parameters():
        if ".router." in name and parameter.ndim > 1:
            draw(name, parameter, len(model.layers), generator)
        elif ".router." in name:
            torch.nn.init.zeros_(parameter)


def print_table(result: dict[str, Any], console: Console) -> None:
    """The one table that a person reads."""
    sides = [result["trained"], result["control"]]
    title = "{twin} after {steps} steps, {tokens} held-out tokens of {requests} requests".format_map(result)
    rows: list[list[str]] = []

    def row(name: str, *path: str | int) -> None:
        values = list(sides)
        for key in path:
            values = [value[key] for value in values]
        rows.append([name, *("–" if value is None else f"{value:.3f}" for value in values)])

    row("loss (nats a token)", "loss")
    for which in ("min", "mean"):
        row(f"entropy of a layer, {which} (bits of {result['max_entropy_bits']:.2f})", "entropy_bits", which)
    row("highest load (1 = even)", "highest_load")
    for lag in LAGS:
        row(f"reuse after {lag} token{'s' if lag > 1 else ''}", "reuse", str(lag))
    row("next-layer recall@K, transition table", "next_layer_recall", "transition")
    row("next-layer recall@K, popularity", "next_layer_recall", "popularity")
    for kind in KINDS:
        for ahead in range(len(sides[0]["pregate_recall"][kind])):
            row(f"pre-gate recall@K, {kind}, d={ahead + 1}", "pregate_recall", kind, ahead)
    print_columns(console, ["", "trained", "new routers"], rows, title=title)
    console.print(f"chance: {result['chance']:.3f}; even: {_word(result['even'])}; learned: {_word(result['learned'])}")


def _word(value: bool) -> str:
    return "yes" if value else "no"
