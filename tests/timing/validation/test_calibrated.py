"""What a validation takes of rig and calibration: tapes of real runs, host costs beside them, pads and link."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertflow.machine import GATE, LOAD, TOKEN
from replay.machine.device import Device
from replay.validation import beside as calibrated
from replay.validation.beside import Beside, TapedMachine, chunk_gb_per_s, replay_on_tape, stack_pads_ns
from replay.validation.lateness import late_ns
from replay.validation.plan import Case as Row
from sim.specs.hardware import Stack
from tests.support.commands import tiny_trace
from tests.support.replays import TINY, Case

TOKENS, LAYERS = 6, 4


@pytest.mark.slow
def test_a_tape_holds_every_wait_with_its_record_and_changes_nothing(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", TOKENS)
    case = Case.of(*TINY, "+policy=lru", "residency=0.25", f"trace.path={trace}")
    with case.rig() as rig:
        plain, _ = case.replay(rig)
        policy, transfer = case.policy()
        metrics, taped = replay_on_tape(rig, case.work, policy, transfer, [])
    tape, ticks_ns = taped.tape, taped.ticks_ns
    for key in ("num_tokens", "num_hits", "num_misses", "bytes"):
        assert metrics[key] == plain[key]
    marks = [mark for _, record in tape for mark in record[2]]
    assert [mark for mark, _, _ in marks] == list(range(1, len(marks) + 1))
    gates = {ident for (kind, ident, _), _ in tape if kind == GATE}
    tokens = {ident for (kind, ident, _), _ in tape if kind == TOKEN}
    assert (len(gates), len(tokens)) == (metrics["num_forwards"] * LAYERS, metrics["num_forwards"])
    loads = {load for _, record in tape for load, _, _, _ in record[1]}
    assert len(loads) == metrics["num_misses"]
    assert {ident for (kind, ident, _), _ in tape if kind == LOAD} <= loads
    assert max(record[0] for _, record in tape) >= metrics["elapsed_ns"]
    # Its streams are threads of this interpreter: a tick would measure the waiting for each other.
    assert ticks_ns == []
    # All that the device waited for is in the overhead and the stall of the same run.
    assert 0 <= late_ns(tape, 0, 0) <= metrics["overhead_ns"] + metrics["stall_ns"]


def test_pads_are_as_long_as_they_last_and_the_link_as_fast_as_it_was() -> None:
    stack = Stack("x", layer_overhead_ns=1000, head_overhead_ns=500, sources={})
    assert stack_pads_ns({"pad_share": 1.1}, stack) == (pytest.approx(1100), pytest.approx(550))
    assert chunk_gb_per_s({"beside": {"x": {"bytes": 900, "idle_ns": 300.0, "busy_ns": 400.0}}}, "x") == 3.0
    assert chunk_gb_per_s({"beside": {}}, "x") is None


class InPlace:
    """In place of short replays: runs of the lengths given, one after the other."""

    lengths: tuple[float, ...] = ()
    log: list[str] = []  # noqa: RUF012  (each test sets its own)

    def __init__(self, device: Any, model: Any, scale: int, num_tokens: int) -> None:
        self.model, self.count = model, 0
        self.log.append(f"made {model.name}")

    def run(
        self, policy: str, stack: str, batch_size: int, residency: float, start: str | None
    ) -> tuple[float, dict[str, Any]]:
        length = self.lengths[self.count]
        self.count += 1
        self.log.append(f"{policy} {stack} {batch_size} {residency} {start}")
        return length, {"issue": {"mean": length, "count": 4}}

    def release(self) -> None:
        self.log.append("released")


def test_beside_each_run_the_middle_of_its_own_hosts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "InPlace", InPlace)
    monkeypatch.setattr(InPlace, "lengths", (5.0, 9.0, 6.0, 70.0))
    monkeypatch.setattr(InPlace, "log", [])
    raw: dict[str, Any] = {"host": {"gpt-oss-20b": {}, "deepseek-v2-lite": {}}}
    beside = Beside(cast(Device, None), raw, 1)
    one, other = (Row("gpt-oss-20b", "found", 0.5, 8, name) for name in ("lru", "oracle"))
    runs = [beside.measure(one, "cold") for _ in range(3)]
    assert raw["host"]["gpt-oss-20b"] == {}
    # Of two runs their mean: either alone would be the faster or the slower host.
    for count, length in ((1, 5.0), (2, 7.0), (3, 6.0)):
        beside.use(one, runs[:count])
        assert raw["host"]["gpt-oss-20b"]["found"]["lru"] == {"issue": {"mean": length, "count": 4}}
    beside.use(other, [beside.measure(other)])
    assert raw["host"]["gpt-oss-20b"]["found"] == {
        "lru": beside.samples[str(one)],
        "oracle": beside.samples[str(other)],
    }
    monkeypatch.setattr(InPlace, "lengths", (1.0,))
    beside.measure(Row("deepseek-v2-lite", "found", 0.25, 1, "lru"))
    assert InPlace.log == [
        "made gpt-oss-20b",
        *["lru found 8 0.5 cold"] * 3,
        "oracle found 8 0.5 None",
        "released",
        "made deepseek-v2-lite",
        "lru found 1 0.25 None",
    ]


class Answering:
    """A machine whose every wait is answered at once. world: of its device."""

    attention = experts = head = copy = decided = staticmethod(lambda *_: 1)

    def __init__(self, world: str) -> None:
        self.device = SimpleNamespace(world=world)

    def begin_forward(self, forward: object) -> None: ...

    def wait(self, wait: object) -> tuple[int, list[Any], list[Any]]:
        return 0, [], []


@pytest.mark.parametrize(("world", "num_ticks"), [("cuda", 3), ("cpu", 0)])
def test_the_host_is_timed_once_a_forward_where_its_streams_are_no_threads(world: str, num_ticks: int) -> None:
    machine = TapedMachine(cast(Any, Answering(world)))
    for _ in range(3):
        machine.begin_forward(cast(Any, None))
        for _ in range(4):
            machine.wait((GATE, 1, False))
    assert len(machine.ticks_ns) == num_ticks
    assert len(machine.tape) == 12
