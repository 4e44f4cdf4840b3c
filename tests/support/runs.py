"""What the tests of the runtime share: forwards from literal routings, constant kernels and links, one `run`.

Knows nothing of trace files or hardware configurations. Times are whole nanoseconds, chosen by each test.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from expertflow.byte_slots import ByteRoom
from expertflow.counters import Counters
from expertflow.evictions.belady import Belady
from expertflow.evictions.lfu import LFU
from expertflow.evictions.lru import LRU
from expertflow.evictions.two_level_lru import TwoLevelLRU
from expertflow.forward import DECODE, Forward, KnownForward
from expertflow.future import Future
from expertflow.horizons.fixed import FixedHorizon
from expertflow.observer import Observer
from expertflow.orders.resident_first import ResidentFirst
from expertflow.parts import Eviction, Horizon, Order, Place, Prediction, Predictor, Selection
from expertflow.policy import Policy
from expertflow.predictors.none import NoPredictor
from expertflow.runtime import RunConfig, Runtime
from expertflow.view import View
from sim.machine.host_compute import HostComputeMachine
from sim.machine.shared_memory import ONE
from sim.machine.simulated import HostCosts, SimMachine, simulate
from sim.machine.storage import StorageMachine
from tests.support.reference import Event, last_occurrences

Row = Sequence[Sequence[int]]
"""Experts [L][K] of one token."""


# -- forwards ------------------------------------------------------------------------------------------------


def forward_of(index: int, rows: Sequence[Row], num_experts: int, *, batched: bool = False) -> Forward:
    """One decode forward of `rows`, each the token of its own request; `batched`: with token counts."""
    demands, counts = [], []
    for layer in range(len(rows[0])):
        chosen = [layer * num_experts + expert for row in rows for expert in row[layer]]
        demands.append(last_occurrences(chosen))
        counts.append({key: chosen.count(key) for key in demands[-1]})
    requests = tuple(range(len(rows)))
    return Forward(
        index=index,
        phase=DECODE,
        rows=list(requests),
        requests=requests,
        kv_lens=(1,) * len(rows),
        demands=demands,
        issue_order=[list(keys) for keys in demands],
        counts=counts if batched or len(rows) > 1 else None,
    )


def decode(routings: Sequence[Row], num_experts: int) -> list[Forward]:
    """One forward of one token per routing: routings[f][l] are the experts chosen, in touch order."""
    return [forward_of(index, [row], num_experts) for index, row in enumerate(routings)]


def batches(routings: Sequence[Sequence[Row]], num_experts: int) -> list[Forward]:
    """One forward of several tokens per routing: routings[f][row][l]."""
    return [forward_of(index, rows, num_experts) for index, rows in enumerate(routings)]


def decode_events(events: Sequence[Sequence[int]], num_layers: int, num_experts: int) -> list[Forward]:
    """Forwards of a stream of events in layer order, `num_layers` to a forward."""
    starts = range(0, len(events), num_layers)
    return decode([events[start : start + num_layers] for start in starts], num_experts)


def events_of(forwards: Iterable[Forward], num_experts: int) -> list[Event]:
    """The same demand as the reference implementation takes it."""
    return [
        (layer, [key - layer * num_experts for key in keys])
        for forward in forwards
        for layer, keys in enumerate(forward.demands)
    ]


# -- constant machines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """Kernel times that do not depend on the model; expert and shared are per token.

    slowdowns: factors on attention, experts and head beside a busy link.
    """

    attention: int = 100
    expert: int = 10
    shared: int = 0
    head: int = 50
    slowdowns: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def attention_list_ns(self, num_tokens: int, kv_lens: Sequence[int], prefill: bool) -> list[int]:
        """[L], the same for every layer."""
        return [self.attention] * 64

    def expert_ns(self, num_tokens: int) -> int:
        """Linear in the tokens routed to the expert."""
        return self.expert * num_tokens

    def experts_ns(self, tokens: Sequence[int]) -> int:
        """One after the other."""
        return self.expert * sum(tokens)

    def shared_ns(self, num_tokens: int) -> int:
        """Linear in the tokens of the forward; 0 = no shared expert."""
        return self.shared * num_tokens

    def head_ns(self, num_tokens: int) -> int:
        """Independent of the tokens."""
        return self.head


@dataclass(frozen=True)
class ConstantLink:
    """A copy takes `ns_per_byte` for each byte, times `slowdown` when a kernel runs at its start."""

    ns_per_byte: int = 1
    slowdown: float = 1.0

    def chunk_ns(self, num_bytes: int, busy: bool) -> int:
        """Device time of one chunk."""
        return round(num_bytes * self.ns_per_byte * (self.slowdown if busy else 1.0))


@dataclass(frozen=True)
class Host:
    """A host that takes `expert` ns for each token of an expert, and `way` for activations there and results back.

    slower: how many times as long copies and products take beside each other.
    """

    expert: int = 30
    way: int = 5
    slower: float = 1.0

    def expert_ns(self, num_tokens: int) -> int:
        """Linear in the tokens routed to the expert."""
        return self.expert * num_tokens

    def there_ns(self, num_rows: int) -> int:
        """Independent of the tokens."""
        return self.way

    def stretch(self, num_bytes: int, copy_ns: int, host_ns: int) -> int:
        """The same whatever is copied and computed."""
        return round(self.slower * ONE)


@dataclass(frozen=True)
class Disk:
    """A disk whose first byte comes after `latency_ns`, and which then takes `ns_per_byte` for each."""

    latency_ns: int = 5
    ns_per_byte: int = 2
    issue_ns: int = 0

    def transfer_ns(self, num_bytes: int) -> int:
        """Linear in the bytes."""
        return num_bytes * self.ns_per_byte


IDEAL_LINK = ConstantLink(ns_per_byte=0)


# -- test parts ----------------------------------------------------------------------------------------------


class Scripted(Predictor):
    """Says what it is told: script[forward, layer, distance] = keys, best first."""

    def __init__(self, script: Mapping[tuple[int, int, int], Sequence[int]]) -> None:
        self.script = script

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        keys = self.script.get((forward.index, layer, distance))
        return None if keys is None else Prediction(keys, [len(keys) - place for place in range(len(keys))])


class RandomKeys(Predictor):
    """Any keys of the target layer, in any number, from a seed; `refreshes` changes its mind at every layer."""

    def __init__(self, seed: int, refreshes: bool = False) -> None:
        self.seed = seed
        self.refreshes = refreshes

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.random = random.Random(self.seed)

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        count = self.random.randrange(-1, self.view.num_experts + 1)
        if count < 0:
            return None
        target = (layer + distance) % self.view.num_layers * self.view.num_experts
        keys = self.random.sample(range(target, target + self.view.num_experts), count)
        return Prediction(keys, list(range(count, 0, -1)))


class TakeAll(Selection):
    """Every scored key is wanted."""

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        return prediction.keys


class NoHorizon(Horizon):
    """Looks at no layer."""

    def distances(self) -> Sequence[int]:
        return ()


def compose(
    *,
    predictor: Predictor | None = None,
    horizon: Horizon | None = None,
    selection: Selection | None = None,
    eviction: Eviction | None = None,
    order: Order | None = None,
    future: Future | None = None,
    place: Place | None = None,
) -> Policy:
    """A policy of the parts given: no prediction, LRU and resident first for those left out."""
    if horizon is None:
        horizon = NoHorizon() if predictor is None else FixedHorizon(depth=1)
    return Policy(
        predictor or NoPredictor(),
        horizon,
        selection or TakeAll(),
        eviction or LRU(),
        order or ResidentFirst(),
        future,
        place=place,
    )


def eviction_named(name: str, scope: str) -> Eviction:
    """An eviction by the name the reference gives it, and `two_level`."""
    kinds: dict[str, type[Any]] = {
        "lru": LRU,
        "lfu": LFU,
        "belady_forced": Belady,
        "belady_bypass": Belady,
        "two_level": TwoLevelLRU,
    }
    return cast(Eviction, kinds[name](scope=scope))


# -- running -------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """One chunk on the copy stream."""

    key: int
    chunk: int
    start_ns: int
    end_ns: int


class Kernel(NamedTuple):
    """One group of kernels on the compute stream."""

    kind: str
    layer: int
    keys: tuple[int, ...]
    start_ns: int
    end_ns: int


class Demand(NamedTuple):
    """One classified layer."""

    known_ns: int
    hits: tuple[int, ...]
    late: tuple[int, ...]
    missing: tuple[int, ...]


class Stall(NamedTuple):
    """A wait of the compute stream. kind: as of `Observer.stalled`; 0 = late, 1 = miss, 2 = host, 3 = storage."""

    start_ns: int
    end_ns: int
    key: int
    kind: int


@dataclass
class Timeline(Observer):
    """Writes down everything an observer hears."""

    copies: list[Copy] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)
    """(key, start_ns, end_ns) of each expert that the host computed."""
    reads: list[Copy] = field(default_factory=list)
    ends_ns: list[int] = field(default_factory=list)

    def was_read(self, key: int, chunk: int, start_ns: int, end_ns: int) -> None:
        self.reads.append(Copy(key, chunk, start_ns, end_ns))

    def computed(self, kind: str, layer: int, keys: Sequence[int], start_ns: int, end_ns: int) -> None:
        self.kernels.append(Kernel(kind, layer, tuple(keys), start_ns, end_ns))

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        self.stalls.append(Stall(start_ns, end_ns, key, kind))

    def computed_on_host(self, key: int, start_ns: int, end_ns: int) -> None:
        self.products.append((key, start_ns, end_ns))

    def copied(self, key: int, chunk: int, cause: int, start_ns: int, end_ns: int) -> None:
        self.copies.append(Copy(key, chunk, start_ns, end_ns))

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        self.demands.append(Demand(now_ns, tuple(hits), tuple(late), tuple(missing)))

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        self.ends_ns.append(now_ns)

    def experts(self) -> list[Kernel]:
        """The groups of routed experts alone."""
        return [kernel for kernel in self.kernels if kernel.kind == "experts"]


@dataclass
class Job:
    """One runtime bound to one machine; `run` once."""

    runtime: Runtime
    machine: SimMachine
    timeline: Timeline

    @property
    def counters(self) -> Counters:
        """The totals of the run."""
        return self.runtime.counters

    def run(self) -> Job:
        """To the end, identities checked."""
        simulate(self.runtime, self.machine)
        self.runtime.check_identities()
        return self


def build(
    forwards: Sequence[Forward],
    *,
    num_experts: int,
    num_slots: int,
    policy: Policy | None = None,
    kernels: Kernels | None = None,
    link: ConstantLink | None = None,
    costs: HostCosts | None = None,
    chunk_bytes: tuple[int, ...] = (40,),
    machine_type: type[SimMachine] = SimMachine,
    host: Host | None = None,
    disk: Disk | None = None,
    watched: bool = True,
    room: ByteRoom | None = None,
    **config: Any,
) -> Job:
    """A job over `forwards`; `config` goes to RunConfig. An expert is 40 bytes in one chunk unless said. host: of a
    machine that computes experts on it. disk: of one whose experts lie there. room: of experts of unlike sizes."""
    kernels = kernels or Kernels()
    num_layers = len(forwards[0].demands)
    config.setdefault("top_k", len(forwards[0].demands[0]))
    config.setdefault("has_shared", kernels.shared > 0)
    run_config = RunConfig(
        num_layers=num_layers, num_experts=num_experts, num_slots=num_slots, chunk_bytes=chunk_bytes, **config
    )
    given: tuple[Any, ...] = (kernels, link or ConstantLink(), costs or HostCosts(), chunk_bytes)
    if disk is not None:
        machine: SimMachine = StorageMachine(*given, disk)
    else:
        machine = machine_type(*given) if host is None else HostComputeMachine(*given, host)
    if room is not None:
        machine.tell_sizes({size for own in room.chunk_bytes for size in own}, None)
    timeline = Timeline()
    runtime = Runtime(run_config, machine, policy or compose(), forwards, [timeline] if watched else [], room)
    return Job(runtime, machine, timeline)


def run(forwards: Sequence[Forward], **settings: Any) -> Job:
    """`build` and run."""
    return build(forwards, **settings).run()


def run_counts(
    forwards: Sequence[Forward],
    *,
    num_experts: int,
    num_slots: int,
    eviction: str,
    scope: str = "global",
    **settings: Any,
) -> tuple[int, int, int]:
    """(hits, misses, evictions) on an ideal link without prefetch; nothing may be late."""
    num_layers = len(forwards[0].demands)
    future = Future(forwards, num_layers * num_experts) if eviction.startswith("belady") else None
    policy = compose(eviction=eviction_named(eviction, scope), future=future)
    settings = {"link": IDEAL_LINK, "watched": False, **settings}
    counters = run(forwards, num_experts=num_experts, num_slots=num_slots, policy=policy, **settings).counters
    assert counters.num_late == 0
    return counters.num_hits, counters.num_misses, counters.num_evictions
