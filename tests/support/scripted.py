"""A device without time of its own: programs and copies end when a test says so, at the times that it says.

Like CUDA's: a program's two events are overwritten by its next launch, and a copy waits for the launch that an event
stood for when the copy was enqueued. What the contract forbids (a launch whose last one is unread, one behind another
that waits for its row, the time of what has not happened, a wait for what nobody ends) fails at once.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertflow.forward import DECODE, PREFILL, Forward
from expertflow.model import ModelSpec
from replay.machine.device import Program, Words, Work
from replay.machine.kernels import Kernels
from replay.machine.launch_row import Row
from replay.machine.memory import HostPlan, align
from replay.machine.pools import HostPool, SlotPool, chunk_offsets
from replay.machine.real import RealMachine
from replay.machine.rows import NUM_EXPERTS, SHARED_BLOCK, TOLD
from replay.machine.stamps import Stamps
from sim.specs.hardware import Stack

CHUNKS = 3


class Point:
    """An event. at_ns: when it happened, None = not yet. launch: number of the launch that it stands for."""

    def __init__(self) -> None:
        self.at_ns: int | None = None
        self.launch = 0
        self.was_read = True


@dataclass(eq=False)
class Made:
    """A program, and what it was made of."""

    program: Program
    work: Work
    pad_ns: int
    words: Words | None
    captured: bool


@dataclass(eq=False)
class Launched:
    """One launch under way. words: its row as it was then; begins_at: what its row's TOLD must be for it to begin."""

    number: int
    made: Made
    words: list[int]
    issued_ns: int
    begins_at: int = 0

    @property
    def waits(self) -> bool:
        """Whether it was launched ahead and has not been told to begin."""
        row = self.made.program.row
        return row is not None and row.words[TOLD] < self.begins_at


@dataclass(eq=False)
class Copied:
    """One copy under way. waits_for: number of the launch that must have ended, 0 = of none."""

    target: int
    source: int
    num_bytes: int
    waits_for: int
    end: Point
    issued_ns: int


