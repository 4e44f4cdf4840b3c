"""One policy over one workload on the simulated machine, and the schedules that bound it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

from expertflow.bounds import Floor, HostFloor, floor, min_loads
from expertflow.clairvoyant import portfolio
from expertflow.expert_sizes import most_that_fit
from expertflow.forward import PREFILL
from expertflow.keys import MOST
from expertflow.metrics import collect_metrics
from expertflow.observer import Observer
from expertflow.parts import Place
from expertflow.places.gpu import Gpu
from expertflow.policy import Policy
from expertflow.runtime import Runtime
from sim.job.forwards import forwards_for
from sim.job.setup import Transfer, Workload, byte_room, load_chunks, run_config
from sim.machine.groups import CheapestGroups
from sim.machine.host_bound import machine_for
from sim.machine.host_compute import CpuTimes, HostComputeMachine
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine, simulate
from sim.machine.solved import solved_stack
from sim.machine.storage import StorageMachine
from sim.specs.disk import Disk
from traces.processes.progress import shown


def machine_of(work: Workload, policy: Policy, transfer: Transfer) -> SimMachine:
    """The machine of `work` for one run of `policy`. ValueError where the hardware lacks what its place needs."""
    chunk_bytes = load_chunks(work)
    link = Link(work.hardware, memory=transfer.memory)
    stack, _ = solved_stack(work)
    kernels = KernelTimes(work.model, work.hardware, stack)
    costs = HostCosts.of(work.hardware, stack)
    machine: SimMachine
    if policy.places:
        machine = HostComputeMachine(kernels, link, costs, chunk_bytes, CpuTimes(work.model, work.hardware))
    elif work.storage is not None:
        machine = StorageMachine(kernels, link, costs, chunk_bytes, Disk(work.storage, work.storage_factor))
    else:
        machine = machine_for(kernels, link, costs, chunk_bytes)
    room = byte_room(work)
    if room is not None:
        machine.tell_sizes(chain.from_iterable(set(room.chunk_bytes)), kernels.keys_ns if kernels.knows_sizes else None)
    return machine


def run_policy(
    work: Workload, policy: Policy, transfer: Transfer, observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """Simulate `policy` over `work`; the metrics of `expertflow.metrics`, after the identities were checked."""
    machine = machine_of(work, policy, transfer)
    config = run_config(work, transfer, load_chunks(work))
    runtime = Runtime(config, machine, policy, forwards_for(policy, work), observers, byte_room(work))
    journal = runtime.journal
    try:
        with shown("", lambda: journal.num_tokens, work.batches.num_tokens):
            simulate(runtime, machine)
    except OverflowError as error:
        raise _too_long(work) from error
    if runtime.counters.elapsed_ns > MOST:
        raise _too_long(work)
    runtime.check_identities()
    if work.warmup_forwards >= runtime.counters.num_forwards:
        raise ValueError(
            f"warmup_forwards={work.warmup_forwards} leaves nothing to measure: the trace has "
            f"{runtime.counters.num_forwards} forwards"
        )
    return collect_metrics(runtime) | solved_stack(work)[1]


def _too_long(work: Workload) -> ValueError:
    return ValueError(
        f"hardware={work.hardware.name} takes more than 2^63 ns (292 years) for this run; raise link_gb_per_s, "
        "memory_gb_per_s, tflops and their efficiencies, or lower max_tokens"
    )


def best_clairvoyant(
    work: Workload, place: Callable[[], Place] = Gpu, transfer: Transfer | None = None
) -> tuple[str, dict[str, Any]]:
    """Name and metrics of the fastest schedule of the portfolio that knows the future. place: makes that of each."""
    runs: list[tuple[str, dict[str, Any]]] = []
    for name, policy in portfolio(work.future, place).items():
        with shown(f"looking for the best schedule, {len(runs) + 1}"):
            runs.append((name, run_policy(work, policy, transfer or Transfer())))
    return min(runs, key=lambda run: run[1]["elapsed_ns"])


def run_floor(work: Workload, staging_slots: int = 0, with_host: bool = False) -> Floor:
    """The floor for schedules with the slots of `work` (and staging buffers), over the whole run. with_host: of those
    that may compute experts on the host.

    Where experts launched at once have times of their own, a layer's take the cheapest partition into groups: a
    schedule launches every expert of a layer once, so that its launches are one of the partitions tried. The shared
    experts add their own time to one of the launches whichever it is, and so to the least of them all. What a busy
    link adds to a kernel only lengthens it, and is left out. Where experts have unlike sizes, no schedule holds more at
    once than there are of the smallest that fit, nor loads any faster than the one that loads fastest: loads and time
    are no less than those of MIN with so many slots of such experts.
    """
    model = work.model
    stack, _ = solved_stack(work)
    kernels = KernelTimes(model, work.hardware, stack)
    costs = HostCosts.of(work.hardware, stack)
    cheapest = None if kernels.groups is None else CheapestGroups(kernels.groups, model.num_experts, costs.group_ns)
    host = _host_floor(work) if with_host else None
    serial: list[int] = []
    heads: list[int] = []
    for forward in work.batches:
        if forward.spans:
            attention = kernels.attention_spans_ns(forward.kv_lens, forward.spans)
        else:
            attention = kernels.attention_list_ns(forward.num_tokens, forward.kv_lens, forward.phase == PREFILL)
        shared = kernels.shared_ns(forward.num_tokens)
        for layer, keys in enumerate(forward.demands):
            tokens = [1] * len(keys) if forward.counts is None else [forward.counts[layer][key] for key in keys]
            if host is not None:
                experts = host.split_ns(_least_kernels(kernels, costs.group_ns, keys, tokens))
            elif cheapest is None:
                experts = kernels.keys_ns(keys, tokens) + costs.group_ns
            else:
                experts = cheapest.ns(tokens)
            serial.append(attention[layer] + shared + experts + costs.layer_serial_ns)
            if layer == 0:
                # After the tokens are read back the first launch of a forward has nothing to hide behind.
                serial[-1] += costs.launch_ns + costs.launch_latency_ns + costs.forward_ns + forward.draft_ns
                # The first forward follows no tokens.
                serial[-1] += costs.observe_ns if heads else 0
        head = kernels.head_ns(forward.num_logits) if forward.num_logits else 0
        heads.append(head + costs.group_ns + costs.head_overhead_ns + costs.token_sync_ns)
    sizes, num_slots = model.bytes_by_key, work.num_slots + staging_slots
    if sizes is not None and work.room_bytes is not None:
        num_slots = most_that_fit(sizes, work.room_bytes + staging_slots * max(sizes))
    link, chunk_bytes = Link(work.hardware), int(work.chunk_mib * 2**20)
    fastest = min(link.fastest_load_ns(size, chunk_bytes) for size in set(sizes or (model.mean_expert_bytes,)))
    with shown("working out the floor"):
        totals = min_loads(work.batches, work.future, num_slots, work.initial())
        found = floor(totals, serial, heads, fastest, kernels.shortest_expert_ns, model.num_layers, host)
        return found if work.storage is None else _floor_of_reads(work, found, serial, heads, kernels)


def _floor_of_reads(
    work: Workload, found: Floor, serial: Sequence[int], heads: Sequence[int], kernels: KernelTimes
) -> Floor:
    """`found` as far as storage allows it: host memory in the place of the slots, reads in the place of copies."""
    assert work.storage is not None
    model, chunk_bytes = work.model, int(work.chunk_mib * 2**20)
    fastest = Disk(work.storage, work.storage_factor).fastest_load_ns(model.mean_expert_bytes, chunk_bytes)
    totals = min_loads(work.batches, work.future, work.host_slots, work.initial())
    reads = floor(totals, serial, heads, fastest, kernels.shortest_expert_ns, model.num_layers)
    largest = max(found, reads, key=lambda one: one.floor_ns)
    return replace(largest, num_loads=found.num_loads, num_reads=reads.num_loads)


def _host_floor(work: Workload) -> HostFloor:
    times = CpuTimes(work.model, work.hardware)
    return HostFloor(times.expert_ns(1), 2 * times.there_ns(1))


def _least_kernels(kernels: KernelTimes, launch_ns: int, keys: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """What 0, 1, 2 … of a layer's experts take on the GPU at least, whichever these are; rising."""
    if kernels.groups is not None:
        # Of how many are launched together, and over how many tokens, nothing is known but that one is launched.
        return [0] + [kernels.shortest_expert_ns + launch_ns] * len(tokens)
    times = accumulate(sorted(map(kernels.one_ns, keys, tokens)))
    return [0, *(time + launch_ns for time in times)]
