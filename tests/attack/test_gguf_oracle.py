"""The second reader of GGUF headers and the mutators of them: each finds what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sim.specs.gguf_format import read_header
from sim.specs.gguf_header import read_gguf
from tests.attack import formats, gguf, gguf_oracle
from tests.support import gguf_models

MODELS = [gguf_models.tiny, gguf_models.tiny_hybrid]


@pytest.mark.parametrize("model", [*MODELS, gguf_models.gpt_oss_20b, gguf_models.nemotron_3_nano])
def test_nothing_is_found_against_a_sound_file(model: Callable[[], Any], tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *model())
    assert gguf_oracle.gguf(path.read_bytes(), read_gguf(path)) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 3},
        {"num_layers": 3, "expert_bytes": None},
        {"expert_bytes": (254976, 221185)},
        {"expert_bits": 4.9},
        {"extra_bytes": 0},
        {"extra_bytes": 10**6},
        {"vocab_size": 999},
        {"tied_embeddings": True},
        {"num_kv_heads": 4},
        {"attention_pattern": "l", "linear_params": 1},
    ],
    ids=str,
)
def test_what_is_wrong_with_a_model_is_found(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.tiny())
    found = read_gguf(path)
    assert gguf_oracle.gguf(path.read_bytes(), replace(found, spec=replace(found.spec, **wrong))) != ""


@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_sees_the_tensors_that_the_reader_sees(model: Callable[[], Any], tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *model())
    _, tensors = gguf_oracle.header(path.read_bytes())
    assert {name: (tuple(dims), size) for name, (dims, size) in tensors.items()} == {
        tensor.name: (tensor.shape, tensor.num_bytes) for tensor in read_header(path).tensors
    }


def test_bits_of_every_type_are_those_of_the_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {int(kind): 8 * size / block for kind, (block, size) in GGML_QUANT_SIZES.items()}
    assert sizes == gguf_oracle.BITS
    assert {int(kind) for kind in GGMLQuantizationType} == gguf_oracle.BITS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_a_sound_header_is_written_as_it_was_read(model: Callable[[], Any], tmp_path: Path) -> None:
    content = gguf_models.write(tmp_path / "m.gguf", *model()).read_bytes()
    assert gguf.write(gguf.parse(content)) == content


def test_every_change_is_refused_at_times_and_taken_at_times(tmp_path: Path) -> None:
    document = gguf.parse(gguf_models.write(tmp_path / "m.gguf", *gguf_models.tiny()).read_bytes())
    taken: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for seed in range(600):
        doc, operation = document.copy(), formats.GGUF.changes[seed % len(formats.GGUF.changes)]
        operation(Random(seed), doc)
        (tmp_path / "x.gguf").write_bytes(gguf.write(doc))
        try:
            read_gguf(tmp_path / "x.gguf")
            taken[operation.__name__] += 1
        except ValueError:
            refused[operation.__name__] += 1
    names = {operation.__name__ for operation in formats.GGUF.changes}
    assert refused.keys() == names
    assert taken.keys() == names
