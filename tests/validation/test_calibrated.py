"""What a validation takes of rig and calibration: tapes of real runs, host costs beside them, pads and link."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from expertflow.machine import GATE, LOAD, TOKEN
from replay.machine.device import Device
from replay.validation import beside as calibrated
from replay.validation.beside import Beside, chunk_gb_per_s, replay_on_tape, stack_pads_ns
from replay.validation.lateness import late_ns
from replay.validation.plan import Case as Row
from sim.specs.hardware import Stack
from tests.cli.support import tiny_trace
from tests.replay.support import TINY, Case

TOKENS, LAYERS = 6, 4


@pytest.mark.slow
def test_a_tape_holds_every_wait_with_its_record_and_changes_nothing(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", TOKENS)
    case = Case.of(*TINY, "+policy=lru", "residency=0.25", f"trace.path={trace}")
    with case.rig() as rig:
        plain, _ = case.replay(rig)
        policy, transfer = case.policy()
        metrics, tape, ticks_ns = replay_on_tape(rig, case.work, policy, transfer, [])
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
    assert len(ticks_ns) == metrics["num_forwards"]
    assert all(tick > 0 for tick in ticks_ns)
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
    log: list[str] = []  # noqa: RUF012

    def __init__(self, device: Any, model: Any, scale: int, num_tokens: int) -> None:
        self.model, self.count = model, 0
        self.log.append(f"made {model.name}")

    def run(
        self, policy: str, stack: str, batch_size: int, residency: float, start: str | None
    ) -> tuple[float, dict[str, Any]]:
        length = self.lengths[self.count]
        self.count += 1
        return length, {"of": length, "run": (policy, stack, batch_size, residency, start)}

    def release(self) -> None:
        self.log.append("released")


def test_beside_each_run_the_median_of_its_own_hosts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "InPlace", InPlace)
    monkeypatch.setattr(InPlace, "lengths", (5.0, 9.0, 6.0, 70.0))
    monkeypatch.setattr(InPlace, "log", [])
    raw: dict[str, Any] = {"host": {"gpt-oss-20b": {}, "deepseek-v2-lite": {}}}
    beside = Beside(cast(Device, None), raw, 1)
    one, other = (Row("gpt-oss-20b", "found", 0.5, 8, name) for name in ("lru", "oracle"))
    runs = [beside.measure(one, "cold") for _ in range(3)]
    assert raw["host"]["gpt-oss-20b"] == {}
    for count, length in ((1, 5.0), (2, 9.0), (3, 6.0)):
        beside.use(one, runs[:count])
        assert raw["host"]["gpt-oss-20b"]["found"]["lru"]["of"] == length
    assert beside.samples[str(one)] == {"of": 6.0, "run": ("lru", "found", 8, 0.5, "cold")}
    beside.use(other, [beside.measure(other)])
    assert raw["host"]["gpt-oss-20b"]["found"] == {
        "lru": beside.samples[str(one)],
        "oracle": beside.samples[str(other)],
    }
    beside.measure(Row("deepseek-v2-lite", "found", 0.5, 1, "lru"))
    assert InPlace.log == ["made gpt-oss-20b", "released", "made deepseek-v2-lite"]
