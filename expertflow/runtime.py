"""The runtime loop: one generator for both machines, which yields what it waits for.

One forward pass over the layers as in the numbered steps of `Runtime.run`. Time enters only through records.
The compute stream's every nanosecond is booked once: a kernel running is compute; a gap is stall from the moment
the routing is known up to the device end of the copy that its kernel was waiting for, and overhead for the rest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from expertflow.copy_queue import CopyQueue, Load
from expertflow.counters import Counters
from expertflow.forward import Forward
from expertflow.identities import check_identities
from expertflow.journal import Journal
from expertflow.machine import GATE, LOAD, TOKEN, Machine, Record, Wait
from expertflow.observer import Observer, Watch, sees_events
from expertflow.parts import DEMAND
from expertflow.policy import Policy
from expertflow.slots import Slots
from expertflow.view import RESIDENT, Feedback, View

NOTHING: tuple[int, ...] = ()


class StuckError(RuntimeError):
    """Nothing can proceed and nothing is under way: a mistake of ours, printed with the state, never a hang."""


@dataclass(frozen=True)
class RunConfig:
    """What a run needs beside machine, policy and forwards. Sizes in bytes."""

    num_layers: int
    num_experts: int
    top_k: int
    num_slots: int
    chunk_bytes: tuple[int, ...]
    has_shared: bool = False
    channel_depth: int = 2
    num_staging: int = 0
    serial: bool = False
    """Copy and compute never overlap: an expert's copy starts when the expert before it has been computed."""
    warmup_forwards: int = 0
    initial: tuple[int, ...] = ()
    """Keys resident at the start, best first, as far as they fit."""


