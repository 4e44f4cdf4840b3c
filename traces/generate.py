"""Routing made up from a small parameter file, with the statistics of its source (`traces.fitting.generator`).

The model. At token t of a request, expert e of layer l scores

    bias[l,e] + topic_scale[l] · bent(√(1−w) · topic[l,e] + √w · wander_t[l,e])    what it is about, slowly moving
              + drift_scale[l] · drift_t[l,e]                                       the subject of a few tokens
              + repeat[l] · (e was chosen by token t−1)
              + Σ over f chosen in layer l−1 of cross[l,f,e]                        one layer suggests the next
              + a standard normal times NOISE

and the K best are chosen, best first. Topic, wander and drift have one structure, `z · loadings + residual · x`, with
Q latent factors z shared by all layers and x of each expert alone; z and x are standard normal, but for the topics' z,
which are those of the source's requests. Wander and drift forget half of themselves in `half_lives` tokens. A normal
offset y of spread σ is bent to y − skew/2 · (y²/σ − σ): experts are avoided harder than they are sought. Gate weights
come from quantiles of log w_k − log w_{k+1} by rank.

Randomness is one PCG64 stream used through `random` and `standard_normal` alone: same seed, same bytes. Knows
nothing of policies; holds the state of at most GROUP requests whatever the length.

Shapes: T tokens, L layers, K top-k, E experts, R requests, M topics, Q factors, N = L·E.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from traces.flags import whole
from traces.format import About, write_trace
from traces.messages import fault
from traces.parameters import GROUP, REMEDY, Arrays, check_params
from traces.parameters import load_params as load_params
from traces.processes.progress import shown
from traces.shipped import shipped

SHIPPED = Path(__file__).parent / "data" / "gpt-oss-20b.params.safetensors"
"""Where it is in a checkout; an installed package has it packed: `shipped_params`."""
NOISE = 1.28  # spread of a standard Gumbel: scores stay on the scale of log-odds
WANDER_STEP = 8  # tokens for which wander stands still: its half-life is far longer

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Model:
    """Parameters made ready to compute with: float64, layers and experts in one axis of N where that helps."""

    params: dict[str, Floats]
    loadings: Floats  # [Q,N]
    residual: Floats  # [N]
    spread: Floats  # [N], of `mix`
    cross: Floats  # [L,E+1,E]; the last row stands for padding and suggests nothing
    topic_scale: Floats  # [N], as the next
    drift_scale: Floats
    top_k: int
    row_size: Floats | None  # [L,K+1] cumulative; None where every row has K experts

    def mix(self, latent: Floats) -> Floats:
        """Latent factors and own parts [R, Q+N] as offsets [R,N]."""
        factors = len(self.loadings)
        return latent[:, :factors] @ self.loadings + self.residual * latent[:, factors:]

    def subject(self, topic: Floats, wander: Floats) -> Floats:
        """Bias and what topic and wander (both from `mix`) add to it, [R,N]."""
        share, skew = self.params["wander_share"], self.params["skew"]
        offset = np.sqrt(1 - share) * topic + np.sqrt(share) * wander
        bent = offset - skew / 2 * (offset * offset / self.spread - self.spread)
        return self.params["bias"].ravel() + self.topic_scale * bent


def _prepare(arrays: Arrays) -> _Model:
    check_params(arrays)
    params = {name: array.astype(np.float64) for name, array in arrays.items()}
    num_layers, num_experts = params["bias"].shape
    cross = np.zeros((num_layers, num_experts + 1, num_experts))
    cross[:, :-1] = params["cross"]
    loadings = params["loadings"].reshape(num_layers * num_experts, -1).T.copy()
    residual = params["residual"].ravel()
    sizes = params["row_size"]
    return _Model(
        params=params,
        loadings=loadings,
        residual=residual,
        spread=np.maximum(np.sqrt((loadings**2).sum(axis=0) + residual**2), 1e-9),
        cross=cross,
        topic_scale=params["topic_scale"].repeat(num_experts),
        drift_scale=params["drift_scale"].repeat(num_experts),
        top_k=sizes.shape[1] - 1,
        row_size=None if (sizes[:, -1] >= 1).all() else sizes.cumsum(axis=1) / sizes.sum(axis=1, keepdims=True),
    )


def _decay(latent: Floats, tokens: float, half_life: float, rng: np.random.Generator) -> Floats:
    """The latent state after so many `tokens`: it forgets part of its value and stays standard normal."""
    kept = 0.5 ** (tokens / half_life)
    later: Floats = kept * latent + np.sqrt(1 - kept * kept) * rng.standard_normal(latent.shape)
    return later


def _draw_topics(model: _Model, lengths: Integers, rng: np.random.Generator) -> Integers:
    """A topic for each request; `lengths` [R] must be in falling order.

    The requests of the source are laid on a line, longest first, each as long as its share of the tokens; so are the
    new requests, and each takes the topic at a random point of its stretch. With the lengths of the source each topic
    is drawn once; with equal lengths the topics are a sample spread over the tokens of the source.
    """
    of_source = model.params["topic_length"]
    order = np.argsort(-of_source, kind="stable")
    share = lengths / lengths.sum()
    places = np.cumsum(share) - share * rng.random(len(lengths))
    found = np.searchsorted(np.cumsum(of_source[order]) / of_source.sum(), places)
    topics: Integers = order[np.minimum(found, len(order) - 1)]
    return topics


def _choose(model: _Model, scores: Floats, rng: np.random.Generator) -> Integers:
    """The K best experts [R,L,K] of `scores` [R,L,E], layer after layer; the id E where a row has fewer."""
    num_rows, num_layers, num_experts = scores.shape
    chosen = np.empty((num_rows, num_layers, model.top_k), np.int64)
    unused = before = None
    if model.row_size is not None:
        size = (rng.random((num_rows, num_layers, 1)) >= model.row_size).sum(axis=2)
        unused = np.arange(model.top_k) >= size[:, :, None]
    for layer in range(num_layers):
        score = scores[:, layer]
        if before is not None:
            score = score + model.cross[layer][before].sum(axis=1)
        before = np.argsort(-score, axis=1)[:, : model.top_k]
        if unused is not None:
            before[unused[:, layer]] = num_experts
        chosen[:, layer] = before
    return chosen


def _generate_group(
    model: _Model, lengths: Integers, first_rows: Integers, topics: Integers, rng: np.random.Generator, ids: Integers
) -> None:
    """Fill the rows of some requests in `ids` [T,L,K], all requests one token a step; `lengths` must fall."""
    (num_layers, num_experts), factors = model.params["bias"].shape, len(model.loadings)
    wander_half_life, drift_half_life = model.params["half_lives"]
    latent = (len(lengths), factors + len(model.residual))
    topic, wander, drift = (rng.standard_normal(latent) for _ in range(3))
    topic[:, :factors] = model.params["topics"][topics]
    fixed = subject = model.mix(topic)
    previous = np.zeros((len(lengths), num_layers, num_experts + 1))

    for token in range(int(lengths[0])):
        active = int((lengths > token).sum())
        if token % WANDER_STEP == 0:
            wander = _decay(wander[:active], WANDER_STEP, wander_half_life, rng)
            subject = model.subject(fixed[:active], model.mix(wander))
        drift = _decay(drift[:active], 1, drift_half_life, rng)
        scores = subject[:active] + model.drift_scale * model.mix(drift)
        scores += NOISE * rng.standard_normal(scores.shape)
        scores = scores.reshape(active, num_layers, num_experts)
        scores += model.params["repeat"][:, None] * previous[:active, :, :num_experts]
        chosen = _choose(model, scores, rng)
        previous = np.zeros((active, num_layers, num_experts + 1))
        np.put_along_axis(previous, chosen, 1.0, axis=2)
        ids[first_rows[:active] + token] = chosen


def _gate_weights(model: _Model, unused: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Gate weights [T,L,K], best first: gaps between ranks drawn from their quantiles, zero where `unused`."""
    gaps, total = model.params["weight_gap"], model.params["weight_sum"]  # [L,K−1,quantiles], [L]
    num_tokens, num_layers, top_k = unused.shape
    weights = np.empty(unused.shape, np.float16)
    layers, ranks = np.arange(num_layers)[:, None], np.arange(top_k - 1)
    for start in range(0, num_tokens, 4096):
        absent = unused[start : start + 4096]
        place = rng.random((len(absent), num_layers, top_k - 1)) * (gaps.shape[2] - 1)
        below = place.astype(np.int64)
        low, high = gaps[layers, ranks, below], gaps[layers, ranks, below + 1]
        logs = np.zeros(absent.shape)
        logs[:, :, 1:] = -np.cumsum(low + (place - below) * (high - low), axis=2)
        # The largest of a row is 1, whatever the gaps.
        values = np.where(absent, 0.0, np.exp(logs - logs.max(axis=2, keepdims=True)))
        share = values / np.maximum(values.sum(axis=2, keepdims=True), 1e-9)
        weights[start : start + 4096] = total[:, None] * share
    return weights


