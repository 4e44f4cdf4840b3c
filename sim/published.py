"""`python -m sim.published FILE --out FOLDER`: seconds that others have measured, beside what a simulation says.

The file lists groups of cases: a source, what was assumed, the words of `python -m sim`, and rows of what was measured.
A group may solve its stack from one figure (`stack.resident_tpot_ms` among its words); that figure's own row `fits`,
and counts for nothing. Everything else comes from what is shipped. Writes `table.csv` and `README.md`.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from joblib import Parallel, delayed

from expertflow.keys import Rule, check_fields, from_mapping, plain
from sim.execute import run_job
from sim.job.configure import configure
from sim.job.errors import one_line
from sim.job.output import write_text
from sim.job.pool import use_workers
from sim.job.run_cli import run_cli
from sim.job.setup import make_workload
from traces.flags import Parser, whole
from traces.messages import fault
from traces.processes.ending import begin
from traces.yamltext import read_yaml

QUANTITIES = {
    "tok/s": "requests at once over the mean TPOT",
    "ms": "mean TPOT",
    "tok/s in all": "tokens that came out over the whole time, prompts included",
    "prefill tok/s": "tokens of the prompts over the time to the first token",
    "hits %": "share of the demanded experts that are in GPU memory",
}
"""What is compared, and how the simulation's figure is made."""
FITTED, BLIND = "fitted", "blind"
_REMEDY = "correct the file: docs/studies.md says what it holds"
_ALONE = "compare=none"


@dataclass(frozen=True)
class Group:
    """Cases of one source. words: of every row. unknown: what the source does not say, and what is taken for it."""

    name: Annotated[str, Rule(about="of the group, in the table")]
    source: Annotated[str, Rule(about="public repository and thread, or page")]
    setting: Annotated[str, Rule(about="what was run, in the words of the source")]
    assumed: Annotated[str, Rule(about="what the source does not say, and what is taken for it")]
    words: Annotated[Sequence[str], Rule(extra="a list of words", about="of python -m sim, for every row")]
    rows: Annotated[Sequence[Mapping[str, Any]], Rule(extra="a list of tables", about="what was measured")]
    quantity: Annotated[str, Rule(choices=tuple(QUANTITIES), about="what was measured")] = "tok/s"
    why: Annotated[
        str | None,
        Rule(null="nothing to say", about="of the errors: what the simulation lacks, or what nobody has said"),
    ] = None


@dataclass(frozen=True)
class Row:
    """One figure. words: beside the group's. over: it is a ratio. fits: the group's stack is solved from it."""

    name: Annotated[str, Rule(about="of the row, in the table")]
    measured: Annotated[float, Rule(0, 1e9, above=True, about="as published")]
    words: Annotated[Sequence[str], Rule(extra="a list of words", about="of python -m sim, beside the group's")] = ()
    to: Annotated[
        float | None, Rule(0, 1e9, above=True, null="one figure", about="the upper end, where a range is published")
    ] = None
    over: Annotated[
        str | None,
        Rule(null="the figure itself", about="an earlier row of the group: what is compared is the ratio to it"),
    ] = None
    fits: Annotated[bool, Rule(about="the group's stack is solved from this figure, which then counts for nothing")] = (
        False
    )


@dataclass(frozen=True)
class Found:
    """One line of the table. measured, predicted: in the quantity's unit. error: predicted / measured - 1, of a range
    from its nearer end, 0 within. low, high: predicted at the ends of assumed routing, where its locality is open."""

    group: str
    row: str
    quantity: str
    measured: float
    measured_to: float | None
    predicted: float
    low: float | None
    high: float | None
    error: float
    kind: str
    counts: bool
    command: str


def read_cases(path: Path) -> list[tuple[Group, list[Row]]]:
    """The groups of a file with their rows. ValueError, one line, for what is none."""
    table = read_yaml(path, _REMEDY)
    groups = table.get("groups")
    if set(table) != {"groups"} or not isinstance(groups, list) or not groups:
        raise fault(path, "file", "must hold `groups`, a list of tables, and nothing else", _REMEDY)
    found = []
    for number, given in enumerate(groups, start=1):
        where = f"groups[{number}]"
        group = _made(path, where, Group, given)
        rows = [_made(path, f"{where}.rows[{place}]", Row, row) for place, row in enumerate(group.rows, start=1)]
        if not rows:
            raise fault(path, where, "has no rows", _REMEDY)
        for place, row in enumerate(rows):
            if row.over is not None and row.over not in [before.name for before in rows[:place]]:
                told = f"over={plain(row.over, 60)} is no earlier row"
                raise fault(path, f"{where}.rows[{place + 1}]", told, _REMEDY)
        found.append((group, rows))
    return found


