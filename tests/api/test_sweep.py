"""Sweeps: every combination, the table that `python -m sim.collect` makes, and what is left when something fails."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from expertflow.evictions.lru import LRU
from sim import SweepError, SweepInterrupted, simulate, sweep
from sim.collect import collect
from tests.support.commands import ROOT, command, small_trace

SWEPT: dict[str, Any] = {"hardware": ["a100", "h100"], "policy": ["lru", "on_demand"], "residency": [0.25, 0.5]}


class Fails(LRU):
    """Raises at its first victim."""

    def victim(self, key: int, cause: int) -> int | None:
        raise OSError("no victim today")


class Interrupts(LRU):
    """As if Ctrl-C were pressed while it runs."""

    def victim(self, key: int, cause: int) -> int | None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("sweep") / "t.safetensors", 16)


@pytest.mark.slow
def test_the_table_has_what_was_swept_and_what_collect_gives(trace: Path, tmp_path: Path) -> None:
    found = sweep(**SWEPT, trace=trace, jobs=1, out=tmp_path / "sweep", batch_size=[1, 2])
    assert len(found) == len(found.results) == 16
    assert found.swept == ("hardware", "policy", "residency", "batch_size")
    table = found.table
    assert list(table.columns[:5]) == ["run", *found.swept]
    assert table["run"][0] == "hardware=a100,policy=lru,residency=0.25,batch_size=1"
    assert table["batch_size"].tolist() == [1, 2] * 8
    collected = collect(tmp_path / "sweep").set_index("run").loc[table["run"]].reset_index()
    measured = collected.loc[:, "schema":]
    assert_frame_equal(table[measured.columns], measured)
    assert collected["batch_size"].tolist() == table["batch_size"].tolist()
    assert str(found).splitlines()[0].split()[:4] == list(found.swept)
    assert "<table" in found._repr_html_()
    assert repr(found) == "<Sweep over hardware, policy, residency, batch_size: 16 runs>"


@pytest.mark.slow
def test_the_commands_sweep_has_the_same_rows_and_workers_give_the_same_results(trace: Path, tmp_path: Path) -> None:
    words = ["+hardware=a100,h100", "+policy=lru,on_demand", "residency=0.25,0.5", f"trace.path={trace}"]
    told = command("-m", *words, "compare=none", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.n_jobs=1")
    subprocess.run(told, cwd=ROOT, capture_output=True, timeout=300, check=True)
    keys = ["hardware", "policy", "residency"]
    there = collect(tmp_path).sort_values(keys, ignore_index=True).loc[:, "schema":]
    here = sweep(**SWEPT, trace=trace, jobs=2, events=True)
    assert_frame_equal(here.table.sort_values(keys, ignore_index=True)[there.columns], there)
    alone = sweep(**SWEPT, trace=trace, jobs=1)
    assert [one.metrics for one in alone] == [one.metrics for one in here]
    # Recorded in the workers; the others are run again here.
    assert_frame_equal(here[3].events, alone[3].events)
    assert str(here[3]) == str(alone[3])


def test_a_result_is_the_simulations_and_can_be_kept(trace: Path) -> None:
    found = sweep(hardware="a100", policy=["lru"], trace=trace, max_tokens=[8, None], jobs=1, timeline=True)
    assert found.table["max_tokens"].isna().tolist() == [False, True]
    alone = simulate(hardware="a100", policy="lru", trace=trace, max_tokens=8, compare="none")
    assert found[0].metrics == alone.metrics
    kept = pickle.loads(pickle.dumps(found))
    assert kept[0].metrics == alone.metrics
    assert_frame_equal(kept[0].timeline.link, alone.timeline.link)


def test_asked_values_stand_where_a_metric_has_the_same_name(trace: Path) -> None:
    table = sweep(hardware="a100", policy="lru", residency=[0.3], trace=trace, jobs=1).table
    assert table["residency"].tolist() == [0.3]
    assert table["capacity.residency"].tolist() == [230 / 768]


def test_a_failing_run_stops_no_other_and_what_finished_is_at_hand(trace: Path) -> None:
    policies: list[Any] = ["lru", {"name": "lru", "eviction": Fails}, "on_demand"]
    with pytest.raises(
        SweepError, match=r"^1 of 3 runs failed; the first, policy=.*Fails: Fails.victim raised"
    ) as found:
        sweep(hardware="a100", policy=policies, residency=0.1, trace=trace, jobs=1)
    assert isinstance(found.value, ValueError)
    assert [one.metrics["policy"] for one in found.value.finished] == ["lru", "on_demand"]
    assert list(found.value.failures) == ["policy=lru-with-eviction=Fails"]
    sent = pickle.loads(pickle.dumps(found.value))
    assert (str(sent), len(sent.finished), sent.failures) == (str(found.value), 2, found.value.failures)


def test_an_interruption_hands_over_what_finished(trace: Path) -> None:
    policies: list[Any] = ["lru", {"name": "lru", "eviction": Interrupts}, "on_demand"]
    with pytest.raises(SweepInterrupted) as found:
        sweep(hardware="a100", policy=policies, residency=0.1, trace=trace, jobs=1)
    assert isinstance(found.value, KeyboardInterrupt)
    assert len(found.value.finished) == 1
    # And the next one runs.
    assert len(sweep(hardware="a100", policy=["lru"], trace=trace, jobs=1)) == 1


INTERRUPTED = """
import os, signal, sys, threading, time
from expertflow.evictions.lru import LRU
from sim import SweepInterrupted, sweep


