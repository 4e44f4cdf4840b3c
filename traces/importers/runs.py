"""Token numbers for sources that tell forwards but no tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from traces.container import fault
from traces.importers.assemble import Choices

Ints = npt.NDArray[np.int64]


class Runs:
    """Token numbers for a source that gives none: choices in the order of forwards, each layer for itself.

    A stream is a sequence of forwards. In it a forward of several tokens is a prompt, or its next part; one of a single
    token decodes; a prompt after a decoded token begins a request. A layer that has fewer choices of a forward than
    others has those of its last tokens: engines that need only the last token's logits leave out the rest.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._streams: dict[str, dict[int, _Run]] = {}

    def add(
        self,
        stream: str,
        forward: int,
        layer: int,
        experts: Sequence[int],
        *,
        place: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        """The next choice of this layer; forward: its number in the stream, from 0, never falling. ValueError as of
        `Choices.add`."""
        choices = self._choices
        run = self._streams.setdefault(stream, {}).setdefault(layer, _Run())
        if not len(run.sizes) - 1 <= forward <= len(choices) + 1:
            raise ValueError(f"is of forward {forward}, out of turn")
        choices.add(0, 0, layer, experts, place=place, weights=weights, prefill=False)
        run.choices.append(len(choices) - 1)
        run.sizes.extend([0] * (forward + 1 - len(run.sizes)))
        run.sizes[forward] += 1

    def number(self, path: Path) -> list[str]:
        """Give all choices their requests and tokens; notes on what was concluded.

        TraceError, which names `path`, where a layer lacks forwards other than that at which the recording ended.
        """
        num_joined = 0
        for stream, layers in self._streams.items():
            num_forwards = max(len(run.sizes) for run in layers.values())
            lengths = [len(layers[layer].sizes) for layer in sorted(layers)]
            if lengths != sorted(lengths, reverse=True) or lengths[-1] < num_forwards - 1:
                layer = next(layer for layer in sorted(layers) if len(layers[layer].sizes) != num_forwards)
                problem = f"{stream}: layer {layer} has {len(layers[layer].sizes)} forwards, others {num_forwards}"
                raise fault(path, "source", problem, "rows are missing; record all layers of a run")
            sizes = np.zeros((len(layers), num_forwards), np.int64)
            for row, run in enumerate(layers.values()):
                sizes[row, : len(run.sizes)] = run.sizes
            request, first, prefill, joined = self._requests(stream, sizes.max(axis=0))
            num_joined += joined
            for size, run in zip(sizes, layers.values(), strict=True):
                forward = np.repeat(np.arange(num_forwards), size)
                within = np.arange(len(forward)) - np.repeat(np.cumsum(size) - size, size)
                late = (sizes.max(axis=0) - size)[forward]
                where = np.frombuffer(run.choices, np.int64)
                self._choices.place_at(where, request[forward], first[forward] + late + within, prefill[forward])
        joined_text = f"{num_joined} forwards of several tokens follow another: taken for parts of one prompt"
        return [joined_text] if num_joined else []

    def _requests(self, stream: str, sizes: Ints) -> tuple[Ints, Ints, npt.NDArray[np.bool_], int]:
        """Of each forward: request, number of its first token, whether it is of the prompt; how many were joined."""
        request, first = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
        prefill = sizes > 1
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
        return request, first, prefill, num_joined


class _Run:
    """Of one layer of a stream: the numbers of its choices, and how many each forward has."""

    __slots__ = ("choices", "sizes")

    def __init__(self) -> None:
        self.choices = array("q")
        self.sizes: list[int] = []
