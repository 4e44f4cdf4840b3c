"""Training the history network (`expertflow.network`) in floats with torch, and rounding it to the integers it runs in.

One loss for two uses: which experts each later layer will choose, at all distances, and how soon each expert will be
used again. Where a trace has a pre-gate, training begins at the calibrated pre-gate, and what the history adds is a
correction of it. Letters as in `expertflow.network`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow.network import (
    LOG_STEPS,
    NUM_OWN,
    NUM_PREGATE,
    OWN_SHIFTS,
    RECENT,
    SHIFTS,
    STATE_BITS,
    TOP,
    UNIT,
)
from expertflow.units import NAT
from traces.fitting.dataset import MAX_ROWS, WEIGHT_SUM, Dataset, log_use, read_dataset, read_pregate
from traces.fitting.training import HybridOptions, Training
from traces.reader import Trace

_RECENT_KEPT = RECENT[0] / RECENT[1]
_PEAK_SHARE = 99.9
_CALIBRATION_ROWS = 3000


class FloatNetwork(nn.Module):
    """The network in floating point, before its weights are rounded to integers."""

    def __init__(self, num_layers: int, num_experts: int, training: Training, pregate: bool) -> None:
        super().__init__()
        L, E, H, M, D = num_layers, num_experts, training.hidden, training.mixed, training.distances
        self.L, self.E, self.D = L, E, D

        def drawn(scale: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * scale)

        self.layers, self.recent = drawn(0.1, L, E, H), drawn(0.1, L, E, H)
        self.rates = drawn(0.05, len(SHIFTS), L * E, H)
        self.place = nn.Parameter(torch.zeros(L + 1, H))
        self.mix, self.mix_bias = drawn(H**-0.5, L, H, M), nn.Parameter(torch.zeros(D, L, M))
        self.out, self.bias = drawn(0.05, L, M, E), nn.Parameter(torch.full((D, L, E), -2.0))
        self.own = nn.Parameter(torch.zeros(D, L, E, NUM_OWN))
        self.forecast, self.forecast_bias = drawn(0.02, H, L * E), nn.Parameter(torch.full((L * E,), -2.0))
        self.forecast_own = nn.Parameter(torch.zeros(L * E, NUM_OWN))
        self.pregate = nn.Parameter(torch.zeros(D, L, NUM_PREGATE)) if pregate else None
        kept = torch.tensor([[_RECENT_KEPT ** (i - j) if j <= i else 0.0 for j in range(L)] for i in range(L)])
        self.register_buffer("kept", kept)

    def sums(self, routing: Tensor, states: Tensor) -> Tensor:
        """Sums [n, L, H] after each layer of routing [n, L, E], on states [R, n, N]."""
        layers = torch.einsum("nle,leh->nlh", routing, self.layers).cumsum(1)
        recent = torch.einsum("ij,njh->nih", self.kept, torch.einsum("nle,leh->nlh", routing, self.recent))
        return self.base(states)[:, None] + layers + recent + self.place[1:]

    def base(self, states: Tensor) -> Tensor:
        """[n, H]."""
        return torch.einsum("rnk,rkh->nh", states, self.rates)

    def odds(self, hidden: Tensor, distance: int, targets: slice, own: Tensor, pregate: Tensor | None) -> Tensor:
        """Log-odds [n, l, E] at the target layers; hidden [n, l, H], own [n, l, E, F], pregate [n, l, E]."""
        d = distance - 1
        mixed = torch.relu(torch.einsum("nlh,lhm->nlm", hidden, self.mix[targets]) + self.mix_bias[d, targets])
        odds = torch.einsum("nlm,lme->nle", mixed, self.out[targets]) + self.bias[d, targets]
        odds = odds + (own * self.own[d, targets]).sum(-1)
        if pregate is not None and self.pregate is not None:
            weights = self.pregate[d, targets]
            odds = odds + pregate_logits(pregate) * weights[:, 0, None] + pregate * weights[:, 1, None]
        return odds

    def soon(self, hidden: Tensor, own: Tensor) -> Tensor:
        """Log-odds [n, L, E] of use in the next forwards; hidden [n, H], own [n, L, E, F] after the row."""
        flat = own.reshape(len(own), -1, NUM_OWN)
        odds = hidden @ self.forecast + self.forecast_bias + (flat * self.forecast_own).sum(-1)
        return odds.view(-1, self.L, self.E)


def pregate_logits(chance: Tensor) -> Tensor:
    """Log-odds of a pre-gate's chances, as `expertflow.network.PREGATE_ODDS` has them."""
    return torch.log((chance * LOG_STEPS + 4) / (LOG_STEPS * (1 - chance) + 4))


