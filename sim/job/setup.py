"""From a composed configuration to the objects of a run: trace, model, hardware, stack, policy.

Every user error is a ValueError with one line that names the key, the value and the remedy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from expertflow.boundary import CHECKING, is_own_class
from expertflow.byte_slots import ByteRoom
from expertflow.evictions.keep_nothing import KeepNothing
from expertflow.expert_sizes import BY_BITS
from expertflow.future import Future
from expertflow.host_memory import HostMemorySpec
from expertflow.keys import Rule, check_fields, from_mapping, shown, unknown_key
from expertflow.model import ModelSpec
from expertflow.parts import Effort, Eviction
from expertflow.places.gpu import Gpu
from expertflow.policy import Policy
from expertflow.runtime import RunConfig
from sim.job.batches import batch_config, requests_kept
from sim.job.keys import AS_RECORDED, PINS, STORAGE, check_storage_pair, check_trace
from sim.job.measured import check_table
from sim.job.model import chosen_model, model_file_of, told_model
from sim.job.parts import KINDS, class_of, make_part
from sim.job.place import make_place
from sim.job.predictor import make_predictor
from sim.job.room import last_layers, room_for
from sim.specs.chunks import chunk_sizes
from sim.specs.hardware import PAGEABLE, PINNED, Hardware, Stack, hardware_from_dict, stack_from_dict
from sim.specs.model_file import ReadModel
from sim.specs.storage import Storage, storage_from_dict
from traces.batching import Batches
from traces.reader import Trace, open_trace
from traces.shipped import shipped

OPTIONAL = ("name", "transfer", "effort", "place")
"""Keys that a policy of parts may leave out."""
CHECK_PARTS = "EXPERTFLOW_CHECK_PARTS"
"""Environment variable: `all` = what the parts of this package answer is checked as well, as others' always is."""
OTHER_TOPOLOGY = "choose the model that was recorded (model=auto), or name no trace: routing is then assumed"
MOST_CHUNKS = 1024
"""Of one expert: each is an event of its own in a run."""


@dataclass(frozen=True)
class Workload:
    """What is run, on what: everything but the policy."""

    trace: Trace
    trace_sha256: str
    model: ModelSpec
    hardware: Hardware
    stack: Stack
    batches: Batches
    num_slots: int
    chunk_mib: float
    channel_depth: int
    start: str
    warmup_forwards: int
    model_file: ReadModel | None = None
    """Where the model's sizes are from, if a file gave them."""
    storage: Storage | None = None
    """What lies below host memory; None: all experts are in it."""
    host_slots: int = 0
    """Experts that host memory holds, where there is storage below it."""
    storage_factor: int = 1
    """Each byte of the model stands for so many of storage: of one whose widths are divided."""
    room_bytes: int | None = None
    """For experts, where they have unlike sizes; `num_slots` is then how many of mean size that is. None: alike."""
    pins: bool = True
    """False: what `start` pins may leave after all, as for runs beside one that is given room for nothing else."""

    @cached_property
    def future(self) -> Future:
        """The demand of the whole trace; made only for references."""
        return Future(self.batches, self.model.num_layers * self.model.num_experts)

    @property
    def start_reads_ahead(self) -> bool:
        """Whether what the cache holds at first was chosen from the whole trace."""
        return self.start in ("popular", "pinned")

    @property
    def residency(self) -> float:
        """Share of all routed experts that have a slot, by bytes where they have unlike sizes."""
        if self.room_bytes is not None:
            return self.room_bytes / self.model.total_expert_bytes
        return self.num_slots / (self.model.num_layers * self.model.num_experts)

    def initial(self) -> tuple[int, ...]:
        """Keys resident at the start, best first."""
        num_keys = self.model.num_layers * self.model.num_experts
        if self.start == "cold":
            return ()
        if self.start == "resident":
            return tuple(range(num_keys))
        if self.start == "pinned_layers":
            num_layers = last_layers(self.model, self.num_slots, self.room_bytes)
            return tuple(range(num_keys - num_layers * self.model.num_experts, num_keys))
        counts = np.bincount(self.future.keys, minlength=num_keys)
        return tuple(int(key) for key in np.argsort(-counts, kind="stable"))


