"""The real machine: implements `expertflow.machine.Machine` on a device, and turns its events into records.

Written once for CUDA and CPU. The host polls: `wait` returns when what is awaited (or the chunk at the head of the
copy stream) has happened, with the device times of everything that has ended by then. Kernels never wait for a copy
on the device: the runtime launches an expert when its last chunk is known to have landed. A copy into a slot whose
last reader may still run waits for that reader on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from expertflow.forward import Forward
from expertflow.machine import GATE, LOAD, Chunk, Mark, Record, Wait
from replay.device import Device
from replay.kernels import Kernels, Work
from replay.pools import HostPool, SlotPool, chunk_offsets
from replay.stamps import Stamps


class RealMachine:
    """One device, its buffers and kernels. stamps: None = do not verify.

    layer_pad_ns, head_pad_ns: what the stack under test would spend on the compute stream, spent doing nothing.
    """

    def __init__(self, device: Device, kernels: Kernels, host: HostPool, slots: SlotPool,
                 chunk_bytes: Sequence[int], layer_pad_ns: int = 0, head_pad_ns: int = 0,
                 stamps: Stamps | None = None) -> None:  # fmt: skip
        self.device = device
        self.kernels = kernels
        self.host = host
        self.slots = slots
        self.stamps = stamps
        self.layer_pad_ns = layer_pad_ns
        self.head_pad_ns = head_pad_ns
        offsets = chunk_offsets(chunk_bytes)
        self._bounds = list(pairwise(offsets))
        self._slot_of: dict[int, int] = {}
        self._num_marks = 0
        # (mark, start, end, known): `known` is what the host must have seen before it may speak of the end.
        self._marks: deque[tuple[int, Any, Any, Any]] = deque()
        self._chunks: deque[tuple[int, int, Any, Any]] = deque()
        self._loads: dict[int, Any] = {}
        self._open: dict[int, Any] = {}
        self._gate: Any = None
        self._compute_end_ns = self._copy_end_ns = self._now_ns = 0
        pinned = device.world == "cuda"
        self._routing = torch.zeros(kernels.routing.shape, dtype=torch.int64, pin_memory=pinned)
        self._tokens = torch.zeros(kernels.tokens.shape, dtype=torch.int64, pin_memory=pinned)
        self._forward: Forward | None = None

    # -- what the runtime asks for ---------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        self.device.begin_forward()
        if self.stamps is not None:
            self.stamps.collect()
        self._forward = forward
        self._num_tokens = len(forward.rows)

    def _launch(self, work: Work, pad_ns: int) -> tuple[int, Any, Any]:
        start, end = self.device.launch(work, pad_ns)
        mark = self._num_marks = self._num_marks + 1
        self._open[mark] = end
        return mark, start, end

    def attention(self, layer: int) -> int:
        assert self._forward is not None
        mark, start, end = self._launch(self.kernels.attention(layer, self._forward), self.layer_pad_ns)
        rows = self._num_tokens
        self._gate = self.device.read_back(self._routing[:rows], self.kernels.routing[:rows])
        self._marks.append((mark, start, end, self._gate))
        return mark

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        slots = [self._slot_of[key] for key in keys]
        tokens = [1] * len(keys) if counts is None else [counts[key] for key in keys]
        work = self.kernels.experts(layer, slots, tokens, shared, self._num_tokens)
        if self.stamps is not None and slots:
            assert self._forward is not None
            work = self.stamps.guard(self._forward.index, layer, keys, slots, work)
        mark, start, end = self._launch(work, 0)
        self._marks.append((mark, start, end, end))
        return mark

    def head(self) -> int:
        assert self._forward is not None
        rows = len(self._forward.requests) if self._forward.emits_token else 0
        mark, start, end = self._launch(self.kernels.head(rows), self.head_pad_ns)
        self._gate = self.device.read_back(self._tokens[:rows], self.kernels.tokens[:rows])
        self._marks.append((mark, start, end, self._gate))
        return mark

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        start_byte, end_byte = self._bounds[chunk]
        if chunk == 0:
            self._slot_of[key] = slot
        if self.stamps is not None:
            self.stamps.sent(key, slot, chunk, load)
        target = self.slots.bytes[slot, start_byte:end_byte]
        source = self.host.buffer(key)[start_byte:end_byte]
        start, end = self.device.copy(target, source, self._open.get(after))
        self._chunks.append((load, chunk, start, end))
        self._loads[load] = end

    def decided(self, wants: Sequence[int]) -> None:
        """Nothing to charge: the time has passed."""

    # -- what it answers -------------------------------------------------------------------------------------

    def wait(self, wait: Wait) -> Record:
        """Block until what `wait` names, then report all that has ended."""
        kind, ident, drain = wait
        device, chunks = self.device, self._chunks
        if kind == LOAD:
            awaited = [chunks[0][3] if drain else self._loads[ident]]
        elif drain and chunks:
            awaited = [self._gate, chunks[0][3]]
        else:
            awaited = [self._gate]
        device.wait(awaited)
        record = self._record()
        if kind != LOAD and record[2] and record[2][-1][0] == ident:
            # What a router's host does next: look at the numbers.
            (self._routing if kind == GATE else self._tokens)[: self._num_tokens].tolist()
        return record

    def _record(self) -> Record:
        device, happened, time_ns = self.device, self.device.happened, self.device.time_ns
        ended_chunks: list[Chunk] = []
        while self._chunks and happened(self._chunks[0][3]):
            load, chunk, start, end = self._chunks.popleft()
            # Times are rounded apart: a stream's intervals follow one another all the same.
            start_ns = max(time_ns(start), self._copy_end_ns)
            self._copy_end_ns = max(time_ns(end), start_ns)
            ended_chunks.append((load, chunk, start_ns, self._copy_end_ns))
            if self._loads[load] is end:
                del self._loads[load]
            device.recycle(start)
            device.recycle(end)
        ended_marks: list[Mark] = []
        while self._marks and happened(self._marks[0][3]):
            mark, start, end, known = self._marks.popleft()
            start_ns = max(time_ns(start), self._compute_end_ns)
            self._compute_end_ns = max(time_ns(end), start_ns)
            ended_marks.append((mark, start_ns, self._compute_end_ns))
            del self._open[mark]
            device.recycle(start)
            device.recycle(end)
            if known is not end:
                device.recycle(known)
        self._now_ns = max(device.now_ns(), self._now_ns, self._copy_end_ns, self._compute_end_ns)
        return (self._now_ns, ended_chunks, ended_marks)

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

    def warm_up(self, forwards: Sequence[Forward], repeat: int = 2) -> None:
        """Run every kernel in the shapes of `forwards` before the clock matters: libraries load and choose on first
        use."""
        device, kernels = self.device, self.kernels
        for forward in [forward for forward in forwards for _ in range(repeat)]:
            rows, requests = len(forward.rows), len(forward.requests)
            events: list[Any] = []
            for layer in range(len(forward.demands)):
                events += device.launch(kernels.attention(layer, forward), 0)
            keys = forward.demands[0]
            tokens = [1] * len(keys) if forward.counts is None else [forward.counts[0][key] for key in keys]
            slots = [place % self.slots.num_slots for place in range(len(keys))]
            events += device.launch(kernels.experts(0, slots, tokens, True, rows), 0)
            events += device.launch(kernels.head(requests), 0)
            events.append(device.read_back(self._routing[:rows], kernels.routing[:rows]))
            events.append(device.read_back(self._tokens[:requests], kernels.tokens[:requests]))
            device.synchronize()
            for event in events:
                device.recycle(event)
