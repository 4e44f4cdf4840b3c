"""What an instruction is, its operands, and those that only compute."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.gpu.ptx.state import LANES, Array, Fault, Warp, width_of

Step = Callable[[Warp], None]
Read = Callable[[Warp], Array]


class UnknownInstruction(Exception):
    """This emulator does not know it: nothing is said of the program."""


class Instruction(NamedTuple):
    """`@guard opcode operands`; unless: where the guard does not hold. Operands in braces are one."""

    text: str
    guard: str | None
    unless: bool
    opcode: str
    operands: tuple[str, ...]


def parse(line: str) -> Instruction:
    """A line without its semicolon."""
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", line)
    if found is None:
        raise UnknownInstruction(line)
    operands = re.findall(r"(?:\{[^}]*\}|[^,{])+", found[4] or "")
    return Instruction(line, found[2], found[1] == "!", found[3], tuple(operand.strip() for operand in operands))


# -- operands ------------------------------------------------------------------------------------------------


def bits_of(kind: str) -> int:
    """The width of a type, as 32 of s32."""
    return int(kind.lstrip("usbf"))


def raw_of(kind: str) -> np.dtype[Any]:
    """How registers hold a type."""
    return np.dtype(bool) if kind == "pred" else np.dtype(f"u{bits_of(kind) // 8}")


def number_of(kind: str) -> np.dtype[Any]:
    """What a type counts with."""
    return raw_of(kind) if kind[0] in "bup" else np.dtype(f"{'i' if kind[0] == 's' else 'f'}{bits_of(kind) // 8}")


def _width(register: str) -> np.dtype[Any]:
    width = width_of(register)
    if width is None:
        raise UnknownInstruction(f"a result in {register}")
    return width


def operand(text: str, kind: str) -> Read:
    """A register or an immediate value, as numbers of this type. Of a wider register the lower part."""
    raw, number = raw_of(kind), number_of(kind)
    if re.match(r"0f[0-9A-Fa-f]{8}$", text):
        constant = np.full(LANES, int(text[2:], 16), np.uint32).view(number)
        return lambda warp: constant
    if re.match(r"-?\d", text):
        value = int(text, 0)
        constant = np.full(LANES, value != 0 if kind == "pred" else value & (1 << bits_of(kind)) - 1, raw).view(number)
        return lambda warp: constant
    if width_of(text) is None and not re.fullmatch(r"%tid\.x|%n?ctaid\.[xyz]|global_smem|\w+_param_\d+", text):
        raise UnknownInstruction(f"an operand {text}")

    def read(warp: Warp) -> Array:
        values = warp.registers[text]
        if values.dtype is not raw:
            if values.dtype.itemsize < raw.itemsize:
                raise Fault(f"{text} has {values.dtype.itemsize} bytes, {raw.itemsize} are read")
            values = values.astype(raw)
        return values.view(number)

    return read


def address(text: str, kind: str) -> Read:
    """`[register + offset]`."""
    found = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
    if found is None:
        raise UnknownInstruction(f"an address {text}")
    base = operand(found[1], kind)
    offset = np.array(int(found[2] or "0", 0) & (1 << bits_of(kind)) - 1, raw_of(kind))
    return (lambda warp: base(warp) + offset) if offset else base


def several(text: str) -> list[str]:
    """The registers of `{a, b}`, or the only one."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def extended_to(kind: str, register: str) -> Callable[[Array], Array]:
    """From a loaded value to the register, which may be wider: by its sign where it has one."""
    number, width = number_of(kind), _width(register)
    if number.itemsize == width.itemsize:
        return lambda values: values
    signed = np.dtype(f"i{width.itemsize}") if kind[0] == "s" else width
    return lambda values: values.view(number).astype(signed).view(width)


# -- arithmetic ----------------------------------------------------------------------------------------------


def _fma(a: Array, b: Array, c: Array) -> Array:
    # The product of two values of float32 is exact in float64.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _field(values: Array, first: Array, length: Array) -> Array:
    return (values >> first) & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32)


