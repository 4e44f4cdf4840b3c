"""From a composed configuration to the objects of a run: trace, model, hardware, stack, policy.

Every user error is a ValueError with one line that names the key, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from expertflow.future import Future
from expertflow.model import ModelSpec, model_from_dict
from expertflow.parts import Effort
from expertflow.places.gpu import Gpu
from expertflow.policy import Policy
from expertflow.runtime import RunConfig
from sim.job.make_parts import make_part, make_predictor
from sim.paths import config_files
from sim.specs.chunks import chunk_sizes
from sim.specs.hardware import PAGEABLE, PINNED, Hardware, Stack, hardware_from_dict, stack_from_dict
from traces.batching import BatchConfig, Batches
from traces.reader import Trace, open_trace
from traces.shipped import shipped

STARTS = ("cold", "popular", "resident")
WORKSPACE_GB = 1.5


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

    @cached_property
    def future(self) -> Future:
        """The demand of the whole trace; made only for references."""
        return Future(self.batches, self.model.num_layers * self.model.num_experts)

    @property
    def residency(self) -> float:
        """Share of all routed experts that have a slot."""
        return self.num_slots / (self.model.num_layers * self.model.num_experts)

    def initial(self) -> tuple[int, ...]:
        """Keys resident at the start, best first."""
        num_keys = self.model.num_layers * self.model.num_experts
        if self.start == "cold":
            return ()
        if self.start == "resident":
            return tuple(range(num_keys))
        counts = np.bincount(self.future.keys, minlength=num_keys)
        return tuple(int(key) for key in np.argsort(-counts, kind="stable"))


@dataclass(frozen=True)
class Transfer:
    """How a policy's copies run: from `pinned` or `pageable` memory; `serial` = never beside compute."""

    memory: str = PINNED
    serial: bool = False
    staging_slots: int = 0

    def __post_init__(self) -> None:
        if self.memory not in (PINNED, PAGEABLE):
            raise ValueError(f"policy.transfer.memory={self.memory!r} is unknown; choose {PINNED} or {PAGEABLE}")
        if not isinstance(self.serial, bool):
            raise ValueError(f"policy.transfer.serial={self.serial!r} must be true or false")
        staging = self.staging_slots
        if not isinstance(staging, int) or isinstance(staging, bool) or staging < 0:
            raise ValueError(f"policy.transfer.staging_slots={staging!r} must be a whole number of at least 0")


def make_workload(cfg: Mapping[str, Any], trace: Trace | None = None) -> Workload:
    """Trace, model, hardware and capacity of the configuration; ValueError where they do not fit together.

    trace: already open, in place of the one that the configuration names.
    """
    _check_choice("start", cfg["start"], STARTS)
    if cfg["start"] == "resident" and (cfg["gpu_memory_gb"] is not None or cfg["residency"] != 1):
        raise ValueError("start=resident needs room for every expert: set residency=1.0, or choose start=popular")
    hardware = hardware_from_dict(cfg["hardware"])
    stack = stack_from_dict(cfg["stack"])
    if trace is None:
        trace = make_trace(cfg["trace"])
    model = make_model(cfg["model"], trace)
    scaled = [name for name in hardware.kernel_ns if name.startswith(f"{model.name}/")]
    if scaled and model.name not in hardware.kernel_ns:
        raise ValueError(
            f"hardware={hardware.name} was measured with {scaled[0]}, widths divided, and says nothing of "
            f"{model.name} itself; hold it against its machine: python -m replay.validate"
        )
    batch = BatchConfig(
        _whole(cfg, "batch_size", 1),
        _whole(cfg, "prefill_chunk", 1),
        None if cfg["max_tokens"] is None else _whole(cfg, "max_tokens", 1),
    )
    batches = Batches(trace, batch)
    chunk_mib = cfg["chunk_mib"]
    if not isinstance(chunk_mib, int | float) or isinstance(chunk_mib, bool) or not 1 / 1024 <= chunk_mib <= 4096:
        raise ValueError(f"chunk_mib={chunk_mib!r} must be a number of MiB from 1/1024 to 4096")
    warmup = _whole(cfg, "warmup_forwards", 0)
    num_slots = _num_slots(cfg, model, trace, batch.batch_size, hardware.memory_gb)
    return Workload(
        trace,
        trace.sha256(),
        model,
        hardware,
        stack,
        batches,
        num_slots,
        float(chunk_mib),
        _whole(cfg, "channel_depth", 1),
        cfg["start"],
        warmup,
    )


