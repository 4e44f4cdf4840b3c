"""Recording a twin on documents it has not learned: full traces, both kinds of pre-gate, all distances.

A request is a piece of one document: a prompt, prefilled in one forward, and rows of decode. Teacher-forced decode
reads on in the document, which gives each row what it would get token by token, in one forward for the whole piece;
greedy and sampled decode run what the twin itself says, token by token. Runs in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from traces.recorder.generate import PROJECTION_SEED, Projection
from traces.recorder.lookahead import KINDS, Recall
from traces.recorder.recording import Recording, Rows, Tap
from traces.stream import TraceWriter
from traces.twin import checkpoint
from traces.twin.model import Cache, Twin
from traces.twin.text import LICENSE, Document, Tokenizer
from traces.twin.train import load_text, open_device

DECODES = ("teacher", "greedy", "sample")
RECORDED_SPLITS = ("train", "eval")
EMBEDDING_DIMS = 16


@dataclass(frozen=True)
class Plan:
    """What to record. ValueError on what cannot be.

    tokens: rows of each of `RECORDED_SPLITS`, rounded up to whole requests; prompt, decode: rows of one request;
    how: one of `DECODES`; temperature and seed are for `sample`; ahead: D, as far as the model goes; device.
    """

    tokens: tuple[int, int] = (6144, 2048)
    prompt: int = 64
    decode: int = 128
    how: str = "teacher"
    temperature: float = 1.0
    seed: int = 0
    ahead: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        for key, low, high in (("prompt", 1, 1 << 16), ("decode", 1, 1 << 16), ("seed", 0, 1 << 31), ("ahead", 1, 64)):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key}={getattr(self, key)} must be a whole number in {low} … {high}")
        if not all(1 <= number <= 1 << 24 for number in self.tokens):
            raise ValueError(f"tokens={self.tokens} must be whole numbers from 1")
        if self.how not in DECODES:
            raise ValueError(f"decode mode {self.how!r} is unknown; known are {', '.join(DECODES)}")
        if not 0 < self.temperature <= 100:
            raise ValueError(f"temperature={self.temperature} must be above 0 and at most 100")


@dataclass(frozen=True)
class Piece:
    """Some tokens of a document, int32 [n]."""

    label: str
    tokens: npt.NDArray[np.int32]


def pieces(documents: Sequence[Document], tokenizer: Tokenizer, length: int) -> Iterator[Piece]:
    """Pieces of `length` tokens that do not overlap, first one of each document, then a second of each, and so on.

    Documents come in the order of their hashes, and begin at a place that the hash says: not all with their heads.
    """
    ordered = sorted(documents, key=lambda document: document.sha256)
    encoded = tokenizer.encode([document.text for document in ordered])
    longest = max((len(ids) // length for ids in encoded), default=0)
    for turn in range(longest):
        for document, ids in zip(ordered, encoded, strict=True):
            count = len(ids) // length
            if turn < count:
                start = (int(document.sha256[8:16], 16) + turn) % count * length
                yield Piece(f"{document.name}@{start}", ids[start : start + length])


def choose_pieces(
    documents: Sequence[Document], tokenizer: Tokenizer, split: str, length: int, tokens: int
) -> list[Piece]:
    """As many pieces of the split as `tokens` need; ValueError where its documents hold fewer."""
    needed, found = -(-tokens // length), []
    for piece in pieces([document for document in documents if document.split == split], tokenizer, length):
        found.append(piece)
        if len(found) == needed:
            return found
    have = len(found) * length
    raise ValueError(
        f"the {split} documents hold {have} tokens in pieces of {length}, {tokens} are asked for; ask less"
    )


def taps(model: Twin) -> list[Tap]:
    """What a `Recording` needs to know of the MoE layers."""
    return [Tap(index, block.router, block.mlp_norm, block.experts) for index, block in model.moe_blocks]


def make_recording(model: Twin, ahead: int, on_forward: Callable[[Rows], None]) -> Recording:
    """A full recording, `ahead` layers ahead or as far as the model goes."""
    config = model.config
    return Recording(
        model,
        taps(model),
        num_experts=config.num_experts,
        top_k=config.top_k,
        lookahead=min(ahead, config.num_layers - 1),
        full=True,
        on_forward=on_forward,
    )


def run_piece(model: Twin, piece: Piece, plan: Plan, number: int) -> tuple[list[int], list[int]]:
    """Run one request; the tokens that went through the model, and how many each forward took."""
    device = next(model.parameters()).device
    tokens = piece.tokens.tolist()

    def run(part: list[int], cache: Cache | None) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([part], device=device), cache)[0, -1]
        return logits

    with torch.no_grad():
        if plan.how == "teacher":
            run(tokens, None)
            return tokens, [len(tokens)]
        draws = np.random.default_rng((plan.seed, number))
        cache: Cache = []
        done = tokens[: plan.prompt]
        logits = run(done, cache)
        for _ in range(plan.decode):
            done.append(next_token(logits, plan, draws))
            logits = run(done[-1:], cache)
    return done, [plan.prompt] + [1] * plan.decode


def next_token(logits: torch.Tensor, plan: Plan, draws: np.random.Generator) -> int:
    """The token that follows logits [vocabulary]."""
    if plan.how == "greedy":
        return int(logits.argmax())
    chances = torch.softmax(logits.double() / plan.temperature, dim=0).cpu().numpy()
    return int(draws.choice(len(chances), p=chances / chances.sum()))


def paths_of(folder: Path, name: str, split: str) -> dict[str, Path]:
    """The full traces of a split, by kind of pre-gate."""
    return {kind: folder / f"{name}-{split}.{kind}.safetensors" for kind in KINDS}


def record(folder: Path, plan: Plan, report: Callable[[str], None]) -> list[Path]:
    """Record the latest checkpoint of the twin in `folder`: one file per split and kind of pre-gate; their paths.

    The files of a split differ in `lookahead` and in what their headers say of it. ValueError names what is at fault.
    """
    device = open_device(plan.device)
    settings = checkpoint.read_settings(folder)
    tokenizer = checkpoint.read_tokenizer(folder, settings)
    documents = load_text(settings)
    length = plan.prompt + plan.decode
    config = settings.config
    if length > config.context:
        raise ValueError(f"prompt={plan.prompt} and decode={plan.decode} exceed the twin's context={config.context}")
    if config.num_layers < 2:
        raise ValueError("the twin has one MoE layer: there is nothing to look ahead to")
    chosen = {
        split: choose_pieces(documents, tokenizer, split, length, tokens)
        for split, tokens in zip(RECORDED_SPLITS, plan.tokens, strict=True)
    }
    model, state = checkpoint.read_model(folder, settings)
    model.to(device)
    written = []
    for split, some in chosen.items():
        targets = paths_of(folder, config.name, split)
        header = _header(settings, state, plan, split)
        for path in targets.values():
            TraceWriter.discard(path)
        record_pieces(model, some, plan, targets, header, _source(settings, state), _license(settings))
        for path in targets.values():
            report(f"wrote {path}: {len(some)} requests, {path.stat().st_size / 1e6:.1f} MB")
            written.append(path)
    return written


def record_pieces(
    model: Twin,
    some: Sequence[Piece],
    plan: Plan,
    targets: dict[str, Path],
    header: dict[str, str],
    source: str,
    license: str,
) -> None:
    """Record requests into one trace per kind of pre-gate."""
    config, project = model.config, Projection(model.embedding, EMBEDDING_DIMS)
    recall = Recall(config.num_layers, min(plan.ahead, config.num_layers - 1))
    forwards, num_forwards = list[Rows](), 0
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(
                TraceWriter(
                    path,
                    model=config.name,
                    num_experts=config.num_experts,
                    source=source,
                    license=license,
                    moe_layer_ids=[index for index, _ in model.moe_blocks],
                    pregate=kind,
                    **header,
                )
            )
            for kind, path in targets.items()
        }
        stack.enter_context(make_recording(model, plan.ahead, forwards.append))
        for number, piece in enumerate(some):
            forwards.clear()
            tokens, lengths = run_piece(model, piece, plan, number)
            rows = Rows.join(forwards)
            ids = np.array(tokens, np.int64)
            common: dict[str, Any] = {"token_ids": ids, "embedding": project(ids)}
            if plan.how != "teacher":
                common["forward_id"] = num_forwards + np.repeat(np.arange(len(lengths)), lengths)
                num_forwards += len(lengths)
            common |= {name: array for name, array in rows.arrays.items() if "@" not in name}
            recall.add(rows.hits, rows.arrays["experts"])
            table = {kind: [round(value, 4) for value in values] for kind, values in recall.by_distance().items()}
            for kind, writer in writers.items():
                writer.header["pregate_recall"] = json.dumps(table)
                ahead = rows.arrays[f"lookahead@{kind}"]
                writer.append(prompt_len=plan.prompt, context_len=0, label=piece.label, lookahead=ahead, **common)


def _source(settings: checkpoint.Settings, state: dict[str, Any]) -> str:
    config = settings.config
    return f"{config.name}, {config.width} wide, trained for {state['step']} steps; not a recording of the original"


def _license(settings: checkpoint.Settings) -> str:
    of = "unknown" if settings.text else f"{LICENSE}, the Python standard library"
    return f"Apache-2.0; token ids are those of a text (license: {of})"


def _header(settings: checkpoint.Settings, state: dict[str, Any], plan: Plan, split: str) -> dict[str, str]:
    decode = {"teacher": "teacher-forced", "greedy": "greedy", "sample": f"temperature={plan.temperature:g}"}[plan.how]
    tokens = int(state["step"]) * settings.batch * settings.config.context
    return {
        "capture": "hooks on a twin in float32 (traces.twin)",
        "decode": decode,
        "split": split,
        "twin": json.dumps(settings.config.to_json(), sort_keys=True),
        "training_steps": str(state["step"]),
        "training_tokens": str(tokens),
        "training_seed": str(settings.seed),
        "seed": str(plan.seed),
        "text": "a folder" if settings.text else "the Python standard library",
        "text_sha256": settings.text_sha256,
        "embedding_projection": f"normal projection to {EMBEDDING_DIMS} dimensions, variance 1/{EMBEDDING_DIMS}, "
        f"NumPy default_rng({PROJECTION_SEED}), of the input embeddings",
    }