def _made(path: Path, where: str, kind: Any, given: Any) -> Any:
    """A group or row of its table, every value checked."""
    if not isinstance(given, dict):
        raise fault(path, where, "must be a table", _REMEDY)
    for key in ("words", "rows"):
        value = given.get(key, [])
        of = str if key == "words" else dict
        if not isinstance(value, list) or not all(isinstance(one, of) for one in value):
            raise fault(path, where, f"{key} must be a list of {'texts' if of is str else 'tables'}", _REMEDY)
    try:
        made = from_mapping(kind, given, "case")
        check_fields(made, "case")
    except ValueError as error:
        raise fault(path, where, plain(str(error), 150), _REMEDY) from None
    return made


def run_cases(cases: Sequence[tuple[Group, Sequence[Row]]], num_jobs: int) -> list[Found]:
    """Every row, simulated, in order. ValueError that names the row for what cannot be run."""
    use_workers()
    tasks = [(group, row, [*group.words, *row.words]) for group, rows in cases for row in rows]
    solved = _solved([(group, words) for group, row, words in tasks if row.fits])
    for group, row, words in tasks:
        # What the row says itself is stronger.
        if not row.fits and not any(word.startswith("stack.resident_tpot_ms=") for word in words):
            words += solved.get(group.name, [])
    outcomes = Parallel(n_jobs=num_jobs)(delayed(_attempt)(group.quantity, words) for group, _, words in tasks)
    found: list[Found] = []
    for (group, row, words), outcome in zip(tasks, outcomes, strict=True):
        if isinstance(outcome, str):
            raise ValueError(f"{plain(group.name, 60)}, {plain(row.name, 60)}: {outcome}")
        if row.over is not None:
            base = next(line.predicted for line in found if (line.group, line.row) == (group.name, row.over))
            outcome = (outcome[0] / base, None, None)
        fitted = any(of is group and one.fits for of, one, _ in tasks)
        found.append(_line(group, row, words, FITTED if fitted else BLIND, *outcome))
    return found


def _solved(tasks: Iterable[tuple[Group, Sequence[str]]]) -> dict[str, list[str]]:
    """Of each group with a row that fits: the words that give the others the stack that was solved from it."""
    found = {}
    for group, words in tasks:
        cfg = configure([*words, _ALONE])
        told = run_job(cfg, make_workload(cfg), None).get("stack_solved")
        if not told:
            raise ValueError(f"{plain(group.name, 60)}: a row that fits needs stack.resident_tpot_ms among its words")
        keys = ("layer_overhead_ns", "head_overhead_ns")
        found[group.name] = [f"stack.{key}={told[key]}" for key in keys]
    return found


def _attempt(quantity: str, words: Sequence[str]) -> tuple[float, float | None, float | None] | str:
    """The figure, and its ends where routing is assumed and nothing said of its locality; a user's error as a line."""
    try:
        cfg = configure([*words, _ALONE])
        work = make_workload(cfg)
        metrics = run_job(cfg, work, None)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        return line
    ends = (metrics.get("assumed") or {}).get("range")
    if not ends or quantity == "prefill tok/s":
        return figure(metrics, quantity, cfg["batch_size"]), None, None
    figures = [figure(one, quantity, cfg["batch_size"]) for one in (metrics, *ends.values())]
    return figures[0], min(figures), max(figures)


def figure(metrics: Mapping[str, Any], quantity: str, batch_size: int = 1) -> float:
    """The quantity of a run's metrics, of so many requests at once. ValueError where the run has none, as requests of
    one token have no TPOT."""
    if quantity == "tok/s in all":
        return float(metrics["tokens_per_s"])
    if quantity == "hits %":
        return 100.0 * float(metrics["num_hits"] / metrics["num_accesses"])
    key = "ttft_ms" if quantity == "prefill tok/s" else "tpot_ms"
    mean = metrics[key]["mean"]
    if not mean:
        raise ValueError(f"{quantity} cannot be told: the run has no {key}; it needs longer requests")
    if quantity == "prefill tok/s":
        return 1000.0 * prompt_tokens(metrics) / float(mean)
    return float(mean) if quantity == "ms" else 1000.0 * batch_size / float(mean)


def prompt_tokens(metrics: Mapping[str, Any]) -> float:
    """Tokens of a request's prompt: those of the trace that did not come out, over its requests."""
    trace = metrics["trace"]
    return float((trace["num_tokens"] - metrics["num_tokens"]) / trace["num_requests"])


def _line(
    group: Group,
    row: Row,
    words: Sequence[str],
    kind: str,
    predicted: float,
    low: float | None,
    high: float | None,
) -> Found:
    return Found(
        group=group.name,
        row=row.name,
        quantity=group.quantity if row.over is None else f"x {row.over}",
        measured=row.measured,
        measured_to=row.to,
        predicted=predicted,
        low=low,
        high=high,
        error=error_of(row, predicted),
        kind=kind,
        counts=not row.fits,
        command=f"python -m sim {shlex.join(words)} {_ALONE}",
    )


def error_of(row: Row, predicted: float) -> float:
    """predicted / measured - 1; of a range, from the end that is nearer, 0 within."""
    nearest = min(max(predicted, row.measured), row.to or row.measured)
    return predicted / nearest - 1.0