class ScriptedDevice:
    """Implements `replay.machine.device.Device`. captures, launches_ahead: as in the protocol. Where it launches ahead,
    each launch tells its row, as on a GPU, and captured programs with a row can be launched ahead.

    auto: all that is enqueued is done at once, and each look at the clock takes 1 ns; else the test calls
    `end_program` and `end_copy`, before a wait or, put into `script`, one by one during it. step: what a wait calls
    when the script is empty. late_numbers: ends of gated programs raise no number, `raise_number` does.
    """

    world = "cpu"
    dtype = torch.float32
    ends_inside = True

    def __init__(self, captures: bool = True, launches_ahead: bool = False) -> None:
        self.torch_device = torch.device("cpu")
        self.captures = captures
        self.launches_ahead = launches_ahead
        self.auto = True
        self.late_numbers = False
        self._numbers = [0]
        self.numbers: Sequence[int] = self._numbers
        self.clock_ns = 0
        self.made: list[Made] = []
        self.launches: list[Launched] = []
        """Every one but those made ahead, in order."""
        self.ahead: list[Launched] = []
        """Every one made ahead, in order."""
        self.programs: deque[Launched] = deque()
        self.copies: deque[Copied] = deque()
        self.script: deque[Callable[[], object]] = deque()
        self.step: Callable[[], object] | None = None
        self.num_blocked = 0
        """Waits for something that had not happened yet."""

    # -- what a test does ------------------------------------------------------------------------------------

    def end_program(self, start_ns: int, end_ns: int) -> None:
        """The first program under way has ended, at these times."""
        launch = self.programs.popleft()
        made = launch.made
        assert not launch.waits
        if launch.begins_at:
            launch.words = made.program.row.host.tolist()
            # Nobody asks when that ran which was let pass.
            if (launch.words[NUM_EXPERTS], launch.words[SHARED_BLOCK]) == (0, -1):
                made.program.start.was_read = made.program.end.was_read = True
        made.program.start.at_ns, made.program.end.at_ns = start_ns, end_ns
        self.clock_ns = max(self.clock_ns, end_ns)
        if made.words is not None and not self.late_numbers:
            self.raise_number()

    def raise_number(self) -> None:
        """The host can see one gate more."""
        self._numbers[0] += 1

    def end_copy(self, end_ns: int) -> None:
        """The first copy under way has ended."""
        copy = self.copies.popleft()
        assert copy.waits_for not in {launch.number for launch in self.programs}
        self._move(copy.target, copy.source, copy.num_bytes)
        copy.end.at_ns = end_ns
        self.clock_ns = max(self.clock_ns, end_ns)

    def then(self, *steps: Callable[[], object]) -> None:
        """What is to happen, one by one, while the host waits."""
        self.script.extend(steps)

    @staticmethod
    def _move(target: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(target, source, num_bytes)

    # -- what a machine asks for -----------------------------------------------------------------------------

    def describe(self) -> Mapping[str, Any]:
        return {"name": "scripted", "memory_bytes": None, "torch": torch.__version__}

    def program(
        self,
        work: Work,
        pad_ns: int = 0,
        words: Words | None = None,
        captured: bool = True,
        row: Row | None = None,
    ) -> Program:
        can_wait = self.launches_ahead and captured and row is not None
        program = Program(
            Point(), Point(), lambda: self._run(made), row, (lambda: self._run_ahead(made)) if can_wait else None
        )
        made = Made(program, work, pad_ns, words, captured)
        self.made.append(made)
        return program

    def _run(self, made: Made) -> None:
        row = made.program.row
        if row is not None and self.launches_ahead:
            row.tell()
        self.launches.append(self._enqueue(made, [] if row is None else row.host.tolist()))
        if self.auto:
            made.work()
            if made.words is not None:
                made.words[1].copy_(made.words[0])
            self.end_program(self.clock_ns, self.clock_ns + 1)

    def _run_ahead(self, made: Made) -> None:
        assert not self.auto
        self.ahead.append(self._enqueue(made, [], made.program.row.words[TOLD] + 1))

    def _enqueue(self, made: Made, words: list[int], begins_at: int = 0) -> Launched:
        program, number = made.program, len(self.launches) + len(self.ahead) + 1
        assert not any(launch.waits for launch in self.programs)
        assert program.start.was_read
        assert program.end.was_read
        for point in (program.start, program.end):
            point.at_ns, point.launch, point.was_read = None, number, False
        launch = Launched(number, made, words, self.clock_ns, begins_at)
        self.programs.append(launch)
        return launch

    def launch(self, program: Program) -> None:
        program.run()

    def copy(self, target: int, source: int, num_bytes: int, after: Point | None) -> Point:
        end = Point()
        waits_for = 0 if after is None else after.launch
        self.copies.append(Copied(target, source, num_bytes, waits_for, end, self.clock_ns))
        if self.auto:
            self.end_copy(self.clock_ns + 1)
        return end

    def disturb(self, target: int, source: int, num_bytes: int) -> None:
        self._move(target, source, num_bytes)

    def happened(self, event: Point) -> bool:
        return event.at_ns is not None

    def wait(self, number: int, event: Point | None = None, idle: Callable[[], object] | None = None) -> None:
        def over() -> bool:
            return (number > 0 and self.numbers[0] >= number) or (event is not None and event.at_ns is not None)

        self.num_blocked += not over()
        while not over():
            if idle is not None:
                idle()
            step = self.script.popleft() if self.script else self.step
            assert step is not None, "the host waits for what nobody ends"
            step()

    def time_ns(self, event: Point) -> int:
        assert event.at_ns is not None
        event.was_read = True
        return event.at_ns

    def now_ns(self) -> int:
        self.clock_ns += self.auto
        return self.clock_ns

    def recycle(self, event: Point) -> None:
        assert event.at_ns is not None

    def begin_forward(self) -> None:
        """No base to renew."""

    def restart_clock(self) -> None:
        """Nobody asks for earlier times."""

    def free_bytes(self) -> int | None:
        return None

    def synchronize(self) -> None:
        assert not self.programs
        assert not self.copies
        for made in self.made:
            made.program.start.was_read = made.program.end.was_read = True

    def close(self) -> None:
        """Nothing to give back."""


class PacedDevice(ScriptedDevice):
    """One whose streams have durations, in ns, and whose host takes no time: what is measured on it is known.

    copy_ns: of so many bytes. program_ns: of a program's kernels, told its row's words. slower, kernels_slower: factors
    on a copy beside kernels and on kernels beside copies. pad_share: how long a pad lasts, of what it should.
    """

    def __init__(
        self,
        copy_ns: Callable[[int], int],
        program_ns: Callable[[list[int]], int] = lambda _: 1000,
        *,
        slower: float = 1.0,
        kernels_slower: float = 1.0,
        pad_share: float = 1.0,
        captures: bool = True,
    ) -> None:
        super().__init__(captures)
        self.auto = False
        self.step = self._next
        self.copy_ns, self.program_ns = copy_ns, program_ns
        self.slower, self.kernels_slower, self.pad_share = slower, kernels_slower, pad_share
        self._compute_ns = self._link_ns = 0

    def _run(self, made: Made) -> None:
        # A measurement may launch what it does not read.
        made.program.start.was_read = made.program.end.was_read = True
        super()._run(made)

    def _next(self) -> None:
        """What ends first, ends."""
        programs, copies = self.programs, self.copies
        start_ns = end_ns = copy_end_ns = 1 << 62
        if programs:
            made = programs[0].made
            begin_ns = max(self._compute_ns, programs[0].issued_ns)
            start_ns = begin_ns + round(made.pad_ns * self.pad_share)
            end_ns = start_ns + round(self.program_ns(programs[0].words) * (self.kernels_slower if copies else 1))
        if copies and copies[0].waits_for not in {one.number for one in programs}:
            taken_ns = round(self.copy_ns(copies[0].num_bytes) * (self.slower if programs else 1))
            copy_end_ns = max(self._link_ns, copies[0].issued_ns) + taken_ns
        if copy_end_ns < end_ns:
            self._link_ns = copy_end_ns
            self.end_copy(copy_end_ns)
        else:
            # A copy that waits for this launch begins no earlier.
            if copies and copies[0].waits_for == programs[0].number:
                self._link_ns = max(self._link_ns, end_ns)
            self._compute_ns = end_ns
            self.end_program(start_ns, end_ns)

    def synchronize(self) -> None:
        while self.programs or self.copies:
            self._next()
        super().synchronize()


def decode(
    kv_lens: Sequence[int], demands: Sequence[Sequence[int]] = ((0,), (0,)), counts: list[dict[int, int]] | None = None
) -> Forward:
    """One row each of as many requests."""
    rows = range(len(kv_lens))
    return Forward(0, DECODE, rows, tuple(rows), tuple(kv_lens), [list(keys) for keys in demands], [], counts)


def prefill(first: int, end: int, demands: Sequence[Sequence[int]], counts: list[dict[int, int]]) -> Forward:
    """Rows of one request with KV lengths from `first` up to `end`."""
    rows = range(end - first)
    return Forward(
        0,
        PREFILL,
        rows,
        (0,),
        tuple(range(first, end)),
        [list(keys) for keys in demands],
        [],
        counts,
        emits_token=False,
    )


def chunks_of(model: ModelSpec) -> list[int]:
    """An expert in `CHUNKS` pieces, the last one shorter."""
    size = model.mean_expert_bytes // CHUNKS + 1
    return [size] * (CHUNKS - 1) + [model.mean_expert_bytes - (CHUNKS - 1) * size]


def machine_on(
    device: ScriptedDevice,
    model: ModelSpec,
    forwards: Sequence[Forward],
    *,
    num_slots: int = 16,
    kv_grid: int = 0,
    verify: bool = False,
) -> RealMachine:
    """A machine prepared for `forwards`, its device in the test's hands from then on."""
    num_keys = model.num_layers * model.num_experts
    host = HostPool(
        HostPlan(num_keys, num_keys, align(model.mean_expert_bytes), 1 << 40),
        model.mean_expert_bytes,
        device.dtype,
        False,
    )
    slots = SlotPool(num_slots, model.mean_expert_bytes, device.torch_device)
    max_tokens = max(len(forward.rows) for forward in forwards)
    kernels = Kernels(model, slots, device.dtype, max_tokens, 1024)
    stamps = Stamps(host, slots, chunk_offsets(chunks_of(model))) if verify else None
    stack = Stack("scripted", 3_000, 5_000, kv_grid)
    machine = RealMachine(device, kernels, host, slots, chunks_of(model), stack, stamps)
    machine.prepare(forwards)
    device.auto, device.clock_ns = False, 0
    device.launches.clear()
    return machine
