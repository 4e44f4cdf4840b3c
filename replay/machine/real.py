"""The real machine: implements `expertflow.machine.Machine` on a device, and turns its events into records.

Written once for CUDA and CPU. The host polls: `wait` returns when what is awaited (or the chunk at the head of the
copy stream) has happened, with the device times of everything that has ended by then. Kernels never wait for a copy
on the device: the runtime launches an expert when its last chunk is known to have landed. A copy into a slot whose
last reader may still run waits for that reader on the device.

What is launched is a program (`replay.machine.programs`), whose events are those of its last launch. Its times are read
before it is launched again, and where there is time for it: while the host waits anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch

from expertflow.forward import Forward
from expertflow.hints import mypyc_attr
from expertflow.machine import GATE, LOAD, Chunk, Mark, Record, Wait
from replay.machine.device import Device, Event, Program
from replay.machine.kernels import Kernels
from replay.machine.launch_row import Row, words_of
from replay.machine.pools import HostPool, SlotPool, chunk_offsets
from replay.machine.programs import Programs
from replay.machine.stamps import Stamps
from sim.specs.hardware import Stack

_ROUNDED_NS = 1_000
"""ns: two times of one stream that differ by less than this may only be rounded differently."""
_NO_END = [0]
"""The end of the kernel that a copy waits for, where it waits for none."""


@mypyc_attr(allow_interpreted_subclasses=True)
class RealMachine:
    """One device, its buffers and kernels. stamps: None = do not verify. `prepare` must come before a run.

    Where the device can, a forward of one token launches experts before it is known which: behind the attention of
    their layer, and behind each launch after which experts of it are still missing. The host then only writes them down
    and tells the GPU, which saves it the time of the launch and the GPU the wait for it.

    stack: the stack under test; what it would spend on the compute stream is spent doing nothing, and KV lengths are
    rounded up to a multiple of its kv_grid.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        host: HostPool,
        slots: SlotPool,
        chunk_bytes: Sequence[int],
        stack: Stack,
        stamps: Stamps | None = None,
    ) -> None:
        self.device = device
        self.kernels = kernels
        self.host = host
        self.slots = slots
        self.stamps = stamps
        self.launches_ahead = device.launches_ahead
        """Whether forwards of one token launch experts ahead."""
        self.layer_pad_ns, self.head_pad_ns = stack.layer_overhead_ns, stack.head_overhead_ns
        self.around_ahead: Callable[[bool], None] | None = None
        """Called in place of `launch_ahead`, which it must call: for who times it."""
        self.num_read_first = 0
        """Launches that had to wait until an earlier one of their program had ended and was read."""
        offsets = chunk_offsets(chunk_bytes)
        self._bounds = list(pairwise(offsets))
        self._sizes = [end - start for start, end in self._bounds]
        num_keys = kernels.model.num_layers * kernels.model.num_experts
        self._slot_of = [-1] * num_keys
        self._host_address = [host.buffer(key).data_ptr() for key in range(num_keys)]
        self._slot_address = [slots.slot(number).data_ptr() for number in range(slots.num_slots)]
        self._num_marks = 0
        self._unread: deque[Program] = deque()
        """Programs launched and not yet read, in the order of the stream."""
        self._open: dict[int, Program] = {}
        """The programs of `_unread` by the mark of their launch."""
        self._read: list[Mark] = []
        """Marks that were read and not yet reported."""
        self._wanted_ends: dict[int, list[int]] = {}
        """By unread mark that copies wait for: [its end], shared with those copies."""
        self._chunks: deque[tuple[int, int, Event, int, int, list[int]]] = deque()
        """(load, chunk, end, when it was issued, mark that it waits for, that one's end once it is read)."""
        self._loads: dict[int, Event] = {}
        self._number = device.numbers[0]
        self._gate = 0
        """Mark of the last gated launch. It is not reported before the host has seen its number."""
        self._gate_start_ns: int | None = None
        """When its kernels began, once that is read."""
        self._compute_end_ns = self._copy_end_ns = self._now_ns = 0
        pinned = device.world == "cuda"
        self._routing = torch.zeros(kernels.routing.shape, dtype=torch.int64, pin_memory=pinned)
        self._tokens = torch.zeros(kernels.tokens.shape, dtype=torch.int64, pin_memory=pinned)
        self._routing_words, self._token_words = words_of(self._routing), words_of(self._tokens)
        self._top_k = kernels.routing.shape[1]
        self.programs = Programs(device, kernels, self._routing, self._tokens, stack, stamps)
        self._attention: Sequence[Program] = ()
        self._head: Program | None = None
        self._is_ahead = False
        """Whether this forward launches experts ahead."""
        self._waiting: Program | None = None
        """The program that is launched and waits for its row."""
        self._num_left = 0
        """Experts of this layer that are not launched yet, nor told to begin."""
        self._demands: Sequence[Sequence[int]] = ()

    # -- what the runtime asks for ---------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        self.device.begin_forward()
        if self.stamps is not None:
            self.stamps.begin_forward(forward)
        self._forward = forward.index
        self._num_tokens = len(forward.rows)
        self._shared_rows = self.kernels.shared_rows(self._num_tokens)
        self._attention = self.programs.attention(forward)
        self._head = self.programs.head(forward.num_logits)
        self._demands = forward.demands
        self._is_ahead = self.launches_ahead and len(forward.rows) == 1 and not forward.has_prompt

    def _launch(self, program: Program) -> int:
        self.device.launch(program)
        return self._mark(program)

    def _mark(self, program: Program) -> int:
        """Give the launch that has just been made, or told to begin, its mark."""
        mark = self._num_marks = self._num_marks + 1
        program.mark = mark
        self._unread.append(program)
        self._open[mark] = program
        return mark

    @property
    def is_waiting(self) -> bool:
        """Whether experts are launched that have not been told to begin."""
        return self._waiting is not None

    def launch_ahead(self, shared: bool) -> None:
        """Launch a program for experts that are not known yet."""
        program = self.programs.experts(1, 1, self._shared_rows if shared else 0)
        if program.mark:
            self._read_first(program)
        assert program.ahead is not None
        self.device.launch(program.ahead)
        self._waiting = program

    def _begin_ahead(self, shared: bool) -> None:
        if self.around_ahead is None:
            self.launch_ahead(shared)
        else:
            self.around_ahead(shared)

    def _let_pass(self) -> None:
        """Let the program that waits pass without any experts: what follows it would wait for ever."""
        if self._waiting is not None:
            row, self._waiting = self._waiting.row, None
            row.describe((), -1, 0)
            row.tell()

    def _launch_gated(self, program: Program) -> int:
        if program.mark:
            self._read_first(program)
        if self._waiting is not None:
            self._let_pass()
        self._number += 1
        self._gate_start_ns = None
        mark = self._gate = self._launch(program)
        return mark

    def attention(self, layer: int) -> int:
        if self.stamps is not None and layer:
            self.stamps.end_layer(layer - 1)
        mark = self._launch_gated(self._attention[layer])
        if self._is_ahead:
            self._num_left = len(self._demands[layer])
            self._begin_ahead(True)
        return mark

    def head(self) -> int:
        assert self._head is not None
        if self.stamps is not None:
            self.stamps.end_layer(len(self._attention) - 1)
        return self._launch_gated(self._head)

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        program = self._waiting
        if program is None:
            count = 1 if counts is None else max([counts[key] for key in keys], default=1)
            program = self.programs.experts(len(keys), count, self._shared_rows if shared else 0)
            if program.mark:
                self._read_first(program)
        row, slot_of = program.row, self._slot_of
        slots = [slot_of[key] for key in keys]
        if counts is not None or not row.plain:
            self._write_counts(row, keys, counts)
        if self.stamps is not None:
            self.stamps.expect(row, self._forward, layer, keys, slots)
        row.describe(slots, layer if shared else -1, self._shared_rows)
        if self._waiting is None:
            return self._launch(program)
        row.tell()
        self._waiting = None
        mark = self._mark(program)
        self._num_left -= len(keys)
        if self._num_left > 0:
            self._begin_ahead(False)
        return mark

    def _write_counts(self, row: Row, keys: Sequence[int], counts: Mapping[int, int] | None) -> None:
        """How many rows each expert computes over, and where they begin. counts None: one token each, for any keys."""
        rows_of = self.kernels.rows
        row.plain = counts is None
        row.spread([rows_of(1)] * row.layout.capacity if counts is None else [rows_of(counts[key]) for key in keys])

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        if chunk == 0:
            self._slot_of[key] = slot
        if self.stamps is not None:
            self.stamps.sent(key, slot, chunk, load)
        device, offset = self.device, self._bounds[chunk][0]
        reader, wanted = self._open.get(after), _NO_END
        if reader is not None:
            wanted = self._wanted_ends.setdefault(after, [0])
        end = device.copy(
            self._slot_address[slot] + offset,
            self._host_address[key] + offset,
            self._sizes[chunk],
            None if reader is None else reader.end,
        )
        self._chunks.append((load, chunk, end, device.now_ns(), after, wanted))
        self._loads[load] = end

    def decided(self, wants: Sequence[int], effort: float) -> None:
        """Do nothing: on a real machine the time of a decision has passed already."""

    # -- what it answers -------------------------------------------------------------------------------------

    def wait(self, wait: Wait) -> Record:
        """Block until what `wait` names, then report all that has ended."""
        kind, ident, drain = wait
        chunks = self._chunks
        if kind == LOAD:
            self.device.wait(0, chunks[0][2] if drain else self._loads[ident], self._read_one)
            return self._record()
        self.device.wait(self._number, chunks[0][2] if drain and chunks else None, self._read_one)
        if self.device.numbers[0] >= self._number:
            self._read_until(ident)
            # What a router's host does next: look at the numbers.
            if kind == GATE:
                self._routing_words[: self._num_tokens * self._top_k].tolist()
            else:
                self._token_words[: self._num_tokens].tolist()
        return self._record()

    def _read_one(self) -> None:
        """While there is nothing else to do: take the times of the next program, if it has ended.

        A gate's end is left to who waits for it: its kernels end before the host has what they found. When they began
        is read while they run, so that nobody waits for that once they have ended.
        """
        if not self._unread:
            return
        program, device = self._unread[0], self.device
        if program.mark != self._gate:
            if device.happened(program.end):
                self._take()
        elif self._gate_start_ns is None and device.ends_inside and device.happened(program.start):
            self._gate_start_ns = device.time_ns(program.start)

    def _take(self) -> None:
        """Read the times of the first unread program, which has ended."""
        program = self._unread.popleft()
        mark, time_ns = program.mark, self.device.time_ns
        # Times are rounded apart: a stream's intervals follow one another all the same.
        early_ns = self._gate_start_ns if mark == self._gate else None
        start_ns = time_ns(program.start) if early_ns is None else early_ns
        if start_ns < self._compute_end_ns:
            start_ns = self._compute_end_ns
        end_ns = time_ns(program.end)
        if end_ns + _ROUNDED_NS < self._compute_end_ns:
            raise AssertionError(
                f"mark {mark} ended at {end_ns} ns, the one before it at {self._compute_end_ns}: the "
                "time of an earlier launch was read"
            )
        if end_ns < start_ns:
            end_ns = start_ns
        self._compute_end_ns = end_ns
        self._read.append((mark, start_ns, end_ns))
        if mark in self._wanted_ends:
            self._wanted_ends.pop(mark)[0] = end_ns
        program.mark = 0
        del self._open[mark]

    def _read_until(self, mark: int) -> None:
        """Read the times of all programs up to the one of `mark`, which have ended or are about to."""
        unread, happened = self._unread, self.device.happened
        while unread and unread[0].mark <= mark:
            while not happened(unread[0].end):
                self.device.wait(0, unread[0].end)
            self._take()

    def _read_first(self, program: Program) -> None:
        """Read the times of the last launch of `program`, which is about to be launched again."""
        self.num_read_first += 1
        self._read_until(program.mark)

    def _record(self) -> Record:
        chunks, happened = self._chunks, self.device.happened
        ended: list[Chunk] = []
        while chunks and happened(chunks[0][2]):
            ended.append(self._retire_chunk())
        marks, self._read = self._read, []
        now_ns = max(self.device.now_ns(), self._now_ns, self._copy_end_ns, self._compute_end_ns)
        self._now_ns = now_ns
        return (now_ns, ended, marks)

    def _retire_chunk(self) -> Chunk:
        """Report a copy that has ended.

        It began when it was issued, when the copy before it had ended or when the kernel that it waits for had ended,
        whichever came last.
        """
        load, chunk, end, start_ns, after, wanted = self._chunks.popleft()
        if after in self._open:
            self._read_until(after)
        if wanted[0] > start_ns:
            start_ns = wanted[0]
        if self._copy_end_ns > start_ns:
            start_ns = self._copy_end_ns
        end_ns = self.device.time_ns(end)
        if end_ns < start_ns:
            # Known to the host's clock alone, a moment of issue is less exact than an event.
            start_ns = max(end_ns, self._copy_end_ns)
            end_ns = start_ns
        self._copy_end_ns = end_ns
        if self._loads[load] is end:
            del self._loads[load]
        self.device.recycle(end)
        return load, chunk, start_ns, end_ns

    # -- before and after ------------------------------------------------------------------------------------

    def preload(self, slot_of: Sequence[int]) -> None:
        """Fill slots that hold an expert from the start. slot_of: slot by key, -1 = none."""
        for key, slot in enumerate(slot_of):
            if slot < 0:
                continue
            self._slot_of[key] = slot
            for chunk, (start, end) in enumerate(self._bounds):
                if self.stamps is not None:
                    self.stamps.sent(key, slot, chunk, 0)
                self.slots.bytes[slot, start:end].copy_(self.host.buffer(key)[start:end])
        self.device.synchronize()

    def prepare(self, forwards: Iterable[Forward]) -> None:
        """Make the programs that `forwards` will launch, and launch each once: libraries load and choose, and the
        device takes graphs in, on first use."""
        self.programs.prepare(forwards, self.slots.num_slots)
        if self.stamps is not None:
            self.stamps.restart()
        self._number = self.device.numbers[0]

    def finish(self) -> None:
        """Block until all that was launched has ended. ValueError if the GPU has not waited for the host until the
        end: what it was to compute then is missing."""
        self.device.synchronize()
        if self.programs.waited_in_vain:
            raise ValueError(
                "the host was held up for so long that kernels launched ahead gave up waiting for it: the run computed "
                "less than it should; run it again without stopping it on the way"
            )

    def close(self) -> None:
        """End what belongs to this machine alone; device and buffers are the rig's."""
        self._let_pass()
