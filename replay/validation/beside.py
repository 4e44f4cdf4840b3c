"""What a validation takes of calibration, rig and replay: the one place to change when those do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from expertflow.forward import Forward
from expertflow.machine import HostResult, Record, Wait
from expertflow.observer import Observer
from expertflow.policy import Policy
from replay.calibration.hostspeed import tick_ns
from replay.calibration.in_place import InPlace, middle_samples
from replay.calibration.probe import HostRun
from replay.calibration.record import named_model
from replay.machine.device import Device
from replay.machine.figures import Figures
from replay.machine.hosted import HostedMachine
from replay.machine.real import RealMachine
from replay.machine.rig import Rig
from replay.machine.scale import scaled_model
from replay.run import replay_policy
from replay.validation.plan import Case
from sim.job.setup import Transfer, Workload
from sim.specs.hardware import Stack

IN_PLACE_TOKENS = 24
_CALLS = ("attention", "experts", "head", "copy", "decided")


class TapedMachine:
    """A machine that keeps what it was asked to wait for and what it answered.

    ticks_ns: how fast the host was, once a forward, while it waits for the first router; nothing else costs time. None
    are taken where the streams are threads of this interpreter: they would measure the waiting for each other.
    """

    def __init__(self, machine: RealMachine) -> None:
        self._machine, self._block = machine, machine.wait
        self.tape: list[tuple[Wait, Record]] = []
        self.results: list[HostResult] = []
        """Of a machine whose host computes experts."""
        if hasattr(machine, "on_host"):
            self.host_ended = self._host_ended
        self.ticks_ns: list[int] = []
        self._ticks = machine.device.world != "cpu"
        self._begun = 0
        for name in _CALLS:
            # Straight through, without a call of our own.
            setattr(self, name, getattr(machine, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    def _host_ended(self) -> Sequence[HostResult]:
        ended = cast(HostedMachine, self._machine).host_ended()
        self.results += ended
        return ended

    def begin_forward(self, forward: Forward) -> None:
        """As the machine's."""
        self._begun += 1
        self._machine.begin_forward(forward)

    def wait(self, wait: Wait) -> Record:
        """As the machine's."""
        if self._ticks and self._begun > len(self.ticks_ns):
            self.ticks_ns.append(tick_ns())
        record = self._block(wait)
        self.tape.append((wait, record))
        return record


class _TapedRig:
    """A rig whose machines keep a tape. made: its last machine."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rig, name)

    def machine(self, *args: Any, **kwargs: Any) -> TapedMachine:
        self.made = TapedMachine(self._rig.machine(*args, **kwargs))
        return self.made


def replay_on_tape(
    rig: Rig,
    work: Workload,
    policy: Policy,
    transfer: Transfer,
    observers: Sequence[Observer],
    figures: Figures | None = None,
) -> tuple[dict[str, Any], TapedMachine]:
    """As `replay_policy`: the metrics, and the machine with what it has kept."""
    taped = _TapedRig(rig)
    metrics, _ = replay_policy(cast(Rig, taped), work, policy, transfer, observers, figures=figures)
    return metrics, taped.made


def stack_pads_ns(raw: Mapping[str, Any], stack: Stack) -> tuple[float, float]:
    """ns that the pads of a layer and of the head last in fact."""
    share = float(raw["pad_share"])
    return stack.layer_overhead_ns * share, stack.head_overhead_ns * share


def chunk_gb_per_s(raw: Mapping[str, Any], model: str) -> float | None:
    """At what rate chunks of the experts of `model` follow one another on the link, as calibrated; None if unknown."""
    found = raw.get("beside", {}).get(model)
    return None if found is None else float(found["bytes"]) / float(found["idle_ns"])


class Beside:
    """Host costs that are measured anew beside each run, over the calibration's trace; `use` puts them into `raw`."""

    def __init__(self, device: Device, raw: Mapping[str, Any], scale: int) -> None:
        self._device, self._raw, self._scale = device, raw, scale
        self._in_place: InPlace | None = None
        self.samples: dict[str, Any] = {}
        """By case: the samples that it was predicted with, those of the run of median length."""

    def measure(self, case: Case, start: str | None = None) -> HostRun:
        """One short replay in place, under the conditions of `case`. start: what the cache holds at first."""
        model = named_model(case.model)
        if self._in_place is None or self._in_place.model.name != case.model:
            self.release()
            self._in_place = InPlace(self._device, model, self._scale, IN_PLACE_TOKENS)
        return self._in_place.run(case.policy, case.stack, case.batch_size, case.residency, start)

    def use(self, case: Case, runs: Sequence[HostRun]) -> None:
        """From here on `raw` says of the host what the middle of `runs`, measured for `case`, says."""
        samples = self.samples[str(case)] = middle_samples(runs)
        model = scaled_model(named_model(case.model), self._scale).name
        self._raw["host"][model].setdefault(case.stack, {})[case.policy] = samples

    def release(self) -> None:
        """Give the memory back."""
        if self._in_place is not None:
            self._in_place.release()
            self._in_place = None
