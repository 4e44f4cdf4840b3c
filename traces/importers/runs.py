"""Token numbers for sources that tell forwards but no tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.container import fault
from traces.importers.assemble import Choices

Ints = npt.NDArray[np.int64]
_UNKNOWN, _PREFILL, _MIXED = -1, 1, 2


class Told(NamedTuple):
    """What a source tells of a choice beside its forward in the stream: whether it is of a prompt, and the number of
    the forward over all streams."""

    prefill: bool | None = None
    ran_in: int | None = None


NOTHING = Told()


class Runs:
    """Token numbers for a source that gives none: choices in the order of forwards, each layer for itself.

    A stream is a sequence of forwards. In it a forward of several tokens is a prompt, or its next part; one of a single
    token decodes; a prompt after a decoded token begins a request. Where the source tells the phase, that counts. A
    layer that has fewer choices of a forward than others has those of its last tokens: engines that need only the last
    token's logits leave out the rest.

    by_request: each stream is what one request's tokens ran in, so that several decoded ones of a forward follow each
    other; else their requests are not told.
    """

    def __init__(self, choices: Choices, by_request: bool = False) -> None:
        self._choices, self._by_request = choices, by_request
        self._streams: dict[str, dict[int, _Run]] = {}
        self._digests: dict[str, Any] = {}
        """Of each stream a hash of all that it chose."""

    def add(
        self,
        stream: str,
        forward: int,
        layer: int,
        experts: Sequence[int],
        *,
        place: int,
        weights: Sequence[float] | None = None,
        told: Told = NOTHING,
    ) -> None:
        """The next choice of this layer; forward: its number in the stream, from 0, never falling. ValueError as of
        `Choices.add`."""
        choices = self._choices
        self._digests.setdefault(stream, blake2b(digest_size=16)).update(repr((forward, layer, experts)).encode())
        run = self._streams.setdefault(stream, {}).setdefault(layer, _Run())
        if not len(run.sizes) - 1 <= forward <= len(choices) + 1:
            raise ValueError(f"is of forward {forward}, out of turn")
        choices.add(0, 0, layer, experts, place=place, weights=weights, prefill=False, forward=told.ran_in)
        run.choices.append(len(choices) - 1)
        more = forward + 1 - len(run.sizes)
        run.sizes.extend([0] * more)
        run.phases.extend([_UNKNOWN] * more)
        run.sizes[forward] += 1
        if told.prefill is not None:
            known, phase = run.phases[forward], int(told.prefill)
            run.phases[forward] = phase if known in (_UNKNOWN, phase) else _MIXED

    def number(self, path: Path) -> list[str]:
        """Give all choices their requests and tokens; notes on what was concluded.

        TraceError, which names `path`, where a layer lacks forwards other than that at which the recording ended, and
        where a forward holds tokens of several requests that are not told apart.
        """
        num_joined = num_bare = 0
        for stream, layers in self._streams.items():
            num_forwards = max(len(run.sizes) for run in layers.values())
            lengths = [len(layers[layer].sizes) for layer in sorted(layers)]
            if lengths != sorted(lengths, reverse=True) or lengths[-1] < num_forwards - 1:
                layer = next(layer for layer in sorted(layers) if len(layers[layer].sizes) != num_forwards)
                problem = f"{stream}: layer {layer} has {len(layers[layer].sizes)} forwards, others {num_forwards}"
                raise fault(path, "source", problem, "rows are missing; record all layers of a run")
            sizes = np.zeros((len(layers), num_forwards), np.int64)
            phases = np.full((len(layers), num_forwards), _UNKNOWN, np.int64)
            for row, run in enumerate(layers.values()):
                sizes[row, : len(run.sizes)] = run.sizes
                phases[row, : len(run.phases)] = run.phases
            prefill = self._prefill(path, stream, sizes.max(axis=0), phases)
            told = bool((phases != _UNKNOWN).any())
            request, first, joined = self._requests(stream, sizes.max(axis=0), prefill)
            num_bare += not (told or prefill[0])
            num_joined += 0 if told else joined
            for size, run in zip(sizes, layers.values(), strict=True):
                forward = np.repeat(np.arange(num_forwards), size)
                within = np.arange(len(forward)) - np.repeat(np.cumsum(size) - size, size)
                late = (sizes.max(axis=0) - size)[forward]
                where = np.frombuffer(run.choices, np.int64)
                self._choices.place_at(where, request[forward], first[forward] + late + within, prefill[forward])
        bare = f"{num_bare} sequences begin with a forward of one token: decoded, of requests without a prompt"
        return [*self._copies(), *self._joined(num_joined), *([bare] if num_bare else [])]

    def _copies(self) -> list[str]:
        """A note where streams say the very same, as ranks that share a layer's work do."""
        num = len(self._digests) - len({digest.digest() for digest in self._digests.values()})
        if not num or self._by_request:
            return []
        return [
            f"{num} of {len(self._digests)} sequences choose as another does, token by token: if ranks of one run "
            "wrote them, import one"
        ]

    def _joined(self, num_joined: int) -> list[str]:
        if not num_joined:
            return []
        text = f"{num_joined} forwards of several tokens follow another: taken for parts of one prompt"
        return [text if self._by_request else f"{text}; wrong where they are of requests that ran together"]

    def _prefill(self, path: Path, stream: str, sizes: Ints, phases: Ints) -> npt.NDArray[np.bool_]:
        """Whether each forward is of a prompt."""
        most = phases.max(axis=0)
        known = np.where(phases == _UNKNOWN, most, phases)
        mixed = np.flatnonzero((most == _MIXED) | (known.min(axis=0) != most))
        remedy = "record them with a column of the request, and name it with request="
        if len(mixed):
            raise fault(path, "source", f"{stream}: forward {mixed[0]} holds prompt and decoded tokens", remedy)
        several = np.flatnonzero((most == 0) & (sizes > 1))
        if len(several) and not self._by_request:
            problem = f"{stream}: forward {several[0]} decodes {sizes[several[0]]} tokens: whose they are is not told"
            raise fault(path, "source", problem, remedy)
        prefill: npt.NDArray[np.bool_] = np.where(most == _UNKNOWN, sizes > 1, most == _PREFILL)
        return prefill

    def _requests(self, stream: str, sizes: Ints, prefill: npt.NDArray[np.bool_]) -> tuple[Ints, Ints, int]:
        """Of each forward: request and number of its first token; how many forwards of a prompt follow another."""
        request, first = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
        current, num_tokens, decoded, num_joined, num_of_stream = -1, 0, True, 0, 0
        for forward, size in enumerate(sizes.tolist()):
            if current < 0 or (prefill[forward] and decoded):
                num_of_stream += 1
                current, num_tokens = self._choices.new_request(f"{stream}/{num_of_stream}"), 0
            elif prefill[forward]:
                num_joined += 1
            decoded = not prefill[forward]
            request[forward], first[forward] = current, num_tokens
            num_tokens += size
        return request, first, num_joined


class _Run:
    """Of one layer of a stream: the numbers of its choices, and how many each forward has and of which phase."""

    __slots__ = ("choices", "phases", "sizes")

    def __init__(self) -> None:
        self.choices = array("q")
        self.sizes: list[int] = []
        self.phases: list[int] = []
