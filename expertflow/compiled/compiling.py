"""How functions are compiled, kept on disk, and given arrays."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pkgutil import get_data
from typing import Any

import llvmlite  # type: ignore[import-untyped, import-not-found, unused-ignore]
import numba  # type: ignore[import-untyped, import-not-found, unused-ignore]
import numpy as np
import numpy.typing as npt
from numba.core import cgutils  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numba.core.registry import cpu_target  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numba.extending import intrinsic  # type: ignore[import-untyped, import-not-found, unused-ignore]

_OWN = ("arrays", "compiling", "deciding", "forest", "learning", "products", "scoring")
_CONSTANTS = ("forest", "network", "units", "view")


def _codegen() -> Any:
    """What makes code for this processor."""
    return cpu_target.target_context.codegen()


def _sources_hash() -> str:
    """Of all that goes into a compiled function: this package, the files whose numbers it takes for constants, what
    compiles, and for which processor.

    Processes keep what they compile without a lock. Numba replaces each of its files in one step, but the index before
    the code that it names: whatever is found under one name must be good for whoever looks there, and so one name is
    written by none but such as make the same of it.
    """
    told = hashlib.sha256(repr((numba.__version__, llvmlite.__version__, _codegen().magic_tuple())).encode())
    for package, names in ((__package__, _OWN), ("expertflow", _CONSTANTS)):
        for name in names:
            told.update(get_data(package, f"{name}.py") or b"")
    return told.hexdigest()[:12]


_SOURCES = _sources_hash()


def compiled(types: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for `types` now, and keep the result beside the source or in the user's cache folder."""

    def decorate(function: Callable[..., Any]) -> Any:
        # Numba keeps code by this name and by the date of the file that it stands in; what that file uses may change
        # without it.
        function.__qualname__ = f"{function.__name__}-{_SOURCES}"
        try:
            return numba.njit(types, cache=True)(function)
        except (RuntimeError, OSError):
            # Nowhere to keep it, or no room: compiled anew by each process.
            return numba.njit(types)(function)

    return decorate


inner: Any = numba.njit
"""Compile a function that is called by compiled ones alone, for whatever types they call it with."""


def packed(*values: npt.NDArray[Any] | int) -> npt.NDArray[np.int64]:
    """Whole numbers, and the addresses of arrays in C order, as one argument: each array that is an argument of its own
    costs a call 0.1 us. Who calls keeps the arrays alive, and in place."""
    for value in values:
        assert isinstance(value, int) or value.flags.c_contiguous
    return np.array([value if isinstance(value, int) else value.ctypes.data for value in values], np.int64)


def _as_pointer(_context, address):
    """An address as the pointer that `numba.carray` takes."""

    def convert(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), convert


_pointer: Any = intrinsic(_as_pointer)
_carray: Any = numba.carray  # type: ignore[attr-defined, unused-ignore]


@inner
def array_at(address, shape, dtype):
    """The array in C order whose address is one of those that `packed` has."""
    return _carray(_pointer(address), shape, dtype)


def bits(power: int) -> int:
    """log2 of a power of two: what divides by one is shifted."""
    if power < 1 or power & (power - 1):
        raise AssertionError(f"{power} is no power of two")
    return power.bit_length() - 1
