"""`python -m traces score-predictors`: predictors fitted to one trace, compared by distance on another.

A target past the last layer is not scored: no pre-gate reaches it. Writes accuracy.csv and fits.csv, prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.container import TraceError, fault
from traces.files import replace_file
from traces.fitting.accuracy import Accuracy, fit_decay
from traces.fitting.baselines import (
    Baseline,
    ForestBaseline,
    NetworkBaseline,
    Popularity,
    Pregate,
    Training,
    has_pregate,
)
from traces.fitting.packages import asked_for_by, check_packages
from traces.fitting.pointwise import Boosting, Logistic, Perceptron, Ridge
from traces.fitting.rows import RowBlock, num_distances, row_blocks
from traces.flags import whole
from traces.help_text import Wrapped
from traces.processes.progress import shown
from traces.reader import Trace, open_trace

BASELINES: dict[str, Callable[[Training], Baseline]] = {
    "popularity": Popularity,
    "transition": lambda training: training.transitions,
    "pregate": Pregate,
    "calibrated": lambda training: training.calibrated,
    "forest": ForestBaseline,
    "hybrid": NetworkBaseline,
    "ridge": Ridge,
    "logistic": Logistic,
    "boosting": Boosting,
    "perceptron": Perceptron,
}
ROUTING_ALONE = ("popularity", "transition", "hybrid")
"""Those of them that need no pre-gate."""
PACKAGES = {
    "forest": ("sklearn",),
    "hybrid": ("torch", "sklearn"),
    "logistic": ("sklearn",),
    "boosting": ("sklearn",),
    "perceptron": ("sklearn",),
}
"""What fitting one of them takes and a plain installation lacks."""
READER_REPORTED = {
    "pregate": {"deepseek": 0.264, "qwen1.5": 0.333, "qwen2": 0.296},
    "forest": {"deepseek": 0.634, "qwen1.5": 0.653, "qwen2": 0.605},
}
"""c of the paper (arXiv 2510.26730) as two readers report it; DeepSeek-V2-Lite, Qwen1.5-MoE, Qwen2-57B."""
_TIMED_DECISIONS = 30

Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.formatter_class = Wrapped
    parser.add_argument("train", help="the trace to fit to: a file, or a quoted glob")
    parser.add_argument("eval", help="the trace to compare on")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write accuracy.csv and fits.csv to")
    parser.add_argument("--only", default="", help=f"some of them, with commas between: {', '.join(BASELINES)}")
    parser.add_argument(
        "--distances", type=whole(1, 9_999), default=8, help="layers ahead (8, or as far as the pre-gate goes)"
    )
    parser.add_argument(
        "--fitted",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="take a predictor of fit-predictor, e.g. forest=FILE; else it is fitted anew",
    )
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of what is drawn (0)")


def run(args: argparse.Namespace) -> int:
    """Fit, score, write."""
    if args.seed < 0:
        raise TraceError(f"--seed={args.seed} must be 0 or more")
    names = chosen_names(args.only)
    files = fitted_files(args.fitted)
    train, judged = open_trace(args.train), open_trace(args.eval)
    check_pair(train, judged)
    usable = names if has_pregate(train, judged) else [name for name in names if name in ROUTING_ALONE]
    if not usable:
        raise TraceError(
            f"{judged.paths[0]}: without a pre-gate in both traces none of {', '.join(names)} can be "
            f"compared; choose {' or '.join(ROUTING_ALONE)}"
        )
    check_needed([name for name in usable if name not in files])
    args.out.mkdir(parents=True, exist_ok=True)
    if skipped := [name for name in names if name not in usable]:
        print(f"skipped, for want of a pre-gate in both traces: {', '.join(skipped)}\n")

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    training = Training(train, reach(args.distances, train, judged, usable), args.seed, files, report)
    baselines = fit_baselines(usable, training)
    accuracy = score(baselines, judged, training.distances)
    costs = {name: (baseline.num_bytes, microseconds(baseline, judged)) for name, baseline in baselines.items()}
    fits = fit_rows(accuracy)
    write_csv(args.out / "accuracy.csv", accuracy)
    write_csv(args.out / "fits.csv", fits)
    print(
        f"{judged.model}: fitted to {train.num_tokens} tokens of {train.name}, scored on {judged.num_tokens} of "
        f"{judged.name}\n"
    )
    print("\n".join(markdown(accuracy, fits, costs, judged.top_k)))
    print(f"\nwrote {args.out / 'accuracy.csv'} and {args.out / 'fits.csv'}")
    return 0


def check_needed(names: Sequence[str]) -> None:
    """TraceError, before anything is fitted, where what one of them needs is not installed."""
    # The decay with distance is fitted to every one of them.
    check_packages(["score-predictors"], {"score-predictors": ("scipy",)})
    try:
        check_packages(names, PACKAGES)
    except TraceError as error:
        others = [name for name in names if name not in PACKAGES]
        remedy = f"; or compare the others: --only {','.join(others)}" if others else ""
        raise TraceError(f"{error}{remedy}") from None


def chosen_names(only: str) -> list[str]:
    """What to compare, in the order of BASELINES. TraceError on an unknown name."""
    wanted = [word for word in only.split(",") if word] or list(BASELINES)
    for word in wanted:
        if word not in BASELINES:
            raise TraceError(f"--only={only} names {word!r}, which is unknown; known are {', '.join(BASELINES)}")
    return [name for name in BASELINES if name in wanted]


def fitted_files(words: Sequence[str]) -> dict[str, Path]:
    """KIND=FILE words. TraceError on what is none."""
    found = {}
    for word in words:
        kind, equals, path = word.partition("=")
        if not equals or kind not in BASELINES or not Path(path).is_file():
            raise TraceError(
                f"--fitted={word}: must be KIND=FILE with a file that exists; kinds are among {', '.join(BASELINES)}"
            )
        found[kind] = Path(path)
    return found


def check_pair(train: Trace, judged: Trace) -> None:
    """TraceError where the two are not of one model, or are the same."""
    for key in ("model", "num_layers", "num_experts", "top_k"):
        if (mine := getattr(judged, key)) != (theirs := getattr(train, key)):
            raise fault(
                judged.paths[0],
                "header",
                f"{key} is {mine}, of the trace to fit to it is {theirs}",
                "compare on a trace of the same model",
            )
    if train.num_layers < 2:
        raise fault(train.paths[0], "header", "has one layer", "there is nothing to look ahead to")
    if judged.sha256() == train.sha256():
        raise fault(judged.paths[0], "file", "is the trace that was fitted to", "compare on another")


def reach(distances: int, train: Trace, judged: Trace, names: Sequence[str]) -> int:
    """Distances that can be scored: as far as asked, as the model goes, and as both pre-gates go if one is needed."""
    most = min(distances, train.num_layers - 1)
    needed = any(name not in ROUTING_ALONE for name in names)
    return min(most, num_distances(train), num_distances(judged)) if needed else most


def fit_baselines(names: Sequence[str], training: Training) -> dict[str, Baseline]:
    """Fitted, by name; says how long each took."""
    baselines = {}
    for name in names:
        start = time.perf_counter()
        with asked_for_by(name), shown(f"fitting {name}"):
            baselines[name] = BASELINES[name](training)
        training.report(f"{name}: fitted in {time.perf_counter() - start:.1f} s")
    return baselines


def score(baselines: dict[str, Baseline], trace: Trace, distances: int) -> Rows:
    """One row per baseline and distance, over all layers, in blocks."""
    sums = {name: [Accuracy(trace.top_k) for _ in range(distances)] for name in baselines}
    done = 0.0
    with shown(f"scoring {', '.join(baselines)}", lambda: done, trace.num_tokens):
        for block in row_blocks(trace, range(trace.num_requests)):
            for layer in range(trace.num_layers - 1):
                for distance in range(1, min(distances, trace.num_layers - 1 - layer) + 1):
                    truth = block.truth(layer, distance)
                    for name, baseline in baselines.items():
                        sums[name][distance - 1].add(baseline.scores(block, layer, distance), truth)
                done += block.num_rows / (trace.num_layers - 1)
    return [
        {"predictor": name, "distance": distance, **one.row()}
        for name, by_distance in sums.items()
        for distance, one in enumerate(by_distance, 1)
    ]


def microseconds(baseline: Baseline, trace: Trace) -> float:
    """Median time of one decision (one row, one layer, distance 1), features included, reading of the pre-gate not."""
    if isinstance(baseline, NetworkBaseline):
        # Here it sees whole forwards; as it decides it is timed by python -m replay.bench_decide.
        return float("nan")
    block: RowBlock = next(row_blocks(trace, range(1), 1))
    layer = (trace.num_layers - 1) // 2
    baseline.scores(block, layer, 1)
    taken = []
    for _ in range(_TIMED_DECISIONS):
        start = time.perf_counter_ns()
        baseline.scores(block, layer, 1)
        taken.append(time.perf_counter_ns() - start)
    return float(np.median(taken)) / 1000


def fit_rows(accuracy: Rows) -> Rows:
    """The decay of recall@k with distance, of each predictor."""
    made: Rows = []
    for name in dict.fromkeys(row["predictor"] for row in accuracy):
        recalls = [row["recall_k"] for row in accuracy if row["predictor"] == name]
        paper = {f"reader_reported_c_{key}": value for key, value in READER_REPORTED.get(name, {}).items()}
        blank = dict.fromkeys((f"reader_reported_c_{key}" for key in READER_REPORTED["forest"]), "")
        made.append({"predictor": name, **fit_decay(recalls), **blank, **paper})
    return made


def write_csv(path: Path, rows: Rows) -> None:
    """Whole or not at all; floats with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    replace_file(path, text.getvalue().encode())