def load_chunks(work: Workload) -> tuple[int, ...]:
    """Bytes of each chunk of one expert."""
    return tuple(chunk_sizes(work.model.expert_bytes, int(work.chunk_mib * 2**20)))


def run_config(work: Workload, transfer: Transfer, chunk_bytes: tuple[int, ...]) -> RunConfig:
    """What the runtime needs to know of `work`, on either machine."""
    model = work.model
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
        initial=work.initial(),
    )


def make_trace(cfg: Mapping[str, Any]) -> Trace:
    """The trace at `path`, one generated where a key of the generator is set, or the shipped recording."""
    unknown = set(cfg) - {"path", "num_tokens", "num_requests", "seed", "params"}
    if unknown:
        raise ValueError(f"trace.{sorted(unknown)[0]} is no key; known: path, num_tokens, num_requests, seed, params")
    if cfg.get("path") is not None:
        return open_trace(_paths(cfg["path"]))
    from sim.job.default_trace import GENERATED, SHIPPED_TRACE, generated_trace

    told = {key: value for key, value in cfg.items() if key != "path" and value is not None}
    if not told:
        return open_trace(str(shipped(SHIPPED_TRACE)))
    cfg = GENERATED | told
    return generated_trace(
        _whole(cfg, "num_tokens", 1, "trace."),
        _whole(cfg, "num_requests", 1, "trace."),
        _whole(cfg, "seed", 0, "trace."),
        cfg.get("params"),
    )


def _paths(value: Any) -> str | list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"trace.path={value!r} must be a file, a glob, or a list of files")
    return value if isinstance(value, str) else paths


def make_model(cfg: Mapping[str, Any], trace: Trace) -> ModelSpec:
    """The named model, or the one that the trace names; its shape must be the trace's."""
    if cfg.get("name") == "auto":
        extra = sorted(set(cfg) - {"name"})
        if extra:
            raise ValueError(f"model.{extra[0]} means nothing with model=auto; name the model to change its sizes")
        # A twin has its original's topology; sizes and speeds come from the original.
        name = trace.model.removesuffix("-twin")
        known = config_files("model")
        del known["auto"]
        if name not in known:
            raise ValueError(
                f"the trace {trace.name} names the model {trace.model!r}, of which no sizes are known; "
                f"say model=NAME with one of: {', '.join(sorted(known))}"
            )
        model = model_from_dict(yaml.safe_load(known[name].read_text(encoding="utf-8")))
    else:
        model = model_from_dict(cfg)
    for key in ("num_layers", "num_experts"):
        if getattr(model, key) != getattr(trace, key):
            raise ValueError(
                f"model={model.name} has {key}={getattr(model, key)}, the trace {trace.name} "
                f"{key}={getattr(trace, key)}; choose the model that was recorded (model=auto)"
            )
    if trace.top_k > model.top_k:
        raise ValueError(
            f"model={model.name} has top_k={model.top_k}, the trace {trace.name} top_k={trace.top_k}; "
            "choose the model that was recorded (model=auto)"
        )
    return model


