"""`python -m traces fit-predictor`: fit a predictor to a trace and write it as a safetensors file.

Knows no kind of predictor: each is a function `fit(trace, report, options) -> (arrays, header)` with a dataclass of
its options, loaded when asked.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.keys import near_to
from traces.container import TraceError, fault
from traces.files import replace_file, safetensors_bytes
from traces.fitting.packages import asked_for_by
from traces.help_text import Wrapped
from traces.processes.progress import shown
from traces.reader import open_trace

FITS = {
    "forest": ("traces.fitting.forest:fit_forest", "traces.fitting.forest:ForestOptions"),
    "hybrid": ("traces.fitting.network:fit_hybrid", "traces.fitting.training:HybridOptions"),
    "transition": ("traces.fitting.transition:fit_transition", "traces.fitting.transition:TransitionOptions"),
}
"""Kinds; function and options of each. The first is the default."""
ZERO_ALLOWED = ("seed", "threads", "dropout")
_EXAMPLES = """examples:
  python -m traces fit-predictor train.safetensors my-model.forest.safetensors kind=forest
  python -m traces fit-predictor train.safetensors small.safetensors kind=forest max_mb=2 rows=6000
  python -m traces fit-predictor train.safetensors my-model.transition.safetensors kind=transition"""


def options_of(kind: str) -> Callable[..., Any]:
    """The options of `kind`, without what its function needs. TraceError on an unknown one."""
    if kind not in FITS:
        raise TraceError(f"kind={kind} is unknown{near_to(kind, FITS)}; known are {', '.join(FITS)}")
    return _loaded(FITS[kind][1])


def fit_of(kind: str) -> Callable[..., Any]:
    """The function that fits `kind`. TraceError where a package that it needs is missing."""
    with asked_for_by(f"kind={kind}"):
        return _loaded(FITS[kind][0])


def _loaded(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    from traces.cli import listed_options

    parser.formatter_class = Wrapped
    parser.add_argument("trace", help="a trace file, or a quoted glob")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("options", nargs="*", metavar="key=value", help="kind=, and options of the kind, listed below")
    lines = [
        "options, by kind (defaults shown; max_mb: 10^6 bytes of the file; rows: pairs of row and distance that",
        "each target layer is fitted on; distances: layers ahead):",
        *(f"  kind={kind} {listed_options(options_of(kind))}" for kind in FITS),
        "",
        _EXAMPLES,
    ]
    parser.epilog = "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Fit and write; progress on stderr."""
    from traces.cli import parse_options

    kinds = [word.partition("=")[2] for word in args.options if word.startswith("kind=")]
    if len(kinds) > 1:
        raise TraceError("option kind is given twice; keep one")
    kind = kinds[0] if kinds else next(iter(FITS))
    make_options = options_of(kind)
    words = [word for word in args.options if not word.startswith("kind=")]
    options = make_options(**parse_options(kind, make_options, words, ZERO_ALLOWED))
    if not args.output.absolute().parent.is_dir():
        raise fault(
            args.output, "file", f"the folder {args.output.absolute().parent} does not exist", "create it first"
        )
    function = fit_of(kind)
    trace = open_trace(args.trace)
    with asked_for_by(f"kind={kind}"), shown(f"fitting {kind} to {trace.name}"):
        arrays, header = function(trace, lambda line: print(line, file=sys.stderr, flush=True), options)
    told = {
        "format": f"expertflow-{kind}",
        "model": trace.model,
        "trace_sha256": trace.sha256(),
        "source": trace.header["source"],
        "license": trace.header["license"],
    }
    write_fitted(args.output, arrays, told | header)
    print(f"wrote {args.output}: {kind} for {trace.model}, {args.output.stat().st_size / 1e6:.2f} MB")
    return 0


def write_fitted(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]], header: Mapping[str, str]) -> None:
    """Write the file whole or not at all."""
    replace_file(path, safetensors_bytes(arrays, header))