class Slow(LRU):
    def victim(self, key, cause):
        time.sleep(600)


keys = {"hardware": "a100", "trace": TRACE, "residency": 0.1, "jobs": 2}


def press():
    while not os.path.exists("sweep/policy=lru/DONE"):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=press, daemon=True).start()
try:
    sweep(policy=["lru", {"name": "lru", "eviction": Slow}, "on_demand"], out="sweep", **keys)
except SweepInterrupted as error:
    print(len(error.finished), "finished")
print(len(sweep(policy=["lru", "on_demand"], out="sweep", skip_done=True, **keys)), "in the end")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_the_workers_and_the_program_goes_on(trace: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(INTERRUPTED.replace("TRACE", repr(str(trace))), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.stdout.splitlines() == ["1 finished", "2 in the end"], done.stderr
    assert done.returncode == 0
    assert time.monotonic() - begun < 200


def test_progress_is_logged_and_nothing_printed(
    trace: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "expertflow"):
        sweep(hardware="a100", policy=["lru", "on_demand"], trace=trace, jobs=1)
    assert [record.getMessage() for record in caplog.records] == ["1/2 policy=lru: done", "2/2 policy=on_demand: done"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_names_that_make_one_folder_are_two_folders(trace: Path, tmp_path: Path) -> None:
    policies = [{"name": "lru", "eviction": {"scope": scope}} for scope in ("global", "layer")]
    named = [{**policy, "transfer": {"memory": "pinned"}} for policy in policies]
    found = sweep(hardware="a100", policy=[*policies, *named], trace=trace, jobs=1, out=tmp_path)
    assert len({path.parent for path in tmp_path.rglob("DONE")}) == 4
    copies = [tmp_path / "a b.safetensors", tmp_path / "a-b.safetensors"]
    for copy in copies:
        copy.write_bytes(trace.read_bytes())
    found = sweep(hardware="a100", policy="lru", trace=copies, jobs=1, out=tmp_path / "traces")
    assert [one.metrics["trace"]["name"] for one in found] == ["a b", "a-b"]
    assert sorted(path.parent.name for path in (tmp_path / "traces").rglob("DONE")) == sorted(found.table["run"])


def test_a_column_of_text_and_numbers_is_as_given(trace: Path, tmp_path: Path) -> None:
    found = sweep(hardware="a100", policy="lru", trace=[trace, str(trace)], seed=pd.Series([1, 2]), jobs=1)
    assert found.table["seed"].tolist() == [1, 2, 1, 2]
    assert found.table["trace"].tolist() == [str(trace)] * 2 + [f"{trace} #2"] * 2