def markdown(accuracy: Rows, fits: Rows, costs: dict[str, tuple[int, float]], top_k: int) -> list[str]:
    """Tables for a person."""
    distances = sorted({row["distance"] for row in accuracy})
    lines = []
    for key, title in (
        ("recall_k", f"recall@{top_k}"),
        ("recall_2k", f"recall@{2 * top_k}"),
        ("ece", "calibration error"),
        ("log_loss", "log loss"),
    ):
        lines += _table(
            [title, *(f"d={d}" for d in distances)],
            (
                [
                    name,
                    *(
                        f"{row[key]:.4f}" if key in ("ece", "log_loss") else f"{row[key]:.3f}"
                        for row in accuracy
                        if row["predictor"] == name
                    ),
                ]
                for name in costs
            ),
        )
    lines += _table(
        ["predictor", "model (kB)", "µs a decision"],
        (
            [name, f"{size / 1000:.0f}", "–" if np.isnan(time_us) else f"{time_us:.0f}"]
            for name, (size, time_us) in costs.items()
        ),
    )
    heads = ["a·e^(−b·d)+c", "a", "b", "c", "rmse", "the paper's c (DeepSeek, Qwen1.5, Qwen2) [2], reader-reported"]
    lines += _table(
        heads,
        (
            [
                fit["predictor"],
                *(f"{fit[key]:.3f}" for key in ("a", "b", "c", "rmse")),
                ", ".join(f"{value:.3f}" for value in READER_REPORTED.get(fit["predictor"], {}).values()),
            ]
            for fit in fits
        ),
    )
    return lines[:-1]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    made = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return [*made, *(f"| {' | '.join(row)} |" for row in rows), ""]
