"""Experts that a CPU machine reads from a file: the right bytes, at the pace of the disk, decided as the log says."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from replay.lockstep.compare import check
from replay.lockstep.log_format import LogHeader
from replay.lockstep.log_reader import LogReader
from replay.machine.disk import DiskThread, ExpertFile, mark_of
from replay.run import pace_of, scaled_workload
from replay.validate import parser, with_defaults
from replay.validation.workbench import Workbench
from sim.job.setup import load_chunks
from sim.specs.disk import Disk
from sim.specs.storage import Storage
from tests.support.commands import tiny_trace
from tests.support.replays import TINY, replay_here

SIZES = (5000, 5000, 2000)
FILL = bytes(range(256)) * 47
# Of 32 experts 20 fit.
STORED = ("+storage=nvme-gen4", "host_memory_gb=0.032", "residency=0.3", "chunk_mib=0.5")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 24, prompt=3)


def content(file: ExpertFile, key: int, chunk: int) -> bytes:
    """What a read of one chunk puts into memory."""
    memory = ctypes.create_string_buffer(SIZES[chunk] + 8)
    file.read(key, chunk, ctypes.addressof(memory))
    assert memory.raw[SIZES[chunk] :] == bytes(8)
    return memory.raw[: SIZES[chunk]]


def expected(key: int, chunk: int) -> bytes:
    start = sum(SIZES[:chunk])
    return mark_of(key, chunk) + FILL[start + 16 : start + SIZES[chunk]]


def test_a_file_holds_every_chunk_and_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = ExpertFile(4, SIZES, FILL[:12_000])
    assert list(tmp_path.iterdir()) == []
    for key in range(4):
        for chunk in range(3):
            assert content(file, key, chunk) == expected(key, chunk)
    file.close()


def test_where_direct_reads_are_refused_the_page_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, direct = os.open, getattr(os, "O_DIRECT", 1 << 14)
    monkeypatch.setattr(os, "O_DIRECT", direct, raising=False)

    def refusing(path: str, flags: int, *more: int) -> int:
        if flags & direct:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    file = ExpertFile(2, SIZES, FILL[:12_000])
    assert file.is_direct is False
    assert content(file, 1, 2) == expected(1, 2)
    file.close()


def test_a_file_that_does_not_fit_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"storage: the experts take 0\.00 GB of a temporary file.*set TMPDIR"):
        ExpertFile(4, SIZES, FILL[:12_000])
    with pytest.raises(ValueError, match="chunks of 8 bytes cannot be told apart on storage; raise chunk_mib"):
        ExpertFile(4, (8, 8), FILL[:16])


def test_a_read_of_another_chunk_does_not_pass() -> None:
    file = ExpertFile(2, SIZES, FILL[:12_000])
    file._starts[1] = 0
    with pytest.raises(AssertionError, match="chunk 1 of expert key 1 was read wrongly"):
        content(file, 1, 1)
    file.close()


def test_reads_keep_the_pace_of_the_disk() -> None:
    # 1 ms until the first byte, 5000 bytes at 0.001 GB/s in 5 ms.
    file, news = ExpertFile(2, SIZES, FILL[:12_000]), []
    disk = DiskThread(file, Disk(Storage("slow", 1_000_000, 0.001, 2, 0)), lambda: news.append(1))
    memory = ctypes.create_string_buffer(sum(SIZES))
    ends = [disk.read(1, chunk, ctypes.addressof(memory) + sum(SIZES[:chunk])) for chunk in range(3)]
    disk.close()
    assert all(end.happened for end in ends)
    assert len(news) == 3
    assert disk.failure is None
    # The second one's first byte comes while the first is read. A machine that is late is set back, never ahead.
    assert ends[1].ns - ends[0].ns >= 5_000_000
    assert ends[2].ns - ends[1].ns >= 2_000_000
    assert memory.raw == b"".join(expected(1, chunk) for chunk in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "adaptive"])
@pytest.mark.parametrize("eviction", ["lru", "page_cache"])
def test_a_replay_reads_and_decides_as_its_log_says(policy: str, eviction: str, trace: Path, tmp_path: Path) -> None:
    words = [*TINY, f"+policy={policy}", f"trace.path={trace}", *STORED, f"storage.eviction={eviction}", "log=true"]
    found = replay_here([*words, "timeline=true", "events=true"], tmp_path / "run")
    assert found.code == 0, found.err
    metrics = found.metrics()
    storage = metrics["storage"]
    assert storage["reads"] == storage["host_misses"] + storage["unused"] > 0
    assert storage["host_evictions"] > 0
    assert storage["direct"] in (0, 1)
    assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
    stalls = ("late_stall_ns", "miss_stall_ns", "storage_stall_ns")
    assert metrics["stall_ns"] == sum(metrics[key] for key in stalls)
    assert metrics["storage_stall_ns"] > 0
    result = check(tmp_path / "run")
    assert result.difference is None
    assert result.partial is None
    assert result.num_decisions > 500


@pytest.mark.slow
def test_the_header_of_a_log_holds_the_host_memory_and_is_checked(trace: Path, tmp_path: Path) -> None:
    words = [*TINY, "+policy=lru", f"trace.path={trace}", *STORED, "log=true"]
    assert replay_here(words, tmp_path / "run").code == 0
    with LogReader(tmp_path / "run" / "records.parquet") as reader:
        header = json.loads(reader.header.to_json())
    assert header["run"]["storage"] == {"num_slots": 20, "read_depth": 4, "eviction": "lru"}
    for key, value, message in (
        ("eviction", "fifo", r"run.storage.eviction='fifo' is none of: lru, page_cache"),
        ("num_slots", 0, r"run.storage.num_slots=0 is no whole number from 1"),
        ("read_depth", True, r"run.storage.read_depth=True is no whole number from 1"),
        ("more", 1, r"its run.storage has an unknown 'more'"),
    ):
        wrong = {**header, "run": {**header["run"], "storage": {**header["run"]["storage"], key: value}}}
        with pytest.raises(ValueError, match=message):
            LogHeader.from_json(json.dumps(wrong))
    wrong = {**header, "run": {**header["run"], "storage": 5}}
    with pytest.raises(ValueError, match=r"run\.storage is no dict"):
        LogHeader.from_json(json.dumps(wrong))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify=true"], "storage='nvme-gen4': verify and fault know no storage"),
        (["machine=cuda"], "storage='nvme-gen4' is simulated, or replayed with machine=cpu; leave it out on a GPU"),
        (["+policy/place=cheaper"], "storage='nvme-gen4' and policy.place exclude each other"),
    ],
)
def test_what_storage_excludes_is_told_in_one_line(words: list[str], message: str, trace: Path, tmp_path: Path) -> None:
    base = [word for word in TINY if not (word.startswith("machine=") and words[0].startswith("machine="))]
    found = replay_here([*base, "+policy=lru", f"trace.path={trace}", *STORED, *words], tmp_path / "run")
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1
    assert len(found.err) <= 301


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (
            "--storage nvme-gen4 --host-memory-gb 8",
            "cuda",
            "--storage=nvme-gen4 is of a CPU machine; add --machine cpu",
        ),
        ("--storage nvme-gen4", "cpu", "--storage=nvme-gen4 needs the host memory above it; add --host-memory-gb GB"),
        (
            "--storage nvme-gen4 --host-memory-gb 8 --verify-executions 5",
            "cpu",
            "--verify-executions=5: stamps know no storage",
        ),
    ],
)
def test_a_validation_refuses_what_storage_excludes(words: str, world: str, message: str) -> None:
    args = parser().parse_args(["mine", *words.split()])
    with pytest.raises(ValueError, match=message):
        with_defaults(args, world)


def test_a_validation_puts_storage_below_every_case() -> None:
    args = parser().parse_args(["mine", "--storage", "nvme-gen4", "--host-memory-gb", "7", "--scale", "16"])
    asked = with_defaults(args, "cpu")
    bench = Workbench(args, None)  # type: ignore[arg-type]
    case = asked.cases("gpt-oss-20b")[0]
    assert {"+storage=nvme-gen4", "host_memory_gb=7.0"} <= set(bench.overrides(case, 8))
    _, work = bench.workload(case, 8)
    assert (work.storage is not None, work.host_slots) == (True, 529)
    scaled = scaled_workload(work, 16)
    # A chunk of the scaled model takes the disk as long as the model's own.
    sizes = load_chunks(work)[0], load_chunks(scaled)[0]
    pace, whole = pace_of(scaled), pace_of(work)
    assert pace is not None
    assert whole is not None
    assert pace.transfer_ns(sizes[1]) == pytest.approx(whole.transfer_ns(sizes[0]), rel=1e-3)
