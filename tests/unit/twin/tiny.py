"""A tiny twin, a text for it, and the routing it is meant to do, restated slowly."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from traces.twin.config import TwinConfig
from traces.twin.model import Block, Twin
from traces.twin.text import SPLITS, Document, load_documents
from traces.twin.train import Pace, Start, Trainer, begin

FORMS = {
    "deepseek": {"num_dense_layers": 1, "dense_width": 24, "shared_width": 12, "routed_scale": 4.0},
    "qwen": {"shared_width": 12, "shared_gate": True},
    "gpt-oss": {"normalised": True, "router_bias": True},
}


def tiny(form: str = "qwen", **changes: object) -> TwinConfig:
    """Three MoE layers of 8 experts, two a token, 16 wide."""
    sizes = {"num_layers": 3, "num_experts": 8, "top_k": 2, "width": 16, "num_heads": 2, "expert_width": 12}
    values: dict[str, object] = {"name": "tiny-twin", "vocab_size": 257, "context": 24, **sizes, **FORMS[form]}
    return TwinConfig(**{**values, **changes})  # type: ignore[arg-type]


def write_text(folder: Path) -> Path:
    """Documents of made-up sentences, enough for every split."""
    folder.mkdir()
    words = ["the", "router", "sends", "each", "token", "to", "two", "experts", "and", "a", "cache", "keeps", "what"]
    draws = random.Random(0)
    for number in range(40):
        text = " ".join(draws.choice(words) for _ in range(80))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def documents(folder: Path) -> dict[str, list[Document]]:
    """By split."""
    found = load_documents(folder)
    return {split: [document for document in found if document.split == split] for split in SPLITS}


def train(folder: Path, text: Path, steps: int, form: str = "qwen", **pace: object) -> Trainer:
    """Begin a twin in `folder`, or go on, to `steps` in all."""
    if not (folder / "twin.json").exists():
        begin(folder, tiny(form), Start(batch=4, warmup=2, lr=0.01, tokenizer="bytes", text=str(text)))
    # One thread: sums of several would still be repeatable, but the machine's number of cores would show.
    trainer = Trainer(folder, Pace(steps=steps, threads=1, log_every=1, **pace))  # type: ignore[arg-type]
    trainer.run(lambda line: None)
    return trainer


def weights(model: Twin) -> dict[str, npt.NDArray[np.float32]]:
    """All parameters as arrays."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def shake(model: Twin, seed: int = 1) -> Twin:
    """Move every weight, so that biases are not zero and experts differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def slow_mixture(
    block: Block, states: npt.NDArray[np.float64]
) -> tuple[list[list[int]], list[list[float]], npt.NDArray[np.float64]]:
    """What the routed experts of a layer do to normed states [n,W]: ids, gate weights, sum; token by token."""
    config = block.router.config
    matrix = block.router.weight.detach().double().numpy()
    bias = 0.0 if block.router.bias is None else block.router.bias.detach().double().numpy()
    gate_up, down = block.experts.gate_up.detach().double().numpy(), block.experts.down.detach().double().numpy()
    ids, gates, total = [], [], np.zeros_like(states)
    for row, state in enumerate(states):
        logits = matrix @ state + bias
        best = sorted(range(len(logits)), key=lambda expert: -logits[expert])[: config.top_k]
        among = best if config.normalised else range(len(logits))
        whole = sum(np.exp(logits[expert]) for expert in among)
        weight = [float(np.exp(logits[expert]) / whole) * config.routed_scale for expert in best]
        for expert, share in zip(best, weight, strict=True):
            gate, up = np.split(state @ gate_up[expert], 2)
            total[row] += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
        ids.append(best)
        gates.append(weight)
    return ids, gates, total