def calibrate_pregate(net: FloatNetwork, data: Dataset, pregate: npt.NDArray[np.float16], seed: int) -> None:
    """Set the weights of the pre-gate, and the biases, by logistic regression for each distance and target layer.

    Without this they start near zero and stay there: the history is learned first, and no error is left for them.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped, import-not-found, unused-ignore]

    assert net.pregate is not None
    drawn = np.random.default_rng(seed).permutation(data.num_rows)[:_CALIBRATION_ROWS]
    rows = np.sort(drawn)
    for distance in range(1, net.D + 1):
        for target in range(distance, net.L):
            chosen = data.chosen[rows, target].ravel()
            if chosen.min() == chosen.max():
                continue
            chance = torch.from_numpy(pregate[rows, target - distance, distance - 1].astype(np.float32)).flatten()
            found = LogisticRegression(max_iter=300).fit(torch.stack([pregate_logits(chance), chance], 1), chosen)
            with torch.no_grad():
                net.pregate[distance - 1, target] = torch.from_numpy(found.coef_[0])
                net.bias[distance - 1, target] = float(found.intercept_[0])


class Batch:
    """Some rows of a dataset, as tensors."""

    def __init__(self, data: Dataset, rows: npt.NDArray[np.int64], pregate: npt.NDArray[np.float16] | None) -> None:
        self.routing = torch.from_numpy(data.routing[rows]).view(len(rows), *data.chosen.shape[1:])
        self.chosen = torch.from_numpy(data.chosen[rows])
        self.states = torch.from_numpy(data.sums[:, rows])
        rates = torch.tensor([2.0**-shift for shift in SHIFTS])[:, None, None]
        self.after = self.states + (self.routing.flatten(1) - self.states) * rates
        use = data.use[rows]
        own_rates = np.array([2.0**-shift for shift in OWN_SHIFTS], np.float32)
        used = use + (data.chosen[rows][..., None] - use) * own_rates
        self.own = _own(use, data.shares[rows])
        self.own_after = _own(used, data.chosen[rows])
        self.last = torch.from_numpy(data.last[rows])
        following = np.minimum(rows + 1, data.num_rows - 1)
        self.next_chosen = torch.from_numpy(data.chosen[following])
        self.future = torch.from_numpy(data.future[rows])
        self.pregate = None if pregate is None else torch.from_numpy(pregate[rows].astype(np.float32))


def _own(use: npt.NDArray[np.float32], shares: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.concatenate([log_use(use), shares[..., None]], axis=-1).astype(np.float32))


def losses(net: FloatNetwork, batch: Batch, distances: list[int], dropout: float) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy of the experts chosen, that of the experts used soon), in nats an expert."""
    hidden = torch.relu(net.sums(batch.routing, batch.states))
    after = torch.relu(net.base(batch.after) + net.place[0])
    if dropout:
        hidden, after = F.dropout(hidden, dropout), F.dropout(after, dropout)
    inside = ~batch.last
    total = hidden.new_zeros(())
    for distance in distances:
        ahead = slice(distance, net.L)
        pregate = None if batch.pregate is None else batch.pregate[:, : net.L - distance, distance - 1]
        odds = net.odds(hidden[:, : net.L - distance], distance, ahead, batch.own[:, ahead], pregate)
        loss = F.binary_cross_entropy_with_logits(odds, batch.chosen[:, ahead], reduction="sum")
        # From the last layer on to the next forward, within a request. No pre-gate reaches there.
        target = slice(distance - 1, distance)
        odds = net.odds(after[inside, None], distance, target, batch.own_after[inside, target], None)
        loss = loss + F.binary_cross_entropy_with_logits(odds, batch.next_chosen[inside, target], reduction="sum")
        total = total + loss / (len(hidden) * net.E * (net.L - distance + 1))
    odds = net.soon(after, batch.own_after)[inside]
    return total / len(distances), F.binary_cross_entropy_with_logits(odds, batch.future[inside])


