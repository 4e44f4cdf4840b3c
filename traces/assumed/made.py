"""An assumed trace: its size where none is said, its arrays, its name, and the copy that is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.assumed.families import families_sha256, family_of
from traces.assumed.routing import AT_ONCE, Topology, make_routing
from traces.kept import KeptArrays, code_hash
from traces.shipped import cache_folder

NUM_REQUESTS = 8
ACCESSES = 150_000
"""Of experts, by all tokens in all layers, so that a run takes as long whatever the topology."""
SHORTEST, LONGEST, STEP = 16, 128, 8
"""Tokens of a request."""
PROMPT = 4
"""One token of so many is of the prompt."""
SOURCE = "assumed routing, no recording of this model: python -m traces.assumed"


class Size(NamedTuple):
    """Tokens in all, and the requests that share them."""

    num_tokens: int
    num_requests: int


class Assumed(NamedTuple):
    """What tells an assumed trace from another, beside the code and the families."""

    topology: Topology
    locality: str
    size: Size
    seed: int
    reuse: float | None = None
    """Share of a token's experts that the token before has chosen too; in place of the locality."""

    @property
    def setting(self) -> str:
        """`usual`, or `reuse 0.45`."""
        return self.locality if self.reuse is None else f"reuse {self.reuse:g}"

    @property
    def name(self) -> str:
        """`assumed:usual 94x128 top 8`, with the seed if it is another than 0."""
        seed = f" seed {self.seed}" if self.seed else ""
        return f"assumed:{self.setting} {self.topology}{seed}"


def usual_size(topology: Topology, num_tokens: int | None = None, num_requests: int | None = None) -> Size:
    """The size where a part is not said: requests of a multiple of `STEP` tokens, as many as `ACCESSES` allows."""
    requests = NUM_REQUESTS if num_requests is None else num_requests
    if num_tokens is not None:
        return Size(num_tokens, min(requests, num_tokens) if num_requests is None else requests)
    fit = ACCESSES // (NUM_REQUESTS * topology.num_layers * topology.top_k)
    length = min(LONGEST, max(SHORTEST, fit // STEP * STEP))
    return Size(length * requests, requests)


def check_size(size: Size, tokens: str = "trace.num_tokens=", requests: str = "trace.num_requests=") -> None:
    """ValueError where a request would have no token."""
    if size.num_requests > size.num_tokens:
        raise ValueError(
            f"{requests}{size.num_requests} is more than {tokens}{size.num_tokens}; a request has at least one token"
        )


def memory_of(topology: Topology, size: Size) -> int:
    """At most so many bytes of memory making it takes: scores of a block, the states of a request, what is chosen."""
    scores = topology.num_layers * topology.num_experts
    return 8 * (4 * max(scores, AT_ONCE) + 8 * scores) + 2 * size.num_tokens * topology.num_layers * topology.top_k


def request_lengths(size: Size) -> list[int]:
    """Tokens of each request; the first ones have one more where they cannot be equal."""
    share, left_over = divmod(size.num_tokens, size.num_requests)
    return [share + (number < left_over) for number in range(size.num_requests)]


def arrays_of(asked: Assumed) -> dict[str, npt.NDArray[Any]]:
    """The trace's arrays by name, made or kept from an earlier run."""
    lengths = request_lengths(asked.size)
    return {
        "experts": _kept_experts(asked, lengths),
        "request_start": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "prompt_len": np.array([length // PROMPT for length in lengths], np.int32),
    }


def header_of(asked: Assumed, model: str) -> dict[str, str]:
    """The trace's header but for format and source."""
    topology, size = asked.topology, asked.size
    return {
        "model": model,
        "num_layers": str(topology.num_layers),
        "num_experts": str(topology.num_experts),
        "top_k": str(topology.top_k),
        "num_requests": str(size.num_requests),
        "num_tokens": str(size.num_tokens),
    }


def _kept_experts(asked: Assumed, lengths: Sequence[int]) -> npt.NDArray[np.integer]:
    topology = asked.topology
    family = family_of(asked.locality, asked.reuse, topology.top_k / topology.num_experts)
    shape = (asked.size.num_tokens, topology.num_layers, topology.top_k)
    kind = np.dtype(np.uint8 if topology.num_experts <= 255 else np.uint16)
    try:
        kept = KeptArrays(cache_folder() / "assumed")
    except RuntimeError:
        return make_routing(family, topology, lengths, asked.seed)
    code = code_hash("traces.assumed.routing", "traces.assumed.made", "traces.assumed.families")
    name = f"{asked} {families_sha256()} {code} {np.__version__}"
    found = kept.find(name, shape, kind)
    if found is not None:
        experts = np.empty(shape, kind)
        try:
            if found.read(0, experts) == len(experts):
                return experts
        except OSError:
            pass  # cut short meanwhile: it is made anew
        finally:
            found.close()
    made = make_routing(family, topology, lengths, asked.seed)
    kept.keep(name, shape, kind, [made])
    return made
