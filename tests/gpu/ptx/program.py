"""A kernel's PTX, and a block of it that runs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tests.gpu.ptx.arithmetic import Step, UnknownInstruction, parse
from tests.gpu.ptx.instructions import decode
from tests.gpu.ptx.state import ALL, LANES, Fault, Landing, Memory, Registers, Shared, Warp

MOST_STEPS = 1_000_000
"""Instructions of one warp, before it is said not to end."""


@dataclass(frozen=True)
class _Line:
    """An instruction. Of those that do not just lead to the next one, `flow` says which: bra, ret, bar; to: a label."""

    text: str
    guard: str | None
    unless: bool
    flow: str | None = None
    to: str = ""
    step: Step | None = None


def _line(text: str) -> _Line:
    found = parse(text)
    if found.opcode in ("bra", "bra.uni"):
        return _Line(text, found.guard, found.unless, "bra", found.operands[0])
    if found.opcode == "ret":
        return _Line(text, found.guard, found.unless, "ret")
    if found.opcode == "bar.sync" and found.operands == ("0",):
        return _Line(text, found.guard, found.unless, "bar")
    return _Line(text, found.guard, found.unless, step=decode(found))


class Program:
    """The only kernel of a text of PTX. UnknownInstruction: it holds one that cannot be run."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//.*", "", text)
        found = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)[^{]*\{(.*?)\n\}", text, re.DOTALL)
        if found is None:
            raise UnknownInstruction("a text without one kernel of a known size")
        self.name, self.num_warps = found[1], int(found[3]) // LANES
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", found[2].strip())
        self.labels: dict[str, int] = {}
        self.lines: list[_Line] = []
        for line in map(str.strip, re.split(r"[;\n]", found[4])):
            if label := re.fullmatch(r"(\$?\w+):", line):
                self.labels[label[1]] = len(self.lines)
            # Directives: registers, which tell their width by their name, and lines of the source.
            elif line and not line.startswith(".") and line not in "{}":
                self.lines.append(_line(line))
        self.lines.append(_Line("the end", None, False, "ret"))
        for jump in self.lines:
            if jump.flow == "bra" and jump.to not in self.labels:
                raise UnknownInstruction(f"{jump.text}: no such label")


def _run(program: Program, warp: Warp) -> Iterator[int]:
    """Run a warp, and stop at each barrier; tells where."""
    at, lines = 0, program.lines
    for _ in range(MOST_STEPS):
        line = lines[at]
        warp.text, warp.mask = line.text, None
        at += 1
        if line.guard is not None:
            active = warp.registers[line.guard] ^ line.unless
            count = np.count_nonzero(active)
            if count == 0:
                continue
            if count < LANES:
                if line.flow is not None:
                    raise Fault(f"{count} of {LANES} lanes take it")
                warp.mask = active
        if line.step is not None:
            line.step(warp)
        elif line.flow == "bra":
            at = program.labels[line.to]
        elif line.flow == "ret":
            return
        else:
            yield at
    raise Fault(f"no end after {MOST_STEPS} instructions")


def run_block(
    program: Program,
    memory: Memory,
    arguments: Sequence[int],
    *,
    block: tuple[int, int, int] = (0, 0, 0),
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
    seed: int = 0,
    landing: Landing = "late",
) -> list[str]:
    """Run one block of `grid`, and tell the hazards that were met. Arguments that are not given are 0."""
    where = f"{program.name}, block {block} of {grid}, copies {landing}, seed {seed}"
    draws, shared = random.Random(seed), Shared(shared_bytes)
    parameters = np.zeros(len(program.parameters), np.uint64)
    parameters[: len(arguments)] = [argument & (1 << 64) - 1 for argument in arguments]
    special = {f"%ctaid.{axis}": number for axis, number in zip("xyz", block, strict=True)}
    special |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", grid, strict=True)}
    fixed = {name: np.full(LANES, number, np.uint32) for name, number in (special | {"global_smem": 0}).items()}
    # Some are read by their address.
    fixed |= {name: np.full(LANES, 8 * place, np.uint64) for place, name in enumerate(program.parameters)}
    warps = []
    for index in range(program.num_warps):
        registers = Registers(fixed | {"%tid.x": (ALL + LANES * index).astype(np.uint32)})
        warps.append(Warp(index, shared, memory, parameters, landing, draws, registers))
    running = {warp.index: _run(program, warp) for warp in warps}
    while running:
        stops: dict[int, int] = {}
        order = list(running)
        draws.shuffle(order)
        for index in order:
            try:
                with np.errstate(all="ignore"):
                    stop = next(running[index], None)
            except (Fault, UnknownInstruction) as error:
                raise type(error)(f"{error}; {warps[index]}; {where}") from error
            if stop is not None:
                stops[index] = stop
        if stops and (len(stops) < len(order) or len(set(stops.values())) > 1):
            raise Fault(f"warps {sorted(stops)} of {sorted(order)} wait at barriers, {stops}; {where}")
        running = {index: running[index] for index in stops}
        shared.time += 1
        shared.barrier = shared.time
        for warp in warps:
            warp.synced = shared.time
    return [f"{hazard}; {where}" for hazard in shared.hazards]
