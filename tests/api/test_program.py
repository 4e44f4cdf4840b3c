"""A program that simulates stays as it was: its Hydra, its folder, its output, its threads, its memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import OmegaConf

from sim import simulate, sweep
from sim.paths import own_folder
from tests.support.commands import ROOT, small_trace


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trace = small_trace(tmp_path_factory.mktemp("program") / "t.safetensors")
    return {"hardware": "a100", "trace": trace, "compare": "none"}


def program(text: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of its own process, run in `folder`."""
    path = folder / "program.py"
    path.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(path), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


# -- Hydra ---------------------------------------------------------------------------------------------------

APPLICATION = """
import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import getbase
from omegaconf import OmegaConf

OmegaConf.register_new_resolver("slug", lambda text: f"mine: {text}")


@hydra.main(config_path="conf", config_name="app", version_base="1.2")
def main(cfg):
    from sim import simulate, sweep

    mine = GlobalHydra.instance().hydra
    result = simulate(hardware=cfg.machine, policy="adaptive", trace=TRACE, compare="none", config_dir="own")
    print(result.metrics["policy"], result.metrics["hardware"])
    print(len(sweep(hardware=["a100", "h100"], policy="lru", trace=TRACE, jobs=1)))
    assert GlobalHydra.instance().hydra is mine
    assert HydraConfig.get().job.name == "program", HydraConfig.get().job.name
    assert str(getbase()) == "1.2"
    print(OmegaConf.create({"a": "${slug:x}"}).a, compose("app").machine, cfg.machine)


main()
"""


