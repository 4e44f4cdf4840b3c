"""The simulated machine: a link, a compute stream and a host on SimPy's clock, in integer nanoseconds.

All ends are known when work is enqueued, so a wake of the runtime is one SimPy timeout. Host time spent on
launching and issuing delays what is enqueued after it, and the next wake.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import simpy

from expertflow.forward import PREFILL, Forward
from expertflow.hints import mypyc_attr
from expertflow.machine import GATE, LOAD, Chunk, Mark, Record, Wait
from expertflow.runtime import Runtime
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.specs.hardware import HOST_COSTS, Hardware, Stack

MAX_IDLE_WAKES = 1000
"""Wakes in a row that bring no news: more is a mistake of the machine, not a schedule."""


@dataclass(frozen=True)
class HostCosts:
    """Host time in ns: what each action keeps the host busy for, and what it takes to read results back."""

    launch_ns: int = 0
    launch_latency_ns: int = 0
    issue_ns: int = 0
    gate_sync_ns: int = 0
    token_sync_ns: int = 0
    decide_ns: int = 0
    layer_overhead_ns: int = 0
    head_overhead_ns: int = 0
    # Charged by `sim.machine.host_bound` alone.
    classify_ns: int = 0
    observe_ns: int = 0
    forward_ns: int = 0
    group_ns: int = 0
    copy_start_ns: int = 0
    release_ns: int = 0
    release_latency_ns: int = 0

    @classmethod
    def of(cls, hardware: Hardware, stack: Stack) -> HostCosts:
        """The costs of one host under one software stack. ValueError for one whose overheads are still to be solved."""
        if stack.resident_tpot_ms is not None:
            raise ValueError(
                f"stack.resident_tpot_ms={stack.resident_tpot_ms:g} is solved in a simulation alone; give here what it "
                "solved: stack.layer_overhead_ns and stack.head_overhead_ns"
            )
        return cls(
            launch_ns=hardware.launch_host_ns,
            launch_latency_ns=hardware.launch_latency_ns,
            issue_ns=hardware.issue_copy_ns,
            gate_sync_ns=hardware.gate_sync_ns,
            token_sync_ns=hardware.token_sync_ns,
            decide_ns=hardware.decide_ns,
            layer_overhead_ns=stack.layer_overhead_ns,
            head_overhead_ns=stack.head_overhead_ns,
            **{key: getattr(stack, key) for key in HOST_COSTS},
        )

    @property
    def host_bound(self) -> bool:
        """Whether there is a cost that `SimMachine` does not charge."""
        return any(getattr(self, key) for key in HOST_COSTS)

    @property
    def layer_serial_ns(self) -> int:
        """What no schedule of a layer avoids on the compute stream beside its kernels: stack, attention's launch on
        the stream, routing read back, classified, launch."""
        serial_ns = self.layer_overhead_ns + self.gate_sync_ns + self.classify_ns + self.group_ns
        launch_ns = self.launch_ns + self.launch_latency_ns
        if self.release_ns:
            # In forwards of one token; others are launched as they are known. The lesser bounds both.
            launch_ns = min(launch_ns, self.release_ns + self.release_latency_ns)
        return serial_ns + launch_ns


class _OneEach(dict[int, int]):
    """ns of a launch by number of experts, one token each; filled on first use."""

    def __init__(self, kernels: KernelTimes) -> None:
        super().__init__()
        self.kernels = kernels

    def __missing__(self, num_experts: int) -> int:
        duration_ns = self[num_experts] = self.kernels.experts_ns([1] * num_experts)
        return duration_ns


@mypyc_attr(allow_interpreted_subclasses=True)
class SimMachine:
    """Implements `expertflow.machine.Machine`. Both streams are first in, first out."""

    def has_other_news(self) -> bool:
        """Whether anything has ended by the last record that it does not hold."""
        return False

    def __init__(self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> None:
        self.kernels = kernels
        self.link = link
        self.costs = costs
        self.now_ns = 0
        self._stream_free_ns = 0
        self._link_free_ns = 0
        self._num_marks = 0
        self._marks: list[Mark] = []
        self._chunks: deque[Chunk] = deque()
        self._attention_ns: Sequence[int] = ()
        self._num_tokens = 0
        self._head_ns = 0
        self._one_each_ns = _OneEach(kernels)
        self._experts_ns = kernels.experts_ns
        self._has_shared = kernels.shared_ns(1) > 0
        self._launch_ns = costs.launch_ns
        self._latency_ns = costs.launch_latency_ns
        self._layer_overhead_ns = costs.layer_overhead_ns
        self._issue_ns = costs.issue_ns
        self._decide_ns = costs.decide_ns
        self._chunk_ns = {num_bytes: link.chunk_ns(num_bytes, False) for num_bytes in set(chunk_bytes)}
        self._keys_ns: Callable[[Sequence[int], Sequence[int]], int] | None = None
        self._slows = link.slowdown > 1.0

    def tell_sizes(
        self, chunk_bytes: Iterable[int], keys_ns: Callable[[Sequence[int], Sequence[int]], int] | None
    ) -> None:
        """Experts have unlike sizes. chunk_bytes: every size of a chunk. keys_ns: as of `KernelTimes.keys_ns`, None
        where all take the same time all the same."""
        self._chunk_ns |= {num_bytes: self.link.chunk_ns(num_bytes, False) for num_bytes in set(chunk_bytes)}
        self._keys_ns = keys_ns

    def begin_forward(self, forward: Forward) -> None:
        self._num_tokens = len(forward.rows)
        if forward.spans:
            self._attention_ns = self.kernels.attention_spans_ns(forward.kv_lens, forward.spans)
            # What drafts runs between the tokens read back and the first launch; copies go on meanwhile.
            self.now_ns += forward.draft_ns
        else:
            prefill = forward.phase == PREFILL
            self._attention_ns = self.kernels.attention_list_ns(self._num_tokens, forward.kv_lens, prefill)
        # Only rows that need logits reach the head: one per request, none before a prompt's last chunk.
        num_logits = forward.num_logits
        self._head_ns = self.kernels.head_ns(num_logits) if num_logits else 0

    def _enqueue(self, duration_ns: int, gap_ns: int) -> int:
        """`gap_ns` is the stack's own time: it begins when the stream is free and the launch has arrived."""
        # No max(): this runs twice a layer, and a call to a builtin costs more than the comparison.
        now = self.now_ns = self.now_ns + self._launch_ns
        start = now + self._latency_ns
        if self._stream_free_ns > start:
            start = self._stream_free_ns
        start += gap_ns
        end = self._stream_free_ns = start + duration_ns
        mark = self._num_marks = self._num_marks + 1
        self._marks.append((mark, start, end))
        return mark

    def attention(self, layer: int) -> int:
        return self._enqueue(self._attention_ns[layer], self._layer_overhead_ns)

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        if self._keys_ns is not None:
            duration = self._keys_ns(keys, [1] * len(keys) if counts is None else [counts[key] for key in keys])
        elif counts is None:
            duration = self._one_each_ns[len(keys)]
        else:
            duration = self._experts_ns([counts[key] for key in keys])
        if shared and self._has_shared:
            duration += self.kernels.shared_ns(self._num_tokens)
        return self._enqueue(duration, 0)

    def head(self) -> int:
        return self._enqueue(self._head_ns, self.costs.head_overhead_ns)

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        start = self.now_ns = self.now_ns + self._issue_ns
        if self._link_free_ns > start:
            start = self._link_free_ns
        if after:
            start = max(start, self._end_of(after))
        if self._slows:
            end = start + self.link.chunk_ns(num_bytes, self._computes_at(start))
        else:
            end = start + self._chunk_ns[num_bytes]
        self._chunks.append((load, chunk, start, end))
        self._link_free_ns = end

    def decided(self, wants: Sequence[int], effort: float) -> None:
        self.now_ns += round(self._decide_ns * effort)

    def _end_of(self, mark: int) -> int:
        for number, _, end in self._marks:
            if number == mark:
                return end
        return 0

    def _computes_at(self, time_ns: int) -> bool:
        """Whether a kernel known by now runs at `time_ns`: what is launched later is not foreseen."""
        return any(start <= time_ns < end for _, start, end in self._marks)

    def wake_ns(self, wait: Wait) -> int:
        """When the host resumes from `wait`, by what is enqueued."""
        kind, ident, drain = wait
        now, chunks = self.now_ns, self._chunks
        if kind == LOAD:
            if drain:
                return max(now, chunks[0][3])
            for load, _, _, end in chunks:
                if load == ident:
                    last = end
            return max(now, last)
        end = self._stream_free_ns
        if drain and chunks and now < end and chunks[0][3] < end:
            # A host that is busy past the mark's end finds mark and chunk together, and reads back at once.
            return max(now, chunks[0][3])
        sync = self.costs.gate_sync_ns if kind == GATE else self.costs.token_sync_ns
        return (end if end > now else now) + sync

    def record(self, now_ns: int) -> Record:
        """What has ended by `now_ns`, each reported once."""
        self.now_ns = now_ns
        marks, chunks = self._marks, self._chunks
        ended_marks: Sequence[Mark] = ()
        if marks and marks[-1][2] <= now_ns:
            ended_marks = marks
            self._marks = []
        elif marks and marks[0][2] <= now_ns:
            count = sum(end <= now_ns for _, _, end in marks)
            ended_marks = marks[:count]
            self._marks = marks[count:]
        if not chunks or chunks[0][3] > now_ns:
            return (now_ns, (), ended_marks)
        ended_chunks: list[Chunk] = []
        while chunks and chunks[0][3] <= now_ns:
            ended_chunks.append(chunks.popleft())
        return (now_ns, ended_chunks, ended_marks)


def simulate(runtime: Runtime, machine: SimMachine) -> None:
    """Run `runtime` to its end as a SimPy process; raises what it raises."""
    env = simpy.Environment()
    env.process(_process(env, runtime, machine))
    usual = gc.get_threshold()
    # A run makes no circles to speak of, and looking for them takes a twentieth of its time: look more rarely.
    gc.set_threshold(100 * usual[0], *usual[1:])
    try:
        env.run()
    finally:
        gc.set_threshold(*usual)


def _process(env: simpy.Environment, runtime: Runtime, machine: SimMachine) -> Generator[simpy.Event, None, None]:
    loop = runtime.run()
    wake_ns, record, timeout, send = machine.wake_ns, machine.record, env.timeout, loop.send
    now = idle_wakes = 0
    try:
        wait = next(loop)
        while True:
            at = wake_ns(wait)
            if at > now:
                yield timeout(at - now)
                now = at
            told = record(at)
            if not told[1] and not told[2] and not machine.has_other_news():
                idle_wakes += 1
                if idle_wakes > MAX_IDLE_WAKES:
                    raise AssertionError(f"the machine makes no progress at {now} ns: waiting for {wait}")
            else:
                idle_wakes = 0
            wait = send(told)
    except StopIteration:
        return