@dataclass(frozen=True)
class Transfer:
    """How a policy's copies run: from `pinned` or `pageable` memory; `serial` = never beside compute."""

    memory: Annotated[str, Rule(choices=(PINNED, PAGEABLE), about="that experts wait in")] = PINNED
    serial: Annotated[bool, Rule(about="copies never run beside compute")] = False
    staging_slots: Annotated[int, Rule(0, 65_536, unit="slots", about="beside the cache, for demand alone")] = 0

    def __post_init__(self) -> None:
        check_fields(self, "policy.transfer")


def make_workload(cfg: Mapping[str, Any], trace: Trace | None = None) -> Workload:
    """Trace, model, hardware and capacity of the configuration; ValueError where they do not fit together.

    trace: already open, in place of the one that the configuration names.
    """
    # With a place on the host only what does not stay there needs room: the runtime knows.
    is_whole = cfg["gpu_memory_gb"] is None and cfg["residency"] == 1
    if cfg["start"] == "resident" and not is_whole and "place" not in cfg["policy"]:
        raise ValueError("start=resident needs room for every expert: set residency=1.0, or choose start=popular")
    hardware = hardware_from_dict(cfg["hardware"])
    stack = stack_from_dict(cfg["stack"])
    model_file = model_file_of(cfg["model"])
    if trace is None:
        trace = trace_of(cfg, model_file)
    model = make_model(cfg["model"], trace, model_file)
    scaled = [name for name in hardware.kernel_ns if name.startswith(f"{model.name}/")]
    if scaled and model.name not in hardware.kernel_ns:
        raise ValueError(
            f"hardware={hardware.name} was measured with {scaled[0]}, widths divided, and says nothing of "
            f"{model.name} itself; hold it against its machine: python -m replay.validate"
        )
    check_table(model, hardware)
    batch = batch_config(cfg)
    batches = Batches(trace, batch)
    num_slots, room_bytes = room_for(cfg, model, trace, requests_kept(trace, batch), hardware.memory_gb)
    work = Workload(
        trace,
        trace.sha256(),
        model,
        hardware,
        stack,
        batches,
        num_slots,
        float(cfg["chunk_mib"]),
        cfg["channel_depth"],
        cfg["start"],
        cfg["warmup_forwards"],
        model_file,
        *_storage(cfg, model, num_slots),
        room_bytes=room_bytes,
    )
    _check_chunks(work)
    if work.start == "pinned_layers" and not last_layers(model, num_slots, room_bytes):
        raise ValueError(
            f"start=pinned_layers: there are {num_slots} slots, too few for the last layer's {model.num_experts} "
            "experts; raise residency or gpu_memory_gb, or choose start=pinned"
        )
    return work


