"""Products of activations, 0 … 127, with weights, -127 … 127, summed exactly in 32 bits, four of them at once.

Processors multiply and add bytes in fours: in one instruction (AVX-512 VNNI), or in two, whose sums of two products fit
their 16 bits, since 2 · 127 · 127 < 2^15 (AVX2). Compilers do not find these by themselves, so that they are named
here; elsewhere the same sums are written out.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numba import types  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numba.core import cgutils  # type: ignore[import-untyped, import-not-found, unused-ignore]
from numba.extending import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
    intrinsic,
    models,
    register_model,
)

from expertflow.compiled.compiling import inner

QUAD = 4
LANES = 16
"""Sums in one value."""
COLUMNS = 2 * LANES
"""Columns of weights in one pass."""
_QUAD_BYTES = QUAD * LANES

_INT = ir.IntType(32)
_SUMS, _BYTES = ir.VectorType(_INT, LANES), ir.VectorType(ir.IntType(8), _QUAD_BYTES)


def padded(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def by_quads(weights: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """weights [..., A, B] as `multiply` reads them, [..., any]: four rows side by side, column by column, the columns
    filled up with zeros to a multiple of `COLUMNS`."""
    *front, rows, columns = weights.shape
    room = np.zeros((*front, padded(rows, QUAD), padded(columns, COLUMNS)), np.int8)
    room[..., :rows, :columns] = weights
    quads = room.reshape(*front, -1, QUAD, room.shape[-1]).swapaxes(-1, -2)
    return np.ascontiguousarray(quads).reshape(*front, -1)


class _Sums(types.Type):
    """Sixteen sums of 32 bits each."""

    def __init__(self) -> None:
        super().__init__(name="expertflow.Sums")


@register_model(_Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _SUMS)


_sums = _Sums()


def _spread(builder, value, kind):
    """A vector whose every element is `value`."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return _chosen(builder, one, [0] * kind.count)


def _chosen(builder, vector, places, other=None):
    return builder.shuffle_vector(
        vector,
        ir.Constant(vector.type, ir.Undefined) if other is None else other,
        ir.Constant(ir.VectorType(_INT, len(places)), list(places)),
    )


def _call(builder, name, kind, *arguments):
    told = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, told, name), arguments)


def add_by_vnni(builder, sums, quad, weights):
    """One instruction of AVX-512 VNNI: sixteen times four products."""
    four = builder.bitcast(weights, _SUMS)
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _SUMS, sums, _spread(builder, quad, _SUMS), four)