def train(
    data: Dataset, training: Training, pregate: npt.NDArray[np.float16] | None, report: Callable[[str], None]
) -> FloatNetwork:
    """Fit a network to all rows."""
    torch.manual_seed(training.seed)
    num_layers, num_experts = data.chosen.shape[1:]
    net = FloatNetwork(num_layers, num_experts, training, pregate is not None)
    draws = np.random.default_rng(training.seed)
    steps = max(data.num_rows // training.batch, 1)
    if pregate is not None:
        calibrate_pregate(net, data, pregate, training.seed)
    free = [parameter for parameter in (net.pregate,) if parameter is not None]
    decayed = [parameter for parameter in net.parameters() if parameter is not net.pregate]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=steps * training.epochs)
    began = time.monotonic()
    for epoch in range(training.epochs):
        order = draws.permutation(data.num_rows)
        seen: list[tuple[float, float]] = []
        for step in range(steps):
            rows = np.sort(order[step * training.batch : (step + 1) * training.batch])
            distances = draws.permutation(training.distances)[: training.distances_a_step] + 1
            chosen, soon = losses(net, Batch(data, rows, pregate), distances.tolist(), training.dropout)
            optimizer.zero_grad()
            (chosen + 0.5 * soon).backward()
            optimizer.step()
            schedule.step()
            seen.append((float(chosen.detach()), float(soon.detach())))
        mean = np.mean(seen, axis=0)
        report(
            f"pass {epoch + 1} of {training.epochs}: loss {mean[0]:.4f}, forecast {mean[1]:.4f}, "
            f"{(time.monotonic() - began) / 60:.1f} min"
        )
    return net.eval()