def _storage(cfg: Mapping[str, Any], model: ModelSpec, num_slots: int) -> tuple[Storage | None, int]:
    """What lies below host memory, and how many experts that holds: what `num_slots` of the GPU do, and one more."""
    if cfg.get(STORAGE) is None:
        return None, 0
    check_storage_pair(cfg)
    if model.bytes_by_key is not None:
        raise ValueError(
            f"storage={shown(cfg[STORAGE].get('name'))}: experts of unlike size are not read from storage yet; give "
            f"one size, model.expert_bytes={model.mean_expert_bytes} is their mean, or leave storage out"
        )
    gigabytes, num_keys = cfg["host_memory_gb"], model.num_layers * model.num_experts
    host_slots, least = int(gigabytes * 1e9 // model.mean_expert_bytes), min(num_slots + 1, num_keys)
    if host_slots < least:
        needed = math.ceil(least * model.mean_expert_bytes / 1e6) / 1000
        raise ValueError(
            f"host_memory_gb={gigabytes}: {host_slots} experts fit, and host memory holds what the GPU's {num_slots} "
            f"slots do, and one more; give {needed:g} or more, or lower residency"
        )
    return storage_from_dict(cfg[STORAGE]), min(host_slots, num_keys)


def _check_chunks(work: Workload) -> None:
    """ValueError where an expert falls into so many chunks that a run would not end in any reasonable time."""
    largest = max(work.model.bytes_by_key or (work.model.mean_expert_bytes,))
    num_chunks = len(chunk_sizes(largest, int(work.chunk_mib * 2**20)))
    if num_chunks > MOST_CHUNKS:
        least = largest / MOST_CHUNKS / 2**20
        raise ValueError(
            f"chunk_mib={work.chunk_mib:g} cuts an expert of {work.model.name} ({largest} bytes) into "
            f"{num_chunks} chunks, more than {MOST_CHUNKS}; give chunk_mib={math.ceil(least * 1e4) / 1e4:g} or more"
        )


def load_chunks(work: Workload) -> tuple[int, ...]:
    """Bytes of each chunk of one expert, of mean size where they are unlike."""
    return tuple(chunk_sizes(work.model.mean_expert_bytes, int(work.chunk_mib * 2**20)))


def byte_room(work: Workload) -> ByteRoom | None:
    """Room and chunks of experts of unlike sizes; None where they are alike."""
    sizes = work.model.bytes_by_key
    if sizes is None or work.room_bytes is None:
        return None
    chunks = {size: tuple(chunk_sizes(size, int(work.chunk_mib * 2**20))) for size in set(sizes)}
    return ByteRoom(work.room_bytes, tuple(chunks[size] for size in sizes))


def run_config(work: Workload, transfer: Transfer, chunk_bytes: tuple[int, ...]) -> RunConfig:
    """What the runtime needs to know of `work`, on either machine."""
    model, initial = work.model, work.initial()
    return RunConfig(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_slots=work.num_slots,
        chunk_bytes=chunk_bytes,
        has_shared=model.shared_intermediate > 0,
        channel_depth=work.channel_depth,
        num_staging=transfer.staging_slots,
        serial=transfer.serial,
        warmup_forwards=work.warmup_forwards,
        initial=initial,
        num_pinned=len(initial) if work.start in PINS and work.pins else 0,
        all_initial=work.start in ("resident", "pinned_layers"),
        storage=host_memory_spec(work),
    )


def host_memory_spec(work: Workload) -> HostMemorySpec | None:
    """Host memory as the runtime knows it; None where nothing lies below it."""
    if work.storage is None:
        return None
    return HostMemorySpec(work.host_slots, work.storage.queue_depth, work.storage.eviction)


def start_note(cfg: Mapping[str, Any]) -> str | None:
    """What a user must know of the start that a configuration asks for, if anything."""
    eviction = cfg["policy"].get("eviction")
    if cfg["start"] not in ("popular", "resident") or eviction is None:
        return None
    if not issubclass(class_of(eviction, "policy.eviction", Eviction), KeepNothing):
        return None
    return (
        f"start={cfg['start']}: {cfg['policy']['name']} gives up every expert when its layer has run, what it began "
        "with as well; start=pinned keeps it (with policy.transfer.staging_slots for the others)"
    )


def trace_of(cfg: Mapping[str, Any], model_file: ReadModel | None = None) -> Trace:
    """The trace of a run: the one it names, or, where that is of another topology than its model, an assumed one.

    model_file: as of `make_model`.
    """
    from sim.job.assumed import assumed_trace

    check_trace(cfg["trace"])
    model = told_model(cfg["model"], model_file)
    batch_size = 1 if cfg["batch_size"] == AS_RECORDED else cfg["batch_size"]
    return assumed_trace(cfg["trace"], model, batch_size) or make_trace(cfg["trace"])


def make_trace(cfg: Mapping[str, Any]) -> Trace:
    """The trace at `path`, one generated where a key of the generator is set, or the shipped recording."""
    check_trace(cfg)
    if cfg.get("path") is not None:
        return open_trace(cfg["path"])
    for key in ("locality", "reuse"):
        if cfg.get(key) is not None:
            from sim.job.assumed import needs_model

            raise needs_model(key, cfg[key])
    from sim.job.default_trace import GENERATED, SHIPPED_TRACE, generated_trace

    told = {key: value for key, value in cfg.items() if key != "path" and value is not None}
    if not told:
        return open_trace(str(shipped(SHIPPED_TRACE)))
    cfg = GENERATED | told
    return generated_trace(cfg["num_tokens"], cfg["num_requests"], cfg["seed"], cfg.get("params"))


def make_model(cfg: Mapping[str, Any], trace: Trace, model_file: ReadModel | None = None) -> ModelSpec:
    """The model that is asked for; its shape must be the trace's, whose sizes of experts it takes where it has none.

    model_file: what `model_file_of` has read.
    """
    model = chosen_model(cfg, trace, model_file)
    for key in ("num_layers", "num_experts"):
        if getattr(model, key) != getattr(trace, key):
            raise ValueError(
                f"model={model.name} has {key}={getattr(model, key)}, the trace {trace.name} "
                f"{key}={getattr(trace, key)}; {OTHER_TOPOLOGY}"
            )
    if trace.top_k > model.top_k:
        raise ValueError(
            f"model={model.name} has top_k={model.top_k}, the trace {trace.name} top_k={trace.top_k}; {OTHER_TOPOLOGY}"
        )
    if trace.expert_bytes is not None and model.expert_bytes is None and cfg.get("expert_bytes") != BY_BITS:
        return replace(model, expert_bytes=trace.expert_bytes)
    return model


def make_policy(cfg: Mapping[str, Any], work: Workload, seed: int) -> tuple[Policy, Transfer]:
    """Compose the parts of a `conf/policy` file for this workload."""
    if os.environ.get(CHECK_PARTS) == "all":
        CHECKING.own = True
    transfer = from_mapping(Transfer, _mapping(cfg.get("transfer", {}), "policy.transfer"), "policy.transfer")
    if "_target_" in cfg:
        # A policy that is not composed of parts; only references that know the future are built that way.
        own = {key: value for key, value in cfg.items() if key not in ("name", "transfer", "place")}
        _require_own(own)
        placed = {"place": make_place(cfg["place"], work.trace)} if "place" in cfg else {}
        return make_part(own, "policy", Policy, future=work.future, **placed), transfer
    known = [*KINDS, *OPTIONAL]
    for key in cfg:
        if key not in known:
            raise unknown_key("policy", key, known)
    missing = [key for key in KINDS if key not in cfg and key not in OPTIONAL]
    if missing:
        raise ValueError(f"policy.{missing[0]} is missing; compose it with policy/{missing[0]}=NAME")
    predictor = make_predictor(cfg["predictor"], work.trace, work.model.num_layers, seed)
    parts = [
        make_part(cfg[name], f"policy.{name}", KINDS[name]) for name in ("horizon", "selection", "eviction", "order")
    ]
    place = make_place(cfg["place"], work.trace) if "place" in cfg else Gpu()
    needs_future = any(part.uses_future for part in (predictor, *parts, place))
    horizon, selection, eviction, order = parts
    future = work.future if needs_future else None
    told = cfg.get("effort")
    effort = None if told is None else from_mapping(Effort, _mapping(told, "policy.effort"), "policy.effort")
    return Policy(predictor, horizon, selection, eviction, order, future, effort, place), transfer


def _require_own(cfg: Mapping[str, Any]) -> None:
    """A whole policy knows the future, and nothing stands around it: only this package's are built."""
    if not is_own_class(class_of(cfg, "policy", Policy)):
        raise ValueError(
            f"policy._target_={cfg['_target_']} is no policy of this package; compose one of your own of parts: "
            "policy.predictor._target_, policy.eviction._target_ and so on"
        )


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={shown(value)} must be a mapping of its keys, as {key}.KEY=VALUE")
    return value
