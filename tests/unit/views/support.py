"""Tiny runs on a machine whose every duration is a round number.

Attention takes 100 ns, an expert 50 ns, the shared expert 20 ns, the head 30 ns, a copy 1 ns a byte; the host
takes no time. An expert is two chunks of 1000 bytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

from expertflow.evictions.lru import LRU
from expertflow.forward import DECODE, PREFILL, Forward
from expertflow.future import Future
from expertflow.horizons.fixed import FixedHorizon
from expertflow.observer import Observer
from expertflow.orders.resident_first import ResidentFirst
from expertflow.policy import Policy
from expertflow.predictors.none import NoPredictor
from expertflow.predictors.oracle import OraclePredictor
from expertflow.runtime import RunConfig, Runtime
from expertflow.selections.top_k import TopK
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine, simulate

CHUNK_BYTES = (1000, 1000)


class ConstantKernels:
    """Stands for `sim.machine.kernels.KernelTimes`."""

    def __init__(self, num_layers: int, shared: bool) -> None:
        self.num_layers = num_layers
        self.shared = shared

    def expert_ns(self, num_tokens: int) -> int:
        return 50 * num_tokens

    def experts_ns(self, tokens: Sequence[int]) -> int:
        return 50 * sum(tokens)

    def shared_ns(self, num_tokens: int) -> int:
        return 20 * self.shared

    def head_ns(self, num_tokens: int) -> int:
        return 30

    def attention_list_ns(self, num_tokens: int, kv_lens: Sequence[int], prefill: bool) -> list[int]:
        return [100] * self.num_layers


class ConstantLink:
    """Stands for `sim.machine.link.Link`: 1 ns a byte."""

    slowdown = 1.0

    def chunk_ns(self, num_bytes: int, busy: bool) -> int:
        return num_bytes


def decode(index: int, demands: list[list[int]]) -> Forward:
    """One token of one request."""
    return Forward(index, DECODE, (index,), (0,), (index + 1,), demands, demands, None)


def prefill(index: int, counts: list[dict[int, int]], num_tokens: int) -> Forward:
    """`num_tokens` rows of one request; counts[layer][key]: tokens routed to the expert."""
    demands = [list(layer) for layer in counts]
    kv_lens = tuple(range(1, num_tokens + 1))
    return Forward(index, PREFILL, range(num_tokens), (0,), kv_lens, demands, demands, counts, (0,))


def run(
    forwards: list[Forward],
    num_experts: int,
    num_slots: int,
    observers: Sequence[Observer],
    *,
    prefetch: bool = True,
    serial: bool = False,
    shared: bool = False,
) -> Runtime:
    """LRU, with perfect prediction one layer ahead if `prefetch`; the finished run."""
    num_layers = len(forwards[0].demands)
    config = RunConfig(num_layers, num_experts, 2, num_slots, CHUNK_BYTES, has_shared=shared, serial=serial)
    kernels = cast(KernelTimes, ConstantKernels(num_layers, shared))
    machine = SimMachine(kernels, cast(Link, ConstantLink()), HostCosts(), CHUNK_BYTES)
    policy = Policy(
        OraclePredictor() if prefetch else NoPredictor(),
        FixedHorizon(depth=1),
        TopK(),
        LRU(),
        ResidentFirst(),
        Future(forwards, num_layers * num_experts),
    )
    runtime = Runtime(config, machine, policy, forwards, observers)
    simulate(runtime, machine)
    runtime.check_identities()
    return runtime


def by_hand() -> list[Forward]:
    """Two tokens, two layers of four experts; with three slots and prefetch: miss, late, hit, late.

    Attention of layer 0 ends at 100; E1 misses, its copy ends at 2100, that of E2 of layer 1, asked for
    meanwhile, at 4100. Layer 1 is routed at 2250, waits, and the token is out at 4180. Layer 0 of the second
    token hits at 4280; E3 of layer 1 is asked for then and lands at 6280; the end is at 6360.
    """
    return [decode(0, [[1], [6]]), decode(1, [[1], [7]])]


def at_random(num_forwards: int = 60, num_layers: int = 4, num_experts: int = 8) -> list[Forward]:
    """A prefill of five tokens, then two distinct experts a layer."""
    draw = random.Random(7)
    first_keys = [layer * num_experts for layer in range(num_layers)]
    counts = [{key + e: draw.randint(1, 3) for e in draw.sample(range(num_experts), 5)} for key in first_keys]
    forwards = [prefill(0, counts, 5)]
    for index in range(1, num_forwards):
        demands = [[key + e for e in draw.sample(range(num_experts), 2)] for key in first_keys]
        forwards.append(decode(index, demands))
    return forwards


RUNS: dict[str, tuple[int, dict[str, bool]]] = {
    "on demand": (12, {"prefetch": False}),
    "prefetch": (12, {"prefetch": True}),
    "prefetch, shared expert": (12, {"prefetch": True, "shared": True}),
    "fewer slots than demand": (1, {"prefetch": True}),
    "copy and compute in turn": (6, {"prefetch": False, "serial": True}),
    "all resident": (32, {"prefetch": False}),
}
"""Number of slots and ways to run `at_random`, by name."""