def _num_slots(cfg: Mapping[str, Any], model: ModelSpec, trace: Trace, batch_size: int, memory_gb: float) -> int:
    num_keys = model.num_layers * model.num_experts
    gigabytes, residency = cfg["gpu_memory_gb"], cfg["residency"]
    if gigabytes is None:
        if not isinstance(residency, int | float) or isinstance(residency, bool) or not 0 < residency <= 1:
            raise ValueError(f"residency={residency!r} must be in (0, 1]: the share of all experts that have a slot")
        slots = int(residency * num_keys + 1e-9)
        if slots < 1:
            raise ValueError(
                f"residency={residency} of {num_keys} experts leaves no slot at all; "
                f"the least is residency={1 / num_keys:.6f}"
            )
        return slots
    if not isinstance(gigabytes, int | float) or isinstance(gigabytes, bool) or not 0 < gigabytes < float("inf"):
        raise ValueError(f"gpu_memory_gb={gigabytes!r} must be a number of GB above 0")
    if gigabytes > memory_gb:
        raise ValueError(f"gpu_memory_gb={gigabytes} is more than the GPU has (hardware.memory_gb={memory_gb})")
    context = int(np.max(np.diff(trace.request_start)))
    if trace.context_len is not None:
        context = int(np.max(np.diff(trace.request_start) + np.asarray(trace.context_len)))
    fixed = model.non_expert_bytes + model.kv_bytes(context) * batch_size + int(WORKSPACE_GB * 1e9)
    slots = int((gigabytes * 1e9 - fixed) // model.expert_bytes)
    if slots < 1:
        need = (fixed + model.expert_bytes) / 1e9
        raise ValueError(
            f"gpu_memory_gb={gigabytes}: weights outside the experts, KV and workspace take "
            f"{fixed / 1e9:.2f} GB and leave no slot for an expert; give at least {need:.2f}"
        )
    return min(slots, num_keys)


def make_policy(cfg: Mapping[str, Any], work: Workload, seed: int) -> tuple[Policy, Transfer]:
    """Compose the parts of a `conf/policy` file for this workload."""
    copies = _known_keys(cfg.get("transfer") or {}, ("memory", "serial", "staging_slots"), "policy.transfer")
    transfer = Transfer(**copies)
    if "_target_" in cfg:
        # A policy that is not composed of parts; only references that know the future are built that way.
        own = {key: value for key, value in cfg.items() if key not in ("name", "transfer")}
        return make_part(own, "policy", future=work.future), transfer
    optional = {"name", "transfer", "effort", "place"}
    known = {"predictor", "horizon", "selection", "eviction", "order"} | optional
    unknown = sorted(set(cfg) - known)
    if unknown:
        raise ValueError(f"policy.{unknown[0]} is no key; known: {', '.join(sorted(known))}")
    missing = sorted(known - optional - set(cfg))
    if missing:
        raise ValueError(f"policy.{missing[0]} is missing; compose it with policy/{missing[0]}=NAME")
    predictor = make_predictor(cfg["predictor"], work.trace, work.model.num_layers, seed)
    parts = [make_part(cfg[name], f"policy.{name}") for name in ("horizon", "selection", "eviction", "order")]
    place = make_part(cfg["place"], "policy.place") if "place" in cfg else Gpu()
    needs_future = any(part.uses_future for part in (predictor, *parts, place))
    horizon, selection, eviction, order = parts
    future = work.future if needs_future else None
    told = cfg.get("effort")
    effort = None if told is None else Effort(**_known_keys(told, ("once", "per_layer"), "policy.effort"))
    return Policy(predictor, horizon, selection, eviction, order, future, effort, place), transfer


def _whole(cfg: Mapping[str, Any], key: str, least: int, prefix: str = "") -> int:
    value = cfg.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{prefix}{key}={value!r} must be a whole number of at least {least}")
    return value


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of: {', '.join(choices)}")


def _known_keys(cfg: Mapping[str, Any], known: tuple[str, ...], group: str) -> dict[str, Any]:
    for key in cfg:
        if key not in known:
            raise ValueError(f"{group}.{key} is no key; known: {', '.join(known)}")
    return dict(cfg)
