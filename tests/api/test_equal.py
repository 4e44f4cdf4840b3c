"""What Python answers is what the command writes and prints, to the byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from sim import simulate
from sim.job.output import to_json
from sim.views.timeline import load_timeline
from tests.support.commands import TINY_MODEL, TINY_MODEL_WORDS, Outcome, routing, run_here, small_trace, tiny_trace
from traces.format import About, write_trace
from traces.reader import open_trace

CASES: list[tuple[list[str], Mapping[str, Any]]] = [
    (["+policy=lru", "compare=none"], {"policy": "lru", "compare": "none"}),
    (["+policy=adaptive", "residency=0.3"], {"policy": {"name": "adaptive"}, "residency": np.float64(0.3)}),
    (["+policy=oracle", "start=popular"], {"policy": "oracle", "start": "popular"}),
    (["+policy=hf_offload", "stack=graph"], {"policy": "hf_offload", "stack": "graph"}),
    (["+policy=clairvoyant", "compare=floor"], {"policy": "clairvoyant", "compare": "floor"}),
    (
        ["+policy=adaptive", "policy.horizon.max_distance=4", "count_redundant=true"],
        {"policy": "adaptive", "policy.horizon.max_distance": 4, "count_redundant": True},
    ),
    (
        ["+policy=fixed_1", "policy/eviction=lfu", "policy.horizon.depth=2", "batch_size=2"],
        {"policy": {"name": "fixed_1", "eviction": "lfu", "horizon": {"depth": 2}}, "batch_size": np.int64(2)},
    ),
    (
        ["+policy=lru", "+policy/place=gpu", "policy.name=mine", "hardware.memory_gb=40", "gpu_memory_gb=12"],
        {"policy": "lru", "policy/place": "gpu", "policy.name": "mine", "hardware.memory_gb": 40, "gpu_memory_gb": 12},
    ),
]


PLACED = ["+policy=lru", "+policy/place=host_layers", "policy.place.layers=12", "start=resident", "compare=none"]
CASES += [
    (
        ["+host=desktop", "hardware.host_tflops=2", *PLACED],
        {
            "host": {"name": "desktop", "host_tflops": 2},
            "policy": {"name": "lru", "place": "host_layers"},
            "policy.place.layers": 12,
            "start": "resident",
            "compare": "none",
        },
    )
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("equal") / "it's a trace, of 12.safetensors", prompt=2)


def commanded(folder: Path, trace: Path, *words: str) -> Outcome:
    quoted = str(trace).replace("'", "\\'")
    found = run_here(["+hardware=a100", f"trace.path='{quoted}'", *words], folder)
    assert found.code == 0, found.err
    return found


@pytest.mark.mostly_slow(keep=3)
@pytest.mark.parametrize(("words", "keys"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_metrics_and_report_are_the_commands(
    words: list[str], keys: Mapping[str, Any], trace: Path, tmp_path: Path
) -> None:
    there = commanded(tmp_path / "run", trace, *words)
    keys = dict(keys)
    hardware: Any = "a100"
    if "hardware.memory_gb" in keys:
        # A mapping of keys is the same as the keys themselves.
        hardware = {"name": "a100", "memory_gb": keys.pop("hardware.memory_gb")}
    result = simulate(hardware=hardware, trace=trace, **keys)
    assert to_json(result.metrics) == (there.folder / "metrics.json").read_text(encoding="utf-8")
    assert str(result).splitlines() == [line.rstrip() for line in there.out.splitlines()[:-1]]
    assert there.out.splitlines()[-1].startswith("written to ")


def test_a_folder_gets_the_files_that_the_command_writes(trace: Path, tmp_path: Path) -> None:
    words = ["+policy=lru", "compare=none", "events=true", "timeline=true"]
    there = commanded(tmp_path / "there", trace, *words)
    keys: dict[str, Any] = {"policy": "lru", "compare": "none", "events": True, "timeline": True}
    result = simulate(hardware="a100", trace=trace, out=tmp_path / "here", **keys)
    for name in ("metrics.json", "events.parquet", "timeline.json"):
        assert (tmp_path / "here" / name).read_bytes() == (there.folder / name).read_bytes(), name
    names = {path.name for path in there.folder.rglob("*") if path.name != "hydra.yaml"}
    assert {path.name for path in (tmp_path / "here").rglob("*")} == names
    assert str(result).splitlines()[-1] == f"written to {tmp_path / 'here'}"
    # The very run is known again, by either of them.
    assert commanded(tmp_path / "here", trace, *words, "skip_done=true").out.startswith("done before")
    written = (there.folder / "DONE").stat().st_mtime_ns
    again = simulate(hardware="a100", trace=trace, out=there.folder, skip_done=True, **keys)
    assert (there.folder / "DONE").stat().st_mtime_ns == written
    assert again.metrics == result.metrics
    simulate(hardware="a100", trace=trace, out=there.folder, skip_done=True, residency=0.25, **keys)
    assert (there.folder / "DONE").stat().st_mtime_ns != written


def test_events_and_timeline_on_demand_are_those_of_the_files(trace: Path, tmp_path: Path) -> None:
    there = commanded(tmp_path, trace, "+policy=fixed_1", "compare=none", "events=true", "timeline=true")
    late = simulate(hardware="a100", policy="fixed_1", trace=trace, compare="none")
    early = simulate(hardware="a100", policy="fixed_1", trace=trace, compare="none", events=True, timeline=True)
    written = pd.read_parquet(there.folder / "events.parquet")
    for result in (late, early):
        assert_frame_equal(result.events.astype({"landed_ns": float}), written)
        assert result.events["stall_ns"].sum() == result.metrics["stall_ns"]
        # Nothing was computed on the host, nor read from a disk.
        assert [name for name, frame in result.timeline._asdict().items() if not len(frame)] == ["host", "storage"]
        for mine, theirs in zip(result.timeline, load_timeline(there.folder / "timeline.json"), strict=True):
            assert_frame_equal(mine, theirs)
    assert late.events is late.events


def test_the_table_has_the_printed_rows(trace: Path) -> None:
    result = simulate(hardware="a100", policy="lru", trace=trace)
    rows = [line.split() for line in str(result).splitlines()[3:] if not line.startswith("  ")]
    assert [row[0] for row in rows] == list(result.table.index) == ["lru", "on_demand", "clairvoyant", "floor"]
    for row in rows[:-1]:
        figures = result.table.loc[row[0]]
        assert [f"{figures[name]:.3f}" for name in result.table.columns[4:9]] == row[1:6]
        assert f"{100 * figures['of_on_demand']:.2f} %" == " ".join(row[6:8])
    assert f"{result.table.loc['floor', 'ms_per_token']:.3f}" == rows[-1][1]


def test_a_trace_may_be_a_file_several_an_opened_one_or_arrays(tmp_path: Path) -> None:
    arrays = {"experts": routing((24, 32, 4), 12).astype(np.int64), "request_start": [0, 5, 12], "prompt_len": [1, 2]}
    about = About("gpt-oss-20b", 32, "arrays given in Python", "none")
    path = write_trace(tmp_path / "one.safetensors", arrays, about)
    keys: dict[str, Any] = {"hardware": "a100", "policy": "lru", "compare": "none"}
    expected = simulate(trace=str(path), **keys).metrics
    assert simulate(trace=open_trace(path), **keys).metrics == expected
    given = {"name": "one", "model": "gpt-oss-20b", **arrays}
    assert simulate(trace=given, **keys).metrics == expected
    assert expected["trace"]["sha256"] == open_trace(path).sha256()
    twice = simulate(trace=[path, path], **keys).metrics
    assert twice["trace"]["num_tokens"] == 24
    assert twice == simulate(trace=open_trace([path, path]), **keys).metrics
    # One request without a prompt, unless it is said.
    alone = simulate(trace={"model": "gpt-oss-20b", "experts": arrays["experts"]}, **keys).metrics["trace"]
    assert (alone["name"], alone["num_requests"], alone["num_tokens"]) == ("given", 1, 12)


def test_arrays_are_copied_and_a_model_of_ones_own_can_be_given(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "tiny.safetensors")
    there = run_here(["+hardware=a100", "+policy=lru", f"trace.path={path}", *TINY_MODEL_WORDS], tmp_path / "run")
    keys = {f"model.{key}": value for key, value in TINY_MODEL.items()}
    arrays = {name: np.array(array) for name, array in open_trace(path).layout_arrays().items()}
    given = {"name": "tiny", "model": "tiny", "num_experts": 8, "source": "tests", **arrays}
    result = simulate(hardware="a100", policy="lru", trace=given, **keys)
    assert to_json(result.metrics) == (there.folder / "metrics.json").read_text(encoding="utf-8")
    for array in arrays.values():
        array[:] = 0
    assert result.events["stall_ns"].sum() == result.metrics["stall_ns"]


def test_a_folder_of_ones_own_configuration_serves_one_call(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "policy").mkdir(parents=True)
    (tmp_path / "mine" / "policy" / "small.yaml").write_text("defaults:\n  - lru\n  - _self_\nname: small\n")
    keys: dict[str, Any] = {"hardware": "a100", "policy": "small", "trace": trace, "compare": "none"}
    assert simulate(config_dir=tmp_path / "mine", **keys).metrics["policy"] == "small"
    with pytest.raises(ValueError, match="policy=small does not exist"):
        simulate(**keys)


def test_arrays_take_the_model_from_the_argument_that_says_it(tmp_path: Path) -> None:
    told = {
        **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 1000},
        **{"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
        **{"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "torch_dtype": "bfloat16"},
    }
    (tmp_path / "config.json").write_text(json.dumps(told))
    keys: dict[str, Any] = {"hardware": "a100", "policy": "lru", "compare": "none"}
    keys["trace"] = {"experts": routing((4, 8, 2), 6)}
    path = str(tmp_path / "config.json")
    named = simulate(**keys, model={"path": path, "name": "mymoe"})
    assert named.metrics["model"] == "mymoe"
    with_keys = simulate(**keys, **{"model.path": path, "model.name": "mymoe"})
    assert with_keys.metrics == named.metrics
    assert simulate(**keys, model={"path": path}).metrics["elapsed_ns"] == named.metrics["elapsed_ns"]
    whole = {"experts": routing((24, 32, 4), 6)}
    assert simulate(**{**keys, "trace": whole}, model="gpt-oss-20b").metrics["model"] == "gpt-oss-20b"
