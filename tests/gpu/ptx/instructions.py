"""Instructions that move values: between registers, lanes and memory. Each becomes a function, once."""

from __future__ import annotations

import re

import numpy as np

from tests.gpu.ptx.arithmetic import (
    Instruction,
    Step,
    UnknownInstruction,
    address,
    bits_of,
    compute,
    extended_to,
    operand,
    raw_of,
    several,
)
from tests.gpu.ptx.state import ALL, LANES, Array, Fault, Warp


def _pack(opcode: str, operands: tuple[str, ...]) -> Step | None:
    """mov.b32 {a, b}, c and mov.b32 c, {a, b}: the first is the lower part."""
    found = re.fullmatch(r"mov\.(b32|b64)", opcode)
    if found is None:
        return None
    kind, (target, source) = found[1], operands
    if source.startswith("{"):
        parts = several(source)
        reads = [operand(part, f"b{bits_of(kind) // len(parts)}") for part in parts]
        return lambda warp: warp.put(target, np.stack([read(warp) for read in reads], 1).view(raw_of(kind)).ravel())
    targets, read = several(target), operand(source, kind)
    narrow = raw_of(f"b{bits_of(kind) // len(targets)}")

    def unpack(warp: Warp) -> None:
        values = np.ascontiguousarray(read(warp).view(narrow).reshape(LANES, len(targets)).T)
        for place, name in enumerate(targets):
            if name != "_":
                warp.put(name, values[place])

    return unpack


# -- between lanes -------------------------------------------------------------------------------------------


def _whole(warp: Warp, member: Array | None = None) -> None:
    if warp.mask is not None or (member is not None and (member != 0xFFFFFFFF).any()):
        raise Fault("not all lanes take part in what a warp does together")


def _exchange(opcode: str, operands: tuple[str, ...]) -> Step | None:
    if opcode == "shfl.sync.bfly.b32" and len(operands) == 5 and operands[3] == "31":
        target, values, member = operands[0], operand(operands[1], "b32"), operand(operands[4], "b32")
        other = ALL ^ int(operands[2], 0)

        def shuffle(warp: Warp) -> None:
            _whole(warp, member(warp))
            warp.put(target, values(warp)[other])

        return shuffle
    if opcode == "redux.sync.add.s32":
        target, values, member = operands[0], operand(operands[1], "b32"), operand(operands[2], "b32")

        def reduce(warp: Warp) -> None:
            _whole(warp, member(warp))
            warp.put(target, np.full(LANES, values(warp).sum(dtype=np.uint32)))

        return reduce
    if opcode == "bar.warp.sync":
        member = operand(operands[0], "b32")

        def sync(warp: Warp) -> None:
            _whole(warp, member(warp))
            warp.sync()

        return sync
    return None


