"""`python -m sim.fit_transition TRACE OUTPUT`: count transitions for the predictor's warm start."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from expertflow.predictors.counts import TransitionCounts
from traces.batching import BatchConfig, Batches
from traces.reader import Trace, open_trace

_BLOCK = 256


def fit_counts(trace: Trace, max_distance: int) -> TransitionCounts:
    """Transition counts over a trace at batch 1 (`expertflow.predictors.counts`)."""
    counts = TransitionCounts(trace.num_layers, trace.num_experts, min(max_distance, trace.num_layers - 1))
    shape = (trace.num_layers, trace.num_experts)
    recent: list[tuple[npt.NDArray[np.float64], int]] = [(np.zeros(shape), 1)]
    for forward in Batches(trace, BatchConfig()):
        active = np.zeros(shape)
        for layer, keys in enumerate(forward.demands):
            for key in keys:
                active[layer, key - layer * trace.num_experts] = (
                    1 if forward.counts is None else forward.counts[layer][key]
                )
        recent.append((active, forward.num_tokens))
        if len(recent) > _BLOCK:
            counts.learn(recent)
            recent = recent[-1:]
    if len(recent) > 1:
        counts.learn(recent)
    return counts


def to_arrays(counts: TransitionCounts) -> dict[str, npt.NDArray[np.generic]]:
    """Counts in 16 bits, scaled down if the trace is longer than that holds."""
    most = max(counts.num_forwards, 1.0)
    scale = min(1.0, 65535 / most)
    arrays = {"frequency": counts.frequency, "cross": counts.cross, "persistence": counts.persistence}
    scaled: dict[str, npt.NDArray[np.generic]] = {
        name: np.rint(value * scale).astype(np.uint16) for name, value in arrays.items()
    }
    scaled["num_forwards"] = np.array([counts.num_forwards * scale])
    return scaled


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sim.fit_transition", description=__doc__)
    parser.add_argument("trace", help="a trace file, or a glob")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--max-distance", type=int, default=8, help="layers ahead (default: 8)")
    args = parser.parse_args(words)
    try:
        if args.max_distance < 1:
            raise ValueError(f"--max-distance={args.max_distance} must be at least 1")
        trace = open_trace(args.trace)
        counts = fit_counts(trace, args.max_distance)
        header = {"format": "expertflow-transition", "model": trace.model, "fitted_to": trace.name,
                  "num_tokens": str(trace.num_tokens), "source": trace.header.get("source", ""),
                  "license": trace.header.get("license", "")}  # fmt: skip
        temporary = args.output.with_name(f".{args.output.name}.tmp")
        temporary.write_bytes(save(to_arrays(counts), metadata=header))
        temporary.replace(args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {trace.num_tokens} tokens of {trace.name}, {args.max_distance} distances")
    return 0


if __name__ == "__main__":
    sys.exit(main())
