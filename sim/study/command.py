"""`python -m sim.study NAME`: run a study of `conf/study`, and write its table, verdicts and pictures."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from sim.job.known import LISTED, is_known, known_at
from sim.job.output import code_sha256
from sim.job.run_cli import run_cli
from sim.paths import add_config_dir, config_files, use_own_folder
from sim.study.before import check_cells
from sim.study.cells import plan_jobs, run_jobs, trace_of_cell
from sim.study.estimates import estimates_table
from sim.study.plan import Study, cells, load_study
from sim.study.report import Run, write_study
from sim.study.table import make_table
from sim.study.verdicts import sentences
from traces.flags import Parser, whole
from traces.processes.locks import locked_folder
from traces.processes.whole import clear


def cli(words: list[str] | None = None) -> int:
    """Command line; exit code 2 and one line for a user's error."""
    args = _parser().parse_args(words)
    return run_cli(lambda: run_study(args), "finished cells are kept: the same command goes on from there")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sim.study",
        description=__doc__,
        epilog="example: python -m sim.study gap --out results/gap --set trace.path=mine.safetensors",
    )
    shipped = ", ".join(sorted(config_files("study")))
    parser.add_argument("study", help=f"{shipped}, or a file study/NAME.yaml of --config-dir")
    parser.add_argument("--out", type=Path, required=True, help="output folder; finished cells in it are kept")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the study, or an override: of every run, or NAME,NAME:KEY=VALUE of the cells of "
        "these variants and values of axes",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="AXIS=VALUE[,VALUE]",
        help="only these values of an axis, or of `variant`",
    )
    parser.add_argument("--tokens", type=whole(1), help="cut every trace after so many tokens (max_tokens)")
    add_config_dir(parser)
    parser.add_argument("--jobs", type=whole(-1, 1024), default=1, help="processes (default: 1; -1: one a core)")
    return parser


def run_study(args: argparse.Namespace) -> None:
    """Plan, run what is not done yet, write."""
    started, code = time.perf_counter(), code_sha256()
    if args.jobs == 0:
        raise ValueError("--jobs=0 runs nothing; give 1 or more, or -1 for one a core")
    use_own_folder(args.config_dir)
    study = load_study(args.study)
    given = [_split("--set", word) for word in args.set]
    values = {key: value for key, value in given if key in study.parameters}
    added = [f"{key}={value}" for key, value in given if key not in study.parameters]
    for key, _ in given:
        _check_key(key, study)
    if args.tokens is not None and any(key == "max_tokens" for key, _ in given):
        raise ValueError(f"--tokens={args.tokens} and --set max_tokens= both cut the traces; leave one out")
    added += [f"max_tokens={args.tokens}"] if args.tokens is not None else []
    only = {axis: names.split(",") for axis, names in (_split("--only", word) for word in args.only)}
    jobs = plan_jobs(cells(study, values, added, only), study.kind)
    check_cells([(job.cell, job.cfg, trace_of_cell(job.cfg)) for job in jobs], study.kind, study.optional)
    args.out.mkdir(parents=True, exist_ok=True)
    found, left_out = run_jobs(jobs, args.out / "cells", args.jobs, study.optional)
    if not found:
        raise ValueError(f"no cell of study {study.name} could be run: {next(iter(left_out.values()), 'it has none')}")
    results = list(found.values())
    if study.kind == "estimates":
        table = estimates_table([" ".join(f"{axis} {name}" for axis, name in cell.place) for cell in found], results)
    else:
        table = make_table(list(found), results, study.perfect)
    run = Run(
        study=study,
        words=tuple(printed(args, study)),
        code_sha256=code,
        traces={result["trace"]["name"]: result["trace"]["sha256"] for result in results},
        left_out=left_out,
        wall_s=time.perf_counter() - started,
    )
    with locked_folder(args.out):
        clear(args.out)
        summary = write_study(args.out, run, table)
    for line in sentences(summary):
        print(line)
    print(f"{len(results)} cells: {args.out / 'README.md'}")


def _check_key(key: str, study: Study) -> None:
    """ValueError for `trace_path` where `trace.path` is meant: of keys at the top none is near to it."""
    name = key.rpartition(":")[2].lstrip("+~")
    dotted = name.replace("_", ".", 1)
    if name not in (*study.parameters, *known_at("")) and "." not in name and "_" in name and is_known(dotted):
        raise ValueError(f"--set {key}: no key is called {name[:60]} (did you mean {dotted[:60]}?); {LISTED}")


def _split(option: str, word: str) -> tuple[str, str]:
    key, separator, value = word.partition("=")
    if not key or not separator:
        raise ValueError(f"{option} {word}: give KEY=VALUE")
    return key, value


def printed(args: argparse.Namespace, study: Study) -> list[str]:
    """The command's words as a report may show them: a path of this machine as the variable that stands for it."""

    def shown(word: str) -> str:
        key, value = _split("--set", word)
        return (
            f"{key}=${re.sub(r'[^A-Z0-9]', '_', key.upper())}"
            if "/" in value or value.endswith(".safetensors")
            else word
        )

    words: list[str] = [study.name, "--out", _from_here(args.out)]
    words += ["--config-dir", "$CONFIG_DIR"] if args.config_dir is not None else []
    parts: Sequence[tuple[str, list[str]]] = (("--set", [shown(word) for word in args.set]), ("--only", args.only))
    for option, listed in parts:
        words += [option, *listed] if listed else []
    return words + (["--tokens", str(args.tokens)] if args.tokens is not None else [])


def _from_here(path: Path) -> str:
    """`path` as seen from the current folder; its name alone where it lies outside."""
    place = Path(os.path.normpath(Path.cwd() / path))
    try:
        return place.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return place.name
