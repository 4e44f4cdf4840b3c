"""What a new user writes on a command line: keys that a file leaves out, another class for a part, near misses."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from sim.job.configure import configure
from sim.job.errors import one_line
from tests.support.commands import command, run_here, small_trace

PARTS = """from expertflow.evictions.lru import LRU
from expertflow.evictions.outlook import Outlook


class Plain(LRU):
    pass


class Own(LRU):
    def __init__(self, mine=1, scope="global"):
        super().__init__(scope)
        self.mine = mine


class Open(Outlook):
    def __init__(self, **more):
        super().__init__(**more)


class Boom(LRU):
    def victim(self, key, cause):
        return chosen(key)


def chosen(key):
    return key // 0


class NotMade(LRU):
    def __init__(self, scope="global"):
        raise RuntimeError("no")


class Misspelt(LRU):
    def touchd(self, keys):
        pass
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of a user's own, importable from the current folder."""
    name = "parts_of_mine"
    (tmp_path / f"{name}.py").write_text(PARTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def refused(*words: str) -> str:
    """The line that a user is told."""
    with pytest.raises((ValueError, HydraException)) as caught:
        configure(list(words))
    line = one_line(caught.value)
    assert line is not None
    assert len(line) <= 293
    return line


ADAPTIVE = ("+hardware=a100", "+policy=adaptive")


@pytest.mark.parametrize(
    ("word", "place", "value"),
    [
        ("hardware.kernel_ns={}", "hardware.kernel_ns", {}),
        ("policy.transfer.serial=true", "policy.transfer.serial", True),
        ("policy.effort.once=2.0", "policy.effort.once", 2.0),
        ("model.note=x", "", None),
    ],
)
def test_a_key_that_the_file_leaves_out_needs_no_plus(word: str, place: str, value: object) -> None:
    if not place:
        assert "model.note is no key" in refused(*ADAPTIVE, word)
        return
    found: object = configure([*ADAPTIVE, word])
    for name in place.split("."):
        assert isinstance(found, dict)
        found = found[name]
    assert found == value


@pytest.mark.slow
def test_what_a_sweep_over_a_group_has_in_common_is_given_to_each_of_its_runs(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    words = ["-m", "+hardware=a100,h100", "+policy=lru,adaptive", "hardware.link_gb_per_s=50", f"trace.path={trace}"]
    words += ["policy.transfer.serial=true", "compare=none", "hydra/launcher=basic", "hydra.sweep.dir=s"]
    found = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    kept = [yaml.safe_load(path.read_text()) for path in sorted(tmp_path.glob("s/*/.hydra/config.yaml"))]
    assert sorted((one["hardware"]["name"], one["policy"]["name"]) for one in kept) == [
        (machine, policy) for machine in ("a100", "h100") for policy in ("adaptive", "lru")
    ]
    assert {(one["hardware"]["link_gb_per_s"], one["policy"]["transfer"]["serial"]) for one in kept} == {(50, True)}


@pytest.mark.slow
def test_a_wrong_key_of_a_group_that_is_swept_over_is_refused_before_anything_runs(tmp_path: Path) -> None:
    words = ["-m", "+hardware=a100,h100", "+policy=lru", "hardware.memory=50", "hydra.sweep.dir=s"]
    found = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "hardware.memory is no key (did you mean hardware.memory_gb?)" in found.stderr
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize(
    ("name", "words", "kept"),
    [
        # Of adaptive's file: used, margin and memory are Outlook's alone.
        ("Plain", [], {}),
        ("Own", ["policy.eviction.mine=3"], {"mine": 3}),
        ("Open", [], {"used": 0.1, "margin": 1.0, "memory": 0.9}),
        # What the user gives stays, and is refused when the part is made.
        ("Plain", ["policy.eviction.used=0.3"], {"used": 0.3}),
    ],
)
def test_another_class_keeps_of_the_files_arguments_those_that_it_takes(
    name: str, words: list[str], kept: dict[str, object], parts: str
) -> None:
    target = f"{parts}.{name}"
    found = configure([*ADAPTIVE, f"policy.eviction._target_={target}", *words])
    assert found["policy"]["eviction"] == {"_target_": target, **kept}


@pytest.mark.slow
def test_a_part_of_ones_own_runs_in_any_policy_and_is_shown_with_its_change_alone(parts: str, tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    words = [*ADAPTIVE, f"policy.eviction._target_={parts}.Plain", f"trace.path={trace}", "compare=none"]
    found = run_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    assert found.out.startswith(f"adaptive with eviction={parts}.Plain (predictor: hybrid) on a100")


def test_an_exception_in_a_part_names_file_and_line(parts: str, tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors", 24)
    words = ["+hardware=a100", "+policy=lru", f"policy.eviction._target_={parts}.Boom", f"trace.path={trace}"]
    found = run_here([*words, "residency=0.01", "compare=none"], tmp_path / "run")
    line = 1 + PARTS.splitlines().index("    return key // 0")
    assert (found.code, found.err.count("\n"), found.done) == (2, 1, False)
    problem = "Boom.victim raised ZeroDivisionError: integer division or modulo by zero"
    assert f"{problem} at {tmp_path.name}/{parts}.py:{line} (" in found.err
    assert "EXPERTFLOW_TRACEBACK=1" in found.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NotMade", "NotMade raised RuntimeError when it was made at {place}: no; mend the part"),
        # The other classes of its module run, as every test here shows.
        ("Misspelt", "Misspelt.touchd is not in the contract of LRU (did you mean touched?); name helpers with a "),
    ],
)
def test_what_keeps_a_part_from_being_made_names_class_and_place(
    name: str, said: str, parts: str, tmp_path: Path
) -> None:
    words = ["+hardware=a100", "+policy=lru", f"policy.eviction._target_={parts}.{name}"]
    found = run_here([*words, "compare=none", "max_tokens=4"], tmp_path / "run")
    line = 1 + PARTS.splitlines().index('        raise RuntimeError("no")')
    assert (found.code, found.err.count("\n"), found.done) == (2, 1, False)
    assert said.format(place=f"{tmp_path.name}/{parts}.py:{line}") in found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+hardware=4090", "+policy=lru"], "hardware=4090 must be the name of one file (did you mean rtx4090?)"),
        (["+hardware=A100", "+policy=lru"], "hardware=A100 does not exist (did you mean a100?)"),
        (["+hardware=a100", "+policy=adaptiv"], "policy=adaptiv does not exist (did you mean adaptive?)"),
        ([*ADAPTIVE, "stack=grph"], "stack=grph does not exist (did you mean graph?)"),
        ([*ADAPTIVE, "compare=ful"], "compare='ful' must be one of full, floor, none (did you mean full?)"),
        ([*ADAPTIVE, "residncy=0.5"], "residncy is no key (did you mean residency?)"),
        ([*ADAPTIVE, "hardwar.memory_gb=8"], "there is no hardwar (did you mean hardware?)"),
        ([*ADAPTIVE, "policy.horizn.depth=2"], "there is no policy.horizn (did you mean policy.horizon?)"),
        (["+hardware=4090,a100", "+policy=lru"], "hardware=4090 must be the name of one file (did you mean rtx4090?)"),
        (["+hardware=rtx409", "+policy=lru"], "(did you mean rtx4090?); choose one of: rtx4090, rtx5090, rtx4080"),
        ([*ADAPTIVE, "trace=gptoss"], "trace=gptoss does not exist (did you mean gpt-oss-20b-twin?)"),
        ([*ADAPTIVE, "model=gptoss20b"], "model=gptoss20b does not exist (did you mean gpt-oss-20b?)"),
        ([*ADAPTIVE, "hydra/laucher=basic"], "hydra/laucher is no group (did you mean hydra/launcher?)"),
        ([*ADAPTIVE, "hydra.run.dri=x"], "hydra.run.dri is no key of Hydra's (did you mean hydra.run.dir?)"),
        ([*ADAPTIVE, "hydra/launcher=basik"], "hydra/launcher=basik does not exist (did you mean basic?)"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(words: list[str], said: str) -> None:
    assert said in refused(*words)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_either_launcher_may_be_chosen(launcher: str, tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    words = ["+hardware=a100", "+policy=lru", f"trace.path={trace}", "compare=none", f"hydra/launcher={launcher}"]
    assert run_here(words, tmp_path / "run").code == 0


@pytest.mark.parametrize("folder", ["sim", "replay", "traces", "expertflow"])
def test_no_message_names_a_file_that_only_a_checkout_has(folder: str) -> None:
    root = Path(__file__).parents[2]
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        texts = [
            text.value
            for node in raised
            for text in ast.walk(node)
            if isinstance(text, ast.Constant) and isinstance(text.value, str)
        ]
        found += [f"{path.name}: {text}" for text in texts if "conf/" in text or "docs/" in text or "run.yaml" in text]
    assert found == []
