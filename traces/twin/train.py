"""Training a twin: windows of text, AdamW, checkpoints; stopped by minutes or steps, resumed by calling it again.

What a step sees follows from the seed and the step's number alone, so that a run that was stopped, or killed and taken
up at its last checkpoint, goes the way of one that was not. Knows nothing of recording.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from traces.container import fault
from traces.files import replace_text
from traces.reading import text_lines
from traces.twin import checkpoint
from traces.twin.checkpoint import Settings
from traces.twin.config import TwinConfig
from traces.twin.model import Twin, balance
from traces.twin.text import Document, Tokenizer, load_documents, text_digest, token_stream

CURVE = ("step", "tokens", "seconds", "tokens_per_s", "loss", "balance", "max_load", "held_out_loss")
_BETAS, _WEIGHT_DECAY, _MAX_NORM = (0.9, 0.95), 0.1, 1.0
_HELD_OUT_WINDOWS = 16


@dataclass(frozen=True)
class Pace:
    """How far one call goes, and how: it ends after `minutes` or at `steps` in all, whichever comes first.

    Every `log_every` steps a line, every `save_every` a checkpoint (and one at the end). device: as torch names it.
    bf16: matrix products in bfloat16 by autocast. threads: of torch, 0 = its own choice.
    """

    minutes: float | None = None
    steps: int | None = None
    save_every: int = 100
    log_every: int = 10
    device: str = "cpu"
    bf16: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ValueError("say how long to train: --minutes=25, or --steps=1000 in all")
        if self.minutes is not None and not 0 < self.minutes <= 100_000:
            raise ValueError(f"minutes={self.minutes} must be above 0 and at most 100000")
        for key, low, high in (
            ("steps", 1, 99_999_999),
            ("save_every", 1, 1 << 30),
            ("log_every", 1, 1 << 30),
            ("threads", 0, 4096),
        ):
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{key}={value} must be a whole number in {low} … {high}")


def open_device(name: str) -> torch.device:
    """The device of that name; ValueError where there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name} cannot be used ({str(error).splitlines()[0]})") from None
    if device.type == "meta":
        raise ValueError("device=meta holds no values; use cpu or cuda")
    return device


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a twin's training is set up, once and for all its calls; the defaults are those of the command.

    seed: of weights and windows. batch: sequences a step. lr: peak learning rate, reached after `warmup` steps.
    balance_weight: of each layer's load-balancing loss. tokenizer: bpe or bytes. text: a folder, empty for the
    standard library of this Python.
    """

    seed: int = 0
    batch: int = 8
    lr: float = 2e-3
    warmup: int = 100
    balance_weight: float = 0.01
    tokenizer: str = "bpe"
    text: str = ""


def begin(folder: Path, config: TwinConfig, start: Start) -> Settings:
    """Make `folder` that of a new twin; its settings. The vocabulary may come out smaller than config asks for."""
    documents = load_documents(Path(start.text) if start.text else None)
    settings = Settings(
        config,
        start.seed,
        start.batch,
        float(start.lr),
        start.warmup,
        float(start.balance_weight),
        start.tokenizer,
        start.text,
        text_digest(documents),
    )
    learned = [document.text for document in documents if document.split == "learn"]
    made = Tokenizer.train(learned, config.vocab_size) if start.tokenizer == "bpe" else Tokenizer()
    settings = dataclasses.replace(settings, config=dataclasses.replace(config, vocab_size=made.size))
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise fault(folder, "folder", f"cannot be made ({error.strerror})", "create its parent first") from None
    checkpoint.write_settings(folder, settings, made)
    return settings


def load_text(settings: Settings) -> list[Document]:
    """The documents that the twin was begun with; ValueError where they have changed."""
    documents = load_documents(Path(settings.text) if settings.text else None)
    if text_digest(documents) != settings.text_sha256:
        where = settings.text or "the standard library of this Python"
        remedy = "use what it was begun with, or begin another in a new folder"
        raise ValueError(f"text: {where} is not the text that the twin was begun with; {remedy}")
    return documents


class Trainer:
    """A twin in training: settings, text, model and optimizer, at some step."""

    def __init__(self, folder: Path, pace: Pace) -> None:
        if pace.threads:
            torch.set_num_threads(pace.threads)
        self.folder, self.pace, self.device = folder, pace, open_device(pace.device)
        self.settings = checkpoint.read_settings(folder)
        tokenizer = checkpoint.read_tokenizer(folder, self.settings)
        documents = load_text(self.settings)
        learned, held_out = ([d for d in documents if (d.split == "learn") is wanted] for wanted in (True, False))
        self.stream = self._windowed(token_stream(learned, tokenizer), "to learn from")
        self.held_out = self._windowed(token_stream(held_out, tokenizer), "held out")
        self.step, self.seconds = 0, 0.0
        resumed = bool(checkpoint.checkpoints(folder))
        if resumed:
            model, state = checkpoint.read_model(folder, self.settings)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
        else:
            model = Twin(self.settings.config, self.settings.seed)
        self.model = model.to(self.device).train()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        kept = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, betas=_BETAS, fused=True)
        if resumed:
            checkpoint.read_optimizer(folder, self.model, self.optimizer, self.step)
        self._curve = _read_curve(folder / "loss.csv", self.step)

    def run(self, report: Callable[[str], None]) -> int:
        """Train as far as the pace says; the step reached. A line to `report` at each entry of the curve."""
        pace, began, before = self.pace, time.monotonic(), self.seconds
        mark, marked = began, self.step
        saved = self.step if checkpoint.checkpoints(self.folder) else -1
        while (pace.steps is None or self.step < pace.steps) and (
            pace.minutes is None or time.monotonic() - began < 60 * pace.minutes
        ):
            loss, even, load = self._train_step()
            self.step += 1
            self.seconds = before + time.monotonic() - began
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {self.step}; train again with a lower --lr")
            saving = self.step % pace.save_every == 0
            if saving or self.step % pace.log_every == 0:
                now = time.monotonic()
                rate = (self.step - marked) * self._tokens_per_step / max(now - mark, 1e-9)
                report(self._enter(rate, loss, even, load, self.held_out_loss() if saving else None))
                mark, marked = time.monotonic(), self.step
            if saving:
                self._save()
                saved = self.step
        if self.step != saved and self.step:
            self._save()
        return self.step

    @property
    def _tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.config.context

    def _train_step(self) -> tuple[float, float, float]:
        """One step; the loss in nats a token, the mean balance of the layers, and the highest load."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        # The step's own generator: no state to keep between runs.
        draws = np.random.default_rng((settings.seed, self.step))
        offsets = draws.integers(0, len(self.stream) - settings.config.context, settings.batch)
        tokens = self._windows(self.stream, offsets)
        routing: list[tuple[torch.Tensor, torch.Tensor]] = []
        with self._precision():
            logits = self.model(tokens[:, :-1], routing=routing)
            loss = _cross_entropy(logits, tokens)
        even, load = balance(routing)
        (loss + settings.balance * even).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(even.detach()) / len(routing), load

    def held_out_loss(self) -> float:
        """Nats a token on windows spread over the documents that were not learned."""
        self.model.eval()
        last = len(self.held_out) - self.settings.config.context - 1
        offsets = np.linspace(0, last, _HELD_OUT_WINDOWS).astype(np.int64)
        with torch.no_grad(), self._precision():
            tokens = self._windows(self.held_out, offsets)
            loss = _cross_entropy(self.model(tokens[:, :-1]), tokens)
        self.model.train()
        return float(loss)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.pace.bf16 else nullcontext()

    def _windows(self, stream: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> torch.Tensor:
        length = self.settings.config.context + 1
        rows = np.stack([stream[offset : offset + length] for offset in offsets.tolist()])
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    def _windowed(self, stream: npt.NDArray[np.int32], what: str) -> npt.NDArray[np.int32]:
        if len(stream) <= self.settings.config.context + 1:
            problem = f"the text has {len(stream)} tokens {what}"
            raise ValueError(f"{problem}, a window needs {self.settings.config.context + 2}; give more text")
        return stream

    def _enter(self, rate: float, loss: float, even: float, load: float, held_out: float | None) -> str:
        tokens = self.step * self._tokens_per_step
        shown = "" if held_out is None else f"{held_out:.4f}"
        self._curve.append(
            (
                str(self.step),
                str(tokens),
                f"{self.seconds:.1f}",
                f"{rate:.0f}",
                f"{loss:.4f}",
                f"{even:.4f}",
                f"{load:.2f}",
                shown,
            )
        )
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([CURVE, *self._curve])
        replace_text(self.folder / "loss.csv", text.getvalue())
        line = f"step {self.step}: {tokens} tokens, {self.seconds / 60:.1f} min, {rate:.0f} tokens/s, loss {loss:.3f}, "
        line += f"balance {even:.3f}, highest load {load:.1f}"
        return line + (f", held out {held_out:.3f}" if held_out is not None else "")

    def _save(self) -> None:
        state = {"step": self.step, "seconds": round(self.seconds, 3), "torch": str(torch.__version__)}
        checkpoint.write_checkpoint(self.folder, self.model, self.optimizer, state)


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of the step with this number, counted from 0: it rises linearly, then falls as 1/√step.

    This needs no last step to be known.
    """
    count = step + 1
    return settings.lr * min(count / settings.warmup, math.sqrt(settings.warmup / count))


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def _read_curve(path: Path, step: int) -> list[tuple[str, ...]]:
    """The entries up to `step`; later ones belong to steps that will be taken again."""
    remedy = "delete it; training goes on without it"
    if not path.exists():
        return []
    try:
        rows = [tuple(row) for row in csv.reader(line for _, line in text_lines(path, remedy))]
    except csv.Error as error:
        raise fault(path, "file", f"is no CSV ({error})", remedy) from None
    if not rows or rows[0] != CURVE:
        raise fault(path, "file", "is no loss curve", remedy)
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(CURVE) or not _are_figures(row):
            raise fault(path, f"line {number}", "is no entry of a loss curve", remedy)
    return [row for row in rows[1:] if int(row[0]) <= step]


def _are_figures(row: tuple[str, ...]) -> bool:
    """Whether an entry holds a step and finite numbers, the last of which may be left out."""
    step, *figures = row
    try:
        values = [float(text) for text in figures[:-1]] + [float(figures[-1] or 0)]
    except ValueError:
        return False
    return step.isascii() and step.isdecimal() and len(step) < 16 and all(map(math.isfinite, values))
