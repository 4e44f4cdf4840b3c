"""Experts on the host in the table of accesses and in the timeline."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from expertflow.places.balanced import Balanced
from expertflow.places.capped import Capped
from sim.machine.host_compute import HostComputeMachine
from sim.machine.simulated import simulate
from sim.study.phases import PhaseRecorder
from sim.views.events import EventTable
from sim.views.plots import plot_timeline, plot_tpot_bars
from sim.views.timeline import Timeline, load_timeline
from tests.support.runs import Host, Job, build, compose, decode

ROUTING = [[[0, 1, 2], [3, 1]], [[1, 4, 0], [2, 3]], [[4, 2, 3], [1, 0]]]


def job_of(place: Balanced | Capped) -> Job:
    """Three tokens of two layers of five experts, four slots."""
    return build(
        decode(ROUTING, 5),
        num_experts=5,
        num_slots=4,
        policy=compose(place=place),
        host=Host(slower=1.5),
        watched=False,
    )


def run_watched(job: Job, *observers: EventTable | Timeline | PhaseRecorder) -> Job:
    """The same run with observers."""
    assert isinstance(job.machine, HostComputeMachine)
    again = type(job.runtime)(job.runtime.config, job.machine, job.runtime.policy, decode(ROUTING, 5), list(observers))
    simulate(again, job.machine)
    again.check_identities()
    return Job(again, job.machine, job.timeline)


@pytest.mark.parametrize(
    "place", [Balanced(), Capped(1), Capped(1, behind=False)], ids=["balanced", "behind", "waiting"]
)
def test_tables_and_timelines_hold_what_the_host_computed(place: Balanced | Capped, tmp_path: Path) -> None:
    job = job_of(place)
    table, timeline = EventTable(tmp_path / "events.parquet", 5), Timeline("host", 5)
    phases = PhaseRecorder(job.runtime.policy)
    counters = run_watched(job, table, timeline, phases).counters
    table.close()
    timeline.write(tmp_path / "timeline.json")

    events = pd.read_parquet(tmp_path / "events.parquet")
    assert len(events) == counters.num_accesses == phases.sums["decode"]["num_accesses"] == 15
    on_host = events[events["class"] == "host"]
    assert len(on_host) == counters.num_host > 0
    assert int(on_host["stall_ns"].sum()) == counters.host_stall_ns > 0
    assert int(events["stall_ns"].sum()) == counters.stall_ns
    assert (on_host["landed_ns"] > on_host["known_ns"]).all()

    frames = load_timeline(tmp_path / "timeline.json")
    assert int((frames.host["end_ns"] - frames.host["start_ns"]).sum()) == counters.host_busy_ns
    assert sorted(frames.host["end_ns"]) == sorted(on_host["landed_ns"].astype("int64"))
    stalls = frames.stalls[frames.stalls["kind"] == "host"]
    assert int((stalls["end_ns"] - stalls["start_ns"]).sum()) == counters.host_stall_ns
    assert (frames.host["start_ns"].to_numpy()[1:] >= frames.host["end_ns"].to_numpy()[:-1] - 5).all()


def test_a_timeline_without_a_host_has_no_track_for_it(tmp_path: Path) -> None:
    job = build(decode(ROUTING, 5), num_experts=5, num_slots=4, watched=False)
    timeline = Timeline("gpu", 5)
    again = type(job.runtime)(job.runtime.config, job.machine, job.runtime.policy, decode(ROUTING, 5), [timeline])
    simulate(again, job.machine)
    timeline.write(tmp_path / "timeline.json")
    assert '"name":"host"' not in (tmp_path / "timeline.json").read_text()
    assert len(load_timeline(tmp_path / "timeline.json").host) == 0


def test_pictures_show_what_the_host_computed_and_the_waits_for_it(tmp_path: Path) -> None:
    job, timeline = job_of(Capped(1)), Timeline("host", 5)
    run_watched(job, timeline)
    timeline.write(tmp_path / "timeline.json")
    figure = plot_timeline(load_timeline(tmp_path / "timeline.json"), 0.0, 0.0005)
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["compute", "link", "host", "stalls"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-3:] == ["miss stall", "late stall", "host stall"]
    rows = {"policy": ["lru", "cheaper"], "stack": "graph", "hardware": "a100", "tpot_ms": [3.0, 2.0]}
    stalls = {"late_ms_per_token": [0.0, 0.0], "miss_ms_per_token": [1.0, 0.2], "host_ms_per_token": [None, 0.5]}
    bars = plot_tpot_bars(pd.DataFrame(rows | stalls))
    assert "host stall" in [text.get_text() for text in bars.legends[0].get_texts()]
    without = plot_tpot_bars(pd.DataFrame(rows | stalls).drop(columns="host_ms_per_token"))
    assert "host stall" not in [text.get_text() for text in without.legends[0].get_texts()]
