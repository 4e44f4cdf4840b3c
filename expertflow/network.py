"""The history network: a small recurrent net over routing, evaluated in integers.

Each routed expert adds its embedding to running sums: one over the forward's layers so far, one that forgets from
layer to layer, and four that forget from forward to forward at different rates. The rectified sum, mixed once more for
the target layer, says how likely each of its experts is. Linear recurrences make a step cost a few row sums; weights
and activations are integers whose products and sums stay exact in floating point (below 2^24 in float32, 2^53 in
float64), so that one forward, a block of forwards and another machine give the same scores to the bit.

Knows arrays; no traces, no files. Shape letters: L layers, E experts, K top-k, H and M widths of the two hidden layers,
R = len(SHIFTS) rates, F = 1 + len(OWN_SHIFTS) own features, D distances, N = L * E.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.units import NAT, SCORE_ONE

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Arrays = Mapping[str, npt.NDArray[np.generic]]

SHIFTS = (0, 1, 3, 5)
"""Rates of the sums over forwards: 1, 1/2, 1/8, 1/32 of the difference per forward."""
OWN_SHIFTS = (1, 3, 5)
"""Rates at which an expert's own use is remembered."""
STATE_BITS = 8
"""Fractional bits of the sums over forwards beyond those of the embeddings."""
RECENT = (11, 16)
"""What the sum over recent layers keeps from one layer to the next."""
TOP = 127
"""Largest activation."""
UNIT = SCORE_ONE
"""One, in the units of chances and of remembered use."""
LOG_STEPS = 1024
LOG_UNIT = 64
LOG_FLOOR = 0.01
SPAN = 14 * NAT
"""Log-odds beyond which chances do not differ."""

LOGS = np.array([round(LOG_UNIT * math.log(step / LOG_STEPS + LOG_FLOOR)) for step in range(LOG_STEPS + 1)], np.float64)
"""Logarithm of remembered use, floored, in 1/64 nat, by its upper 10 bits."""
CHANCES = np.array([round(UNIT / (1 + math.exp(-x / NAT))) for x in range(-SPAN, SPAN + 1)], np.int64)
"""Sigmoid of log-odds -14 … 14 nats, in 2^-16."""
CODE_GAP = UNIT // 2
CODES = (CHANCES - (CHANCES > CODE_GAP)).astype(np.uint16)
"""The same, so that 16 bits hold certainty: one less above a half, next to which there is none (`chances_of_codes`)."""
PREGATE_ODDS = np.array(
    [round(LOG_UNIT * math.log((step + 4) / (LOG_STEPS - step + 4))) for step in range(LOG_STEPS + 1)], np.float64
)
"""Log-odds of a pre-gate's chance, in 1/64 nat, by its upper 10 bits; the ends are held at 5.6 nats."""
SINGLE_THREADED = 1 << 18
"""Multiplications up to which OpenBLAS, which numpy brings, starts no threads."""
NUM_OWN = 1 + len(OWN_SHIFTS)
NUM_PREGATE = 2


def origin_of(arrays: Arrays, what: str) -> str:
    """What fitted arrays are, for messages: with their file, where they say it (`origin`)."""
    origin = getattr(arrays, "origin", None)
    return what if origin is None else f"{origin}: {what}"


def chance_of(odds: Floats) -> Ints:
    """Log-odds in 1/1024 nat → chances in 2^-16."""
    return CHANCES[np.clip(odds, -SPAN, SPAN).astype(np.intp) + SPAN]


def chances_of_codes(codes: npt.NDArray[np.uint16]) -> Ints:
    """Chances in 2^-16 by their `CODES`."""
    found = codes.astype(np.int64)
    found += codes > CODE_GAP
    return found


