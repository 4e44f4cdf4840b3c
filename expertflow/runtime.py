"""The runtime loop: one generator for both machines, which yields what it waits for.

One forward pass over the layers as in the numbered steps of `Runtime.run`. Time enters only through records.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass

from expertflow.byte_queue import ByteQueue
from expertflow.byte_slots import ByteRoom, ByteSlots
from expertflow.copy_queue import CopyQueue, SlotHooks
from expertflow.counters import Counters
from expertflow.filling import fill
from expertflow.forward import Forward
from expertflow.hints import mypyc_attr
from expertflow.host_memory import HostMemorySpec
from expertflow.hosting import Aside, Hosting
from expertflow.identities import check_identities, check_storage
from expertflow.journal import Journal
from expertflow.machine import GATE, HOST, LOAD, TOKEN, Machine, Record, Wait
from expertflow.observer import HOST_STALL, LATE, MISS, Observer, Watch, sees_events
from expertflow.parts import DEMAND
from expertflow.policy import Policy
from expertflow.slots import Slots
from expertflow.stream import StreamBooks
from expertflow.tiered_queue import tiered
from expertflow.view import RESIDENT, Feedback, Progress, View

NOTHING: tuple[int, ...] = ()


@mypyc_attr(native_class=False)
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
    num_pinned: int = 0
    """How many of `initial`, from the first on, never leave, as far as they fit."""
    all_initial: bool = False
    """Whether a run must not begin without all of `initial` that does not stay on the host."""
    storage: HostMemorySpec | None = None
    """Host memory as a cache above storage; None = all experts lie in host memory."""


class Runtime:
    """Drives one policy over a stream of forwards on one machine."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        policy: Policy,
        forwards: Iterable[Forward],
        observers: Sequence[Observer] = (),
        room: ByteRoom | None = None,
    ) -> None:
        """room: where experts have unlike sizes; `config` then says what one of mean size takes, and how many of those
        there is room for."""
        self.config = config
        self.machine = machine
        self.policy = policy
        self.forwards = forwards
        self.counters = Counters()
        self.journal = Journal()
        self.watch = Watch(observers) if any(map(sees_events, observers)) else None
        self.books = StreamBooks(self.counters, self.watch)
        self._forward_listeners = [observer.end_forward for observer in observers]
        scope = policy.eviction.scope
        shape = (config.num_layers, config.num_experts)
        by_bytes = None
        if room is not None:
            by_bytes = ByteSlots(*shape, scope, config.num_staging, room.sizes, room.room_bytes)
        self.slots = Slots(*shape, config.num_slots, scope, config.num_staging) if by_bytes is None else by_bytes
        self.progress = Progress()
        self.view = self._view(self.slots.state)
        # A view leads to the memory it shows: parts whose answers are checked see a copy, which is kept up to date.
        shown = self.slots.show_copy() if policy.guarded else None
        policy.start(self.view, None if shown is None else self._view(shown))
        self.answers = answers = policy.answers
        self._touched, self._strict = answers.touched, policy.order.strict
        hooks = SlotHooks(answers.victim, answers.admitted, policy.listeners("evicted"), policy.listeners("landed"))
        books, depth = (self.progress, self.counters), config.channel_depth
        copying = (machine, self.slots, *books, config.chunk_bytes, depth, hooks)
        self.tier = None if config.storage is None else tiered(config.storage, *copying)
        if self.tier is not None:
            self.queue: CopyQueue = self.tier
        elif room is None or by_bytes is None:
            self.queue = CopyQueue(*copying)
        else:
            self.queue = ByteQueue(machine, by_bytes, *books, room.chunk_bytes, depth, hooks)
        self._layer_end_listeners = policy.listeners("layer_end")
        self._releases = policy.overrides(policy.eviction, "release")
        self._trims_at_layer_end = bool(self._releases or config.num_staging)
        self._num_late = self._num_misses = 0
        self._first_gate = (0, 0)
        self._pending_serial: list[int] = []
        self._hosting = Hosting(machine, policy, self.queue, self.counters, self.watch) if policy.places else None
        fixed = self._fill()
        self._aside = Aside(fixed, self._hosting, self.progress, answers.touched) if fixed or policy.places else None
        """What parts do not hear of; None: there is nothing of the kind."""
        if self.tier is not None:
            self.tier.fill(config.initial)

    def _fill(self) -> frozenset[int]:
        """Put what is there from the start into the slots; those that never leave them."""
        config = self.config
        # That all experts of a run on the GPU alone have room the configuration has seen to.
        needs_all = config.all_initial and (self._hosting is not None or config.num_pinned > 0)
        stays = self.policy.stays_on_host
        placed, fixed = fill(self.slots, config.initial, stays, config.num_pinned, needs_all)
        for key in reversed(placed):
            if key not in fixed:
                self.answers.admitted(key, DEMAND)
        if fixed:
            self.progress.pinned = fixed
        return fixed

    def _view(self, state: bytearray) -> View:
        config, slots = self.config, self.slots
        return View(
            self.progress,
            memoryview(state),
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
            expert_bytes=sum(config.chunk_bytes),
            num_slots=config.num_slots,
            slots_by_layer=slots.capacities if slots.by_layer else (),
        )

    def run(self) -> Generator[Wait, Record, None]:
        """The loop. Yields waits, is sent records; `counters` and `journal` are complete when it ends."""
        machine, policy, queue, progress, watch = self.machine, self.policy, self.queue, self.progress, self.watch
        books, layers = self.books, range(self.config.num_layers)
        arrange = self.answers.arrange if policy.overrides(policy.order, "arrange") else None
        serial, last_layer = self.config.serial, self.config.num_layers - 1
        hosting, aside, stays = self._hosting, self._aside, policy.stays_on_host
        between: Collection[int] = NOTHING if aside is None else aside.fixed
        for forward in self.forwards:
            # 0. Begin: the policy hears what is known before any routing.
            progress.forward = forward.index
            machine.begin_forward(forward)
            policy.begin_forward(forward)
            mark = self._launch_next(-1)
            for layer in layers:
                # 1. Attention and router run; the routing becomes known when the host has read it back.
                while True:
                    self._retire((yield (GATE, mark, queue.has_work)))
                    if books.last_mark >= mark:
                        break
                    queue.pump()
                progress.late_ns += progress.now_ns - books.cursor_ns
                progress.layer = layer
                progress.event += 1
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
                    if ready:
                        self._launch(forward, layer, arrange(ready) if arrange is not None else ready, True)
                    elif self.config.has_shared:
                        self._launch(forward, layer, NOTHING, True)
                # 5. Decide, while the device works: on the next attention too, if nothing holds that up. Where there is
                # nothing to decide the host spends no time on it, and what was wanted before stays wanted.
                launched = not waiting
                if hosting is not None and hosting.num_left:
                    launched = False
                if launched:
                    mark = self._launch_next(layer)
                if policy.prefetches:
                    wants = policy.decide(layer)
                    if wants is not None:
                        if stays:
                            wants = [key for key in wants if key not in stays]
                        machine.decided(wants, policy.decision_effort)
                        if wants or queue.wanted:
                            queue.want(wants)
                            queue.pump()
                    if watch is not None:
                        watch.horizon(progress.now_ns, policy.distances)
                # 6. Wait for the experts still missing; launch each when its last chunk has landed.
                while waiting:
                    if not queue.flight and not queue.num_reading:
                        waiting = self._unblock(forward, layer, waiting, missing)
                        if not waiting:
                            break
                    num_landed = queue.num_landed
                    self._retire((yield self._wait_for_load(waiting)))
                    if queue.has_work:
                        queue.pump()
                    # Most chunks are not the last of their load.
                    if queue.num_landed != num_landed:
                        waiting = self._launch_landed(forward, layer, waiting, missing, self._strict)
                if not launched:
                    # 7. Wait for the host's results, which the next attention adds to the GPU's.
                    while hosting is not None and not hosting.is_done():
                        self._retire((yield (HOST, hosting.task, queue.has_work)))
                        if queue.has_work:
                            queue.pump()
                    mark = self._launch_next(layer)
                    if hosting is not None and hosting.keys:
                        self.books.blame(mark, hosting.ended_ns, hosting.last_key, HOST_STALL)
                        progress.late_ns += progress.now_ns - hosting.ended_ns
                progress.pinned = between
                for heard in self._layer_end_listeners:
                    heard(layer, forward.demands[layer] if aside is None else aside.heard)
                if self._trims_at_layer_end:
                    self._end_layer(forward, layer)
            # End: head and sampling run, the tokens are read back; prefetches of the next forward may copy meanwhile.
            while True:
                self._retire((yield (TOKEN, mark, queue.has_work)))
                if queue.has_work:
                    queue.pump()
                if books.last_mark >= mark:
                    break
            progress.late_ns += progress.now_ns - books.cursor_ns
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
        state, counters, policy = self.slots.state, self.counters, self.policy
        known_ns = self.progress.now_ns
        stall_ns = self.books.begin_layer(known_ns)
        if stall_ns and policy.hears_feedback:
            # Only now, with the next routing read, would a GPU know that a layer has stalled.
            before = (layer - 1) % self.config.num_layers
            num_host = 0 if self._hosting is None else len(self._hosting.keys)
            storage_ns = 0 if self.tier is None else self.books.storage_stall_ns()
            policy.feedback(Feedback(before, stall_ns, self._num_late, self._num_misses, num_host, storage_ns))
        if policy.follows:
            policy.routed(layer)
        aside = self._aside
        if aside is None:
            # A few are searched faster than a set is made. Parts see it: nobody can change it.
            self.progress.pinned = tuple(keys) if len(keys) <= 8 else frozenset(keys)
            self._touched(keys)
        else:
            self._num_late = self._num_misses = 0
            keys = aside.demanded(forward, layer)
            counters.num_accesses += len(forward.demands[layer]) - len(keys)
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
        self.queue.begin_layer(keys)
        if missing or late:
            if forward.issue_order[layer] is not keys:
                missing = [key for key in forward.issue_order[layer] if not state[key]]
                if aside is not None:
                    missing = [key for key in missing if key in keys]
            counters.num_late += len(late)
            counters.num_misses += len(missing)
            self._num_late = len(late)
            self._num_misses = len(missing)
        if self.watch is not None:
            self.watch.demanded(forward, layer, known_ns, ready, late, missing)
        return ready, missing, late

    def _time_layers(self, layer: int) -> None:
        """Time of the layers between the first routing and the last of a forward, without stall."""
        now = (self.books.cursor_ns, self.counters.stall_ns)
        if layer:
            self.progress.layer_time_ns += now[0] - self._first_gate[0] - (now[1] - self._first_gate[1])
            self.progress.num_layers_timed += layer
        self._first_gate = now

    def _load_in_turn(self, missing: Sequence[int]) -> None:
        """Serial mode: each copy waits for the kernels launched before it; the next is queued after the next."""
        arranged = [key for key in self.answers.arrange(missing) if key in missing]
        self._pending_serial = arranged
        self._load_next(self.queue.last_reader)

    def _load_next(self, after: int) -> None:
        self.queue.demand_after(self._pending_serial.pop(0), after)
        self.queue.pump()

    def _launch_ready(
        self, forward: Forward, layer: int, ready: list[int], missing: Sequence[int], late: Sequence[int]
    ) -> list[int]:
        arrange = self.answers.arrange
        first: Sequence[int]
        if self._strict:
            arranged = list(arrange(forward.demands[layer] if self._aside is None else self._aside.keys))
            stop = next(i for i, key in enumerate(arranged) if key not in ready)
            first, waiting = arranged[:stop], arranged[stop:]
        else:
            first = arrange(ready)
            waiting = self._in_landing_order(missing, late) if late else list(missing)
        if first or self.config.has_shared:
            self._launch(forward, layer, first, True)
        return waiting

    def _in_landing_order(self, missing: Sequence[int], late: Sequence[int]) -> list[int]:
        loading = self.queue.loading
        return sorted(late, key=lambda key: loading[key].id) + list(missing)

    def _launch_landed(
        self, forward: Forward, layer: int, waiting: list[int], missing: Sequence[int], in_turn: bool
    ) -> list[int]:
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
        read_ns = 0 if self.tier is None else self.tier.read_ns[key]
        self.books.blame(mark, landed_ns[key], key, MISS if key in missing else LATE, read_ns)
        self.progress.late_ns += self.progress.now_ns - landed_ns[key]
        if self._pending_serial:
            self._load_next(mark)
        elif self.queue.demand:
            self.queue.pump()
        return rest

    def _launch(self, forward: Forward, layer: int, keys: Sequence[int], shared: bool) -> int:
        counts = forward.counts
        mark = self.machine.experts(layer, keys, None if counts is None else counts[layer], shared)
        self.queue.launched(mark, keys)
        if self.watch is not None:
            self.watch.launched(mark, "experts", layer, tuple(keys))
        return mark

    def _wait_for_load(self, waiting: Sequence[int]) -> Wait:
        queue, tier, key = self.queue, self.tier, waiting[0]
        if tier is not None and not self._strict:
            key = tier.first_to_land(waiting)
        load = queue.loading.get(key)
        if not queue.flight and not queue.num_reading:
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
        slots, answers = self.slots, self.answers
        heard = forward.demands[layer] if self._aside is None else self._aside.heard
        if self._releases and heard:
            for key in answers.release(layer, heard):
                self.queue.evict(key)
        if slots.num_staging:
            first = forward.demands[layer][0]
            while slots.lacks_staging(first):
                victim = answers.victim(first, DEMAND)
                if victim is None:
                    break
                self.queue.evict(victim)

    def _end_forward(self, forward: Forward) -> None:
        counters, now = self.counters, self.progress.now_ns
        self.books.close(now)
        counters.elapsed_ns = now
        counters.link_busy_ns = self.progress.link_busy_ns
        counters.num_forwards += 1
        self.journal.end_forward(forward, now)
        self.policy.end_forward()
        if self.slots.shown is not None and self.slots.shown != self.slots.state:
            raise self.policy.tampered()
        for heard in self._forward_listeners:
            heard(forward, now)
        if counters.num_forwards == self.config.warmup_forwards:
            before = counters.copy()
            self.queue.leave_out(before)
            self.journal.begin_measuring(before)
            self.policy.begin_measuring()

    # -- time ----------------------------------------------------------------------------------------------

    def _retire(self, record: Record) -> None:
        """Book what has ended. The only place where time enters."""
        now_ns, chunks, marks = record
        self.progress.now_ns = now_ns
        if self.tier is not None:
            reads = self.tier.machine.reads_ended()
            if reads:
                if self.watch is not None:
                    self.watch.was_read(reads)
                self.tier.retire_reads(reads)
        if chunks:
            if self.watch is not None:
                self.watch.copied(chunks, self.queue.flight)
            self.queue.retire(chunks)
        if marks:
            self.books.book(marks)

    def check_identities(self) -> None:
        """Assert the identities that hold over every whole run; PartError where parts run that are not of the package,
        which may have changed what is."""
        try:
            check_identities(self.counters, self.queue, 0 if self._hosting is None else self._hosting.num_results)
            if self.tier is not None:
                check_storage(self.counters, self.tier)
        except AssertionError as error:
            if not self.policy.guarded:
                raise
            raise self.policy.unsound(error) from error
