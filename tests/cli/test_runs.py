"""What a run leaves: the same bytes for the same job, every promised key, `DONE` last; sweeps that go on."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from sim import collect, regress
from sim.job.output import code_sha256
from sim.paths import DATA
from tests.support.commands import ROOT, command, job, run_here, run_there, small_trace
from tests.support.recordings import named, recordings

LRU = ("+hardware=a100", "+policy=lru")
ADAPTIVE = ("+hardware=a100", "+policy=adaptive")
FILES = {".hydra", "DONE", "metrics.json", "provenance.json"}

TIMES = {"mean", "p50", "p95", "p99"}
NESTED: dict[str, set[str]] = {
    "trace": {"name", "sha256", "num_tokens", "num_requests"},
    "capacity": {"num_slots", "residency"},
    "prefetch": {"requested", "issued", "useful", "late", "wasted", "redundant", "dropped", "dropped_by_reason"},
    "bytes": {"demand", "prefetch"},
    "link": {"busy_ns", "utilisation"},
    "tpot_ms": TIMES,
    "ttft_ms": TIMES,
    "horizon": {"mean", "min", "max"},
    "bounds": {"floor_ns", "serial_ns", "min_loads", "clairvoyant_ns", "clairvoyant"},
    "compare": {"on_demand", "lru", "clairvoyant"},
}
PLAIN = {
    "schema",
    "world",
    "policy",
    "predictor",
    "hardware",
    "model",
    "stack",
    "uses_future",
    "num_tokens",
    "num_forwards",
    "elapsed_ns",
    "compute_ns",
    "stall_ns",
    "late_stall_ns",
    "miss_stall_ns",
    "overhead_ns",
    "num_accesses",
    "num_hits",
    "num_late",
    "num_misses",
    "num_evictions",
    "num_streamed_layers",
    "tokens_per_s",
}
HEAD = {"schema", "world", "policy", "predictor", "hardware", "model", "stack", "trace", "uses_future", "capacity"}
BESIDE = {"bounds", "compare"}
"""Keys of the main run that the runs beside it do not repeat, with those of `HEAD`."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("trace") / "small.safetensors", 40, 4)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- one run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_job_gives_the_same_bytes_twice_here_and_in_two_processes(trace: Path, tmp_path: Path) -> None:
    words = [*ADAPTIVE, f"trace.path={trace}", "count_redundant=true"]
    found = [run_here(words, tmp_path / "first"), run_here(words, tmp_path / "second")]
    for hash_seed in ("1", "2"):
        os.environ["PYTHONHASHSEED"] = hash_seed
        try:
            found.append(run_there(words, tmp_path / hash_seed, cwd=tmp_path))
        finally:
            del os.environ["PYTHONHASHSEED"]
    assert [one.code for one in found] == [0, 0, 0, 0], [one.err for one in found]
    assert len({(one.folder / "metrics.json").read_bytes() for one in found}) == 1
    assert names(found[2].folder) == FILES


@pytest.mark.slow
def test_other_jobs_in_between_change_nothing(trace: Path, tmp_path: Path) -> None:
    words = [*ADAPTIVE, f"trace.path={trace}", "compare=none"]
    first = run_here(words, tmp_path / "first")
    run_here([*LRU, f"trace.path={trace}", "batch_size=3", "residency=0.1"], tmp_path / "other")
    again = run_here(words, tmp_path / "again")
    assert (first.folder / "metrics.json").read_bytes() == (again.folder / "metrics.json").read_bytes()


def test_metrics_have_the_promised_keys_and_no_other(trace: Path, tmp_path: Path) -> None:
    metrics = run_here([*ADAPTIVE, f"trace.path={trace}"], tmp_path / "run").metrics()
    assert set(metrics) == PLAIN | set(NESTED)
    for key, keys in NESTED.items():
        assert set(metrics[key]) == keys, key
    reasons = metrics["prefetch"]["dropped_by_reason"]
    assert set(reasons) == {"replaced", "passed", "refused", "became_demand"}
    assert metrics["prefetch"]["dropped"] == sum(reasons.values())
    for other in metrics["compare"].values():
        assert set(other) == (PLAIN | set(NESTED)) - HEAD - BESIDE
    assert (metrics["schema"], metrics["world"], metrics["prefetch"]["redundant"]) == (1, "sim", None)


