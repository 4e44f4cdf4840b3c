"""A replay of a model that was read from a file, and what a replay has no kernels for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_bad_input import assert_refused
from tests.support.commands import tiny_trace
from tests.support.replays import replay_here

WORDS = ("+hardware=local", "+policy=lru", "machine=cpu")
CONFIG = {
    "model_type": "afmoe",
    "head_dim": 64,
    "hidden_size": 512,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_dense_layers": 0,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "sliding_window": 8,
    "global_attn_every_n_layers": 2,
    "tie_word_embeddings": False,
    "vocab_size": 1000,
}


def words(folder: Path, *more: str, **changes: Any) -> list[str]:
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    return [*WORDS, f"model.path={path}", f"trace.path={tiny_trace(folder / 't.safetensors')}", *more]


@pytest.mark.slow
def test_a_model_with_windows_and_a_gate_is_replayed_and_recorded(tmp_path: Path) -> None:
    found = replay_here(words(tmp_path), tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    assert "model: derived: attention has an output gate" in found.out
    origin = json.loads((found.folder / "provenance.json").read_text(encoding="utf-8"))
    assert (origin["model"]["attention_pattern"], origin["model"]["extra_attention_params"]) == ("wf", 512 * 512)
    assert origin["model_file"]["derived"]


@pytest.mark.parametrize(
    ("more", "changes", "part"),
    [
        ((), {"layer_types": ["chunked_attention"] * 4, "attention_chunk_size": 8}, "attention_pattern='c'"),
        ((), {"swa_num_key_value_heads": 4}, "window_kv_heads=4"),
        ((), {"v_head_dim": 32}, "v_dim=32"),
        ((), {"moe_latent_size": 64}, "expert_hidden=64"),
        (("model.shared_kv=true",), {}, "shared_kv=true"),
        (("model.num_bare_layers=1", "model.feed_pattern=mmnmm"), {}, "feed_pattern='mmnmm'"),
    ],
)
def test_what_is_only_simulated_is_refused_in_one_line(
    more: tuple[str, ...], changes: dict[str, Any], part: str, tmp_path: Path
) -> None:
    found = replay_here(words(tmp_path, *more, **changes), tmp_path / "out")
    assert_refused(found, (f"model.{part}", "is only simulated", "run python -m sim"))
