"""The user's own folder, named by --config-dir: its models, hardware and policies are found wherever ours are."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from expertflow.keys import declared
from sim import collect, paths, regress, simulate
from sim.job.configure import configure
from sim.paths import CONF, config_files, folder_to_write, own_folder, use_own_folder
from tests.support.commands import TINY_MODEL, command, routing, run_here, run_there, small_trace, tiny_trace

POLICY = """defaults:
  - predictor: none
  - horizon: fixed_1
  - selection: top_k
  - eviction: last_in
  - order: resident_first
  - _self_
name: mine
"""
PART = """from expertflow.evictions.lru import LRU


class LastIn(LRU):
    def victim(self, key, cause):
        for candidate in reversed(self.pools[key // self.span]):
            if self.residency[candidate] == 2 and candidate not in self.view.pinned:
                return candidate
        return None
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a model, hardware and a policy whose eviction part is a class beside the folder."""
    folder = tmp_path / "it's mine"
    hardware = yaml.safe_load((CONF / "hardware" / "a100.yaml").read_text(encoding="utf-8"))
    for name, text in {
        "model/tiny.yaml": yaml.safe_dump(TINY_MODEL),
        "hardware/box.yaml": yaml.safe_dump({**hardware, "name": "box", "memory_gb": 7.0}),
        "policy/mine.yaml": POLICY,
        "policy/eviction/last_in.yaml": "_target_: mine.LastIn\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "mine.py").write_text(PART, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def nothing_of_ones_own() -> Iterator[None]:
    yield
    use_own_folder(None)


def test_files_of_both_folders_are_listed(mine: Path) -> None:
    assert "tiny" not in config_files("model")
    use_own_folder(mine)
    assert own_folder() == mine
    assert config_files("model")["tiny"] == mine / "model" / "tiny.yaml"
    assert config_files("model")["gpt-oss-20b"] == CONF / "model" / "gpt-oss-20b.yaml"
    assert config_files("stack") == {path.stem: path for path in (CONF / "stack").glob("*.yaml")}


def test_a_configuration_takes_files_of_both(mine: Path) -> None:
    use_own_folder(mine)
    found = configure(["+hardware=box", "+policy=mine", "model=tiny", "stack=graph"])
    assert (found["hardware"]["memory_gb"], found["model"]["name"]) == (7.0, "tiny")
    assert found["policy"]["eviction"] == {"_target_": "mine.LastIn"}
    with pytest.raises(ValueError, match=r"hardware is not chosen.*\bbox\b"):
        configure(["+policy=mine"])
    use_own_folder(None)
    assert "box" not in config_files("hardware")


def test_the_replay_still_finds_its_own_hardware(mine: Path) -> None:
    from replay.keys import ReplayKeys

    use_own_folder(mine)
    keys = declared(ReplayKeys)
    assert configure(["+hardware=local", "+policy=lru"], "replay", keys)["hardware"] == {"name": "local"}
    assert configure(["+hardware=box", "+policy=lru"], "replay", keys)["hardware"]["name"] == "box"


def test_a_calibration_takes_a_model_that_leaves_something_to_another_file(mine: Path) -> None:
    from replay.calibration.record import named_model

    (mine / "model" / "wider.yaml").write_text("defaults: [tiny, _self_]\nname: wider\nhidden_size: 1024\n")
    use_own_folder(mine)
    wider, tiny = named_model("wider"), named_model("tiny")
    assert (wider.hidden_size, wider.num_layers) == (1024, tiny.num_layers)


def test_the_command_runs_them_and_finds_the_model_that_the_trace_names(mine: Path, tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "t.safetensors")
    words = ["--config-dir", str(mine), "+hardware=box", "+policy=mine", f"trace.path={trace}", "compare=none"]
    found = run_there(words, tmp_path / "run", cwd=tmp_path)
    assert found.code == 0, found.err
    metrics = found.metrics()
    assert [metrics[key] for key in ("hardware", "policy", "model")] == ["box", "mine", "tiny"]
    # Another run of the same process does not find them any more.
    assert "tiny" not in config_files("model")


def test_a_model_that_takes_what_it_leaves_out_from_another_file_is_found_by_the_trace_too(
    mine: Path, tmp_path: Path
) -> None:
    (mine / "model" / "wider.yaml").write_text("defaults: [tiny, _self_]\nname: wider\nhidden_size: 1024\n")
    trace = small_trace(tmp_path / "t.safetensors", 6, 1, shape=(4, 8, 2), model="wider")
    words = ["--config-dir", str(mine), "+hardware=a100", "+policy=lru", f"trace.path={trace}"]
    found = run_here([*words, "compare=none"], tmp_path / "run")
    assert found.code == 0, found.err
    assert found.metrics()["model"] == "wider"
    origin = json.loads((found.folder / "provenance.json").read_text())
    assert (origin["model"]["hidden_size"], origin["model"]["num_layers"]) == (1024, 4)
    sweep = ["-m", *words, "compare=none", "residency=0.5,1", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path}/s"]
    assert run_here(sweep, tmp_path).code == 0
    keys = {"hardware": "a100", "policy": "lru", "compare": "none", "config_dir": mine}
    assert simulate(trace=str(trace), **keys).metrics["model"] == "wider"
    given = {"experts": routing((4, 8, 2), 6), "model": "wider"}
    assert simulate(trace=given, **keys).metrics["elapsed_ns"] == found.metrics()["elapsed_ns"]


@pytest.mark.slow
def test_a_sweep_finds_them_in_every_process(mine: Path, tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "t.safetensors")
    words = ["-m", "--config-dir", str(mine), "+hardware=box,a100", "+policy=mine", f"trace.path={trace}"]
    words += ["residency=0.25,0.5", "compare=none", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 's'}"]
    found = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    table = collect.collect(tmp_path / "s")
    assert sorted(table["hardware"]) == ["a100", "a100", "box", "box"]


def test_pinned_runs_may_name_them(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trace(tmp_path / "t.safetensors")
    pins = tmp_path / "pins.json"
    pins.write_text('{"runs": {"own": {"overrides": ["+hardware=box", "+policy=lru", "trace.path=t.safetensors"]}}}')
    assert regress.main(["record", str(pins)]) == 2
    assert regress.main(["record", str(pins), "--config-dir", str(mine)]) == 0
    assert regress.main(["check", str(pins), "--config-dir", str(mine)]) == 0
    assert "1 of 1 runs identical" in capsys.readouterr().out


def test_a_name_that_is_taken_is_refused(mine: Path, tmp_path: Path) -> None:
    shutil.copy(CONF / "hardware" / "a100.yaml", mine / "hardware" / "a100.yaml")
    with pytest.raises(ValueError, match=r"a100\.yaml: a file of that name comes with the package"):
        use_own_folder(mine)
    assert own_folder() is None
    found = run_here(["--config-dir", str(mine), "+hardware=a100", "+policy=lru"], tmp_path / "run")
    assert (found.code, found.err.count("\n"), found.done) == (2, 1, False)
    assert "give yours another" in found.err


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config-dir=.*nowhere: no such folder"):
        use_own_folder(tmp_path / "nowhere")
    found = run_here(["--config-dir", str(tmp_path / "nowhere"), "+hardware=a100", "+policy=lru"], tmp_path / "run")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "nowhere" in found.err


@pytest.mark.parametrize(
    ("text", "place"), [("name: ${o", "name"), ("name: mine\nsources:\n  a: [x, '${']\n", r"sources\.a\[1\]")]
)
def test_a_broken_interpolation_is_told_with_file_and_key(text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"stack/mine\.yaml: {place}: is no interpolation \(.*\); write "):
        use_own_folder(tmp_path)
    (tmp_path / "stack" / "mine.yaml").write_text("name: ${model.name}\n", encoding="utf-8")
    use_own_folder(tmp_path)


def test_the_packages_own_folder_is_no_other(tmp_path: Path) -> None:
    use_own_folder(CONF)
    assert own_folder() is None


def test_nothing_is_written_into_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_to_write(None) == CONF
    assert folder_to_write(tmp_path / "new" / "mine") == tmp_path / "new" / "mine"
    assert own_folder() == tmp_path / "new" / "mine"
    monkeypatch.setattr(paths, "INSTALLED", True)
    with pytest.raises(ValueError, match="--config-dir FOLDER"):
        folder_to_write(None)