def test_the_identities_hold_in_the_file(trace: Path, tmp_path: Path) -> None:
    found = run_here([*ADAPTIVE, f"trace.path={trace}", "stack=graph"], tmp_path / "run").metrics()
    for one in (found, *found["compare"].values()):
        assert one["num_accesses"] == one["num_hits"] + one["num_late"] + one["num_misses"]
        assert one["stall_ns"] == one["late_stall_ns"] + one["miss_stall_ns"]
        assert one["elapsed_ns"] == one["compute_ns"] + one["stall_ns"] + one["overhead_ns"]
        prefetch = one["prefetch"]
        assert prefetch["issued"] == prefetch["useful"] + prefetch["late"] + prefetch["wasted"]
        assert one["link"]["utilisation"] == pytest.approx(one["link"]["busy_ns"] / one["elapsed_ns"])
    bounds = found["bounds"]
    assert bounds["serial_ns"] <= bounds["floor_ns"] <= bounds["clairvoyant_ns"]
    assert bounds["clairvoyant_ns"] == found["compare"]["clairvoyant"]["elapsed_ns"]


def test_compare_none_leaves_out_what_stands_beside(trace: Path, tmp_path: Path) -> None:
    metrics = run_here([*LRU, f"trace.path={trace}", "compare=none"], tmp_path / "run").metrics()
    assert (metrics["compare"], metrics["bounds"]) == (None, None)


def test_a_cut_trace_reports_the_requests_that_ran(trace: Path) -> None:
    assert job(*LRU, f"trace.path={trace}", "compare=none", "max_tokens=15")["trace"]["num_requests"] == 2


def test_compare_floor_gives_the_floor_alone(trace: Path) -> None:
    told = (*LRU, f"trace.path={trace}")
    full, alone = job(*told, "compare=full"), job(*told, "compare=floor")
    assert alone["compare"] is None
    assert alone["bounds"] == full["bounds"] | {"clairvoyant_ns": None, "clairvoyant": None}


def test_provenance_says_where_the_result_came_from(trace: Path, tmp_path: Path) -> None:
    found = run_here([*LRU, f"trace.path={trace}", "compare=none"], tmp_path / "run")
    origin = json.loads((found.folder / "provenance.json").read_text())
    assert origin["trace_sha256"] == found.metrics()["trace"]["sha256"]
    assert re.fullmatch(r"[0-9a-f]{64}", origin["code_sha256"])
    assert {"python", "expertflow", "simpy", "numpy", "hydra-core"} <= set(origin["versions"])
    assert None not in origin["versions"].values()
    assert origin["overrides"] == [*LRU, f"trace.path={trace}", "compare=none"]
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", origin["commit"])
        assert isinstance(origin["dirty"], bool)


def test_done_is_written_last(trace: Path, tmp_path: Path) -> None:
    folder = run_here([*LRU, f"trace.path={trace}", "compare=none"], tmp_path / "run").folder
    times = {name: (folder / name).stat().st_mtime_ns for name in ("metrics.json", "provenance.json", "DONE")}
    assert list(times.values()) == sorted(times.values())
    assert set(json.loads((folder / "DONE").read_text())) == {"asked", "files", "code"}


def test_a_run_that_fails_takes_an_older_done_away(trace: Path, tmp_path: Path) -> None:
    words = [*LRU, f"trace.path={trace}", "compare=none"]
    assert run_here(words, tmp_path / "run").done
    failed = run_here([*words, "warmup_forwards=9999"], tmp_path / "run")
    assert (failed.code, failed.done) == (2, False)


@pytest.mark.slow
def test_timeline_and_events_are_written_if_asked_for(trace: Path, tmp_path: Path) -> None:
    words = [*ADAPTIVE, f"trace.path={trace}", "compare=none"]
    found = run_here([*words, "timeline=true", "events=true"], tmp_path / "run")
    assert names(found.folder) == FILES | {"timeline.json", "events.parquet"}
    metrics = found.metrics()
    events = pd.read_parquet(found.folder / "events.parquet")
    assert len(events) == metrics["num_accesses"]
    assert int(events["stall_ns"].sum()) == metrics["stall_ns"]
    assert json.loads((found.folder / "timeline.json").read_text())["traceEvents"]
    plain = run_here(words, tmp_path / "plain")
    assert names(plain.folder) == FILES
    assert plain.metrics() == metrics


