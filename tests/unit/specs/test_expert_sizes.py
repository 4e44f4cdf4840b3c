"""`model.expert_bytes`: what it may hold, what a model then weighs, and how much room a run has."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from replay.machine.scale import check_replayable, scaled_model
from sim.job.configure import configure
from sim.job.setup import byte_room, make_workload
from sim.model import as_yaml, summary
from sim.specs.chunks import chunk_sizes
from sim.specs.model_file import ReadModel
from tests.support.commands import TINY_MODEL, TINY_MODEL_WORDS, tiny_trace

SIZES = [1000, 3000, 1000, 2000]
NESTED: list[Any] = [1000, [1, 2, 3, 4, 5, 6, 7, 8], 1000, 2000]


def tiny(sizes: Any) -> ModelSpec:
    return model_from_dict({**TINY_MODEL, "expert_bytes": sizes})


def test_sizes_by_layer_and_by_expert() -> None:
    assert tiny(SIZES).bytes_by_key == (1000,) * 8 + (3000,) * 8 + (1000,) * 8 + (2000,) * 8
    assert tiny(SIZES).total_expert_bytes == 8 * 7000
    assert tiny(SIZES).mean_expert_bytes == 1750
    nested = tiny(NESTED)
    assert nested.bytes_by_key is not None
    assert nested.bytes_by_key[8:16] == (1, 2, 3, 4, 5, 6, 7, 8)
    assert hash(nested) == hash(model_from_dict(asdict(nested)))


@pytest.mark.parametrize("sizes", [5, [5] * 4, [[5] * 8, 5, 5, 5]])
def test_alike_sizes_are_one_size(sizes: Any) -> None:
    model = tiny(sizes)
    assert (model.bytes_by_key, model.mean_expert_bytes, model.total_expert_bytes) == (None, 5, 160)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2], r"model\.expert_bytes lists 2 sizes, the model has num_layers=4; give one each"),
        ([1, 2, 3, [1]], r"model\.expert_bytes\[3\] lists 1 sizes, a layer has num_experts=8; give one each"),
        ([1, 2, 3, 0], r"model\.expert_bytes\[3\] holds 0; give whole numbers of bytes in \[1, 1e\+13\]"),
        ([1, 2, 3, True], r"model\.expert_bytes\[3\] holds true; give whole numbers"),
        ([1, 2, 3, [1, 1, 1, 1, 1, 1, 1, "a"]], r"model\.expert_bytes\[3\] holds 'a'; give whole numbers"),
        ([1, 2, 3, 4.0], r"model\.expert_bytes\[3\] holds 4\.0; give whole numbers"),
        (0, r"model\.expert_bytes=0 is outside \[1, 1e\+13\] bytes"),
        ("big", r"model\.expert_bytes='big' must be a whole number in .* or a list of num_layers of them"),
    ],
)
def test_what_is_no_size_is_refused_in_one_line(sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        tiny(sizes)
    assert len(str(told.value)) <= 300


@pytest.mark.parametrize("sizes", [SIZES, NESTED])
def test_the_yaml_of_a_model_is_short_and_gives_the_model_again(sizes: Any) -> None:
    model = tiny(sizes)
    text = as_yaml(ReadModel(model, (), ()))
    assert model_from_dict(yaml.safe_load(text)) == model
    assert sum("expert_bytes" in line or line.startswith("  - ") for line in text.splitlines()) <= 5


def test_the_summary_names_the_least_and_the_most() -> None:
    assert "an expert takes 1.00 to 3.00 MB, all 0.1 GB" in summary(tiny([size * 1000 for size in SIZES]))


def test_a_replay_refuses_unlike_sizes_and_names_the_mean() -> None:
    with pytest.raises(ValueError, match=r"give model\.expert_bytes=1750, their mean, or run python -m sim"):
        check_replayable(tiny(SIZES))
    alike = replace(tiny(SIZES), expert_bytes=1750)
    check_replayable(alike)
    assert scaled_model(alike, 5).mean_expert_bytes == 70


# -- room ----------------------------------------------------------------------------------------------------


def work_of(tmp_path: Path, *words: str) -> Any:
    path = tiny_trace(tmp_path / "t.safetensors")
    listed = f"+model.expert_bytes={SIZES}".replace(" ", "")
    return make_workload(
        configure(["+hardware=a100", "+policy=lru", f"trace.path={path}", *TINY_MODEL_WORDS, listed, *words])
    )


def test_residency_is_a_share_of_the_bytes(tmp_path: Path) -> None:
    work = work_of(tmp_path, "residency=0.25", "chunk_mib=0.001953125")
    assert (work.room_bytes, work.num_slots, work.residency) == (14_000, 8, 0.25)
    room = byte_room(work)
    assert room is not None
    assert room.chunk_bytes[8] == tuple(chunk_sizes(3000, 2048)) == (1500, 1500)
    assert work_of(tmp_path, "residency=1.0").room_bytes == 56_000


def test_gpu_memory_leaves_what_all_else_does_not_take(tmp_path: Path) -> None:
    whole = work_of(tmp_path, "gpu_memory_gb=40")
    assert whole.room_bytes == 56_000
    with pytest.raises(ValueError, match=r"gpu_memory_gb=1\.0: weights outside the experts.*leave no slot"):
        work_of(tmp_path, "gpu_memory_gb=1.0")


def test_too_little_room_names_what_suffices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"residency=0\.05 of 56000 bytes leaves 2800.*least is residency=0\.053572"):
        work_of(tmp_path, "residency=0.05")
    assert work_of(tmp_path, "residency=0.053572").room_bytes == 3000


def test_pinned_layers_are_those_whose_bytes_fit(tmp_path: Path) -> None:
    # The last layer takes 16,000 bytes, the one before it 8,000.
    assert work_of(tmp_path, "residency=0.43", "start=pinned_layers").initial() == tuple(range(16, 32))
    with pytest.raises(ValueError, match="too few for the last layer's 8 experts"):
        work_of(tmp_path, "residency=0.28", "start=pinned_layers")
