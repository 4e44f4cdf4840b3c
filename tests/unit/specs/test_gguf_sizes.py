"""Bytes of public GGUF files, from headers that are made by the recipe of their quantisation, against their sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from sim.specs.gguf_format import read_header
from sim.specs.gguf_header import read_gguf
from tests.support import gguf_models

GIB = 2**30
PUBLISHED: list[tuple[Callable[[], Any], float, str]] = [
    # Size of Qwen3-30B-A3B-Q4_K_M.gguf in Qwen/Qwen3-30B-A3B-GGUF on Hugging Face, of which 6 MB are tokenizer.
    (gguf_models.qwen3_30b_a3b, 18_556_685_824, "qwen3-30b-a3b"),
    # Bytes of the tensors as llama-bench prints them for allenai/OLMoE-1B-7B-0924-Instruct-GGUF, Q4_K_M.
    (gguf_models.olmoe, 4_211_730_432, "olmoe-1b-7b-0924-instruct"),
    # Size of gpt-oss-20b-mxfp4.gguf in ggml-org/gpt-oss-20b-GGUF, of which 13 MB are tokenizer.
    (gguf_models.gpt_oss_20b, 12_109_565_632, "gpt-oss-20b"),
    # llama-bench: "llama 8x7B Q4_K - Medium, 26.49 GiB, 46.70 B".
    (gguf_models.mixtral_8x7b, 26.49 * GIB, "mixtral-8x7b-instruct-v0.1"),
    # llama-bench: "deepseek2 16B Q4_K - Medium, 9.65 GiB, 15.71 B".
    (gguf_models.deepseek_v2_lite, 9.65 * GIB, "deepseek-v2-lite-chat"),
    (lambda: gguf_models.deepseek_v2_lite(split_kv=True), 9.65 * GIB, "deepseek-v2-lite-chat"),
    # llama-bench in GitHub ggml-org/llama.cpp#15616: "qwen3moe 30B.A3B Q8_0, 30.25 GiB".
    (lambda: QWEN3["Q8_0"](), 30.25 * GIB, "qwen3-30b-a3b"),
    # llama-bench, as several public tables have it: "qwen3moe 30B.A3B Q6_K, 23.36 GiB, 30.53 B".
    (lambda: QWEN3["Q6_K"](), 23.36 * GIB, "qwen3-30b-a3b"),
    # llama-bench: "deepseek2 16B Q8_0, 15.55 GiB".
    (lambda: gguf_models.of_one_type(gguf_models.deepseek_v2_lite(), "Q8_0"), 15.55 * GIB, "deepseek-v2-lite-chat"),
]
QWEN3: dict[str, Callable[[], Any]] = {
    "Q4_K_M": gguf_models.qwen3_30b_a3b,
    "Q6_K": lambda: gguf_models.of_one_type(gguf_models.qwen3_30b_a3b(), "Q6_K"),
    "Q8_0": lambda: gguf_models.of_one_type(gguf_models.qwen3_30b_a3b(), "Q8_0"),
}
"""Qwen3-30B-A3B by quantisation."""


@pytest.mark.parametrize(("model", "published", "name"), PUBLISHED, ids=[name for _, _, name in PUBLISHED])
def test_a_model_takes_what_its_file_does(
    model: Callable[[], Any], published: float, name: str, tmp_path: Path
) -> None:
    arch, keys, tensors = model()
    found = read_gguf(gguf_models.write(tmp_path / "m.gguf", arch, keys, tensors)).spec
    assert found.name == name
    total = sum(info.num_bytes for info in tensors)
    assert total == pytest.approx(published, rel=0.002)
    # Exactly the tensors' bytes, but for the fraction of a byte by which the mean of an expert is rounded up.
    excess = found.total_expert_bytes + found.non_expert_bytes - total
    assert 0 <= excess < found.num_layers * found.num_experts


@pytest.mark.parametrize("model", [gguf_models.tiny, gguf_models.tiny_hybrid, gguf_models.gpt_oss_20b])
def test_tensors_are_those_that_the_reader_of_the_package_sees(model: Callable[[], Any], tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *model())
    found = read_header(path)
    with path.open("r+b") as file:
        file.truncate(found.data_start + found.data_bytes)  # a hole on the disk in place of the weights
    package = {t.name: (tuple(t.shape.tolist()), int(t.n_bytes), t.tensor_type.name) for t in GGUFReader(path).tensors}
    assert {t.name: (t.shape, t.num_bytes, t.kind) for t in found.tensors} == package


def test_the_experts_of_qwen3_30b_a3b_are_those_that_were_streamed(tmp_path: Path) -> None:
    """BigMoeOnEdge measures its experts of 2,654,208 and 3,059,712 bytes, by layer."""
    arch, keys, tensors = gguf_models.qwen3_30b_a3b()
    found = read_gguf(gguf_models.write(tmp_path / "m.gguf", arch, keys, tensors))
    by_hand = 2 * 2048 * 768 * 144 // 256  # gate and up: a block of Q4_K has 256 weights in 144 bytes
    assert by_hand + 768 * 2048 * 144 // 256 == 2_654_208
    assert by_hand + 768 * 2048 * 210 // 256 == 3_059_712  # down, where Q6_K: 210 bytes
    # use_more_bits: blocks 0 to 5, every third from 8 to 41, 42 to 47.
    wide = [layer for layer in range(48) if layer < 6 or layer >= 42 or (layer - 6) % 3 == 2]
    assert len(wide) == 24
    assert found.spec.mean_expert_bytes == (2_654_208 + 3_059_712) // 2
    assert "experts take 2.65 MB to 3.06 MB by layer (Q4_K, Q6_K), 2.86 MB in the mean" in found.derived


@pytest.mark.parametrize(
    ("kind", "each", "published"),
    [
        # Blocks of 256 weights in 144 and 210 bytes (Q4_K; Q6_K in half of the layers' down), 210 and, of 32, 34 bytes.
        ("Q4_K_M", (2_654_208 + 3_059_712) // 2, 18_556_685_824),
        ("Q6_K", 3 * 2048 * 768 * 210 // 256, 23.36 * GIB),
        ("Q8_0", 3 * 2048 * 768 * 34 // 32, 30.25 * GIB),
    ],
)
def test_an_expert_takes_what_the_published_file_leaves_for_it(
    kind: str, each: int, published: float, tmp_path: Path
) -> None:
    spec = read_gguf(gguf_models.write(tmp_path / "m.gguf", *QWEN3[kind]())).spec
    assert spec.mean_expert_bytes == each
    assert (published - spec.non_expert_bytes) / (48 * 128) == pytest.approx(each, rel=0.01)


@pytest.mark.parametrize(
    ("model", "conf"),
    [
        (gguf_models.qwen3_30b_a3b, "qwen3-30b-a3b"),
        (gguf_models.olmoe, "olmoe-1b-7b"),
        (gguf_models.mixtral_8x7b, "mixtral-8x7b"),
        (gguf_models.gpt_oss_20b, "gpt-oss-20b"),
        (gguf_models.deepseek_v2_lite, "deepseek-v2-lite"),
        (lambda: gguf_models.deepseek_v2_lite(split_kv=True), "deepseek-v2-lite"),
    ],
)
def test_dimensions_are_those_of_the_shipped_model(model: Callable[[], Any], conf: str, tmp_path: Path) -> None:
    from expertflow.model import model_from_dict
    from sim.paths import CONF
    from traces.yamltext import read_yaml

    shipped = model_from_dict(read_yaml(CONF / "model" / f"{conf}.yaml"))
    found = read_gguf(gguf_models.write(tmp_path / "m.gguf", *model())).spec
    stored = {"name", "source", "weight_bits", "expert_bits", "expert_bytes", "embedding_bits", "extra_bytes"}
    for key in {field.name for field in fields(shipped)} - stored:
        assert getattr(found, key) == getattr(shipped, key), key
    assert found.num_params == shipped.num_params