def to_integers(net: FloatNetwork, data: Dataset) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `HistoryNetwork`, scaled so that activations on `data` fill 0 … 127."""
    rows = np.linspace(0, data.num_rows - 1, min(data.num_rows, 2048)).astype(np.int64)
    batch = Batch(data, rows, None)
    with torch.no_grad():
        hidden = torch.relu(net.sums(batch.routing, batch.states)).numpy()
        after = torch.relu(net.base(batch.after) + net.place[0]).numpy()
        peaks = _peaks(np.concatenate([hidden.reshape(-1, hidden.shape[-1]), after]))
        mixed_peaks = np.stack(
            [
                np.max(
                    [
                        _peaks(
                            torch.relu(
                                torch.from_numpy(hidden[:, max(layer - 1 - gap, 0)]) @ net.mix[layer]
                                + net.mix_bias[gap, layer]
                            ).numpy()
                        )
                        for gap in (0, net.D - 1)
                    ],
                    axis=0,
                )
                for layer in range(net.L)
            ]
        )
    values = {name: parameter.detach().double().numpy() for name, parameter in net.named_parameters()}
    L, E, H = values["layers"].shape
    arrays: dict[str, npt.NDArray[Any]] = {"rank_weights": data.weights.astype(np.int32)}
    fill = TOP / peaks
    tables = np.concatenate(
        [values["layers"].reshape(L * E, H), values["recent"].reshape(L * E, H), *values["rates"]], axis=1
    )
    scaled = tables * np.tile(fill, 2 + len(SHIFTS)) / (WEIGHT_SUM / 2)
    bits = int(np.clip(np.floor(np.log2(32767 / np.abs(scaled).max())), 0, 16))
    unit = float(1 << bits)
    arrays["tables"] = np.rint(scaled * unit).astype(np.int16)
    arrays["table_bits"] = np.array([bits], np.int32)
    # Activations are rounded down: half a unit makes that rounding to the nearest.
    arrays["place"] = np.rint((values["place"] * fill + 0.5) * unit).astype(np.int32)
    prior = np.stack([data.mean_routing.reshape(-1).astype(np.float64) @ rate for rate in values["rates"]])
    arrays["prior"] = np.rint(prior * fill * unit * (1 << STATE_BITS)).astype(np.int64)
    mix = values["mix"] / fill[None, :, None]
    steps = np.maximum(np.abs(mix).max(axis=1), 1e-9) / TOP
    arrays["mix"] = np.rint(mix / steps[:, None]).astype(np.int8)
    mixed_fill = TOP / mixed_peaks
    arrays["mix_scale"] = np.rint(UNIT * steps * mixed_fill).astype(np.int64)
    arrays["mix_bias"] = np.rint((values["mix_bias"] + 0.5 / mixed_fill) / steps).astype(np.int32)
    arrays["out"], arrays["out_scale"] = _rows_to_bytes(values["out"] / mixed_fill[:, :, None], axis=1)
    arrays["bias"] = np.rint(NAT * values["bias"]).astype(np.int32)
    arrays["own"] = np.rint(NAT * values["own"]).astype(np.int32).transpose(0, 3, 1, 2).copy()
    arrays["frequency"] = np.rint(UNIT * data.frequency).astype(np.int32)
    arrays["forecast"], arrays["forecast_scale"] = _rows_to_bytes(values["forecast"] / fill[:, None], axis=0)
    arrays["forecast_bias"] = np.rint(NAT * values["forecast_bias"]).astype(np.int32)
    arrays["forecast_own"] = np.rint(NAT * values["forecast_own"]).astype(np.int32).T.copy()
    if "pregate" in values:
        arrays["pregate"] = np.rint(values["pregate"] * [NAT, 64]).astype(np.int32)
    return arrays


def _peaks(active: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The value [H] that nearly all activations [n, H] stay below."""
    return np.maximum(np.percentile(active, _PEAK_SHARE, axis=0), 1e-3).astype(np.float64)


def _rows_to_bytes(weights: npt.NDArray[np.float64], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Weights to log-odds as bytes, and what turns sums of them into 1/1024 nat, in 2^-16; one scale per expert."""
    steps = np.maximum(np.abs(weights).max(axis=axis), 1e-9) / TOP
    return np.rint(weights / np.expand_dims(steps, axis)).astype(np.int8), np.rint(UNIT * NAT * steps).astype(np.int64)


def fit_hybrid(
    trace: Trace, report: Callable[[str], None], options: HybridOptions
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Fit a history network, corrected towards the pre-gate where the trace has one; its arrays and header.

    ValueError where the trace has nothing to look ahead to, or no whole request.
    """
    if trace.num_layers < 2:
        raise ValueError(f"{trace.name} has one MoE layer: there is nothing to look ahead to")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not 0 <= options.dropout < 100:
        raise ValueError(f"dropout={options.dropout} must be a share in percent, 0 … 99")
    requests = int(np.searchsorted(trace.request_start, min(options.rows, MAX_ROWS), side="right")) - 1
    if requests < 1:
        raise ValueError(f"rows={options.rows} hold no whole request of {trace.name}; give more")
    training = options.training(trace.num_layers)
    data = read_dataset(trace, range(requests), training.discount)
    pregate = read_pregate(trace, 0, data.num_rows)
    if pregate is not None and pregate.shape[2] < training.distances:
        training = dataclasses.replace(training, distances=pregate.shape[2])
        training = dataclasses.replace(training, distances_a_step=min(training.distances_a_step, training.distances))
    report(f"{data.num_rows} rows of {requests} requests, {'with' if pregate is not None else 'without'} a pre-gate")
    arrays = to_integers(train(data, training, pregate, report), data)
    header = {"rows": str(data.num_rows), **{key: str(value) for key, value in dataclasses.asdict(training).items()}}
    return arrays, header
