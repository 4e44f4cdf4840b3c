"""Every file in `conf/` composes, is made into objects and runs; names of files and names inside agree."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from expertflow.predictors.hybrid import HybridPredictor
from expertflow.predictors.lookahead import LookaheadPredictor
from expertflow.predictors.transition import TransitionPredictor
from sim.job.beside import baselines
from sim.job.configure import configure
from sim.job.report import memory_note
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from sim.paths import CONF
from sim.specs.hardware import HOST_COMPUTE, hardware_from_dict, unsourced
from sim.specs.storage import storage_from_dict
from tests.support.commands import GPT_OSS, job, routing, small_trace


def choices(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def values(group: str, name: str) -> dict[str, Any]:
    """The content of one file."""
    content: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def composed(group: str, name: str) -> dict[str, Any]:
    """The content of one file, with the files that it is composed of."""
    own = values(group, name)
    made: dict[str, Any] = {}
    for other in own.pop("defaults", []):
        if other != "_self_":
            file, _, key = other.partition("@")
            made[key] = values(group, file)
    for key, value in own.items():
        made[key] = {**made[key], **value} if key in made else value
    return made


NAMED = [(group, name) for group in ("hardware", "link", "model", "policy", "stack") for name in choices(group)]
KINDS = ("predictor", "horizon", "selection", "eviction", "order", "place", "transfer")
PARTS = [(part, name) for part in KINDS for name in choices(f"policy/{part}")]
MODELS = [name for name in choices("model") if name != "auto"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("trace") / "small.safetensors", 8, 2, prompt=2)


@cache
def model(name: str) -> ModelSpec:
    return model_from_dict(values("model", name))


def lookahead(shape: tuple[int, int, int], num_tokens: int) -> np.ndarray:
    """Recorded scores [T, L, 2, E] that say nothing, NaN past the last layer."""
    num_layers, num_experts, _ = shape
    scores = np.zeros((num_tokens, num_layers, 2, num_experts), np.float16)
    scores[:, -1] = np.nan
    scores[:, -2, 1] = np.nan
    return scores


@pytest.mark.parametrize(("group", "name"), NAMED)
def test_a_file_says_its_own_name(group: str, name: str) -> None:
    assert values(group, name)["name"] == name


def test_every_folder_of_conf_is_tested_here() -> None:
    folders = {str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir() and list(path.glob("*.yaml"))}
    parts = {f"policy/{part}" for part, _ in PARTS}
    known = {"hardware", "host", "link", "model", "policy", "stack", "storage", "trace"}
    assert folders - {"experiment", "study"} == known | parts
    assert len(NAMED) >= 40
    assert len(PARTS) >= 20


@pytest.mark.mostly_slow(keep=9)
@pytest.mark.parametrize("stack", choices("stack"))
@pytest.mark.parametrize("hardware", choices("hardware"))
def test_every_hardware_runs_under_every_stack(hardware: str, stack: str, trace: Path) -> None:
    metrics = job(f"+hardware={hardware}", "+policy=lru", f"stack={stack}", f"trace.path={trace}", "compare=none")
    # Of two requests of 4 rows, each a prompt of 2, the prompt's second row yields the first token.
    assert (metrics["hardware"], metrics["stack"], metrics["num_tokens"]) == (hardware, stack, 6)
    assert metrics["elapsed_ns"] > metrics["compute_ns"] > 0


@pytest.mark.parametrize("name", choices("policy"))
def test_every_policy_runs(name: str, trace: Path) -> None:
    metrics = job("+hardware=a100", f"+policy={name}", f"trace.path={trace}", "compare=none", "batch_size=2")
    assert metrics["policy"] == name
    assert metrics["uses_future"] is (name in {"belady", "clairvoyant", "oracle"})
    prefetches = name not in {
        "belady",
        "hf_offload",
        "lfu",
        "lfu_per_layer",
        "lru",
        "lru_per_layer",
        "on_demand",
        "two_level",
    }
    assert (metrics["prefetch"]["issued"] > 0) is prefetches


@pytest.mark.mostly_slow(keep=7)
@pytest.mark.parametrize(("part", "name"), PARTS)
def test_every_part_can_be_swapped_into_adaptive(part: str, name: str, tmp_path: Path) -> None:
    path = small_trace(tmp_path / "recorded.safetensors", 8, lookahead=lookahead(GPT_OSS, 8))
    told = ("+hardware=a100", "+policy=adaptive", f"trace.path={path}", "compare=none")
    # The place is a default that no policy names: it is added, not replaced.
    word = f"{'+' if part == 'place' else ''}policy/{part}={name}"
    assert configure([*told, word])["policy"][part] == composed(f"policy/{part}", name)
    needed = ["+host=desktop"] if part == "place" else []
    needed += ["policy.place.experts=[1,33]"] if name == "host_experts" else []
    assert job(*told, word, *needed)["num_tokens"] == 8


@pytest.mark.parametrize("name", choices("host"))
def test_every_host_fills_in_the_hardware_it_is_given_with(name: str, trace: Path) -> None:
    own = values("host", name)
    told = ("+hardware=a100", f"+host={name}", "+policy=lru", "+policy/place=balanced")
    hardware = hardware_from_dict(configure([*told])["hardware"])
    assert {key: getattr(hardware, key) for key in own if key != "sources"} == {
        key: value for key, value in own.items() if key != "sources"
    }
    assert set(own) - {"sources"} == set(own["sources"])
    assert set(HOST_COMPUTE) == set(own) - {"sources", "host_unpack_gweights_per_s"}  # which may be left out
    assert unsourced(hardware) == []
    metrics = job(*told, f"trace.path={trace}", "compare=none")
    assert metrics["num_host"] > 0
    assert (metrics["hardware"], metrics["host_stall_ns"] >= 0) == ("a100", True)


def test_a_host_alone_is_no_machine() -> None:
    with pytest.raises(ValueError, match=r"hardware is not chosen; say \+hardware=NAME"):
        configure(["+host=desktop", "+policy=lru"])


@pytest.mark.mostly_slow(keep=3)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_on_a_trace_that_names_it(name: str, tmp_path: Path) -> None:
    spec = model(name)
    shape = (spec.num_layers, spec.num_experts, spec.top_k)
    path = small_trace(tmp_path / "t.safetensors", 2, 1, shape=shape, model=name)
    told = ("+hardware=h200", "+policy=lru", f"trace.path={path}", "compare=none", "stack=graph")
    metrics = job(*told)
    assert metrics["model"] == name
    assert metrics["num_accesses"] == 2 * spec.num_layers * spec.top_k
    assert job(*told, f"model={name}") == metrics


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("name", MODELS)
def test_memory_for_the_whole_model_holds_every_expert(name: str, tmp_path: Path) -> None:
    spec = model(name)
    shape = (spec.num_layers, spec.num_experts, spec.top_k)
    path = small_trace(tmp_path / "t.safetensors", 2, 1, shape=shape, model=name)
    fixed = (spec.non_expert_bytes + spec.kv_bytes(2)) / 1e9 + 1.5
    whole, expert = fixed + spec.total_expert_bytes / 1e9, spec.mean_expert_bytes / 1e9
    told = ["+hardware=h200", "+policy=lru", f"trace.path={path}", f"hardware.memory_gb={whole + 1}"]
    num_keys = spec.num_layers * spec.num_experts
    just = {whole + 1e-6: num_keys, whole - expert / 2: num_keys - 1, fixed + 1.5 * expert: 1}
    for gigabytes, num_slots in just.items():
        assert make_workload(configure([*told, f"gpu_memory_gb={gigabytes}"])).num_slots == num_slots


@pytest.mark.parametrize(
    ("word", "refused", "noted"),
    [
        ("gpu_memory_gb=24", False, False),
        ("gpu_memory_gb=25.769", False, True),
        ("gpu_memory_gb=25.770", True, False),
        ("residency=0.36", False, False),
        ("residency=0.38", False, True),
    ],
)
def test_memory_to_count_on_and_memory_that_there_is(word: str, refused: bool, noted: bool, tmp_path: Path) -> None:
    """Of a card of 24 GB: 24 * 2^30 bytes are 25.7698 GB, beyond which nothing is there. What is beyond 24 is said."""
    path = small_trace(tmp_path / "t.safetensors", 2, 1, shape=(48, 128, 8), model="qwen3-30b-a3b")
    cfg = configure(["+hardware=rtx4090", "+policy=lru", f"trace.path={path}", "compare=none", word])
    if refused:
        with pytest.raises(ValueError, match=r"more than the GPU has \(hardware.memory_gb=24.0: 25.77 GB .*; give 24"):
            make_workload(cfg)
        return
    work = make_workload(cfg)
    taken = 24.3 if word[0] == "g" else 25.1
    # 57.98 GB of experts, 3.07 GB beside; 1.5 GB of workspace and the KV cache are in gpu_memory_gb.
    assert memory_note(work) == (
        [
            f"these slots and all other weights take {taken} GB, and rtx4090 has 24 to count "
            "on: say gpu_memory_gb=24 for what fits"
        ]
        if noted
        else []
    )


@pytest.mark.parametrize("name", ["on_demand", "lru"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_baseline_is_the_policy_of_the_same_name(name: str, batch_size: int, trace: Path) -> None:
    cfg = configure(["+hardware=a100", f"+policy={name}", f"trace.path={trace}", f"batch_size={batch_size}"])
    work = make_workload(cfg)
    configured = run_policy(work, *make_policy(cfg["policy"], work, cfg["seed"]))
    assert run_policy(work, *baselines()[name]) == configured


def test_the_default_trace_runs_without_a_file() -> None:
    metrics = job("+hardware=a100", "+policy=lru", "trace.num_tokens=6", "trace.num_requests=2", "compare=none")
    assert (metrics["model"], metrics["num_tokens"]) == ("gpt-oss-20b", 6)
    assert metrics["num_accesses"] == 6 * 24 * 4


# -- the predictor that adaptive takes -----------------------------------------------------------------------


def predictor(path: Path, *words: str) -> object:
    cfg = configure(["+hardware=a100", "+policy=adaptive", f"trace.path={path}", *words])
    return make_policy(cfg["policy"], make_workload(cfg), cfg["seed"])[0].predictor


def test_adaptive_takes_the_recorded_lookahead_where_there_is_one(tmp_path: Path) -> None:
    dense = small_trace(tmp_path / "dense.safetensors", 8, lookahead=lookahead(GPT_OSS, 8))
    ids = np.tile(np.arange(6, dtype=np.uint8), (8, 24, 2, 1))
    ids[:, -1], ids[:, -2, 1] = 255, 255
    scores = np.where(ids == 255, 0, 200).astype(np.uint8)
    listed = small_trace(tmp_path / "listed.safetensors", 8, lookahead_ids=ids, lookahead_scores=scores)
    assert isinstance(predictor(dense), LookaheadPredictor)
    assert isinstance(predictor(listed), LookaheadPredictor)
    assert isinstance(predictor(dense, "policy/predictor=transition"), TransitionPredictor)


def test_adaptive_takes_the_history_elsewhere(trace: Path) -> None:
    assert isinstance(predictor(trace), HybridPredictor)
    unfitted = "policy.predictor.hybrid.fitted=null"
    found = predictor(trace, unfitted)
    assert isinstance(found, TransitionPredictor)
    assert found.fitted_start is not None
    cold = predictor(trace, unfitted, "policy.predictor.transition.fitted_start=null")
    assert cold.fitted_start is None  # type: ignore[attr-defined]


def test_a_forest_without_a_pregate_to_correct_is_refused(trace: Path) -> None:
    with pytest.raises(ValueError, match="needs a recorded pre-gate"):
        predictor(trace, "policy/predictor=forest")


def test_a_model_without_fitted_counts_starts_cold(tmp_path: Path) -> None:
    shape = (32, 8, 2)
    path = small_trace(tmp_path / "t.safetensors", 4, shape=shape, model="mixtral-8x7b", experts=routing(shape, 4))
    found = predictor(path)
    assert isinstance(found, TransitionPredictor)
    assert found.fitted_start is None


def test_the_noisy_oracle_takes_the_seed_of_the_run(trace: Path) -> None:
    told = ("policy/predictor=noisy_oracle",)
    assert predictor(trace, *told, "seed=7").seed == 7  # type: ignore[attr-defined]
    assert predictor(trace, *told, "seed=7", "policy.predictor.seed=3").seed == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", choices("storage"))
def test_every_storage_runs_and_says_where_its_figures_are_from(name: str, trace: Path) -> None:
    own = values("storage", name)
    disk = storage_from_dict(own)
    assert disk.name == name
    assert set(disk.sources) == set(own) - {"name", "eviction", "sources"}
    words = ("+hardware=a100", "+policy=lru", f"+storage={name}", "host_memory_gb=9", f"trace.path={trace}")
    metrics = job(*words, "compare=none")
    assert metrics["storage_preset"]["name"] == name
    assert metrics["storage"]["reads"] == metrics["storage"]["host_misses"] > 0
    slower = job(*words, "compare=none", "storage.gb_per_s=0.1")
    assert slower["storage_stall_ns"] > metrics["storage_stall_ns"] > 0
