"""What is wrong is a ValueError of one line: the command's, where the command knows of such a thing."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertflow.boundary import PartError
from expertflow.evictions.lru import LRU
from expertflow.orders.index import IndexOrder
from sim import SweepError, simulate, sweep
from sim.job.limit import RunTimeoutError
from tests.support.commands import run_here, small_trace

BOTH: list[tuple[list[str], Mapping[str, Any]]] = [
    ([], {}),
    (["+hardware=a100"], {"hardware": "a100"}),
    (["+hardware=a1000", "+policy=lru"], {"hardware": "a1000", "policy": "lru"}),
    (["+hardware=a100", "+policy=lru", "residency=2"], {"hardware": "a100", "policy": "lru", "residency": 2}),
    (["+hardware=a100", "+policy=lru", "residenci=1"], {"hardware": "a100", "policy": "lru", "residenci": 1}),
    (["+hardware=a100", "+policy=lru", "max_tokens=ten"], {"hardware": "a100", "policy": "lru", "max_tokens": "ten"}),
    (
        ["+hardware=a100", "+policy=lru", "residency=0.5", "gpu_memory_gb=20"],
        {"hardware": "a100", "policy": "lru", "residency": 0.5, "gpu_memory_gb": 20},
    ),
    (
        ["+hardware=a100", "+policy=lru", "trace.path=nosuch.safetensors"],
        {"hardware": "a100", "policy": "lru", "trace": "nosuch.safetensors"},
    ),
    (
        ["+hardware=a100", "+policy=lru", "policy.eviction._target_=nosuch.LRU"],
        {"hardware": "a100", "policy": "lru", "policy.eviction._target_": "nosuch.LRU"},
    ),
    (
        ["+hardware=a100", "+policy=adaptive", "+policy.horizon.nosuch=1"],
        {"hardware": "a100", "policy": {"horizon": {"nosuch": 1}}},
    ),
]


@pytest.mark.mostly_slow(keep=4)
@pytest.mark.parametrize(("words", "keys"), BOTH, ids=[" ".join(words) or "nothing" for words, _ in BOTH])
def test_an_error_is_the_line_that_the_command_prints(
    words: list[str], keys: Mapping[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = run_here(words, tmp_path)
    assert there.code == 2
    with pytest.raises(ValueError) as found:
        simulate(**keys)
    assert f"error: {found.value}\n" == there.err
    assert capfd.readouterr() == ("", "")


ALONE: list[tuple[Mapping[str, Any], str]] = [
    ({"policy": ["lru", "adaptive"]}, r"policy=\['lru', 'adaptive'\] must be the name .* sweep\(\) runs a list"),
    ({"policy": LRU()}, r"policy=a LRU must be the name of a file, or a mapping"),
    ({"policy": {"eviction": object()}}, r"policy.eviction=a object is no value of a key"),
    ({"policy": {"eviction": IndexOrder}}, r"must be a class that derives from expertflow.parts.Eviction"),
    ({"policy": {"eviction": IndexOrder()}}, r"must be a class that derives from expertflow.parts.Eviction"),
    ({"policy": {"eviction": {"_target_": LRU(), "size": 1}}}, r"policy.eviction.size would have no effect"),
    ({"policy": {"eviction": LRU}, "policy.eviction.x": 1}, r"policy.eviction.x=1 would have no effect"),
    ({"policy": "lru", "hydra.run.dir": "x"}, r"hydra.run.dir is no key that Python takes; out= names the folder"),
    ({"policy": "lru", "two words": 1}, r"two words is no key that Python takes"),
    ({"policy": "lru", "residency": {"a": 1}}, r"residency=a dict is no value of a key"),
    ({"policy": "lru", "skip_done": True}, r"skip_done=true means nothing without a folder"),
    ({"policy": {"eviction": LRU}, "skip_done": True, "out": "x"}, r"skip_done=true cannot tell"),
    ({"policy": "lru", "seed": 10**5000}, r"seed=.* is no value of a key"),
    ({"policy": "lru", "hardware": {"memory_gb": 1}}, r"hardware has no name"),
    ({"policy": "lru", "hardware": {"name": 3}}, r"hardware=3 must be the name of a file"),
    ({"policy": "lru", "hardware": {"name": "a100", "a b": 3}}, r"hardware: .a b. cannot be given as a key"),
    ({"policy": "lru", "trace": {"experts": np.zeros((2, 2)), "model": "gpt-oss-20b"}}, r"given.trace: experts"),
    ({"policy": "lru", "trace": {"experts": np.zeros((2, 2, 1), int)}}, r"trace: model=null must be the name"),
    ({"policy": "lru", "trace": {"experts": [], "model": "mine"}}, r"trace: num_experts=null must be given"),
    ({"policy": "lru", "trace": {"experts": [], "model": "gpt-oss-20b"}}, r"given.trace: experts"),
    ({"policy": "lru", "trace": {"experts": [], "modl": "mine"}}, r"trace: modl is no array of a trace"),
    ({"policy": "lru", "trace": np.zeros((3, 2, 1), int)}, r"trace is an array of numbers; name it: trace={'experts'"),
    ({"policy": "lru", "trace": {"expert": np.zeros((3, 2, 1), int)}}, r"expert is no array .*did you mean experts\?"),
    ({"policy": "lru", "trace": {"weights": np.zeros((3, 2, 1))}}, r"trace: experts is missing"),
    ({"policy": "lru", "host": "destop"}, r"host=destop does not exist \(did you mean desktop\?\)"),
    ({"policy": "lru", "host": {"host_tflops": 1}}, r"host has no name; give host={'name': NAME"),
    ({"policy": "lru", "config_dir": "nosuch"}, r"nosuch: no such folder"),
    ({"policy": "lru", "config_dir": 3}, r"config_dir=3 must be the path of a folder, or None"),
    ({"policy": "lru", "out": ""}, r"out='' must be the path of a folder, or None"),
]


@pytest.mark.parametrize(("keys", "line"), ALONE, ids=[str(number) for number in range(len(ALONE))])
def test_what_only_python_can_say_is_refused_in_a_line_too(keys: Mapping[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as found:
        simulate(**{"hardware": "a100", **keys})
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300


def test_a_list_inside_a_mapping_is_refused_with_how_to_sweep_over_it_before_anything_runs() -> None:
    told = (
        r"link_slowdown=\[1, 2\] must .*; to sweep over it: \*\*{'hardware.link_slowdown': \[1, 2\]} beside hardware$"
    )
    with pytest.raises(ValueError, match=told) as found:
        sweep(hardware={"name": "a100", "link_slowdown": [1, 2]}, policy="lru", max_tokens=4)
    assert not isinstance(found.value, SweepError)
    with pytest.raises(ValueError, match="trace is an array of numbers; name it"):
        sweep(hardware="a100", policy="lru", trace=np.zeros((3, 2, 1), int))


class Drops(IndexOrder):
    """Leaves out what came last."""

    def arrange(self, keys: Sequence[int]) -> Sequence[int]:
        return keys[:-1]


class Leaves(LRU):
    """Would end the process."""

    def touched(self, keys: Any) -> None:
        sys.exit(3)


class Boom(LRU):
    """Raises at its first victim."""

    def victim(self, key: int, cause: int) -> int | None:
        raise KeyError(key)


def test_an_error_of_a_part_is_not_followed_by_what_this_package_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        with pytest.raises(PartError, match=r"Boom\.victim raised KeyError: \d+ at api/test_errors\.py:\d+") as found:
            simulate(hardware="a100", policy={"name": "lru", "eviction": Boom}, max_tokens=20, compare="none")
        return "".join(traceback.format_exception(found.value))

    assert shown().count("\n") < 16
    monkeypatch.setenv("EXPERTFLOW_TRACEBACK", "1")
    assert "raise KeyError(key)" in shown()


class Hangs(LRU):
    """Never comes back by itself."""

    def touched(self, keys: Any) -> None:
        while True:
            pass


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("errors") / "t.safetensors")


@pytest.mark.parametrize("given", ["class", "object"])
def test_parts_given_in_python_are_checked(given: str, trace: Path) -> None:
    order: Any = Drops if given == "class" else Drops()
    with pytest.raises(PartError, match=r"Drops.arrange leaves out key \d+ \(forward 0, layer 0\)"):
        simulate(hardware="a100", policy={"name": "lru", "order": order}, trace=trace)


def test_a_part_that_would_end_the_process_does_not(trace: Path) -> None:
    with pytest.raises(ValueError, match=r"Leaves.touched raised SystemExit"):
        simulate(hardware="a100", policy={"name": "lru", "eviction": Leaves}, trace=trace)


def test_a_part_that_hangs_is_named_and_the_program_goes_on(trace: Path) -> None:
    keys: dict[str, Any] = {"hardware": "a100", "trace": trace, "compare": "none"}
    with pytest.raises(RunTimeoutError, match=r"Hangs.touched was running when the time was up"):
        simulate(policy={"name": "lru", "eviction": Hangs}, timeout_s=0.3, **keys)
    assert simulate(policy="lru", timeout_s=60, **keys).metrics["num_accesses"]


def test_a_failed_run_leaves_no_result(trace: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"hardware": "a100", "trace": trace, "compare": "none", "out": tmp_path / "run"}
    simulate(policy="lru", **keys)
    assert (tmp_path / "run" / "DONE").exists()
    with pytest.raises(PartError):
        simulate(policy={"name": "lru", "order": Drops}, **keys)
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("jobs", [0, -2, 1.5, True, "two"])
def test_jobs_that_are_no_number_are_refused(jobs: Any) -> None:
    with pytest.raises(ValueError, match=r"jobs=.* must be a number of processes, or -1"):
        sweep(hardware="a100", policy=["lru"], jobs=jobs)


def test_a_sweep_over_nothing_or_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="policy is an empty list"):
        sweep(hardware="a100", policy=[])
    with pytest.raises(ValueError, match="a sweep of 1000000 runs is more than 100000"):
        sweep(hardware="a100", policy="lru", seed=range(1000), max_tokens=range(1000))


def test_what_cannot_be_composed_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"residency=3 is outside"):
        sweep(hardware="a100", policy="lru", residency=[0.5, 3], out=tmp_path / "sweep", jobs=1)
    assert not (tmp_path / "sweep").exists()
