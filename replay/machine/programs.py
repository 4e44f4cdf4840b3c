"""What one run launches, prepared before its clock starts: attention by layer and shape, experts by size, the head.

A program is one launch for the host whatever it holds. Experts run by slot id, so that one program serves any set of
slots; how many experts, and over how many rows, is rounded up to a power of two. A program's events and its row belong
to its last launch: of those for experts there are several of each size, taken in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import torch

from expertflow.forward import Forward
from replay.machine.device import Device, Program
from replay.machine.kernels import Kernels, Shape
from replay.machine.launch_row import Row
from replay.machine.rows import (
    GAVE_UP,
    RowLayout,
    row_class,
    row_classes,
    size_class,
)
from replay.machine.stamps import Stamps
from replay.machine.timing import works_ns
from sim.specs.hardware import Stack

REPLICAS = 8
"""So many launches of one size may have unread times; one more waits until those of the first are read."""
PROMPT_REPLICAS = 2
"""The same of sizes that only prompts have: their kernels run for longer than the host needs to read a time."""
MOST_PROMPT_PROGRAMS = 512
"""Programs captured for prompts, at most: each prompt has a shape of its own, and each shape a program a layer."""
PROGRAM_BYTES = 2 << 20
"""GPU memory that a captured program takes, as seen on an H200."""
DEFAULT_KV_GRID = 256
"""KV tokens to which lengths are rounded where shapes are captured and the stack names no grid."""


def capacity_for(num_experts: int, top_k: int) -> int:
    """Routed experts that the program has room for which launches `num_experts`: what one token chooses, at least, so
    that which program it is does not depend on what is resident; beyond that rounded up to a power of two."""
    return size_class(max(num_experts, top_k))


def launch_rows(rows: int, shared_rows: int) -> int:
    """The class of rows of the kernels for a launch of experts over at most `rows` each and of shared ones over
    `shared_rows`: that of the larger number. Else a shared expert of many rows would pass its weights through the
    kernels of few rows again and again."""
    return row_class(max(rows, shared_rows))


def _doublings(first: int, last: int) -> list[int]:
    """first, twice that, and so on, as far as `last`."""
    found = [first]
    while found[-1] < last:
        found.append(2 * found[-1])
    return found


class Ring:
    """Programs of one size, taken in turn."""

    __slots__ = ("_next", "programs")

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = programs
        self._next = 0

    def take(self) -> Program:
        """The one whose last launch is the longest ago; it may be unread."""
        place = self._next
        self._next = place + 1 if place + 1 < len(self.programs) else 0
        return self.programs[place]


class Programs:
    """All programs of one run on one device.

    routing [max_tokens, top_k], tokens [max_tokens]: where the host reads what router and head have found, int64.
    stack: its overheads become pads, and KV lengths are rounded up to a multiple of its kv_grid. stamps: what the slots
    are checked for around each launch of experts.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        routing: torch.Tensor,
        tokens: torch.Tensor,
        stack: Stack,
        stamps: Stamps | None = None,
    ) -> None:
        self._device, self._kernels = device, kernels
        self._routing, self._tokens = routing, tokens
        self._layer_pad_ns, self._head_pad_ns = stack.layer_overhead_ns, stack.head_overhead_ns
        self.kv_grid = stack.kv_grid or (DEFAULT_KV_GRID if device.captures else 0)
        self._stamps = stamps
        self._has_shared = kernels.shared_rows(1) > 0
        self._top_k = kernels.model.top_k
        self._by_shape: dict[tuple[int, Shape], Program] = {}
        self._by_forward: dict[tuple[Shape, Shape], list[Program]] = {}
        self._heads: dict[int, Program] = {}
        self._rings: dict[tuple[int, int, bool], Ring] = {}
        windowed = [kernels.model.is_windowed(layer) for layer in range(kernels.model.num_layers)]
        self._is_windowed = windowed
        # A layer of each kind tells the shapes of all.
        self._probes = [windowed.index(kind) if kind in windowed else 0 for kind in (False, True)]
        self._is_prepared = False
        self.num_unprepared = 0
        """Shapes that came up in the run without having been prepared; their kernels are launched one by one."""

    # -- before the run --------------------------------------------------------------------------------------

    def prepare(self, forwards: Iterable[Forward], num_slots: int) -> None:
        """Make what `forwards` will launch, and launch it once; slots up to `num_slots` are read.

        Decode is captured. Of prompts, no two of which have the same shape, as many are captured as half of the free
        memory holds and MOST_PROMPT_PROGRAMS allows, the shortest first: the longer a prompt, the better its kernels
        hide that they are launched one by one. What that means for a prompt, a calibration measures
        (`replay.calibration.tables.prompt_launches`).
        """
        captures = self._device.captures
        most: dict[bool, tuple[int, int, int]] = {}
        others: dict[tuple[Shape, Shape], Forward] = {}
        for forward in forwards:
            # A prompt's chunk beside decoded rows makes a shape of its own as well.
            decode = not forward.has_prompt
            if captures and decode:
                self.attention(forward, prepare=True)
            else:
                others.setdefault(self._shapes(forward), forward)
            self.head(forward.num_logits)
            num_experts, count, tokens = most.get(decode, (1, 1, 1))
            num_experts = max(num_experts, *map(len, forward.demands))
            if forward.counts is not None:
                count = max(count, *(max(counts.values(), default=1) for counts in forward.counts))
            most[decode] = num_experts, count, max(tokens, len(forward.rows))
        if True in most:
            self._prepare_decode(*most[True])
        if False in most:
            self._prepare_prompts(others, *most[False])
        self._launch_once(
            [program for forward in self._largest(others) for program in self.attention(forward)], num_slots
        )
        self.num_unprepared = 0
        self._is_prepared = True

    def _largest(self, forwards: Mapping[tuple[Shape, Shape], Forward]) -> Iterable[Forward]:
        """Of those of `forwards` (by shape) that are not captured, the largest of each number of rows: launched once
        before the run, for what a first launch loads."""
        largest: dict[tuple[bool, int], Forward] = {}
        for shapes, forward in forwards.items():
            kind = forward.has_prompt, len(forward.rows)
            if shapes in self._by_forward:
                continue
            if kind not in largest or sum(forward.kv_lens) > sum(largest[kind].kv_lens):
                largest[kind] = forward
        return largest.values()

    def _launch_once(self, more: Sequence[Program], num_slots: int) -> None:
        device = self._device
        for program in [*self._by_shape.values(), *self._heads.values(), *more]:
            device.launch(program)
        for (capacity, _rows, shared), ring in self._rings.items():
            for program in ring.programs if device.captures else ring.programs[:1]:
                slots = [place % num_slots for place in range(capacity)]
                program.row.spread([self._kernels.rows(1)] * capacity)
                program.row.describe(slots, 0 if shared else -1, self._kernels.shared_rows(1))
                device.launch(program)
        device.synchronize()

    def _prepare_decode(self, num_experts: int, count: int, num_tokens: int) -> None:
        """Experts of decode forwards; the arguments are those of `_buckets`. Only theirs are tuned: it takes long."""
        buckets = self._buckets(num_experts, count, num_tokens)
        captures = self._device.captures
        if captures:
            # Tiles do not depend on whether shared experts are there.
            each = sorted({(capacity, rows) for capacity, rows, _ in buckets})
            self._kernels.tune(lambda work: works_ns(self._device, [work], 5), each)
        for bucket in buckets:
            if bucket not in self._rings:
                self._rings[bucket] = self._make_ring(*bucket, REPLICAS, captures)

    def _prepare_prompts(
        self, prompts: Mapping[tuple[Shape, Shape], Forward], num_experts: int, count: int, num_tokens: int
    ) -> None:
        """Experts of forwards with a prompt, then their attention, as far as there is room. prompts: by shape."""
        room = self._room()
        for bucket in self._buckets(num_experts, count, num_tokens):
            if bucket in self._rings:
                continue
            captured = room >= PROMPT_REPLICAS
            room -= PROMPT_REPLICAS if captured else 0
            self._rings[bucket] = self._make_ring(*bucket, PROMPT_REPLICAS if captured else REPLICAS, captured)
        for shapes, forward in sorted(prompts.items(), key=lambda item: len(item[1].rows)):
            if shapes not in self._by_forward and room >= len(self._is_windowed):
                room -= len(self._is_windowed)
                self.attention(forward, prepare=True)

    def _room(self) -> int:
        """How many programs of prompts may be captured."""
        if not self._device.captures:
            return 0
        free_bytes = self._device.free_bytes()
        return (
            MOST_PROMPT_PROGRAMS if free_bytes is None else min(MOST_PROMPT_PROGRAMS, free_bytes // 2 // PROGRAM_BYTES)
        )

    def _buckets(self, num_experts: int, count: int, num_tokens: int) -> list[tuple[int, int, bool]]:
        """(capacity, class of rows, whether shared experts are there) of launches of up to `num_experts` experts over
        up to `count` tokens each, in forwards of up to `num_tokens`."""
        rows, shared_rows = self._kernels.rows, self._kernels.shared_rows
        capacities = _doublings(*(capacity_for(number, self._top_k) for number in (1, num_experts)))
        classes = {False: row_classes(rows(1), rows(count))}
        if self._has_shared:
            least, last = max(rows(1), shared_rows(1)), max(rows(count), shared_rows(num_tokens))
            classes[True] = row_classes(least, last)
        return [
            (capacity, most, shared)
            for shared, found in classes.items()
            for capacity, most in product(capacities, found)
        ]

    def _make_ring(self, capacity: int, rows: int, shared: bool, num_programs: int, captured: bool) -> Ring:
        stamps = self._stamps
        layout = RowLayout(capacity, 0 if stamps is None else stamps.words_per_expert)
        programs = []
        for _ in range(num_programs):
            row = Row(layout, self._device.torch_device)
            check = None if stamps is None else stamps.check(row)
            work = self._kernels.experts(row, rows, shared, check)
            programs.append(self._device.program(work, captured=captured, row=row))
        return Ring(programs)

    # -- in the run ------------------------------------------------------------------------------------------

    def attention(self, forward: Forward, prepare: bool = False) -> list[Program]:
        """Attention and router of each MoE layer [L]; do not change the list."""
        full, windowed = self._shapes(forward)
        made = self._by_forward.get((full, windowed))
        if made is not None:
            return made
        captured = self._device.captures and prepare
        self.num_unprepared += self._device.captures and not prepare
        made = [
            self._attention(layer, windowed if narrow else full, captured)
            for layer, narrow in enumerate(self._is_windowed)
        ]
        if captured:
            self._by_forward[full, windowed] = made
        return made

    def _shapes(self, forward: Forward) -> tuple[Shape, Shape]:
        """Of attention without a window, and with one; of a model that has but one kind, twice that."""
        full, windowed = self._probes
        shape, grid = self._kernels.shape, self.kv_grid
        return shape(full, forward, grid), shape(windowed, forward, grid)

    def _attention(self, layer: int, shape: Shape, captured: bool) -> Program:
        program = self._by_shape.get((layer, shape))
        if program is None:
            rows = shape.num_tokens
            words = self._kernels.routing[:rows], self._routing[:rows]
            program = self._device.program(self._kernels.attention(layer, shape), self._layer_pad_ns, words, captured)
            if captured:
                self._by_shape[layer, shape] = program
        return program

    def experts(self, num_experts: int, count: int, shared_rows: int) -> Program:
        """For `num_experts` routed experts over at most `count` tokens each, and shared ones over `shared_rows` rows, 0
        for none; its row is to be written before launch."""
        rows = launch_rows(self._kernels.rows(count), shared_rows)
        return self._rings[capacity_for(num_experts, self._top_k), rows, shared_rows > 0].take()

    def head(self, num_rows: int) -> Program:
        """Head and sampling over `num_rows` rows, of which there may be none."""
        program = self._heads.get(num_rows)
        if program is None:
            if self._is_prepared:
                raise AssertionError(f"a head of {num_rows} rows was not prepared: captured now it would miscount")
            words = self._kernels.tokens[:num_rows], self._tokens[:num_rows]
            program = self._device.program(self._kernels.head(num_rows), self._head_pad_ns, words)
            self._heads[num_rows] = program
        return program

    @property
    def waited_in_vain(self) -> bool:
        """Whether a launch has ever given up waiting for the host; what it was to compute is missing. The device must
        be idle."""
        return any(program.row.words[GAVE_UP] for ring in self._rings.values() for program in ring.programs)

    @property
    def num_prepared(self) -> int:
        """Programs that are there."""
        return len(self._by_shape) + len(self._heads) + sum(len(ring.programs) for ring in self._rings.values())