def _bfloat16(values: Array) -> Array:
    """Rounded to the nearest, of two to the even one."""
    bits = values.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _float16(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


def _pair(rounded: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two values in one register, the first in its upper half."""
    return lambda upper, lower: rounded(upper).astype(np.uint32) << 16 | rounded(lower)


def _shifted(shift: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """By a number of 32 bits, whatever is shifted; by the width or more, nothing is left of it."""
    return lambda values, by: shift(values, by.astype(values.dtype))


def _converted(dtype: np.dtype[Any]) -> Callable[[Array], Array]:
    return lambda values: values.astype(dtype)


def _sum_of_product(a: Array, b: Array, c: Array) -> Array:
    found: Array = a * b + c
    return found


def _ones(values: Array) -> Array:
    return np.array([int(value).bit_count() for value in values], np.uint32)


def _chosen(a: Array, b: Array, first: Array) -> Array:
    return np.where(first, a, b)


def _wide(kind: str) -> Callable[[Array, Array], Array]:
    dtype = np.int64 if kind == "s32" else np.uint64
    return lambda a, b: (a.astype(dtype) * b.astype(dtype)).view(np.uint64)


_COMPARISONS: dict[str, tuple[str, Callable[[Array, Array], Array]]] = {
    "eq": ("b", np.equal),
    "ne": ("b", np.not_equal),
    "lt": ("us", np.less),
    "le": ("us", np.less_equal),
    "gt": ("us", np.greater),
    "ge": ("us", np.greater_equal),
}
"""By name: for which kinds of numbers, and what it does."""


def _arithmetic() -> Iterator[tuple[str, str, tuple[str, ...], Callable[..., Array]]]:
    """(opcode, type of the result, types of the operands, function)."""
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("max", np.maximum)):
        yield f"{name}.f32", "f32", ("f32", "f32"), function
    yield "fma.rn.f32", "f32", ("f32", "f32", "f32"), _fma
    yield "div.full.f32", "f32", ("f32", "f32"), np.divide
    yield "ex2.approx.f32", "f32", ("f32",), np.exp2
    for bits in (32, 64):
        kind = f"b{bits}"
        # Wrapped around, signs make no difference.
        yield f"add.s{bits}", kind, (kind, kind), np.add
        yield f"sub.s{bits}", kind, (kind, kind), np.subtract
        yield f"mul.lo.s{bits}", kind, (kind, kind), np.multiply
        yield f"mad.lo.s{bits}", kind, (kind, kind, kind), _sum_of_product
        yield f"min.s{bits}", f"s{bits}", (f"s{bits}", f"s{bits}"), np.minimum
        for kind in (f"u{bits}", f"s{bits}"):
            yield f"shr.{kind}", kind, (kind, "u32"), _shifted(np.right_shift)
        for name, (letters, compare) in _COMPARISONS.items():
            for kind in (f"{letter}{bits}" for letter in letters):
                yield f"setp.{name}.{kind}", "pred", (kind, kind), compare
    for kind in ("u32", "s32"):
        wide = _wide(kind)
        yield f"mul.wide.{kind}", "b64", (kind, kind), wide
        yield f"mad.wide.{kind}", "b64", (kind, kind, "b64"), lambda a, b, c, wide=wide: wide(a, b) + c
    for kind in ("b16", "b32", "b64", "pred"):
        yield f"and.{kind}", kind, (kind, kind), np.bitwise_and
        yield f"or.{kind}", kind, (kind, kind), np.bitwise_or
        yield f"xor.{kind}", kind, (kind, kind), np.bitwise_xor
        yield f"not.{kind}", kind, (kind,), np.invert
        if kind != "pred":
            yield f"shl.{kind}", kind, (kind, "u32"), _shifted(np.left_shift)
    for kind in ("b16", "b32", "b64", "f32"):
        yield f"selp.{kind}", kind, (kind, kind, "pred"), _chosen
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "pred"):
        yield f"mov.{kind}", kind, (kind,), lambda a: a
    yield "bfe.u32", "u32", ("u32", "u32", "u32"), _field
    yield "popc.b32", "u32", ("b32",), _ones
    for to, kind in (("u32", "u64"), ("u64", "u32"), ("s64", "s32"), ("u32", "u16")):
        yield f"cvt.{to}.{kind}", to, (kind,), _converted(number_of(to))
    yield "cvt.f32.bf16", "b32", ("b16",), lambda a: a.astype(np.uint32) << 16
    yield "cvt.f32.f16", "f32", ("f16",), lambda a: a.astype(np.float32)
    yield "cvt.rn.bf16.f32", "b16", ("f32",), _bfloat16
    yield "cvt.rn.f16.f32", "b16", ("f32",), _float16
    yield "cvt.rn.bf16x2.f32", "b32", ("f32", "f32"), _pair(_bfloat16)
    yield "cvt.rn.f16x2.f32", "b32", ("f32", "f32"), _pair(_float16)


_ARITHMETIC = {opcode: (result, kinds, function) for opcode, result, kinds, function in _arithmetic()}


def compute(opcode: str, operands: tuple[str, ...]) -> Step | None:
    """An instruction whose result is a function of registers, lane by lane; None: it is none of those."""
    found = _ARITHMETIC.get(opcode)
    if found is None or len(operands) != 1 + len(found[1]):
        return None
    result, kinds, function = found
    target, raw = operands[0], raw_of(result)
    if _width(target) != raw:
        raise UnknownInstruction(f"{opcode} to {target}")
    reads = [operand(text, kind) for text, kind in zip(operands[1:], kinds, strict=True)]
    # By number of operands: this is what nearly all time goes to.
    if len(reads) == 1:
        (a,) = reads
        return lambda warp: warp.put(target, function(a(warp)).view(raw))
    if len(reads) == 2:
        a, b = reads
        return lambda warp: warp.put(target, function(a(warp), b(warp)).view(raw))
    a, b, c = reads
    return lambda warp: warp.put(target, function(a(warp), b(warp), c(warp)).view(raw))
