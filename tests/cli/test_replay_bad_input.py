"""What is wrong with a replay's own keys is said in one line, with exit code 2; nothing looks like a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.test_bad_input import Bad, assert_refused, by_words
from tests.support.commands import TINY_MODEL_WORDS, run_here, run_there, tiny_trace
from tests.support.replays import replay_here

LRU = "+hardware=local +policy=lru"
BAD = [
    Bad("+policy=lru", ("hardware is not chosen", "+hardware=NAME", "a100")),
    Bad("+hardware=local", ("policy is not chosen", "+policy=NAME", "adaptive")),
    Bad("+hardware=locall +policy=lru", ("hardware=locall", "did you mean local?", "a100")),
    Bad("hardware=local +policy=lru", ("hardware", "+hardware=NAME")),
    Bad(f"{LRU} +hardware.memory_gb=3", ("hardware lacks", "compute_efficiency", "defaults: [NAME, _self_]")),
    Bad(f"{LRU} machine=gpu", ("machine='gpu'", "auto, cuda, cpu")),
    Bad(f"{LRU} machine=null", ("machine=null", "auto, cuda, cpu")),
    Bad(f"{LRU} verify=maybe", ("verify='maybe'", "true or false")),
    Bad(f"{LRU} verify=1", ("verify=1", "true or false")),
    Bad(f"{LRU} log=null", ("log=null", "true or false")),
    Bad(f"{LRU} fault=slow verify=true", ("fault='slow'", "delayed", "early_reuse", "lost")),
    Bad(f"{LRU} fault=3 verify=true", ("fault=3", "delayed")),
    Bad(f"{LRU} fault=failed", ("fault=failed", "verify=true")),
    Bad(f"{LRU} fault=failed verify=true fault_at=99999", ("fault=failed", "fault_at=99999", "lower fault_at")),
    Bad(f"{LRU} fault=lost fault_at=99999", ("fault=lost", "fault_at=99999", "lower fault_at")),
    Bad(f"{LRU} fault_at=0", ("fault_at=0", "[1, 2147483647]")),
    Bad(f"{LRU} fault_at=1.5", ("fault_at=1.5", "whole number in [1, 2147483647]")),
    Bad(f"{LRU} fault_at=true", ("fault_at=true", "whole number in [1, 2147483647]")),
    Bad(f"{LRU} scale=0", ("scale=0", "[1, 1024]")),
    Bad(f"{LRU} scale=1025", ("scale=1025", "[1, 1024]")),
    Bad(f"{LRU} scale=1.5", ("scale=1.5", "[1, 1024]")),
    Bad(f"{LRU} scale=tiny", ("scale='tiny'", "[1, 1024]")),
    Bad(f"{LRU} scale=1024", ("too small to compute with", "smaller scale")),
    Bad(f"{LRU} scale=1024 chunk_mib=0.0015", ("smaller scale",)),
    Bad(f"{LRU} scale=16 chunk_mib=0.0015 verify=true", ("chunk_mib", "bytes", "raise chunk_mib")),
    Bad(f"{LRU} throttle_gb_per_s=0", ("throttle_gb_per_s=0", "[0.0001, 1e+06] GB/s")),
    Bad(f"{LRU} throttle_gb_per_s=inf", ("throttle_gb_per_s=inf", "[0.0001, 1e+06] GB/s")),
    Bad(f"{LRU} throttle_gb_per_s=nan", ("throttle_gb_per_s=nan", "[0.0001, 1e+06] GB/s")),
    Bad(f"{LRU} throttle_gb_per_s=fast", ("throttle_gb_per_s='fast'", "or null")),
    Bad(f"{LRU} throttle_gb_per_s=true", ("throttle_gb_per_s=true", "or null")),
    Bad(f"{LRU} machine=cuda throttle_gb_per_s=3", ("throttle_gb_per_s=3", "machine=cpu")),
    Bad(f"{LRU} host_memory_gb=0", ("host_memory_gb=0", "(0, 1e+06] GB")),
    Bad(f"{LRU} host_memory_gb=inf", ("host_memory_gb=inf", "(0, 1e+06] GB")),
    Bad(f"{LRU} host_memory_gb=nan", ("host_memory_gb=nan", "(0, 1e+06] GB")),
    Bad(f"{LRU} host_memory_gb=all", ("host_memory_gb='all'", "(0, 1e+06] GB")),
    Bad(f"{LRU} host_memory_gb=0.00002", ("hold no two experts", "host_memory_gb=0.0000492 or more")),
    Bad(f"{LRU} host_memory_gb=1000000", ("host_memory_gb=1000000", "more than the host has left", "would fit")),
    Bad(f"{LRU} stack.resident_tpot_ms=12", ("stack.resident_tpot_ms=12", "simulated kernels", "layer_overhead_ns")),
    Bad(f"{LRU} compare=floor", ("compare=floor", "simulator", "full or none")),
    Bad(f"{LRU} compare=some", ("compare='some'", "full, floor, none")),
    Bad(f"{LRU} foo=1", ("foo", "is no key")),
    Bad(f"{LRU} machne=cpu", ("machne is no key (did you mean machine?)",)),
    Bad(f"{LRU} +foo=1", ("foo is no key", "batch_size")),
    Bad(f"{LRU} ~verify", ("verify is missing", "another value")),
    Bad(f"{LRU} gpu_memory_gb=100000", ("gpu_memory_gb=100000", "more than the GPU has")),
    Bad(f"{LRU} warmup_forwards=12", ("warmup_forwards=12", "12 forwards")),
    Bad(f"{LRU} start=resident", ("start=resident", "residency=1.0")),
    Bad(f"{LRU} count_redundant=maybe", ("count_redundant='maybe'", "true or false")),
    Bad(
        "+hardware=a100 +policy=lru hardware.link_gb_per_s=0",
        ("hardware.link_gb_per_s=0", "[0.0001, 1e+06] GB/s"),
    ),
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("sound") / "tiny.safetensors")


def told(words: str, trace: Path) -> list[str]:
    given = [*words.split(), *TINY_MODEL_WORDS, f"trace.path={trace}"]
    for default in ("machine=cpu", "scale=8", "stack=found"):
        key = default.split("=")[0]
        if not any(word.lstrip("~+").split("=")[0] == key for word in given):
            given.append(default)
    return given


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("case", by_words(BAD))
def test_a_broken_configuration_is_one_line(case: Bad, trace: Path, tmp_path: Path) -> None:
    assert_refused(replay_here(told(case.words, trace), tmp_path / "run"), case.names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "host_memory_gb=0.0000492",
        "scale=64",
        "scale=64 verify=true",
        "throttle_gb_per_s=1000000",
        "scale=1",
        "scale=null",
        "machine=auto",
        "warmup_forwards=11",
    ],
)
def test_the_last_value_within_a_limit_is_accepted(words: str, trace: Path, tmp_path: Path) -> None:
    found = replay_here(told(f"{LRU} {words}", trace), tmp_path / "run")
    assert found.done, found.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(trace: Path, tmp_path: Path) -> None:
    found = replay_here(told(f"{LRU} machine=cuda scale=null", trace), tmp_path / "run")
    assert_refused(found, ("machine=cuda", "no CUDA device", "machine=cpu"))


def test_a_trace_that_is_not_there_is_one_line(trace: Path, tmp_path: Path) -> None:
    found = replay_here(told(f"{LRU} trace.path=/absent/x.safetensors", trace)[:-4], tmp_path / "run")
    assert_refused(found, ("/absent/x.safetensors", "does not exist"))


def test_a_profile_that_only_a_replay_knows_is_one_line_to_the_simulator(tmp_path: Path) -> None:
    assert_refused(run_here(["+hardware=local", "+policy=lru"], tmp_path / "run"), ("hardware=local", "a100"))


def test_a_replays_key_is_one_line_to_the_simulator(tmp_path: Path) -> None:
    found = run_here(["+hardware=a100", "+policy=lru", "verify=true"], tmp_path / "run")
    assert_refused(found, ("verify", "is no key"))


@pytest.mark.slow
def test_a_process_says_the_same_with_code_2(tmp_path: Path) -> None:
    words = [*LRU.split(), "scale=0", f"hydra.run.dir={tmp_path / 'run'}"]
    assert_refused(run_there(words, tmp_path / "run", cwd=tmp_path, module="replay"), ("scale=0", "[1, 1024]"))


def test_threads_of_a_refused_run_are_given_back(trace: Path, tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    replay_here(told(f"{LRU} host_memory_gb=1000000", trace), tmp_path / "run")
    assert threading.active_count() == before