def medians(found: Iterable[Found]) -> dict[str, tuple[int, float]]:
    """Of each kind that has rows: how many count, and the median of their errors' size."""
    by_kind: dict[str, list[float]] = {}
    for line in found:
        if line.counts:
            by_kind.setdefault(line.kind, []).append(abs(line.error))
    return {kind: (len(errors), statistics.median(errors)) for kind, errors in by_kind.items()}


def write(folder: Path, cases: Sequence[tuple[Group, Sequence[Row]]], found: Sequence[Found], command: str) -> None:
    """`table.csv`, a line a row, and `README.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Found)], lineterminator="\n")
    writer.writeheader()
    for line in found:
        writer.writerow(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(line).items()}
        )
    write_text(folder / "table.csv", text.getvalue())
    write_text(folder / "README.md", page(cases, found, command))


def page(cases: Sequence[tuple[Group, Sequence[Row]]], found: Sequence[Found], command: str) -> str:
    """The page: the medians, the table, and of each group its source, setting, assumptions, command and misses."""
    lines = [
        "# Published seconds, predicted",
        "",
        "What others measured with real engines, and what this simulation says of the same setting. The error is that",
        "of the simulated figure. *Fitted*: one published figure with all experts resident says what the stack takes",
        "(`stack.resident_tpot_ms`); its own row does not count. *Blind*: nothing is fitted: shipped profiles,",
        "what the source says of its machine (the rate of a link, of a memory), and assumptions. No key was chosen by",
        "the figure that it predicts. *Range*: from low to high locality, where routing is assumed and its reuse not",
        "known.",
        "",
        "```sh",
        command,
        "```",
        "",
        *(
            f"**{kind.capitalize()}: median error {100 * median:.0f} %** over {number} rows."
            for kind, (number, median) in medians(found).items()
        ),
        "",
        "| case | | errors, row by row |",
        "|---|---|---|",
        *(_summary(group, [line for line in found if line.group == group.name]) for group, _ in cases),
        "",
        "All columns, and the command of every row: `table.csv`.",
        "",
    ]
    for group, _ in cases:
        lines += _about(group, [line for line in found if line.group == group.name])
    return "\n".join(lines).rstrip() + "\n"


def _summary(group: Group, found: Sequence[Found]) -> str:
    told = ", ".join(_told(line) for line in found)
    return f"| {group.name} | {found[0].kind} | {told} |"


def _about(group: Group, found: Sequence[Found]) -> list[str]:
    """Of a group its source, table, setting, assumptions, what is behind its errors, and a command."""
    meaning = QUANTITIES[group.quantity]
    lines = [
        f"## {group.name}",
        "",
        *_wrapped("", f"Source: {group.source}. {found[0].kind.capitalize()}; {group.quantity} = {meaning}."),
        "",
        "| row | measured | simulated | range | error |",
        "|---|---|---|---|---|",
        *map(_table_line, found),
        "",
        *_wrapped("- ", f"Setting: {group.setting}"),
        *_wrapped("- ", f"Assumed: {group.assumed}"),
        *(_wrapped("- ", f"Errors: {group.why}") if group.why else []),
        "",
        "```sh",
        *_broken(found[-1].command),
        "```",
        "",
    ]
    return lines


def _wrapped(bullet: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False)


def _broken(command: str) -> list[str]:
    """A command in lines that a shell joins again."""
    lines = textwrap.wrap(command, 112, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _table_line(line: Found) -> str:
    measured = f"{line.measured:g}" + (f"–{line.measured_to:g}" if line.measured_to else "")
    open_ended = line.low is not None and line.high is not None and _short(line.low) != _short(line.high)
    span = f"{_short(line.low)}–{_short(line.high)}" if open_ended and line.low and line.high else ""
    unit = "" if not line.quantity.startswith("x ") else f" ({line.quantity})"
    return f"| {' | '.join((line.row + unit, measured, _short(line.predicted), span, _told(line)))} |"


def _told(line: Found) -> str:
    return f"{100 * line.error:+.0f} %" if line.counts else "fits"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def publish(args: argparse.Namespace) -> None:
    """The command: read, run, write, and say the medians."""
    cases = read_cases(args.cases)
    found = run_cases(cases, args.jobs)
    command = f"python -m sim.published {args.cases} --out {args.out}"
    write(args.out, cases, found, command)
    for kind, (number, median) in medians(found).items():
        print(f"{kind}: median error {100 * median:.1f} % over {number} rows")
    print(f"written to {args.out}")


def cli(words: list[str] | None = None) -> int:
    """Command line; exit code 2 and one line for a user's error."""
    parser = Parser(
        prog="python -m sim.published",
        description=__doc__,
        epilog="example: python -m sim.published results/published/cases.yaml --out results/published",
    )
    parser.add_argument("cases", type=Path, help="a YAML file of cases")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--jobs", type=whole(-1, 1024), default=1, help="processes (default: 1; -1: one a core)")
    args = parser.parse_args(words)
    return run_cli(lambda: publish(args), "nothing was written; give the same command again")


if __name__ == "__main__":
    begin()
    raise SystemExit(cli())
