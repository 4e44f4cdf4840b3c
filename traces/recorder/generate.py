"""Running a causal language model over prompts while its routing is recorded.

A request is a prompt and what the model answers; its rows are the tokens that went through the model: the prompt,
then all generated tokens but the last, which nothing was computed from. Padding and whatever a finished request is
fed while others of its batch go on are not recorded. Knows of Hugging Face's `generate`, and of no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from traces.recorder.recording import Recording, Rows

PROJECTION_SEED = 0


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, at least one, and what to call it."""

    tokens: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class Answer:
    """One finished request: its rows, and token_ids and forward_id int64 [n] for them; what was generated."""

    prompt: Prompt
    rows: Rows
    token_ids: npt.NDArray[np.int64]
    forward_id: npt.NDArray[np.int64]
    generated: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else drawn, from `seed` and the number of the batch."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


def generate(model: Any, prompts: Sequence[Prompt], sampling: Sampling, batch: int = 0) -> list[tuple[int, ...]]:
    """What the model answers to each of the prompts, run as one batch: the generated tokens, the end token included.

    The random state of the process is left as it was. batch: the number of the batch, for the seed.
    """
    from transformers import GenerationConfig

    device = model.device
    width = max(len(prompt.tokens) for prompt in prompts)
    pad, ends = _special(model)
    # Padded on the left, as decoding goes on at the right.
    rows = [[pad] * (width - len(prompt.tokens)) + list(prompt.tokens) for prompt in prompts]
    mask = [[0] * (width - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in prompts]
    drawn: dict[str, Any] = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        **(drawn if sampling.temperature else {}),
    )
    devices = [device] if device.type == "cuda" else []
    own = model.generation_config
    # What a configuration leaves open is filled in from the model's own: penalties and filters nobody chose here.
    model.generation_config = GenerationConfig()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed * 1_000_003 + batch)
            output = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )
    finally:
        model.generation_config = own
    return [_until_end(answer, ends) for answer in output[:, width:].tolist()]


def _special(model: Any) -> tuple[int, frozenset[int]]:
    """A token to pad with, which never matters, and the tokens that end an answer."""
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    if ends is None:
        ends = getattr(model.config, "eos_token_id", None)
    found = frozenset(int(end) for end in (ends if isinstance(ends, list | tuple) else [ends]) if end is not None)
    return min(found, default=0), found


def _until_end(answer: list[int], ends: frozenset[int]) -> tuple[int, ...]:
    last = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
    return tuple(answer[: last + 1])


def record_batches(
    model: Any,
    make_recording: Callable[[Callable[[Rows], None]], Recording],
    prompts: Iterator[Prompt],
    batch_size: int,
    sampling: Sampling,
) -> Iterator[Answer]:
    """Run the prompts in batches of `batch_size`, in order; each request as it is finished.

    make_recording: makes a `Recording` of the model that calls what it is given. forward_id counts forwards from 0;
    the requests of a batch share them. Memory holds the rows of one batch.
    """
    num_forwards = 0
    for number, batch in enumerate(_batches(prompts, batch_size)):
        forwards: list[Rows] = []
        with make_recording(forwards.append):
            answers = generate(model, batch, sampling, number)
        yield from _answers(batch, answers, forwards, num_forwards)
        num_forwards += len(forwards)


def _batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _answers(
    batch: list[Prompt], answers: list[tuple[int, ...]], forwards: list[Rows], first_forward: int
) -> Iterator[Answer]:
    """Take the rows of a batch apart: request r has row r·S + s of a forward of S positions."""
    width = max(len(prompt.tokens) for prompt in batch)
    lengths = [len(rows) // len(batch) for rows in forwards]
    for index, (prompt, answer) in enumerate(zip(batch, answers, strict=True)):
        # Positions in the padded batch; the last generated token was never put in.
        start, stop = width - len(prompt.tokens), width + len(answer) - 1
        parts, ids, position = [], [], 0
        for number, (rows, length) in enumerate(zip(forwards, lengths, strict=True)):
            low, high = max(start, position), min(stop, position + length)
            if low < high:
                parts.append(rows.select(slice(index * length + low - position, index * length + high - position)))
                ids.append(np.full(high - low, first_forward + number, np.int64))
            position += length
        rows = Rows.join(parts)
        tokens = np.array([*prompt.tokens, *answer[:-1]], np.int64)
        if len(rows) != len(tokens):
            raise ValueError(
                f"{prompt.label}: {len(rows)} rows were recorded of {len(tokens)} tokens: the model does not run "
                "them one forward a token; record it with traces.recorder.recording.Recording"
            )
        yield Answer(prompt, rows, tokens, np.concatenate(ids), answer)


class Projection:
    """Token embeddings, projected to few dimensions: distances between them are kept approximately.

    A matrix of independent normal numbers with variance 1/dims, the same for all recordings of one width.
    """

    def __init__(self, embeddings: torch.nn.Module, dims: int) -> None:
        self._embeddings, self.dims = embeddings, dims
        self._matrix: npt.NDArray[np.float32] | None = None

    def __call__(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32 [n, dims] of token ids [n]."""
        device = next(self._embeddings.parameters()).device
        with torch.no_grad():
            # forward, not a call: hooks of others are not to see it.
            vectors = self._embeddings.forward(torch.from_numpy(token_ids).to(device)).float().cpu().numpy()
        if self._matrix is None:
            shape = (vectors.shape[1], self.dims)
            drawn = np.random.default_rng(PROJECTION_SEED).standard_normal(shape, np.float32)
            self._matrix = drawn / np.float32(np.sqrt(self.dims))
        projected: npt.NDArray[np.float32] = vectors @ self._matrix
        return projected
