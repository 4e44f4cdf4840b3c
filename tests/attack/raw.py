"""Mutation of bytes whatever they mean: flips, cuts, repeats, splices."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

RawOp = Callable[[Random, bytes], bytes]


def flip_bits(rng: Random, content: bytes) -> bytes:
    """One to four bits anywhere."""
    if not content:
        return b"\x01"
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_byte(rng: Random, content: bytes) -> bytes:
    """One byte becomes another, often one with a meaning in text."""
    if not content:
        return b"{"
    place = rng.randrange(len(content))
    value = rng.choice((0, 0xFF, 0x80, 0x7F, 10, 13, 32, 34, 39, 44, 45, 46, 48, 57, 58, 91, 93, 123, 125))
    return content[:place] + bytes([value]) + content[place + 1 :]


def truncate(rng: Random, content: bytes) -> bytes:
    """The end is missing."""
    return content[: rng.choice((0, 1, 7, 8, 9, 15, 16, rng.randrange(len(content) + 1), max(0, len(content) - 1)))]


def extend(rng: Random, content: bytes) -> bytes:
    """Something follows the end."""
    return content + rng.choice((b"\x00", b"\n", b" ", b"\xff" * 8, b"{}", content[:64], bytes(4096)))


def cut_out(rng: Random, content: bytes) -> bytes:
    """Some bytes in the middle are missing."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 4, 8, 64)) :]


def repeat(rng: Random, content: bytes) -> bytes:
    """Some bytes in the middle come twice."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start : start + rng.choice((1, 2, 8, 64))] + content[start:]


def move(rng: Random, content: bytes) -> bytes:
    """Two stretches change places."""
    first, second, third = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def set_number(rng: Random, content: bytes) -> bytes:
    """An aligned 2-, 4- or 8-byte number becomes one at an edge."""
    size = rng.choice((2, 4, 8))
    if len(content) < size:
        return content
    place = rng.randrange(len(content) // size) * size
    value = rng.choice((0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1, len(content)))
    return content[:place] + (value % (1 << 8 * size)).to_bytes(size, "little") + content[place + size :]


OPS: tuple[RawOp, ...] = (flip_bits, flip_bits, set_byte, truncate, extend, cut_out, repeat, move, set_number)


def mutate(rng: Random, content: bytes) -> bytes:
    """One of these."""
    return rng.choice(OPS)(rng, content)
