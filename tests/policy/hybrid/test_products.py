"""Products of bytes are exact in every way in which a processor may make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import get_data
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from expertflow.compiled import compiling, products  # noqa: E402  (after numba)
from expertflow.compiled.compiling import inner  # noqa: E402  (after numba)

FEATURES = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[2].split(",")
WAYS = {
    "written out": products.add_written_out,
    **({"avx2": products.add_by_avx2} if "+avx2" in FEATURES else {}),
    **({"vnni": products.add_by_vnni} if "+avx512vnni" in FEATURES else {}),
}
"""Those that the processor has."""
EXTREMES = np.array([0, 1, 126, 127])


def drawn(rows: int, columns: int, seed: int, extreme: bool = False) -> tuple[Any, Any]:
    """Activations [rows] and weights [rows, columns]; extreme: as large as they may be, all of one sign or mixed."""
    draw = np.random.default_rng(seed)
    if extreme:
        return draw.choice(EXTREMES, rows, p=[0.05, 0.05, 0.1, 0.8]), draw.choice([-127, 127], (rows, columns))
    return draw.integers(0, 128, rows), draw.integers(-127, 128, (rows, columns))


def quads(values: Any) -> Any:
    room = np.zeros(products.padded(len(values), products.QUAD), np.uint8)
    room[: len(values)] = values
    return room.view(np.int32)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_every_way_adds_the_same(name: str, seed: int) -> None:
    add: Callable[..., Any] = products.adding(WAYS[name])

    @inner
    def run(values: Any, weights: Any, found: Any) -> None:
        sums = products.zeros()
        for at in range(len(values)):
            sums = add(sums, values[at], weights, 4 * found.size * at)
        products.store(sums, found, 0)

    values, weights = drawn(192, products.LANES, seed, extreme=seed % 2 == 1)
    laid = weights.reshape(-1, 4, products.LANES).swapaxes(1, 2).astype(np.int8).reshape(-1)
    found = np.zeros(products.LANES, np.int32)
    run(quads(values), np.ascontiguousarray(laid), found)
    assert found.tolist() == (values @ weights).tolist()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 32), (10, 12), (192, 128), (127, 60), (128, 33)])
def test_rows_and_columns_of_any_number(rows: int, columns: int) -> None:
    cases = [drawn(rows, columns, seed, extreme=seed > 1) for seed in range(4)]
    weights = cases[0][1]
    laid, width = products.by_quads(weights), products.padded(columns, products.COLUMNS)
    totals, total = np.full((4, width), -1, np.int32), np.full(width, -1, np.int32)
    products.multiply_four(*[quads(values) for values, _ in cases], laid, totals)
    for row, (values, _) in enumerate(cases):
        products.multiply(quads(values), laid, total)
        assert total[:columns].tolist() == totals[row, :columns].tolist() == (values @ weights).tolist()


@pytest.mark.parametrize(
    ("features", "way"),
    [
        ("+avx2,+avx512f,+avx512vnni", products.add_by_vnni),
        ("+avx2,-avx512f,-avx512vnni", products.add_by_avx2),
        ("+avx2,+avx512f,-avx512vnni", products.add_by_avx2),
        ("+sse2,-avx2", products.add_written_out),
        ("", products.add_written_out),
    ],
)
def test_the_way_is_chosen_by_what_the_processor_has(features: str, way: Any) -> None:
    assert products.best_for(features) is way


def test_weights_of_several_layers_are_laid_out_alike() -> None:
    weights = np.random.default_rng(0).integers(-127, 128, (3, 10, 12))
    laid = products.by_quads(weights)
    assert [row.tolist() for row in laid] == [products.by_quads(one).tolist() for one in weights]


def test_what_is_compiled_is_told_from_what_other_sources_gave() -> None:
    """By all files of the package, so that none is forgotten where one is added."""
    folder = Path(compiling.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {*compiling._OWN, "__init__"}
    assert all(len(get_data("expertflow", f"{name}.py") or b"") > 100 for name in compiling._CONSTANTS)