@pytest.mark.slow
def test_a_run_works_from_another_folder_with_its_own_folder_and_a_relative_trace(trace: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    there.mkdir()
    words = [*LRU, f"trace.path={os.path.relpath(trace, there)}", "compare=none"]
    found = subprocess.run(command(*words), cwd=there, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    folders = [path.parent for path in there.rglob("DONE")]
    assert len(folders) == 1
    assert folders[0].relative_to(there).parts[0] == "outputs"
    assert f"written to {folders[0].relative_to(there)}" in found.stdout


COLUMNS = [
    "policy",
    "TPOT ms",
    "ms/token",
    "stall ms",
    "late",
    "miss",
    "of on-demand",
    "hits",
    "prefetch used",
    "link busy",
]


def table_of(out: str, beside: bool = True) -> dict[str, list[str]]:
    """The cells of the printed table by first cell, cut where its columns end: right-aligned below their titles.

    beside: other runs stand in it, on-demand among them.
    """
    lines = out.splitlines()
    top = next(number for number, line in enumerate(lines) if line.startswith("policy "))
    columns = [title for title in COLUMNS if title != "of on-demand" or beside]
    assert re.split(r" {2,}", lines[top].strip()) == columns
    ends = [lines[top].index(title) + len(title) for title in columns[1:]]
    width = lines[top].index(COLUMNS[1])
    rows = {}
    for line in lines[top + 1 :]:
        if line.startswith("  "):
            break
        name = line[:width].split()[0]
        starts = [len(name), *ends[:-1]]
        rows[name] = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return rows


def cells(metrics: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    """What the table must say of a run, from its metrics and those of on_demand."""
    tokens, prefetch = metrics["num_tokens"], metrics["prefetch"]
    times = (metrics[key] / tokens / 1e6 for key in ("elapsed_ns", "stall_ns", "late_stall_ns", "miss_stall_ns"))
    used = prefetch["useful"] + prefetch["late"]
    return [
        f"{metrics['tpot_ms']['mean']:.3f}",
        *(f"{value:.3f}" for value in times),
        *([f"{100 * metrics['stall_ns'] / base['stall_ns']:.2f} %"] if base else []),
        f"{100 * metrics['num_hits'] / metrics['num_accesses']:.2f} %",
        f"{100 * used / prefetch['issued']:.1f} %" if prefetch["issued"] else "–",
        f"{100 * metrics['link']['utilisation']:.1f} %",
    ]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(
    ("policy", "beside"),
    [
        ("adaptive", ["on_demand", "lru", "clairvoyant"]),
        ("lru", ["on_demand", "clairvoyant"]),
        ("clairvoyant", ["on_demand", "lru"]),
    ],
)
def test_the_table_has_a_row_for_each_run_beside_but_not_the_runs_own(
    policy: str, beside: list[str], tmp_path: Path
) -> None:
    path = small_trace(tmp_path / "t.safetensors", 40, 4, prompt=3)
    found = run_here(["+hardware=a100", f"+policy={policy}", f"trace.path={path}"], tmp_path / "run")
    rows, metrics = table_of(found.out), found.metrics()
    assert list(rows) == [policy, *beside, "floor"]
    base = metrics["compare"]["on_demand"]
    assert rows[policy] == cells(metrics, base)
    for name in beside:
        assert rows[name] == cells(metrics["compare"][name], base)
    floor_ms = metrics["bounds"]["floor_ns"] / metrics["num_tokens"] / 1e6
    assert rows["floor"] == ["", f"{floor_ms:.3f}", *[""] * 7]
    assert float(rows["floor"][1]) <= min(float(cells_[1]) for cells_ in rows.values())


def test_the_table_of_a_run_alone_is_one_row(trace: Path, tmp_path: Path) -> None:
    found = run_here([*ADAPTIVE, f"trace.path={trace}", "compare=none"], tmp_path / "run")
    assert table_of(found.out, beside=False) == {"adaptive": cells(found.metrics(), None)}


def test_the_table_of_a_prompt_alone_has_no_time_between_tokens(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.safetensors", 4, 1, prompt=3)
    found = run_here([*LRU, f"trace.path={path}", "compare=none", "max_tokens=2"], tmp_path / "run")
    assert found.metrics()["tpot_ms"]["mean"] is None
    assert table_of(found.out, beside=False)["lru"][0] == "–"


def test_redundant_prefetches_are_told_of_below_the_table(trace: Path, tmp_path: Path) -> None:
    found = run_here([*ADAPTIVE, f"trace.path={trace}", "count_redundant=true", "compare=none"], tmp_path / "run")
    prefetch = found.metrics()["prefetch"]
    assert f"{prefetch['redundant']} of {prefetch['useful']} useful prefetches were redundant" in found.out


def test_no_more_prefetches_are_used_than_issued_after_a_warm_up(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.safetensors", 40, 4, prompt=3)
    told = ("+hardware=a100", "+policy=clairvoyant", f"trace.path={path}", "compare=none", "stack=graph")
    prefetch = job(*told, "warmup_forwards=3")["prefetch"]
    assert prefetch["useful"] + prefetch["late"] <= prefetch["issued"]


@pytest.mark.parametrize("path", recordings("train", "eval"), ids=named)
def test_a_recorded_trace_runs_between_floor_and_on_demand(path: Path) -> None:
    metrics = job("+hardware=a100", "+policy=adaptive", f"trace.path={path}", "max_tokens=120")
    bounds, beside = metrics["bounds"], metrics["compare"]
    assert metrics["model"] == "gpt-oss-20b"
    assert bounds["floor_ns"] <= bounds["clairvoyant_ns"] < metrics["elapsed_ns"] < beside["on_demand"]["elapsed_ns"]


# -- runs with a known answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [LRU, ADAPTIVE])
def test_warm_up_and_measured_part_add_up_to_the_whole(words: tuple[str, ...], trace: Path) -> None:
    told = (*words, f"trace.path={trace}", "compare=none", "stack=graph")
    whole, begin, rest = job(*told), job(*told, "max_tokens=15"), job(*told, "warmup_forwards=15")
    counts = [
        "num_tokens",
        "num_forwards",
        "num_accesses",
        "num_hits",
        "num_late",
        "num_misses",
        "elapsed_ns",
        "compute_ns",
        "overhead_ns",
        "late_stall_ns",
        "miss_stall_ns",
        "num_evictions",
    ]
    assert [begin[key] + rest[key] for key in counts] == [whole[key] for key in counts]
    assert (begin["num_forwards"], rest["num_forwards"]) == (15, 25)
    assert begin["bytes"]["demand"] + rest["bytes"]["demand"] == whole["bytes"]["demand"]


def test_a_warm_up_has_no_floor_to_hold_against(trace: Path) -> None:
    bounds = job(*LRU, f"trace.path={trace}", "warmup_forwards=15")["bounds"]
    assert (bounds["floor_ns"], bounds["serial_ns"]) == (None, None)


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("policy", ["adaptive", "fixed_2", "oracle", "lru"])
def test_redundant_prefetches_are_useful_ones(policy: str, trace: Path) -> None:
    told = ("+hardware=a100", f"+policy={policy}", f"trace.path={trace}", "compare=none", "stack=graph")
    prefetch = job(*told, "count_redundant=true")["prefetch"]
    assert job(*told, "count_redundant=false")["prefetch"] == {**prefetch, "redundant": None}
    assert 0 <= prefetch["redundant"] <= prefetch["useful"]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("policy", ["adaptive", "oracle"])
def test_redundant_prefetches_of_warm_up_and_measured_part_add_up(policy: str, trace: Path) -> None:
    told = (
        "+hardware=a100",
        f"+policy={policy}",
        f"trace.path={trace}",
        "compare=none",
        "count_redundant=true",
        "residency=0.25",
        "policy/eviction=lru",
    )
    whole, begin, rest = job(*told), job(*told, "max_tokens=15"), job(*told, "warmup_forwards=15")
    redundant = [one["prefetch"]["redundant"] for one in (begin, rest, whole)]
    assert redundant[0] + redundant[1] == redundant[2] > 0


@pytest.mark.parametrize("policy", ["lru", "lru_per_layer", "lfu", "belady", "two_level", "adaptive", "clairvoyant"])
def test_all_experts_resident_from_the_start_never_stall(policy: str, trace: Path) -> None:
    told = (f"+policy={policy}", f"trace.path={trace}", "compare=none", "residency=1.0", "start=resident")
    metrics = job("+hardware=a6000", *told)
    assert (metrics["stall_ns"], metrics["num_misses"], metrics["bytes"]["demand"]) == (0, 0, 0)


@pytest.mark.mostly_slow(keep=6)
@pytest.mark.parametrize("words", ["", "batch_size=3", "residency=0.01", "chunk_mib=1 channel_depth=1"])
@pytest.mark.parametrize("policy", ["on_demand", "hf_offload", "lru", "adaptive", "oracle", "clairvoyant"])
def test_copies_in_no_time_never_stall(policy: str, words: str, trace: Path) -> None:
    told = (f"+policy={policy}", f"trace.path={trace}", "compare=none", "max_tokens=20", *words.split())
    metrics = job("+hardware=ideal_link", "hardware.decide_ns=0", *told)
    assert (metrics["num_late"], metrics["link"]["busy_ns"]) == (0, 0)
    assert 0 < metrics["num_misses"] <= metrics["num_accesses"]
    assert (metrics["late_stall_ns"], metrics["miss_stall_ns"], metrics["stall_ns"]) == (0, 0, 0)


@pytest.mark.parametrize("policy", ["adaptive", "oracle", "clairvoyant"])
def test_copies_in_no_time_never_stall_a_host_that_decides(policy: str, trace: Path) -> None:
    told = (f"+policy={policy}", f"trace.path={trace}", "compare=none", "max_tokens=1")
    assert job("+hardware=ideal_link", *told)["stall_ns"] == 0


def test_a_host_that_issues_all_the_demand_before_it_decides_never_stalls_on_copies_in_no_time(trace: Path) -> None:
    told = ("+policy=oracle", f"trace.path={trace}", "compare=none", "max_tokens=20", "channel_depth=64")
    metrics = job("+hardware=ideal_link", *told)
    assert (metrics["stall_ns"], metrics["num_misses"] > 0) == (0, True)


def test_start_resident_without_room_for_all_is_refused(trace: Path) -> None:
    with pytest.raises(ValueError, match=r"start=resident needs room for every expert: set residency=1\.0"):
        job(*LRU, f"trace.path={trace}", "compare=none", "start=resident", "residency=0.5")


# -- runs that are killed ------------------------------------------------------------------------------------


def wait_for(happened: Any, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Until `happened()`; the process must not end before."""
    stop = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < stop
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what it has started, without a chance to tidy up."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def started(words: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*words), cwd=cwd, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def long_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("long") / "long.safetensors", 1500)


def test_a_killed_run_leaves_no_result(long_trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*ADAPTIVE, f"trace.path={long_trace}", "events=true", f"hydra.run.dir={folder}"]
    process = started(words, tmp_path)
    wait_for((folder / ".hydra" / "config.yaml").exists, process)
    kill(process)
    assert not {"DONE", "metrics.json", "events.parquet"} & names(folder)


def results(sweep: Path) -> dict[str, int]:
    """When each finished run's metrics were written, by folder."""
    return {done.parent.name: (done.parent / "metrics.json").stat().st_mtime_ns for done in sweep.rglob("DONE")}


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_repeats_nothing(long_trace: Path, tmp_path: Path) -> None:
    sweep, code = tmp_path / "sweep", code_sha256()
    words = [
        "-m",
        *LRU,
        f"trace.path={long_trace}",
        "compare=none",
        "residency=0.2,0.3,0.4,0.5,0.6",
        "hydra.launcher.n_jobs=1",
        f"hydra.sweep.dir={sweep}",
        "skip_done=true",
    ]
    process = started(words, tmp_path)
    wait_for(lambda: len(results(sweep)) >= 2, process)
    kill(process)
    before = results(sweep)
    assert 2 <= len(before) < 5
    assert len(collect.collect(sweep)) == len(before)
    again = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    if code_sha256() != code:
        pytest.skip("the code was changed meanwhile: then everything is repeated, as it should be")
    after = results(sweep)
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    assert again.stdout.count("done before: ") == len(before)
    table = collect.collect(sweep)
    assert sorted(table["residency"].round(2)) == [0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.slow
def test_a_finished_run_is_skipped_only_if_it_is_the_same(trace: Path, tmp_path: Path) -> None:
    words = [*LRU, f"trace.path={trace}", "compare=none", "skip_done=true"]
    first = run_here(words, tmp_path / "run")
    written = (first.folder / "metrics.json").stat().st_mtime_ns
    again = run_here(words, tmp_path / "run")
    assert again.out.startswith("done before: ")
    assert (first.folder / "metrics.json").stat().st_mtime_ns == written
    other = run_here([*words, "residency=0.25"], tmp_path / "run")
    assert "done before" not in other.out
    assert other.metrics()["capacity"]["num_slots"] == 192


@pytest.mark.slow
def test_a_finished_run_is_not_skipped_when_a_fitted_file_it_names_has_changed(tmp_path: Path) -> None:
    fitted = tmp_path / "mine.safetensors"
    fitted.write_bytes((DATA / "gpt-oss-20b.hybrid.safetensors").read_bytes())
    words = [
        "+hardware=a100",
        "+policy=adaptive",
        "policy/predictor=hybrid",
        f"policy.predictor.fitted={fitted}",
        "trace.num_tokens=8",
        "trace.num_requests=1",
        "compare=none",
        "skip_done=true",
    ]
    assert "done before" not in run_here(words, tmp_path / "run").out
    assert run_here(words, tmp_path / "run").out.startswith("done before: ")
    arrays = load_file(fitted)
    save_file({**arrays, "bias": arrays["bias"] + 1}, fitted)
    assert "done before" not in run_here(words, tmp_path / "run").out


def test_a_finished_run_is_not_skipped_when_its_trace_has_changed(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t.safetensors", seed=1)
    words = [*LRU, f"trace.path={path}", "compare=none", "skip_done=true"]
    first = run_here(words, tmp_path / "run").metrics()
    small_trace(path, seed=2)
    assert run_here(words, tmp_path / "run").metrics()["trace"]["sha256"] != first["trace"]["sha256"]


@pytest.mark.slow
def test_runs_in_parallel_give_what_they_give_one_by_one(trace: Path, tmp_path: Path) -> None:
    words = [
        "-m",
        *LRU,
        f"trace.path={trace}",
        "compare=none",
        "residency=0.3,0.6",
        "batch_size=1,2",
        "hydra.launcher.n_jobs=2",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    found = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    table = collect.collect(tmp_path / "sweep")
    assert len(table) == 4
    for row in table.to_dict("records"):
        batch_size = 2 if "batch_size=2" in str(row["run"]) else 1
        alone = job(
            *LRU, f"trace.path={trace}", "compare=none", f"residency={row['residency']:.1f}", f"batch_size={batch_size}"
        )
        assert row["elapsed_ns"] == alone["elapsed_ns"]


# -- tables of runs, and pins --------------------------------------------------------------------------------


@pytest.mark.slow
def test_collect_writes_one_row_a_finished_run(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in ("lru", "adaptive"):
        run_here(["+hardware=a100", f"+policy={policy}", f"trace.path={trace}"], tmp_path / policy)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "metrics.json").write_text("{}")
    assert collect.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("2 runs: ")
    table = pd.read_parquet(tmp_path / "table.parquet")
    from_csv = pd.read_csv(tmp_path / "table.csv")
    assert table.columns.tolist() == from_csv.columns.tolist()
    known = table.dropna(axis=1, how="all")
    pd.testing.assert_frame_equal(known, from_csv[known.columns], check_dtype=False)
    assert table["policy"].tolist() == ["adaptive", "lru"]
    metrics = json.loads((tmp_path / "lru" / "metrics.json").read_text())
    row = table.set_index("run").loc["lru"]
    assert row["hit_rate"] == metrics["num_hits"] / metrics["num_accesses"]
    assert row["stall_ms_per_token"] == metrics["stall_ns"] / 40 / 1e6
    assert row["bounds.floor_ns"] == metrics["bounds"]["floor_ns"]
    assert row["ms_per_token"] == metrics["elapsed_ns"] / 40 / 1e6
    assert row["floor_ms_per_token"] == metrics["bounds"]["floor_ns"] / 40 / 1e6 <= row["ms_per_token"]
    assert "floor_stall_ms_per_token" not in table.columns


@pytest.mark.slow
def test_collect_beside_adds_a_row_for_each_run_beside(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here([*ADAPTIVE, f"trace.path={trace}"], tmp_path / "full")
    run_here([*LRU, f"trace.path={trace}", "compare=none"], tmp_path / "none")
    assert collect.collect(tmp_path)["run"].tolist() == ["full", "none"]
    assert collect.main([str(tmp_path), "--beside", "--markdown", "ms_per_token"]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["policy", "adaptive", "on_demand", "lru (beside)", "clairvoyant", "lru"]
    assert collect.main([str(tmp_path), "--beside"]) == 0
    table = pd.read_parquet(tmp_path / "table.parquet").set_index("run")
    beside = ["full (on_demand)", "full (lru)", "full (clairvoyant)"]
    assert table.index.tolist() == ["full", *beside, "none"]
    assert table["policy"].tolist() == ["adaptive", "on_demand", "lru", "clairvoyant", "lru"]
    assert table["uses_future"].tolist() == [False, False, False, True, False]
    metrics = json.loads((tmp_path / "full" / "metrics.json").read_text())
    for run in beside:
        other, row = metrics["compare"][table.loc[run, "policy"]], table.loc[run]
        assert row["ms_per_token"] == other["elapsed_ns"] / 40 / 1e6
        assert row["stall_ms_per_token"] == other["stall_ns"] / 40 / 1e6
        assert (row["hardware"], row["residency"], row["elapsed_ns"]) == ("a100", 0.5, other["elapsed_ns"])
    assert table.loc["full (lru)", "elapsed_ns"] == table.loc["none", "elapsed_ns"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: folder / "absent", "no such folder"),
        (lambda folder: folder, "no finished run"),
    ],
)
def test_collect_without_runs_is_one_line(
    prepare: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect.main([str(prepare(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), says in error, error.count("\n")) == (True, True, 1)


def pins(trace: Path, folder: Path) -> Path:
    runs = {
        name: {"overrides": ["+hardware=a100", f"+policy={name}", "trace.path=pinned.safetensors", "compare=none"]}
        for name in ("lru", "adaptive")
    }
    (folder / "pinned.safetensors").write_bytes(trace.read_bytes())
    path = folder / "pins.json"
    path.write_text(json.dumps({"runs": runs}))
    return path


@pytest.mark.slow
def test_pinned_runs_are_identical_from_anywhere_until_a_number_moves(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pins(trace, tmp_path)
    monkeypatch.chdir("/")
    assert regress.main(["record", str(path)]) == 0
    recorded = path.read_bytes()
    assert regress.main(["check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 runs identical"
    assert path.read_bytes() == recorded
    content = json.loads(recorded)
    stall = content["runs"]["lru"]["metrics"]["miss_stall_ns"]
    content["runs"]["lru"]["metrics"]["miss_stall_ns"] = stall * 2
    path.write_text(json.dumps(content))
    assert regress.main(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"    miss_stall_ns: {stall * 2} → {stall} (-50.000 %)" in lines
    assert lines[-1] == "1 of 2 runs identical"


def test_pins_name_metrics_that_came_or_went() -> None:
    assert regress.differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ["a: 1 → gone", "c: new, 3"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("{", "line 1: is no JSON"),
        ("[]", "lacks"),
        ('{"runs": {"x": {"overrides": "lru"}}}', "lacks overrides"),
        ('{"runs": {"x": {"overrides": ["+hardware=a100", "+policy=lru"]}}}', "python -m sim.regress record"),
        ('{"runs": {"x": {"overrides": ["+hardware=a1", "+policy=lru"], "metrics": {"a": 1}}}}', "hardware=a1"),
    ],
)
def test_faulty_pins_are_one_line(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pins.json"
    if content is not None:
        path.write_text(content)
    assert regress.main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), says in error, error.count("\n")) == (True, True, 1), error


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+hardware=a100", "+policy=lru", "residency=2", "trace.path=t.safetensors"],
    ],
)
def test_pinned_overrides_are_checked_like_a_command_line(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pins.json"
    path.write_text(json.dumps({"runs": {"x": {"overrides": overrides}}}))
    small_trace(tmp_path / "t.safetensors")
    assert regress.main(["record", str(path)]) == 2
    error = capsys.readouterr().err
    assert ("residency=2 is outside (0, 1]" in error) if overrides else ("+hardware=NAME" in error)


def test_max_tokens_gives_what_a_trace_that_ends_there_gives(tmp_path: Path) -> None:
    experts = np.stack([np.roll(np.arange(32), shift)[:4] for shift in range(24)]).astype(np.uint8)
    whole = np.stack([(experts + step) % 32 for step in range(20)]).astype(np.uint8)
    long = small_trace(tmp_path / "long.safetensors", 20, 1, experts=whole)
    short = small_trace(tmp_path / "short.safetensors", 9, 1, experts=whole[:9])
    cut = job(*LRU, f"trace.path={long}", "compare=none", "max_tokens=9")
    assert cut["elapsed_ns"] == job(*LRU, f"trace.path={short}", "compare=none")["elapsed_ns"]