class HistoryNetwork:
    """Fitted weights, checked, in the types they are computed in.

    arrays: rank_weights [K] (weight of the best, second … expert of one token), tables int16 [N, (2 + R)·H] (columns:
    all layers, recent layers, one per rate), table_bits [1], place [L + 1, H] (0: before the first), prior [R, H],
    mix int8 [L, H, M], mix_scale [L, M] and mix_bias [D, L, M], out int8 [L, M, E], out_scale [L, E], bias [D, L, E],
    own [D, F, L, E], frequency [L, E] (use at the start of a request, 2^-16), forecast int8 [H, N], forecast_scale,
    forecast_bias [N], forecast_own [F, N], and where it was fitted with a pre-gate, pregate [D, L, 2].
    ValueError names what does not fit the model.
    """

    def __init__(self, arrays: Arrays, num_layers: int, num_experts: int) -> None:
        self.L, self.E = num_layers, num_experts
        self._origin = origin_of(arrays, "fitted network")
        tables = self._array(arrays, "tables", (num_layers * num_experts, None), 32767)
        mix = self._array(arrays, "mix", (num_layers, None, None), TOP)
        self.H, self.M = mix.shape[1:]
        rates = len(SHIFTS)
        if tables.shape[1] != (2 + rates) * self.H:
            raise self._misfit("tables", tables.shape, (num_layers * num_experts, (2 + rates) * self.H))
        bias = self._array(arrays, "bias", (None, num_layers, num_experts), 1 << 24)
        self.D = len(bias)
        L, E, N, H, M, D = num_layers, num_experts, num_layers * num_experts, self.H, self.M, self.D
        if H * TOP * TOP >= 1 << 24 or M * TOP * TOP >= 1 << 24 or H < 1 or M < 1 or D < 1:
            raise ValueError(
                f"{self._origin}: hidden widths {H} and {M}, or {D} distances, are 0 or too large to be summed exactly"
            )
        self.tables = tables.astype(np.float32)
        self.rank_weights = self._array(arrays, "rank_weights", (None,), 64, 0).astype(np.float32)
        if np.abs(tables).max(initial=0) * np.abs(self.rank_weights).sum() >= 1 << 24:
            raise ValueError(f"{self._origin}: rank_weights and tables are too large to be summed exactly")
        self.unit = float(1 << int(self._array(arrays, "table_bits", (1,), 16, 0)[0]))
        self.place = self._array(arrays, "place", (L + 1, H), 1 << 30)
        self.prior = self._array(arrays, "prior", (rates, H), 1 << 40)
        self.mix, self.mix_scale = mix.astype(np.float32), self._array(arrays, "mix_scale", (L, M), 1 << 28, 0)
        self.mix_bias = self._array(arrays, "mix_bias", (D, L, M), 1 << 23).astype(np.float32)
        self.out = self._array(arrays, "out", (L, M, E), TOP).astype(np.float32)
        self.out_scale, self.bias = self._array(arrays, "out_scale", (L, E), 1 << 28, 0), bias
        self.own_by_feature = self._array(arrays, "own", (D, NUM_OWN, L, E), 1 << 24)
        self.frequency = self._array(arrays, "frequency", (L, E), UNIT, 0)
        self.forecast_weights = self._array(arrays, "forecast", (H, N), TOP).astype(np.float32)
        self.forecast_scale = self._array(arrays, "forecast_scale", (N,), 1 << 28, 0)
        self.forecast_bias = self._array(arrays, "forecast_bias", (N,), 1 << 24)
        self.forecast_own = self._array(arrays, "forecast_own", (NUM_OWN, N), 1 << 24)
        self.pregate: Floats | None = None
        if "pregate" in arrays:
            self.pregate = self._array(arrays, "pregate", (D, L, NUM_PREGATE), 1 << 24)
        # By the first target: what distances 1, 2, … add at targets first, first + 1, …
        self.mix_bias_ahead = [_diagonal(self.mix_bias, first) for first in range(L)]
        self.bias_ahead = [_diagonal(self.bias, first) for first in range(L)]
        self.pregate_ahead = [] if self.pregate is None else [_diagonal(self.pregate, first) for first in range(L)]
        self.mean_weight = float(np.floor(self.rank_weights.mean()))

    def _misfit(self, name: str, found: tuple[int, ...], wanted: object) -> ValueError:
        return ValueError(
            f"{self._origin}: {name} has shape {found}, the trace needs {wanted}; "
            "fit one on a trace of the same model (python -m traces fit-predictor)"
        )

    def _array(
        self, arrays: Arrays, name: str, shape: tuple[int | None, ...], most: int, least: int | None = None
    ) -> Floats:
        """As float64, whole and within least … most; None: -most."""
        if name not in arrays:
            raise ValueError(f"{self._origin}: {name} is missing; write it with python -m traces fit-predictor")
        found = arrays[name]
        wanted = zip(shape, found.shape, strict=False)
        if found.ndim != len(shape) or any(want not in (None, have) for want, have in wanted):
            raise self._misfit(name, found.shape, tuple("any" if size is None else size for size in shape))
        if found.dtype.kind not in "iu":
            raise ValueError(
                f"{self._origin}: {name} must hold whole numbers, it holds {found.dtype}; "
                "write it with python -m traces fit-predictor"
            )
        values = found.astype(np.float64)
        least = -most if least is None else least
        if values.size and not (values.min() >= least and values.max() <= most):
            bound = f"{np.abs(values).max():.0f}, at most {most}"
            if least == 0 and values.max() <= most:
                bound = f"{values.min():.0f}, at least 0"
            raise ValueError(
                f"{self._origin}: {name} holds {bound} may be; write it with python -m traces fit-predictor"
            )
        return values

    # -- one layer's routing: embeddings [..., (2 + R)·H] -----------------------------------------------------------

    def embed(self, keys: Sequence[int], counts: Sequence[int] | None, num_tokens: int) -> Floats:
        """Embedding of a layer's demand `keys`: of one token, best first (counts None), or of the mean token."""
        rows = self.tables[np.array(keys, np.intp)]
        if counts is None and len(keys) == len(self.rank_weights):
            return (self.rank_weights @ rows).astype(np.float64)
        mass = np.ones(len(keys)) if counts is None else np.array(counts, np.float64)
        return np.floor(mass @ rows.astype(np.float64) * self.mean_weight / num_tokens)

    def embed_block(self, keys: Ints) -> Floats:
        """Embeddings [..., (2 + R)·H] of keys [..., K], each of one token, best first."""
        made: Singles = self.tables[keys[..., 0]] * self.rank_weights[0]
        for rank in range(1, keys.shape[-1]):
            made += self.tables[keys[..., rank]] * self.rank_weights[rank]
        return made.astype(np.float64)

    def forget_recent(self, recent: Floats) -> Floats:
        """What is kept of the sum over recent layers when the next layer's embedding comes."""
        return np.floor(recent * RECENT[0] / RECENT[1])

    def advance(self, states: Floats, total: Floats, num_steps: int = 1) -> Floats:
        """Sums over forwards [R, H] after one whose embeddings add up to total [R·H], as if it were num_steps alike."""
        new = total.reshape(len(SHIFTS), self.H) * (1 << STATE_BITS)
        return states + np.floor((new - states) * rates_of(SHIFTS, num_steps)[:, None] / UNIT)

    def remember(self, use: Floats, shares: Floats, num_steps: int = 1) -> Floats:
        """Remembered use [F - 1, L, E] in 2^-16 after a forward in which a share [L, E] of its tokens used each."""
        return use + np.floor((shares * UNIT - use) * rates_of(OWN_SHIFTS, num_steps)[:, None, None] / UNIT)

    def own_features(self, use: Floats, shares: Floats) -> Floats:
        """[F, L, E]: logarithms of remembered use, and the last forward's shares in 1/64."""
        logs = LOGS[np.floor(use * (LOG_STEPS / UNIT)).astype(np.intp)]
        return np.concatenate([logs, np.floor(shares * LOG_UNIT)[None]])

    def begin(self) -> Memory:
        """What is usual at the first token of a request."""
        use = np.repeat(self.frequency[None], len(OWN_SHIFTS), axis=0)
        return Memory(self.prior.copy(), use, np.zeros((self.L, self.E)))

    def run_block(self, memory: Memory, keys: Ints, starts: npt.NDArray[np.bool_]) -> tuple[Memory, Block]:
        """Forwards of one token each, one after the other: keys [n, L, K], best first; starts [n], a request begins."""
        num, H = len(keys), self.H
        flags = np.zeros((num, self.L * self.E))
        np.put_along_axis(flags, keys.reshape(num, -1), 1.0, axis=1)
        now = flags.reshape(num, self.L, self.E)
        made = self.embed_block(keys)
        totals = made[..., 2 * H :].sum(axis=1)
        bases: Floats = np.empty((num, H))
        after: Singles = np.empty((num, H), np.float32)
        features, features_after = [], []
        for row in range(num):
            if starts[row]:
                memory = self.begin()
            bases[row] = self.base(memory.states)
            features.append(self.own_features(memory.use, memory.shares))
            memory = self.after(memory, totals[row], now[row])
            after[row] = self.activate(self.base(memory.states) + self.place[0])
            features_after.append(self.own_features(memory.use, memory.shares))
        sums = made[..., :H].cumsum(axis=1) + bases[:, None]
        kept: Floats = np.zeros((num, H))
        for layer in range(self.L):
            kept = self.forget_recent(kept) + made[:, layer, H : 2 * H]
            sums[:, layer] += kept
        hidden = self.activate(sums + self.place[1:])
        return memory, Block(hidden, after, np.stack(features), np.stack(features_after))

    def after(self, memory: Memory, total: Floats, shares: Floats, num_steps: int = 1) -> Memory:
        """Memory after a forward whose embeddings add up to total [R·H] and whose tokens used shares [L, E]."""
        states = self.advance(memory.states, total, num_steps)
        return Memory(states, self.remember(memory.use, shares, num_steps), shares)

    # -- chances ------------------------------------------------------------------------------------------------------

    def activate(self, sums: Floats) -> Singles:
        """Rectified activations 0 … 127 of sums of embeddings [..., H]."""
        active = np.floor(sums / self.unit)
        np.minimum(np.maximum(active, 0, out=active), TOP, out=active)
        return active.astype(np.float32)

    def base(self, states: Floats) -> Floats:
        """[H]: what the sums over forwards add to every layer's sum."""
        total: Floats = states.sum(axis=-2)
        return np.floor(total / (1 << STATE_BITS))

    def odds(self, hidden: Singles, target: int, distance: int) -> Floats:
        """Log-odds [..., E] of the target layer's experts without their own features; hidden [..., H]."""
        mixed = _product(hidden, self.mix[target]) + self.mix_bias[distance - 1, target]
        active = np.clip(np.floor(mixed * self.mix_scale[target] / UNIT), 0, TOP).astype(np.float32)
        odds: Floats = np.floor(_product(active, self.out[target]) * self.out_scale[target] / UNIT)
        odds += self.bias[distance - 1, target]
        return odds

    def odds_ahead(self, hidden: Singles, first: int, reach: int) -> Floats:
        """`odds` at targets first … first + reach - 1, distances 1 … reach, at once: [reach, E]; hidden [H]."""
        targets = slice(first, first + reach)
        mixed = np.matmul(hidden, self.mix[targets])
        mixed += self.mix_bias_ahead[first][:reach]
        active = np.floor(mixed * self.mix_scale[targets] / UNIT)
        np.minimum(np.maximum(active, 0, out=active), TOP, out=active)
        odds: Floats = np.matmul(active.astype(np.float32)[:, None], self.out[targets])[:, 0] * self.out_scale[targets]
        odds /= UNIT
        np.floor(odds, out=odds)
        odds += self.bias_ahead[first][:reach]
        return odds

    def own_odds(self, features: Floats, distance: int) -> Floats:
        """Log-odds [..., L, E] from the experts' own features [..., F, L, E]."""
        odds: Floats = (features * self.own_by_feature[distance - 1]).sum(axis=-3)
        return np.floor(odds / LOG_UNIT)

    def pregate_odds(self, chance: Floats, weights: Floats) -> Floats:
        """Log-odds [..., E] from a pre-gate's chances [..., E]; weights [2] or [2, ..., 1], of log-odds and chance."""
        steps: Floats = np.clip(np.floor(chance * LOG_STEPS), 0, LOG_STEPS)
        odds: Floats = PREGATE_ODDS[steps.astype(np.intp)] * weights[0] + steps * weights[1]
        return np.floor(odds / LOG_UNIT)

    def forecast(self, hidden: Singles, features: Floats) -> Ints:
        """Chances [N] in 2^-16 of use in the next forwards, nearer ones weighing more; hidden [H]."""
        odds = np.floor((hidden @ self.forecast_weights) * self.forecast_scale / UNIT) + self.forecast_bias
        own = (features.reshape(NUM_OWN, -1) * self.forecast_own).sum(axis=0)
        return chance_of(odds + np.floor(own / LOG_UNIT))


