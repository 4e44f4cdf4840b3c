"""What the mutators draw from: numbers at the edges, hostile strings, and JSON literals that no parser should trust."""

from __future__ import annotations

from random import Random

WHOLE = (0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 257, 32_767, 65_535, 65_536, 2**31 - 1, 2**31, -(2**31), 2**32)
HUGE = (2**53, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**15, 10**18, 10**30, 10**400)
REAL = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-9, 1e-308, 5e-324, 65_504.0, 65_520.0, 1e30, 1e308, -1e308)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    " ",
    "\n",
    "0",
    "-1",
    "nan",
    "null",
    "true",
    "[]",
    "{}",
    "\x00",
    "a\nb\nc",
    "é",
    "\u202e\u0663",
    "\U0001f9ff",
    "../../x",
    "%s%n{0}",
    "=1+1",
    "x" * 400,
    "\r\n",
)
LITERALS = (
    "null",
    "true",
    "false",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "-0.0",
    "1.0",
    "1e2",
    "01",
    "[]",
    "{}",
    '""',
    "[[]]",
    '"\\ud800"',
    '"\\u0000"',
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 30,
    "'x'",
    "undefined",
    "",
)
"""JSON text of one value; some are no JSON."""


def whole(rng: Random, near: int = 0) -> int:
    """A whole number: near another, at an edge, or huge."""
    kind = rng.random()
    if kind < 0.5:
        return near + rng.choice((-2, -1, 1, 2))
    return rng.choice(WHOLE) if kind < 0.85 else rng.choice(HUGE)


def real(rng: Random) -> float:
    """A float at an edge, or not finite."""
    return rng.choice(REAL) if rng.random() < 0.6 else rng.choice(NOT_FINITE)


def text(rng: Random) -> str:
    """A string; seldom a very long one."""
    return "y" * 70_000 if rng.random() < 0.01 else rng.choice(TEXTS)


def literal(rng: Random) -> str:
    """JSON text of a value that does not belong there; seldom one nested too deeply to be parsed by recursion."""
    kind = rng.random()
    if kind < 0.02:
        depth = rng.choice((50, 900, 1_100, 20_000, 100_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        return opening * depth + ("1" if opening != "[" else "") + closing * rng.choice((depth, 0))
    if kind < 0.3:
        return str(whole(rng))
    return rng.choice(LITERALS)
