"""Random small workloads, in memory: a trace, a machine, batches and slots, drawn from a seed.

Knows nothing of what a policy should do with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from expertflow.forward import DECODE, Forward, Recorded
from expertflow.model import ModelSpec
from expertflow.policy import Policy
from expertflow.view import Progress, View
from sim.job.configure import configure
from sim.job.setup import Transfer, Workload, make_policy
from sim.paths import CONF
from sim.specs.hardware import Hardware, Stack
from tests.support.commands import TINY_MODEL, routing
from traces.batching import BatchConfig, Batches
from traces.reader import Trace

HARDWARE = Hardware(
    name="drawn",
    memory_gb=80.0,
    memory_gb_per_s=2000.0,
    tflops=300.0,
    link_gb_per_s=25.0,
    pageable_gb_per_s=6.0,
    memory_efficiency=0.8,
    compute_efficiency=0.6,
    link_latency_ns=5000,
    launch_host_ns=2000,
    launch_latency_ns=3000,
    issue_copy_ns=5000,
    gate_sync_ns=10000,
    token_sync_ns=20000,
    decide_ns=20000,
)


def memory_trace(
    experts: np.ndarray, num_experts: int, starts: Sequence[int], prompts: Sequence[int], **arrays: Any
) -> Trace:
    """A trace that is in no file: experts [T, L, K], request starts [R + 1], prompt lengths [R]."""
    num_tokens, num_layers, top_k = experts.shape
    sizes = {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "num_requests": len(prompts),
        "num_tokens": num_tokens,
    }
    header = {"model": "tiny", **{key: str(value) for key, value in sizes.items()}}
    given = {
        "experts": experts,
        "request_start": np.array(starts, np.int64),
        "prompt_len": np.array(prompts, np.int32),
        **arrays,
    }
    return Trace([Path("drawn.trace")], header, given)


def model_of(num_layers: int, num_experts: int, top_k: int, **changes: Any) -> ModelSpec:
    """The tiny model in another shape."""
    shape = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    return ModelSpec(**{**TINY_MODEL, **shape, **changes})


def workload(trace: Trace, model: ModelSpec, num_slots: int, **changes: Any) -> Workload:
    """A workload at batch 1 on `HARDWARE`, one chunk per expert, no stack overhead unless changed."""
    batch = changes.pop("batch", BatchConfig())
    plain: dict[str, Any] = {
        "trace_sha256": "",
        "hardware": HARDWARE,
        "stack": Stack("none", 0, 0),
        "chunk_mib": 4.0,
        "channel_depth": 2,
        "start": "cold",
        "warmup_forwards": 0,
    }
    return Workload(trace=trace, model=model, batches=Batches(trace, batch), num_slots=num_slots, **(plain | changes))


def drawn_hardware(draw: random.Random) -> Hardware:
    """From a link that starves the GPU to one that copies in no time; host costs in or out."""
    rate: Any = draw.choice([0.5, 6.0, 25.0, 350.0, float("inf"), ((65536, 2.0), (4 << 20, 25.0))])
    pinned = max(bandwidth for _, bandwidth in rate) if isinstance(rate, tuple) else rate
    fast: dict[str, Any] = dict.fromkeys(
        ("launch_host_ns", "launch_latency_ns", "issue_copy_ns", "gate_sync_ns", "token_sync_ns", "decide_ns"), 0
    )
    slow = [{"issue_copy_ns": 60_000}, {"gate_sync_ns": 300_000}, {"decide_ns": 500_000}]
    costs: dict[str, Any] = draw.choice([{}, fast, *slow])
    # A curve may be slow for small copies: the pageable rate must not exceed it there.
    pageable = 2.0 if isinstance(rate, tuple) else pinned * draw.choice([0.25, 1.0])
    latency, slowdown = draw.choice([0, 5000]), draw.choice([1.0, 1.0, 1.4])
    return replace(
        HARDWARE,
        link_gb_per_s=rate,
        pageable_gb_per_s=pageable,
        link_latency_ns=latency,
        link_slowdown=slowdown,
        **costs,
    )


def drawn_trace(draw: random.Random, num_layers: int, num_experts: int, top_k: int) -> Trace:
    """Up to 30 tokens in up to 5 requests, with and without prompts."""
    num_requests = draw.randint(1, 5)
    lengths = [draw.randint(1, 6) for _ in range(num_requests)]
    starts = [sum(lengths[:index]) for index in range(num_requests + 1)]
    prompts = [draw.randint(0, length) if draw.random() < 0.5 else 0 for length in lengths]
    experts = routing((num_layers, num_experts, top_k), starts[-1], draw.randrange(1 << 30))
    return memory_trace(experts, num_experts, starts, prompts)


def drawn_workload(seed: int) -> Workload:
    """A small instance of everything a configuration can vary."""
    draw = random.Random(seed)
    num_layers, num_experts = draw.randint(2, 6), draw.randint(2, 8)
    top_k = draw.randint(1, min(3, num_experts))
    changes = {"shared_intermediate": 256} if draw.random() < 0.3 else {}
    model = model_of(num_layers, num_experts, top_k, **changes)
    num_keys = num_layers * num_experts
    batch = BatchConfig(draw.choice([1, 1, 2, 4]), draw.choice([1, 2, 512]))
    overhead = draw.choice([0, 0, 20_000, 1_000_000])
    start = draw.choice(["cold", "cold", "popular", "resident"])
    num_slots = num_keys if start == "resident" else draw.randint(1, num_keys)
    return workload(
        drawn_trace(draw, num_layers, num_experts, top_k),
        model,
        num_slots,
        batch=batch,
        hardware=drawn_hardware(draw),
        stack=Stack("drawn", overhead, overhead),
        start=start,
        chunk_mib=draw.choice([0.1, 0.5, 4.0]),
        channel_depth=draw.randint(1, 3),
    )


@cache
def policy_conf(name: str, *words: str) -> dict[str, Any]:
    """The configuration of one policy."""
    found: dict[str, Any] = configure(["+hardware=a100", f"+policy={name}", *words])["policy"]
    return found


def policy_names() -> list[str]:
    """Every policy of `conf/`."""
    return sorted(path.stem for path in (CONF / "policy").glob("*.yaml"))


def policy_for(work: Workload, name: str, *words: str) -> tuple[Policy, Transfer]:
    """A policy of `conf/` for this workload."""
    return make_policy(policy_conf(name, *words), work, seed=0)


def view_of(
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    state: bytearray | None = None,
    expert_bytes: int = 1000,
    num_slots: int | None = None,
    slots_by_layer: Sequence[int] = (),
) -> View:
    """What a part sees before anything has run; `state`, if given, is the residency that the test moves."""
    num_keys = num_layers * num_experts
    return View(
        Progress(),
        memoryview(bytearray(num_keys) if state is None else state),
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        num_slots=num_keys if num_slots is None else num_slots,
        slots_by_layer=slots_by_layer,
    )


def progress_of(view: View) -> Progress:
    """What the runtime would write, and `view` shows."""
    return view._progress


def forward_rows(index: int, rows: Sequence[int], num_layers: int, recorded: Recorded | None = None) -> Forward:
    """A decode forward of trace rows whose demand nobody asks for."""
    demands: list[list[int]] = [[] for _ in range(num_layers)]
    return Forward(
        index, DECODE, list(rows), tuple(range(len(rows))), (1,) * len(rows), demands, demands, None, recorded=recorded
    )