class Runtime:
    """Drives one policy over a stream of forwards on one machine."""

    def __init__(self, config: RunConfig, machine: Machine, policy: Policy, forwards: Iterable[Forward],
                 observers: Sequence[Observer] = ()) -> None:  # fmt: skip
        self.config = config
        self.machine = machine
        self.policy = policy
        self.forwards = forwards
        self.counters = Counters()
        self.journal = Journal()
        self.watch = Watch(observers) if any(map(sees_events, observers)) else None
        self._forward_listeners = [observer.end_forward for observer in observers]
        self.eviction = policy.eviction
        self.slots = Slots(config.num_layers, config.num_experts, config.num_slots, self.eviction.scope,
                           config.num_staging)  # fmt: skip
        slots_by_layer = self.slots.capacities if self.slots.by_layer else []
        self.view = View(config.num_layers, config.num_experts, config.top_k, sum(config.chunk_bytes),
                         config.num_slots, slots_by_layer, memoryview(self.slots.state).toreadonly())  # fmt: skip
        self.queue = CopyQueue(machine, self.slots, self.view, self.counters, config.chunk_bytes,
                               config.channel_depth, self.eviction, policy.listeners("evicted"))  # fmt: skip
        self.queue.landed_listeners = policy.listeners("landed")
        self._layer_end_listeners = policy.listeners("layer_end")
        self._routed_listeners = policy.listeners("routed")
        self._releases = policy.overrides(self.eviction, "release")
        self._trims_at_layer_end = bool(self._releases or config.num_staging)
        self._feedback = Feedback()
        self._layer_stall_ns = 0
        self._known_ns = 0
        self._blame: dict[int, tuple[int, int, bool]] = {}
        self._cursor_ns = 0
        self._last_mark = 0
        self._first_gate = (0, 0)
        self._pending_serial: list[int] = []
        policy.start(self.view)
        for key in reversed(self.slots.fill(config.initial)):
            self.eviction.admitted(key, DEMAND)

    def run(self) -> Generator[Wait, Record, None]:
        """The loop. Yields waits, is sent records; `counters` and `journal` are complete when it ends."""
        machine, policy, queue, view, watch = self.machine, self.policy, self.queue, self.view, self.watch
        layers = range(self.config.num_layers)
        arrange = policy.order.arrange if policy.overrides(policy.order, "arrange") else None
        serial, last_layer = self.config.serial, self.config.num_layers - 1
        for forward in self.forwards:
            # 0. Begin: the policy hears what is known before any routing.
            view.forward = forward.index
            machine.begin_forward(forward)
            wants = policy.begin_forward(forward)
            if wants is not None:
                queue.want(wants)
                queue.pump()
            mark = self._launch_next(-1)
            for layer in layers:
                # 1. Attention and router run; the routing becomes known when the host has read it back.
                while True:
                    self._retire((yield (GATE, mark, queue.has_work)))
                    if self._last_mark >= mark:
                        break
                    queue.pump()
                view.late_ns += view.now_ns - self._cursor_ns
                view.layer = layer
                view.event += 1
                if layer == 0 or layer == last_layer:
                    self._time_layers(layer)
                # 2. and 3. Classify against this moment, then queue and issue the demand.
                ready, missing, late = self._classify(forward, layer)
                if missing or late or queue.wanted:
                    queue.arrive(layer, () if serial else missing, late)
                    queue.pump()
                elif queue.has_work:
                    queue.pump()
                # 4. Launch what is there.
                if missing or late:
                    waiting = self._launch_ready(forward, layer, ready, missing, late)
                    if serial and missing:
                        self._load_in_turn(missing)
                else:
                    waiting = []
                    self._launch(forward, layer, arrange(ready) if arrange is not None else ready, True)
                # 5. Decide, while the device works: on the next attention too, if nothing holds that up. Where there is
                # nothing to decide the host spends no time on it, and what was wanted before stays wanted.
                launched = not waiting
                if launched:
                    mark = self._launch_next(layer)
                if policy.prefetches:
                    if policy.decides():
                        wants = policy.decide(forward, layer)
                        machine.decided(wants)
                        if wants or queue.wanted:
                            queue.want(wants)
                            queue.pump()
                    if watch is not None:
                        watch.horizon(view.now_ns, policy.horizon.distances())
                # 6. Wait for the experts still missing; launch each when its last chunk has landed.
                while waiting:
                    if not queue.flight:
                        waiting = self._unblock(forward, layer, waiting, missing)
                        if not waiting:
                            break
                    self._retire((yield self._wait_for_load(waiting[0])))
                    if queue.has_work:
                        queue.pump()
                    waiting = self._launch_landed(forward, layer, waiting, missing, policy.order.strict)
                if not launched:
                    mark = self._launch_next(layer)
                view.pinned = NOTHING
                for heard in self._layer_end_listeners:
                    heard(layer, forward.demands[layer])
                if self._trims_at_layer_end:
                    self._end_layer(forward, layer)
            # End: head and sampling run, the tokens are read back; prefetches of the next forward may copy meanwhile.
            while True:
                self._retire((yield (TOKEN, mark, queue.has_work)))
                if queue.has_work:
                    queue.pump()
                if self._last_mark >= mark:
                    break
            view.late_ns += view.now_ns - self._cursor_ns
            self._end_forward(forward)

    def _launch_next(self, layer: int) -> int:
        """Launch what follows the experts of `layer`: the next layer's attention, or the head."""
        layer += 1
        if layer < self.config.num_layers:
            mark, kind = self.machine.attention(layer), "attention"
        else:
            layer -= 1
            mark, kind = self.machine.head(), "head"
        if self.watch is not None:
            self.watch.launched(mark, kind, layer, ())
        return mark

    # -- steps ---------------------------------------------------------------------------------------------

    def _classify(self, forward: Forward, layer: int) -> tuple[list[int], list[int], list[int]]:
        keys = forward.demands[layer]
        state, counters = self.slots.state, self.counters
        self._known_ns = self.view.now_ns
        if self._layer_stall_ns:
            self._give_feedback()
        if self._routed_listeners:
            for heard in self._routed_listeners:
                heard(forward, layer)
        self.queue.launched = []
        # A short list is searched faster than a set is made.
        self.view.pinned = keys if len(keys) <= 8 else set(keys)
        self.eviction.touched(keys)
        ready: list[int] = []
        late: list[int] = []
        missing: list[int] = []
        for key in keys:
            where = state[key]
            if where == RESIDENT:
                ready.append(key)
            elif where:
                late.append(key)
            else:
                missing.append(key)
        counters.num_accesses += len(keys)
        counters.num_hits += len(ready)
        if self.queue.num_fresh:
            self._book_used_prefetches(keys)
        if missing or late:
            if forward.issue_order[layer] is not keys:
                missing = [key for key in forward.issue_order[layer] if not state[key]]
            counters.num_late += len(late)
            counters.num_misses += len(missing)
            self._feedback.num_late = len(late)
            self._feedback.num_misses = len(missing)
        if self.watch is not None:
            self.watch.demanded(forward, layer, self._known_ns, ready, late, missing)
        return ready, missing, late

    def _book_used_prefetches(self, keys: Sequence[int]) -> None:
        queue, state, counters = self.queue, self.slots.state, self.counters
        for key in keys:
            if queue.fresh[key]:
                queue.fresh[key] = 0
                queue.num_fresh -= 1
                self.view.num_used += 1
                if state[key] == RESIDENT:
                    counters.prefetch_useful += 1
                else:
                    counters.prefetch_late += 1

    def _give_feedback(self) -> None:
        """A layer has stalled; only now, with the next routing read, would a GPU know it."""
        feedback = self._feedback
        feedback.stall_ns = self._layer_stall_ns
        feedback.layer = (self.view.layer - 1) % self.config.num_layers
        self._layer_stall_ns = 0
        self.policy.feedback(feedback)

    def _time_layers(self, layer: int) -> None:
        """Time of the layers between the first routing and the last of a forward, without stall."""
        now = (self._cursor_ns, self.counters.stall_ns)
        if layer:
            self.view.layer_time_ns += now[0] - self._first_gate[0] - (now[1] - self._first_gate[1])
            self.view.num_layers_timed += layer
        self._first_gate = now

    def _load_in_turn(self, missing: Sequence[int]) -> None:
        """Serial mode: each copy waits for the kernels launched before it; the next is queued after the next."""
        arranged = [key for key in self.policy.order.arrange(missing) if key in missing]
        self._pending_serial = arranged
        self._load_next(self.queue.launched[-1][0] if self.queue.launched else 0)

    def _load_next(self, after: int) -> None:
        load = Load(self._pending_serial.pop(0), DEMAND)
        load.after = after
        self.queue.demand_load(load)
        self.queue.pump()

    def _launch_ready(self, forward: Forward, layer: int, ready: list[int], missing: Sequence[int],
                      late: Sequence[int]) -> list[int]:  # fmt: skip
        order = self.policy.order
        first: Sequence[int]
        if order.strict:
            arranged = list(order.arrange(forward.demands[layer]))
            stop = next(i for i, key in enumerate(arranged) if key not in ready)
            first, waiting = arranged[:stop], arranged[stop:]
        else:
            first = order.arrange(ready)
            waiting = self._in_landing_order(missing, late) if late else list(missing)
        if first or self.config.has_shared:
            self._launch(forward, layer, first, True)
        return waiting

    def _in_landing_order(self, missing: Sequence[int], late: Sequence[int]) -> list[int]:
        loading = self.queue.loading
        return sorted(late, key=lambda key: loading[key].id) + list(missing)

    def _launch_landed(self, forward: Forward, layer: int, waiting: list[int], missing: Sequence[int],
                       in_turn: bool) -> list[int]:  # fmt: skip
        state = self.slots.state
        landed: Sequence[int]
        rest: list[int]
        if len(waiting) == 1:
            if state[waiting[0]] != RESIDENT:
                return waiting
            landed, rest = waiting, []
        elif in_turn:
            stop = next((i for i, key in enumerate(waiting) if state[key] != RESIDENT), len(waiting))
            landed, rest = waiting[:stop], waiting[stop:]
        else:
            landed = [key for key in waiting if state[key] == RESIDENT]
            rest = [key for key in waiting if state[key] != RESIDENT] if len(landed) < len(waiting) else []
        if not landed:
            return rest
        mark = self._launch(forward, layer, landed, False)
        # The last to land is what held the group up.
        landed_ns = self.queue.landed_ns
        key = landed[0] if len(landed) == 1 else max(landed, key=landed_ns.__getitem__)
        self._blame[mark] = (landed_ns[key], key, key in missing)
        self.view.late_ns += self.view.now_ns - landed_ns[key]
        if self._pending_serial:
            self._load_next(mark)
        elif self.queue.demand:
            self.queue.pump()
        return rest

    def _launch(self, forward: Forward, layer: int, keys: Sequence[int], shared: bool) -> int:
        counts = forward.counts
        mark = self.machine.experts(layer, keys, None if counts is None else counts[layer], shared)
        self.queue.launched.append((mark, keys))
        if self.watch is not None:
            self.watch.launched(mark, "experts", layer, tuple(keys))
        return mark

    def _wait_for_load(self, key: int) -> Wait:
        queue = self.queue
        load = queue.loading.get(key)
        if not queue.flight:
            raise StuckError(
                f"nothing can proceed at forward {self.view.forward}, layer {self.view.layer}: waiting for "
                f"expert key {key}; pinned {sorted(self.view.pinned)}; {queue.describe()}"
            )
        return (LOAD, load.id if load is not None else 0, queue.has_work)

    def _unblock(self, forward: Forward, layer: int, waiting: list[int], missing: Sequence[int]) -> list[int]:
        """Fewer slots than demand: run what is there, whatever the order, so that its slots can be reused."""
        rest = self._launch_landed(forward, layer, waiting, missing, in_turn=False)
        self.queue.pump()
        return rest

    def _end_layer(self, forward: Forward, layer: int) -> None:
        keys = forward.demands[layer]
        slots, eviction = self.slots, self.eviction
        if self._releases:
            for key in eviction.release(layer, keys):
                self.queue.evict(key)
        if slots.num_staging:
            while len(slots.free[keys[0] // slots.span]) < slots.num_staging:
                victim = eviction.victim(keys[0], DEMAND)
                if victim is None:
                    break
                self.queue.evict(victim)

    def _end_forward(self, forward: Forward) -> None:
        counters, now = self.counters, self.view.now_ns
        counters.overhead_ns += now - self._cursor_ns
        self._cursor_ns = now
        counters.elapsed_ns = now
        counters.link_busy_ns = self.view.link_busy_ns
        counters.num_forwards += 1
        self.journal.end_forward(forward, now)
        self.policy.end_forward(forward)
        for heard in self._forward_listeners:
            heard(forward, now)
        if counters.num_forwards == self.config.warmup_forwards:
            before = counters.copy()
            # What the warm-up has prefetched and not used yet counts as the measured part's, as its slots do.
            before.prefetch_issued -= self.queue.num_fresh
            before.prefetch_requested -= self.queue.num_fresh + len(self.queue.wanted)
            self.journal.begin_measuring(before)
            self.policy.begin_measuring()

    # -- time ----------------------------------------------------------------------------------------------

    def _retire(self, record: Record) -> None:
        """Book what has ended. The only place where time enters."""
        now_ns, chunks, marks = record
        self.view.now_ns = now_ns
        if chunks:
            if self.watch is not None:
                self.watch.copied(chunks, self.queue.flight)
            self.queue.retire(chunks)
        if not marks:
            return
        counters, blame, cursor = self.counters, self._blame, self._cursor_ns
        compute = overhead = 0
        for mark, start_ns, end_ns in marks:
            gap = start_ns - cursor
            if blame and mark in blame:
                landed_ns, key, is_miss = blame.pop(mark)
                # Up to the moment the routing is known the stream waits for the host, not for a copy.
                stall = landed_ns - (cursor if cursor > self._known_ns else self._known_ns)
                if stall < 0:
                    stall = 0
                elif stall > gap:
                    stall = gap
                self._layer_stall_ns += stall
                if is_miss:
                    counters.miss_stall_ns += stall
                else:
                    counters.late_stall_ns += stall
                gap -= stall
                if stall and self.watch is not None:
                    self.watch.stalled(landed_ns - stall, landed_ns, key, is_miss)
            overhead += gap
            compute += end_ns - start_ns
            cursor = end_ns
        counters.compute_ns += compute
        counters.overhead_ns += overhead
        if self.watch is not None:
            self.watch.computed(marks)
        self._cursor_ns = cursor
        self._last_mark = mark

    def check_identities(self) -> None:
        """Assert the identities that hold over every whole run."""
        check_identities(self.counters, self.queue)
