"""What runs between two layers, compiled with numba: the fitted parts import this package only where they are used.

Whole numbers only, if need be in floating point that holds them exactly, so that the numpy versions of these functions
(`HistoryNetwork`, `Forest`) give the same to the bit. ImportError where numba is missing or does not fit the installed
numpy. Shape letters as in `network` and `forest`.

`compiling` compiles and keeps what was compiled, `products` multiplies bytes, `learning` takes in routing, `scoring`
says how likely experts are, `deciding` which of them are wanted, `forest` walks trees.
"""

import sys
from importlib import import_module

# First: the rest may be loaded already from a time when numba was there.
import_module("numba")

from expertflow.compiled.arrays import Block, Choice, History, Network, Sizes  # noqa: E402  (after numba)
from expertflow.compiled.compiling import packed  # noqa: E402  (after numba)
from expertflow.compiled.deciding import decide, decide_scored, settle  # noqa: E402  (after numba)
from expertflow.compiled.forest import evaluate_forest  # noqa: E402  (after numba)
from expertflow.compiled.learning import close, learn, learn_block  # noqa: E402  (after numba)
from expertflow.compiled.products import QUAD, by_quads, padded  # noqa: E402  (after numba)
from expertflow.compiled.scoring import forecast, forecast_block, look, score_block  # noqa: E402  (after numba)

MODULES = tuple(name for name in sys.modules if name == __name__ or name.startswith(f"{__name__}."))
"""The modules that compute."""

__all__ = [
    "MODULES",
    "QUAD",
    "Block",
    "Choice",
    "History",
    "Network",
    "Sizes",
    "by_quads",
    "close",
    "decide",
    "decide_scored",
    "evaluate_forest",
    "forecast",
    "forecast_block",
    "learn",
    "learn_block",
    "look",
    "packed",
    "padded",
    "score_block",
    "settle",
]