@pytest.mark.slow
def test_it_runs_within_a_hydra_application_and_leaves_it_alone(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text("machine: h100\nhydra: {run: {dir: out}}\n", encoding="utf-8")
    (tmp_path / "own" / "hardware").mkdir(parents=True)
    (tmp_path / "own" / "hardware" / "mine.yaml").write_text("defaults: [a100, _self_]\nname: mine\n", encoding="utf-8")
    done = program(APPLICATION.replace("TRACE", repr(str(keys["trace"]))), tmp_path, "machine=mine")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # An application of Hydra's shows what is logged.
    said = [line for line in done.stdout.splitlines() if "[expertflow][INFO]" not in line]
    assert said == ["adaptive mine", "2", "mine: x h100 mine"]


def test_no_global_state_is_left_behind(keys: dict[str, Any]) -> None:
    simulate(policy="lru", **keys)
    base = VersionBase.instance()
    HydraConfig.instance()
    before = (dict(Singleton._instances), base.version_base, HydraConfig.instance().cfg)
    resolvers = {name for name in ("slug", "groups", "now") if OmegaConf.has_resolver(name)}
    handlers = [multiprocessing.current_process().name, *warnings.filters]
    result = simulate(policy={"name": "adaptive", "horizon": {"max_distance": 3}}, **keys)
    with pytest.raises(ValueError, match="does not exist"):
        simulate(policy="nosuch", **keys)
    _ = result.events, str(result), result.plot()
    assert (dict(Singleton._instances), base.version_base, HydraConfig.instance().cfg) == before
    assert not GlobalHydra.instance().is_initialized()
    assert {name for name in ("slug", "groups", "now") if OmegaConf.has_resolver(name)} == resolvers
    assert [multiprocessing.current_process().name, *warnings.filters] == handlers
    assert own_folder() is None


BEFORE = """
import sys
from sim import simulate
assert not any(name in sys.modules for name in ("torch", "IPython", "matplotlib.pyplot")), "loaded too much"
import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
simulate(hardware="a100", policy="lru", trace=TRACE, max_tokens=4, compare="none")
assert not OmegaConf.has_resolver("slug") and not OmegaConf.has_resolver("groups")
assert not GlobalHydra.instance().is_initialized()
assert not any(name in sys.modules for name in ("torch", "IPython", "matplotlib.pyplot", "sim.app"))
with hydra.initialize_config_dir(CONF, version_base="1.3"):
    print(hydra.compose("config", ["+hardware=h100", "+policy=lru"]).hardware.name)
"""


@pytest.mark.slow
def test_a_program_that_composes_for_itself_afterwards_can(keys: dict[str, Any], tmp_path: Path) -> None:
    text = BEFORE.replace("TRACE", repr(str(keys["trace"]))).replace("CONF", repr(str(ROOT / "conf")))
    done = program(text, tmp_path)
    assert (done.stdout, done.stderr) == ("h100\n", "")


def test_importing_sim_loads_none_of_it() -> None:
    code = "import sim, sys; print([m for m in ('hydra', 'pandas', 'matplotlib', 'sim.api') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_what_is_not_there_is_an_attribute_error() -> None:
    import sim

    assert {"simulate", "sweep"} <= set(dir(sim))
    with pytest.raises(AttributeError, match="module 'sim' has no attribute 'simulat'"):
        _ = sim.simulat


# -- files and output ----------------------------------------------------------------------------------------


def test_nothing_is_written_and_nothing_printed(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("TMPDIR", "XDG_CACHE_HOME", "HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    result = simulate(policy="adaptive", events=True, timeline=True, **{**keys, "compare": "full"})
    _ = str(result), result._repr_html_(), result.plot("timeline"), result.table
    sweep(policy=["lru", "on_demand"], jobs=1, **keys).plot("tpot_ms")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert capfd.readouterr() == ("", "")


def test_twice_in_one_process_is_the_same_twice(keys: dict[str, Any]) -> None:
    first = simulate(policy="adaptive", seed=3, **keys)
    simulate(policy="oracle", **{**keys, "hardware": "h20"})
    assert simulate(policy="adaptive", seed=3, **keys).metrics == first.metrics


def test_a_result_is_its_own(keys: dict[str, Any]) -> None:
    result = simulate(policy="lru", **keys)
    text = str(result)
    table = result.table
    table["tpot_ms"] = 0.0
    assert str(result) == text
    assert result.table["tpot_ms"].min() > 0


# -- threads and processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_threads_take_turns(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.yaml").write_text("defaults: [lru, _self_]\nname: mine\n", encoding="utf-8")
    asked: list[dict[str, Any]] = [
        {"policy": "mine", "config_dir": tmp_path} if number % 2 else {"policy": "adaptive", "seed": number}
        for number in range(6)
    ]
    alone = [simulate(**one, **keys).metrics for one in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: simulate(**one, **keys).metrics, asked))
        limited = pool.submit(lambda: simulate(policy="lru", timeout_s=60, **keys).metrics).result()
    assert found == alone
    assert limited["policy"] == "lru"


@pytest.mark.slow
def test_a_sweep_in_a_thread_has_workers_and_so_has_the_next(keys: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: sweep(policy=["lru", "on_demand"], jobs=2, **keys).table).result()
    assert found.equals(sweep(policy=["lru", "on_demand"], jobs=2, **keys).table)


def tpot(asked: dict[str, Any]) -> Any:
    """Run in another process."""
    return simulate(**asked)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_of_a_pool_simulate_and_send_their_results(method: str, keys: dict[str, Any]) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    asked = [{"policy": policy, **keys} for policy in ("lru", "adaptive", "on_demand")]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        found = list(pool.map(tpot, asked))
    assert [one.metrics for one in found] == [simulate(**one).metrics for one in asked]
    assert found[0].events["stall_ns"].sum() == found[0].metrics["stall_ns"]


# -- memory --------------------------------------------------------------------------------------------------

REPEATED = """
import gc, resource
from sim import simulate

keys = {"hardware": "a100", "trace": TRACE, "compare": "none", "events": True, "timeline": True}
peaks = []
for number in range(60):
    simulate(policy="adaptive", **keys).plot("timeline")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[9], peaks[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_the_peak_of_memory_does_not_grow_from_run_to_run(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors", 48)
    done = program(REPEATED.replace("TRACE", repr(str(trace))), tmp_path)
    assert done.returncode == 0, done.stderr
    tenth, last = map(int, done.stdout.split())
    # A run's events and timeline alone are 0.5 MiB: kept, fifty of them would be 25 MiB.
    assert last - tenth < 8 << 10
