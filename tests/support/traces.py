"""Traces made for tests, and `python -m traces` in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from traces import cli

Arrays = dict[str, npt.NDArray[Any]]

TOKENS, LAYERS, EXPERTS, TOP_K = 6, 3, 8, 2
HEADER = {
    "format": "expertflow-trace",
    "format_version": "1",
    "model": "toy",
    "num_layers": str(LAYERS),
    "num_experts": str(EXPERTS),
    "top_k": str(TOP_K),
    "num_requests": "2",
    "num_tokens": str(TOKENS),
    "source": "made for a test",
    "license": "Apache-2.0",
}


def sound_arrays(lists: bool = False) -> Arrays:
    """Every array of a sound trace of two requests of four and two rows; `lists`: lookahead as lists."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((TOKENS, LAYERS, EXPERTS)), axis=2)
    past = np.arange(LAYERS)[:, None] + np.arange(1, 3) >= LAYERS
    ahead = rng.random((TOKENS, LAYERS, 2, EXPERTS)).astype(np.float16)
    ahead[:, past] = np.nan
    listed = np.argsort(-np.nan_to_num(ahead), axis=3)[..., :3].astype(np.uint8)
    listed[:, past] = 255
    weights = rng.random((TOKENS, LAYERS, TOP_K)).astype(np.float16)
    arrays: Arrays = {
        "experts": order[..., :TOP_K].astype(np.uint8),
        "weights": weights,
        "request_start": np.array([0, 4, 6], np.int64),
        "prompt_len": np.array([4, 0], np.int32),
        "context_len": np.array([0, 7], np.int32),
        "forward_id": np.array([0, 0, 1, 2, 1, 2], np.int64),
        "token_ids": np.arange(TOKENS, dtype=np.int32),
        "embedding": rng.standard_normal((TOKENS, 5)).astype(np.float16),
        "logits": rng.standard_normal((TOKENS, LAYERS, EXPERTS)).astype(np.float16),
    }
    if lists:
        return arrays | {"lookahead_ids": listed, "lookahead_scores": np.full(listed.shape, 9, np.uint8)}
    return arrays | {"lookahead": ahead}


def save(path: Path, arrays: Arrays, header: dict[str, str]) -> Path:
    """Write whatever is given, sound or not, with the safetensors library."""
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, header)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m traces WORDS`."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def check_error(result: tuple[int, str, str], *parts: str) -> None:
    """It was refused with exit code 2, in one line on stderr that holds `parts`."""
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