@dataclass
class Memory:
    """What is kept from forward to forward: sums [R, H], remembered use [F - 1, L, E], the last one's shares [L, E]."""

    states: Floats
    use: Floats
    shares: Floats


@dataclass
class Block:
    """Forwards of one token each: activations after each layer [n, L, H] and after the forward [n, H], own features
    [n, F, L, E] before and after it."""

    hidden: Singles
    after: Singles
    features: Floats
    features_after: Floats


def _product(values: Singles, weights: Singles) -> Singles:
    """values [..., A] @ weights [A, B], a few rows of [n, A] at once: for more the linear algebra would start threads,
    which gain nothing here, and beside other busy processes wait for each other ten times as long."""
    rows = max(SINGLE_THREADED // weights.size, 1)
    if values.ndim != 2 or len(values) <= rows:
        return values @ weights
    found: Singles = np.empty((len(values), weights.shape[1]), np.float32)
    for start in range(0, len(values), rows):
        np.matmul(values[start : start + rows], weights, out=found[start : start + rows])
    return found


def _diagonal(values: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
    """Rows [d, first + d] of values [D, L, ...], as far as there are any."""
    reach = min(len(values), values.shape[1] - first)
    steps = np.arange(reach)
    return np.ascontiguousarray(values[steps, first + steps])


@lru_cache(maxsize=1024)
def rates_of(shifts: tuple[int, ...], num_steps: int) -> Floats:
    """How far a sum moves in num_steps steps, in 2^-16."""
    return np.array([float(round(UNIT * (1 - (1 - 2.0**-shift) ** num_steps))) for shift in shifts])


def compiled_functions() -> Any:
    """The compiled functions, where numba is installed and fits."""
    try:
        return importlib.import_module("expertflow.compiled")
    except ImportError:
        return None