def add_by_avx2(builder, sums, quad, weights):
    """Two instructions of AVX2 for either half: sums of two products in 16 bits, then of two of these in 32."""
    half = LANES // 2
    bytes_of, pairs_of, fours_of = (
        ir.VectorType(ir.IntType(32 // parts), half * parts) for parts in (QUAD, QUAD // 2, 1)
    )
    values = builder.bitcast(_spread(builder, quad, fours_of), bytes_of)
    made = []
    for first in (0, _QUAD_BYTES // 2):
        some = _chosen(builder, weights, range(first, first + _QUAD_BYTES // 2))
        pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs_of, values, some)
        made.append(_call(builder, "llvm.x86.avx2.pmadd.wd", fours_of, pairs, ir.Constant(pairs_of, [1] * 2 * half)))
    return builder.add(sums, _chosen(builder, made[0], range(LANES), made[1]))


def add_written_out(builder, sums, quad, weights):
    """For any processor."""
    for place in range(QUAD):
        value = builder.and_(builder.lshr(quad, ir.Constant(_INT, 8 * place)), ir.Constant(_INT, 0xFF))
        some = builder.sext(_chosen(builder, weights, range(place, _QUAD_BYTES, QUAD)), _SUMS)
        sums = builder.add(sums, builder.mul(some, _spread(builder, value, _SUMS)))
    return sums


def best_for(features: str) -> Callable[..., Any]:
    """The fastest way for a processor with these features, in LLVM's names."""
    has = features.split(",")
    if "+avx512vnni" in has and "+avx512f" in has:
        return add_by_vnni
    return add_by_avx2 if "+avx2" in has else add_written_out


def adding(way: Callable[..., Any] | None = None) -> Any:
    """A compiled function (sums, quad, weights i1[:], index): sums, grown by the products of the bytes of `quad`, four
    activations, with the sixteen times four weights from `index` on. way: how; None: as suits the processor."""

    def add_quad(_context, sums, quad, weights, index):
        def generate(context, builder, signature, arguments):
            sums, quad, weights, index = arguments
            data = context.make_array(signature.args[2])(context, builder, weights).data
            place = builder.bitcast(builder.gep(data, [index]), _BYTES.as_pointer())
            # Numba compiles for these, which need not be those of the processor that it runs on.
            chosen = way or best_for(context.codegen().magic_tuple()[2])
            return chosen(builder, sums, quad, builder.load(place, align=1))

        return _sums(_sums, types.int32, types.Array(types.int8, 1, "C"), types.intp), generate

    return intrinsic(add_quad)


def _zeros(_context):
    return _sums(), lambda context, builder, signature, arguments: ir.Constant(_SUMS, None)


def _store(_context, sums, found, index):
    def generate(context, builder, signature, arguments):
        sums, found, index = arguments
        data = context.make_array(signature.args[1])(context, builder, found).data
        builder.store(sums, builder.bitcast(builder.gep(data, [index]), _SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(_sums, types.Array(types.int32, 1, "C"), types.intp), generate


zeros: Any = intrinsic(_zeros)
"""A compiled function: sums of nothing."""
store: Any = intrinsic(_store)
"""A compiled function (sums, found i4[:], index) that writes the sums to `found`, from `index` on."""
_add_quad: Any = adding()


@inner
def multiply(values, weights, total):
    """total i4 [B] becomes values [A] @ weights [A, B]: values as quads i4 [A / 4], weights as `by_quads` makes them, B
    a multiple of `COLUMNS`."""
    width = QUAD * len(total)
    for column in range(0, len(total), COLUMNS):
        left, right = zeros(), zeros()
        index = QUAD * column
        for quad in values:
            left, right = _add_quad(left, quad, weights, index), _add_quad(right, quad, weights, index + _QUAD_BYTES)
            index += width
        store(left, total, column)
        store(right, total, column + LANES)


@inner
def multiply_four(a, b, c, d, weights, totals):
    """`multiply` of four rows at once: totals i4 [4, B]. Weights are read once, and eight sums at a time wait for
    nothing."""
    width = QUAD * totals.shape[1]
    for column in range(0, totals.shape[1], COLUMNS):
        left_a, left_b, left_c, left_d = zeros(), zeros(), zeros(), zeros()
        right_a, right_b, right_c, right_d = zeros(), zeros(), zeros(), zeros()
        index = QUAD * column
        for at in range(len(a)):
            more = index + _QUAD_BYTES
            left_a, right_a = _add_quad(left_a, a[at], weights, index), _add_quad(right_a, a[at], weights, more)
            left_b, right_b = _add_quad(left_b, b[at], weights, index), _add_quad(right_b, b[at], weights, more)
            left_c, right_c = _add_quad(left_c, c[at], weights, index), _add_quad(right_c, c[at], weights, more)
            left_d, right_d = _add_quad(left_d, d[at], weights, index), _add_quad(right_d, d[at], weights, more)
            index += width
        store(left_a, totals[0], column)
        store(right_a, totals[0], column + LANES)
        store(left_b, totals[1], column)
        store(right_b, totals[1], column + LANES)
        store(left_c, totals[2], column)
        store(right_c, totals[2], column + LANES)
        store(left_d, totals[3], column)
        store(right_d, totals[3], column + LANES)
