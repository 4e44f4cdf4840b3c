"""One policy over one workload on a real machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any, cast

from expertflow.forward import PREFILL, Forward
from expertflow.launches import Mislaunched
from expertflow.metrics import collect_metrics
from expertflow.observer import Observer
from expertflow.policy import Policy
from expertflow.runtime import RunConfig, Runtime
from replay.drive import drive
from replay.gc_pause import gc_paused
from replay.lockstep.host_log import logging_machine
from replay.lockstep.log import LogWriter
from replay.lost import DeviceLostError
from replay.machine.cuda_errors import explaining
from replay.machine.device import Device
from replay.machine.faults import FaultyDevice
from replay.machine.figures import Figures
from replay.machine.programs import DEFAULT_KV_GRID
from replay.machine.real import RealMachine
from replay.machine.rig import Needs, Rig
from replay.machine.scale import check_replayable, scaled_model
from replay.machine.stamps import Stamps, WrongStamp
from replay.machine.stored import StoredMachine
from sim.job.setup import Transfer, Workload, load_chunks, run_config
from sim.specs.disk import Disk
from traces.processes.progress import shown

_FORWARDS_AHEAD = 8192
"""Forwards are built before the clock starts, as far as memory allows: building one takes host time."""


LEAST_CHUNK = 64
"""Bytes: smaller ones would vanish when copies are aligned to words."""


class PartialRunError(RuntimeError):
    """The device was lost midway; `metrics` holds what was measured until then."""

    def __init__(self, message: str, metrics: dict[str, Any]) -> None:
        super().__init__(message)
        self.metrics = metrics


@dataclass(frozen=True)
class Integrity:
    """What the stamps said. A check is one chunk's stamp, before or after one launch.

    num_mislaunched: experts demanded by a layer that were not launched in it exactly once, and those launched in vain.
    """

    num_executions: int
    num_checks: int
    num_wrong: int
    first: WrongStamp | None
    num_mislaunched: int = 0
    first_mislaunched: Mislaunched | None = None

    @property
    def sound(self) -> bool:
        """Whether everything was launched, and read what it should."""
        return not (self.num_wrong or self.num_mislaunched)


def scaled_workload(work: Workload, scale: int) -> Workload:
    """`work` with a model whose widths are divided by `scale`, and chunks as many as before; ValueError for a model
    that is only simulated."""
    check_replayable(work.model)
    if scale == 1:
        return work
    model = scaled_model(work.model, scale)
    return replace(work, model=model, chunk_mib=work.chunk_mib / scale**2, storage_factor=scale**2)


def needs_of(work: Workload, policy: Policy, transfer: Transfer) -> Needs:
    """Slots, rows and KV tokens of a run."""
    pools = work.model.num_layers if policy.eviction.scope == "layer" else 1
    max_tokens = max_context = 1
    for forward in work.batches:
        max_tokens = max(max_tokens, len(forward.rows))
        context = _context(forward)
        max_context = max(max_context, context)
    # Shapes that are captured are rounded up.
    grid = work.stack.kv_grid or DEFAULT_KV_GRID
    max_context = -(-max_context // grid) * grid
    return Needs(work.num_slots + transfer.staging_slots * pools, max_tokens, max_context)


def _context(forward: Forward) -> int:
    """KV tokens that a forward reads of all its requests together."""
    if forward.spans:
        return sum(forward.kv_lens[end - 1] for end in accumulate(span.num_rows for span in forward.spans))
    return forward.kv_lens[-1] if forward.phase == PREFILL else sum(forward.kv_lens)


def memory_of(work: Workload, host_memory_gb: float | None) -> dict[str, Any]:
    """The host memory of a rig: a budget for all experts, or rooms above storage."""
    return {"host_memory_gb": host_memory_gb} if work.storage is None else {"rooms": work.host_slots}


def replay_policy(
    rig: Rig,
    work: Workload,
    policy: Policy,
    transfer: Transfer,
    observers: Sequence[Observer] = (),
    *,
    verify: bool = False,
    log: LogWriter | None = None,
    fault: tuple[str, int] | None = None,
    figures: Figures | None = None,
) -> tuple[dict[str, Any], Integrity | None]:
    """Run `policy` over `work` on `rig`: the metrics of `expertflow.metrics`, and what the stamps said if verified.

    figures: of a policy that may place experts on the host (`replay.host_figures`).

    PartialRunError if the device is lost on the way.
    """
    device: Device = rig.device if fault is None else FaultyDevice(rig.device, *fault)
    chunk_bytes = load_chunks(work)
    if len(chunk_bytes) > 1 and chunk_bytes[-1] < LEAST_CHUNK:
        raise ValueError(
            f"chunk_mib={work.chunk_mib:.3g} (scaled with the model) makes chunks of {chunk_bytes[-1]} "
            f"bytes; a copy has {LEAST_CHUNK} at least: raise chunk_mib"
        )
    config = run_config(work, transfer, chunk_bytes)
    # What runs before have left behind goes now, not while this one captures its programs.
    gc.collect()
    with explaining():
        machine = rig.machine(chunk_bytes, work.stack, transfer.memory, verify, device, figures, pace_of(work))
    with closing(machine):
        runtime = _run(machine, config, work, policy, observers, log)
    integrity = _integrity(machine.stamps)
    if integrity is None or integrity.sound:
        runtime.check_identities()
    if isinstance(device, FaultyDevice) and not device.struck:
        what = "copy" if device.host_fault is None else "expert on the host"
        raise ValueError(
            f"fault={device.fault} found no occasion from {what} fault_at={device.at} on; lower fault_at or "
            "residency, so that there are more"
        )
    if work.warmup_forwards >= runtime.counters.num_forwards:
        raise ValueError(
            f"warmup_forwards={work.warmup_forwards} leaves nothing to measure: the trace has "
            f"{runtime.counters.num_forwards} forwards"
        )
    metrics = collect_metrics(runtime) | {"launches": _launches(machine)}
    if work.storage is not None:
        metrics["storage"]["direct"] = int(cast(StoredMachine, machine).is_direct)
    return metrics, integrity


def _run(
    machine: RealMachine,
    config: RunConfig,
    work: Workload,
    policy: Policy,
    observers: Sequence[Observer],
    log: LogWriter | None,
) -> Runtime:
    """Prepare and drive one run to its end; its runtime."""
    device, stamps = machine.device, machine.stamps
    # Whatever stands around it: a tape, or a log.
    stored = None if work.storage is None else cast(StoredMachine, machine)
    logging = None if log is None else logging_machine(machine, log)
    runtime = Runtime(config, logging or machine, policy, _ahead(iter(work.batches)), observers)
    try:
        with explaining():
            machine.prepare(work.batches)
            if stored is not None and runtime.tier is not None:
                stored.preload_rooms(runtime.tier.memory.room_of)
            machine.preload(runtime.slots.slot_of)
            with gc_paused():
                device.restart_clock()
                try:
                    with shown("", lambda: runtime.journal.num_tokens, work.batches.num_tokens):
                        drive(runtime, logging or machine)
                finally:
                    if logging is not None:
                        logging.flush()
            machine.finish()
            if stamps is not None:
                stamps.collect()
    except DeviceLostError as error:
        raise PartialRunError(str(error), _so_far(runtime)) from error
    return runtime


def _integrity(stamps: Stamps | None) -> Integrity | None:
    if stamps is None:
        return None
    found = (stamps.num_executions, stamps.num_checks, stamps.num_wrong, stamps.first)
    return Integrity(*found, stamps.num_mislaunched, stamps.first_mislaunched)


def pace_of(work: Workload) -> Disk | None:
    """How long reads last; None where nothing lies below host memory."""
    return None if work.storage is None else Disk(work.storage, work.storage_factor)


def _launches(machine: RealMachine) -> dict[str, int]:
    """How a run launched its kernels: its pads in ns and KV grid, the programs prepared, the shapes that were not, and
    the launches that had to wait until an earlier one of the same program had ended."""
    programs = machine.programs
    return {
        "layer_pad_ns": machine.layer_pad_ns,
        "kv_grid": programs.kv_grid,
        "num_prepared": programs.num_prepared,
        "num_unprepared": programs.num_unprepared,
        "num_read_first": machine.num_read_first,
    }


def _so_far(runtime: Runtime) -> dict[str, Any]:
    """Metrics of a run that broke off, up to its last whole forward."""
    counters, journal = runtime.counters, runtime.journal
    gaps = journal.gaps_ns
    return {
        "partial": True,
        "num_tokens": journal.num_tokens,
        "num_forwards": counters.num_forwards,
        "elapsed_ns": counters.elapsed_ns,
        "tpot_ms_mean": sum(gaps) / len(gaps) / 1e6 if len(gaps) else None,
        "num_accesses": counters.num_accesses,
        "num_hits": counters.num_hits,
    }


def _ahead(forwards: Iterator[Forward]) -> Iterator[Forward]:
    """The same forwards: the first ones are built at once, the others when they are due."""
    return chain(list(islice(forwards, _FORWARDS_AHEAD)), forwards)