def _matrix(opcode: str, operands: tuple[str, ...]) -> Step | None:
    """8 x 8 values of 16 bits each; lane l has two of row l / 4. Lane l gives the address of row l of all of them."""
    found = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", opcode)
    if found is None:
        return None
    registers, place = operands if found[1] == "ld" else operands[::-1]
    names, at, count = several(registers), address(place, "b32"), int(found[2])
    if len(names) != count:
        return None
    # Who has each cell of two bytes.
    lanes = np.tile(np.arange(8)[:, None] * 4 + np.arange(8) // 2, (count, 1))
    reads = [operand(name, "b32") for name in names]

    def load(warp: Warp) -> None:
        _whole(warp)
        values = warp.shared.load(warp, at(warp)[: 8 * count], 16, lanes | warp.index << 6)
        for place, name in enumerate(names):
            warp.put(name, values[8 * place : 8 * place + 8].reshape(LANES, 4).view(np.uint32).ravel())

    def store(warp: Warp) -> None:
        _whole(warp)
        values = np.concatenate([read(warp).view(np.uint8).reshape(8, 16) for read in reads])
        warp.shared.store(warp, at(warp)[: 8 * count], values, lanes | warp.index << 6)

    return load if found[1] == "ld" else store


# -- memory --------------------------------------------------------------------------------------------------


def _parameter(opcode: str, operands: tuple[str, ...]) -> Step | None:
    found = re.fullmatch(r"ld\.param\.([bsu]32|[bsu]64)", opcode)
    if found is None:
        return None
    target, at, raw = operands[0], address(operands[1], "b64"), raw_of(found[1])
    extended = extended_to(found[1], target)

    def load(warp: Warp) -> None:
        places = at(warp)
        if (places % np.uint64(8)).any() or int(places.max()) >= 8 * warp.parameters.size:
            raise Fault(f"no parameter is at {places.max()}")
        warp.put(target, extended(warp.parameters[(places // np.uint64(8)).astype(np.int64)].astype(raw)))

    return load


def _access(opcode: str, operands: tuple[str, ...]) -> Step | None:
    found = re.fullmatch(r"(ld|st)(\.volatile)?\.(global|shared)(?:\.v([24]))?\.b(16|32|64)", opcode)
    if found is None or (found[2] and found[1] == "st"):
        return None
    is_shared, parts, kind = found[3] == "shared", int(found[4] or 1), f"b{found[5]}"
    place, values = operands if found[1] == "st" else operands[::-1]
    at, names, width = address(place, "b32" if is_shared else "b64"), several(values), bits_of(kind) // 8
    if len(names) != parts:
        return None
    size, volatile = parts * width, bool(found[2])

    def load(warp: Warp) -> None:
        lanes = warp.lanes
        addresses = at(warp)[lanes]
        found = np.zeros((LANES, size), np.uint8)
        if is_shared:
            found[lanes] = warp.shared.load(warp, addresses, size, warp.threads(lanes))
        else:
            found[lanes] = warp.memory.load(addresses, size, parts, volatile, warp.random)
        for name, number in zip(names, np.ascontiguousarray(found.view(raw_of(kind)).T), strict=True):
            warp.put(name, extended[name](number))

    def store(warp: Warp) -> None:
        lanes = warp.lanes
        found = np.stack([read(warp) for read in reads], 1).view(np.uint8)[lanes]
        if is_shared:
            warp.shared.store(warp, at(warp)[lanes], found, warp.threads(lanes))
        else:
            warp.memory.store(at(warp)[lanes], found, warp.random)

    if found[1] == "ld":
        extended = {name: extended_to(kind, name) for name in names}
        return load
    reads = [operand(name, kind) for name in names]
    return store


def _atomic(opcode: str, operands: tuple[str, ...]) -> Step | None:
    found = re.fullmatch(r"atom\.global\.(?:sys|gpu)\.acq_rel\.(add\.u64|min\.s64)", opcode)
    if found is None:
        return None
    target, at, values = operands[0], address(operands[1], "b64"), operand(operands[2], found[1][-3:])
    combine = np.add if found[1] == "add.u64" else np.minimum

    def change(warp: Warp) -> None:
        before = np.zeros(LANES, np.uint64)
        for lane in warp.lanes:
            place, value = at(warp)[lane : lane + 1], values(warp)[lane : lane + 1]
            there = warp.memory.load(place, 8, 1, True, warp.random)
            before[lane] = there.view(np.uint64)[0, 0]
            warp.memory.store(place, combine(there.view(value.dtype)[0], value).view(np.uint8)[None], warp.random)
        warp.put(target, before)

    return change


def _copy(opcode: str, operands: tuple[str, ...]) -> Step | None:
    """cp.async: `size` bytes a lane, of which as many come from global memory as its last operand says, else zeros."""
    if opcode not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
        return None
    to, source, size = address(operands[0], "b32"), address(operands[1], "b64"), int(operands[2], 0)
    given = operand(operands[3] if len(operands) > 3 else operands[2], "b32")

    def copy(warp: Warp) -> None:
        lanes = warp.lanes
        targets, sources, count = to(warp)[lanes], source(warp)[lanes], given(warp)[lanes]
        # Of the address too where nothing is read.
        if (sources & np.uint64(size - 1)).any():
            raise Fault("the source of a copy is not aligned")
        if ((count != 0) & (count != size)).any():
            raise UnknownInstruction(f"{opcode} of a part")
        threads, shared, read = warp.threads(lanes), warp.shared, count > 0

        def land() -> None:
            values = np.zeros((lanes.size, size), np.uint8)
            if read.any():
                values[read] = warp.memory.load(sources[read], size, 1, False, warp.random)
            shared.land(targets, values)

        def end() -> None:
            if not early:
                land()
            shared.end_copy(warp, targets, size, threads)

        early = warp.landing == "early" or (warp.landing == "mixed" and warp.random.random() < 0.5)
        shared.begin_copy(warp, targets, size, threads)
        if early:
            land()
        warp.copies.append(end)

    return copy


def _groups(opcode: str, operands: tuple[str, ...]) -> Step | None:
    if opcode == "cp.async.commit_group":

        def commit(warp: Warp) -> None:
            warp.groups.append(warp.copies)
            warp.copies = []

        return commit
    if opcode == "cp.async.wait_group":
        left = int(operands[0], 0)

        def wait(warp: Warp) -> None:
            while len(warp.groups) > left:
                for end in warp.groups.pop(0):
                    end()

        return wait
    return None


_KINDS = compute, _exchange, _matrix, _parameter, _access, _atomic, _copy, _groups


def decode(instruction: Instruction) -> Step:
    """What it does, of any instruction that leads to the next one."""
    opcode, operands = instruction.opcode, instruction.operands
    is_packed = opcode.startswith("mov.") and any(operand.startswith("{") for operand in operands)
    try:
        for known in (_pack,) if is_packed else _KINDS:
            step = known(opcode, operands)
            if step is not None:
                return step
    except (IndexError, ValueError, UnknownInstruction) as error:
        raise UnknownInstruction(f"{instruction.text} ({error})") from error
    raise UnknownInstruction(instruction.text)
