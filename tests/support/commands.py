"""Runs `python -m sim`, mostly in this process (a start costs more than most runs), and writes small traces.

`run_here` drives the real entry point with its arguments; `run_there` starts a process, for what only a process
can show. Knows nothing of what a run should answer.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from sim.app import cli, run_job
from sim.job.compose import Remembering
from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.paths import use_own_folder
from traces.format import About, write_trace

ROOT = Path(__file__).parents[2]
GPT_OSS = (24, 32, 4)
"""Layers, experts, top-k of gpt-oss-20b: the model that small traces pretend to be."""

TINY_MODEL = {
    "name": "tiny",
    "source": "tests",
    "num_layers": 4,
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 512,
    "expert_intermediate": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "vocab_size": 1000,
}
TINY_MODEL_WORDS = tuple(f"{'' if key == 'name' else '+'}model.{key}={value}" for key, value in TINY_MODEL.items())
"""Overrides that describe a model of 4 layers and 8 experts, of which no file in `conf/model` knows."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def done(self) -> bool:
        """Whether the run counts as finished."""
        return (self.folder / "DONE").exists()

    def metrics(self) -> dict[str, Any]:
        """metrics.json."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return found


# -- commands ------------------------------------------------------------------------------------------------


@contextmanager
def composed_once() -> Iterator[None]:
    """Within it Hydra does not compose all of a configuration twice, first to see whether it sets hydra.mode, and
    parses no text again that it knows.

    None sets it: without -m it is a single run.
    """
    once = patch("hydra._internal.hydra.Hydra.get_mode", return_value=None)
    with once, patch("hydra._internal.config_loader_impl.ConfigRepository", Remembering):
        yield


def run_here(words: Sequence[str], folder: Path) -> Outcome:
    """`python -m sim WORDS hydra.run.dir=FOLDER` in this process; of a sweep the words name the folder."""
    assert not any("hydra.mode" in word for word in words)
    out, err = io.StringIO(), io.StringIO()
    argv = ["sim", *words, *folder_words(words, folder)]
    GlobalHydra.instance().clear()
    try:
        with (
            composed_once(),
            patch.object(sys, "argv", argv),
            patch.dict(os.environ),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = cli()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        use_own_folder(None)
    return Outcome(code, out.getvalue(), err.getvalue(), folder)


def command(*words: str, module: str = "sim") -> list[str]:
    """The command line of a process."""
    return [sys.executable, "-m", module, *words]


def folder_words(words: Sequence[str], folder: Path) -> list[str]:
    """The word that names the folder of a single run."""
    return [] if "-m" in words else [f"hydra.run.dir={folder}"]


def run_there(words: Sequence[str], folder: Path, cwd: Path, module: str = "sim") -> Outcome:
    """The same in a process of its own, started in `cwd`."""
    told = [*words, *folder_words(words, folder)] if module == "sim" else list(words)
    found = subprocess.run(command(*told, module=module), cwd=cwd, capture_output=True, text=True, timeout=120)
    return Outcome(found.returncode, found.stdout, found.stderr, folder)


def job(*words: str, folder: Path | None = None) -> dict[str, Any]:
    """Metrics of one configuration, without command line and output folder."""
    cfg = configure(list(words))
    return run_job(cfg, make_workload(cfg), folder)


# -- traces --------------------------------------------------------------------------------------------------


def routing(shape: tuple[int, int, int], num_tokens: int, seed: int = 0) -> np.ndarray:
    """Random distinct experts [T, L, K] that prefer low numbers and repeat what the token before chose."""
    num_layers, num_experts, top_k = shape
    rng = np.random.default_rng(seed)
    liking = np.log(1.0 / np.arange(1, num_experts + 1))
    scores = liking + rng.gumbel(size=(num_tokens, num_layers, num_experts))
    for token in range(1, num_tokens):
        kept = rng.random(num_layers) < 0.5
        scores[token, kept] = scores[token - 1, kept]
    return np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.uint8 if num_experts < 256 else np.uint16)


def small_trace(
    path: Path,
    num_tokens: int = 12,
    num_requests: int = 2,
    *,
    shape: tuple[int, int, int] = GPT_OSS,
    model: str = "gpt-oss-20b",
    seed: int = 0,
    prompt: int = 0,
    **arrays: Any,
) -> Path:
    """A valid trace at `path`: requests of equal length, each with a prompt of `prompt` tokens."""
    starts = [round(index * num_tokens / num_requests) for index in range(num_requests + 1)]
    given: dict[str, Any] = {
        "experts": routing(shape, num_tokens, seed),
        "request_start": starts,
        "prompt_len": [prompt] * num_requests,
        **arrays,
    }
    return write_trace(path, given, About(model, shape[1], "tests", "none"))


def tiny_trace(path: Path, num_tokens: int = 12, **settings: Any) -> Path:
    """A trace of `TINY_MODEL`."""
    return small_trace(path, num_tokens, shape=(4, 8, 2), model="tiny", **settings)


def exit_code(run: Callable[[], int | None]) -> int:
    """The exit code of a command's `main`, also where its flags end it."""
    try:
        return run() or 0
    except SystemExit as ended:
        return int(ended.code or 0)