def split_tokens(num_tokens: int, num_requests: int) -> Integers:
    """Lengths [R] of requests that share the tokens evenly; the first ones have one more."""
    if not 1 <= num_requests <= num_tokens:
        raise ValueError(f"num_requests={num_requests} must be 1 … num_tokens={num_tokens}: no request is empty")
    share, left_over = divmod(num_tokens, num_requests)
    return np.full(num_requests, share, np.int64) + (np.arange(num_requests) < left_over)


def generate(params: Arrays, request_lengths: Sequence[int] | Integers, seed: int = 0) -> Arrays:
    """A trace with requests of these lengths: `experts`, `request_start`, `prompt_len`, and `weights` if fitted.

    The arrays are those of the trace format. ValueError if a length is below 1 or the parameters do not fit together.
    """
    lengths = np.asarray(request_lengths, np.int64)
    if lengths.ndim != 1 or not len(lengths) or lengths.min() < 1:
        raise ValueError(f"request_lengths={lengths.tolist()} needs one or more lengths of at least 1 token")
    model, rng = _prepare(params), np.random.Generator(np.random.PCG64(seed))
    num_layers, num_experts = model.params["bias"].shape
    kind = np.uint8 if num_experts <= 255 else np.uint16
    starts = np.concatenate([[0], np.cumsum(lengths)])
    experts = np.empty((starts[-1], num_layers, model.top_k), kind)
    longest_first = np.lexsort((rng.random(len(lengths)), -lengths))
    topics = _draw_topics(model, lengths[longest_first], rng)
    first = 0
    with shown("generating", lambda: first, len(lengths)):
        for first in range(0, len(lengths), GROUP):
            group = longest_first[first : first + GROUP]
            _generate_group(model, lengths[group], starts[group], topics[first : first + GROUP], rng, experts)
    unused = experts == num_experts
    experts[unused] = np.iinfo(kind).max
    arrays: Arrays = {"experts": experts, "request_start": starts, "prompt_len": np.zeros(len(lengths), np.int32)}
    if "weight_gap" in params:
        arrays["weights"] = _gate_weights(model, unused, rng)
    return arrays


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m traces generate`."""
    parser.add_argument("output", help="the trace to write (.safetensors)")
    parser.add_argument("--params", help="parameter file (default: the shipped gpt-oss-20b)")
    parser.add_argument(
        "--tokens", type=whole(1, 10_000_000), required=True, help="number of tokens, all requests together"
    )
    parser.add_argument(
        "--requests", type=whole(1, 10_000_000), help="number of requests (default: of the source's mean length)"
    )
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)


def shipped_params() -> Path:
    """The parameter file that comes with the package, unpacked if it is packed."""
    return shipped(SHIPPED.name) or SHIPPED


def run(args: argparse.Namespace) -> int:
    """Write a generated trace. Errors are ValueErrors."""
    path = args.params or shipped_params()
    params, header = load_params(path)
    for key in ("model", "source", "license"):
        if not header.get(key, "").strip():
            raise fault(path, "header", f"{key} is missing or empty", REMEDY)
    usual = max(1, round(args.tokens / float(params["topic_length"].mean())))
    requests = usual if args.requests is None else args.requests
    made = generate(params, split_tokens(args.tokens, requests), args.seed)
    about = About(
        model=header["model"],
        num_experts=params["bias"].shape[1],
        source=f"generated with seed {args.seed} from parameters fitted to: {header['source']}",
        license=header["license"],
    )
    write_trace(args.output, made, about)
    print(f"wrote {args.output}: {requests} requests, {args.tokens} tokens")
    return 0
