"""`python -m sim.assumed`: do assumed low and high locality bracket what recordings give?

Each recording is held against routing that is assumed for its topology, made by families that were fitted without any
recording of its model: with the recording's own request lengths and prompts, on the same machine. Writes a table, a
page that says where the range fails, and how the families carry over to other topologies.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from sim.job.beside import baselines
from sim.job.configure import configure
from sim.job.default_trace import GeneratedTrace
from sim.job.output import write_text
from sim.job.pool import use_workers
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from sim.paths import DATA, INSTALLED
from traces.assumed.families import SETTINGS, Family, shipped_families
from traces.assumed.fit import fit_families
from traces.assumed.measure import LAGS, beyond_chance, measure, share_of_top_tenth
from traces.assumed.routing import Topology, make_routing
from traces.flags import Parser, whole
from traces.messages import PREFIX, TraceError, told
from traces.processes.ending import begin, keeping, stopped
from traces.reader import Trace, open_trace

RESIDENCIES = (0.25, 0.5, 0.75)
HISTORY = "history"
"""`adaptive` that predicts from the run's own history alone, as it does where routing is assumed."""
QUANTITIES = {
    "LRU hits": ("lru", "hits"),
    "LRU stall left": ("lru", "stall"),
    "adaptive hits": ("adaptive", "hits"),
    "adaptive stall left": ("adaptive", "stall"),
    "history hits": (HISTORY, "hits"),
    "history stall left": (HISTORY, "stall"),
}
"""What is compared: of a policy, hits as a share of accesses, or its stall as a share of on-demand's; in percent."""
TOPOLOGIES = (Topology(3, 8, 2), Topology(3, 32, 4), Topology(3, 128, 8), Topology(3, 256, 8))
OWN = DATA
"""Where the shipped ones lie."""
_OF_A_SPLIT = re.compile(r"[.-](train|eval)$")
_CARRIED_TOKENS, _CARRIED_REQUESTS = 128, 96


@dataclass(frozen=True)
class Row:
    """One quantity of one recording at one residency, in percent; assumed: at each of `SETTINGS`."""

    recording: str
    fitted_to: str
    residency: float
    quantity: str
    recorded: float
    assumed: tuple[float, ...]

    @property
    def bracketed(self) -> bool:
        """Whether the recording lies within what is assumed."""
        return min(self.assumed) <= self.recorded <= max(self.assumed)

    @property
    def off(self) -> float:
        """How far outside it lies, in points of percent; 0 within."""
        return max(min(self.assumed) - self.recorded, self.recorded - max(self.assumed), 0.0)


def recordings(folders: Sequence[Path]) -> list[Trace]:
    """The shipped recordings and those of `folders`, by name. TraceError for a folder without any."""
    paths = []
    for folder in (OWN, *folders):
        found = [path for path in sorted(folder.glob("*.safetensors")) if _OF_A_SPLIT.search(path.stem)]
        if not found and folder == OWN and INSTALLED:
            if folders:
                # Those that were named may hold them.
                continue
            raise TraceError(
                "the recordings that are compared are in the repository (traces/data), not in the installed package; "
                "name that folder"
            )
        if not found:
            raise TraceError(f"{folder}: no recording lies there; its files are named …train.safetensors or …eval")
        paths += found
    return [open_trace(path) for path in paths]


def is_to_fit(trace: Trace) -> bool:
    """Whether families may be fitted to it: what is kept to judge by says eval in its name."""
    return trace.paths[0].stem.endswith("train")


def compare(path: Path, families: Mapping[str, Family], fitted_to: str, num_tokens: int) -> list[Row]:
    """The rows of the recording at `path`, of which the first tokens are run."""
    trace = open_trace(path)
    runs = [trace, *(_assumed_like(trace, families[name], num_tokens) for name in SETTINGS)]
    rows = []
    for residency in RESIDENCIES:
        found = [_measured(one, trace.model, residency, num_tokens) for one in runs]
        for quantity in QUANTITIES:
            recorded, *assumed = (one[quantity] for one in found)
            rows.append(Row(trace.name, fitted_to, residency, quantity, recorded, tuple(assumed)))
    return rows


def _assumed_like(trace: Trace, family: Family, num_tokens: int) -> Trace:
    """Assumed routing of the recording's topology, requests and prompts."""
    starts = np.minimum(np.asarray(trace.request_start), num_tokens)
    lengths = np.diff(starts)[np.diff(starts) > 0]
    num = len(lengths)
    topology = Topology(trace.num_layers, trace.num_experts, trace.top_k)
    experts = make_routing(family, topology, lengths.tolist(), seed=0)
    arrays = {
        "experts": experts,
        "request_start": starts[: num + 1].astype(np.int64),
        "prompt_len": np.minimum(np.asarray(trace.prompt_len)[:num], lengths).astype(np.int32),
    }
    if trace.context_len is not None:
        arrays["context_len"] = np.asarray(trace.context_len)[:num]
    header = {
        "model": "assumed",
        "num_layers": str(topology.num_layers),
        "num_experts": str(topology.num_experts),
        "top_k": str(topology.top_k),
        "num_requests": str(num),
        "num_tokens": str(len(experts)),
    }
    return GeneratedTrace([Path("assumed.trace")], header, arrays)


def _measured(trace: Trace, model: str, residency: float, num_tokens: int) -> dict[str, float]:
    """Each of `QUANTITIES`, in percent."""
    name = model.removesuffix("-twin")
    words = [
        "+hardware=a100",
        "+policy=adaptive",
        f"model={name}",
        f"residency={residency}",
        f"max_tokens={num_tokens}",
    ]
    cfg = configure([*words, "compare=none"])
    work = make_workload(cfg, trace)
    run = partial(run_policy, work)
    found = {other: run(*parts) for other, parts in baselines().items()}
    found["adaptive"] = run(*make_policy(cfg["policy"], work, cfg["seed"]))
    found[HISTORY] = found["adaptive"]
    if not isinstance(trace, GeneratedTrace):
        learned = ("policy/predictor=transition", "policy.predictor.fitted_start=null", "policy.predictor.keep=0")
        alone = configure([*words, *learned])
        found[HISTORY] = run(*make_policy(alone["policy"], work, cfg["seed"]))
    return {quantity: _figure(found, *what) for quantity, what in QUANTITIES.items()}


def _figure(found: Mapping[str, Any], policy: str, what: str) -> float:
    metrics = found[policy]
    if what == "hits":
        return float(100 * metrics["num_hits"] / metrics["num_accesses"])
    return float(100 * metrics["stall_ns"] / max(found["on_demand"]["stall_ns"], 1))


# -- how families carry over ---------------------------------------------------------------------------------


def carried() -> list[dict[str, float | str]]:
    """What routing of the shipped families shows at several topologies, mean over layers."""
    rows: list[dict[str, float | str]] = []
    lengths = [_CARRIED_TOKENS] * _CARRIED_REQUESTS
    starts = np.arange(_CARRIED_REQUESTS + 1) * _CARRIED_TOKENS
    for name, family in shipped_families().items():
        for topology in TOPOLOGIES:
            experts = make_routing(family, topology, lengths, seed=1)
            seen = measure(experts, starts, topology.num_experts)
            near, far = (float(np.mean(seen.lags[LAGS.index(lag)])) for lag in (1, 32))
            rows.append(
                {
                    "setting": name,
                    "experts": f"{topology.top_k} of {topology.num_experts}",
                    "1 token": near,
                    "32 tokens": far,
                    "across requests": float(np.mean(seen.popularity)),
                    "layer before": float(np.mean(seen.depth)),
                    "overlap beyond chance": beyond_chance(experts, starts, topology.num_experts, 1),
                    "most chosen tenth": share_of_top_tenth(experts, starts, topology.num_experts),
                }
            )
    return rows


# -- the command ---------------------------------------------------------------------------------------------


def check(folders: Sequence[Path], num_tokens: int, num_jobs: int = 1) -> list[Row]:
    """Every row: each recording against families of recordings of other models. TraceError where there is none."""
    found = recordings(folders)
    jobs, rows = [], []
    families: dict[str, dict[str, Family]] = {}
    for trace in found:
        others = [one for one in found if is_to_fit(one) and one.model != trace.model]
        if not others:
            raise TraceError(f"{trace.name}: no recording of another model to fit to; name a folder that has one")
        fitted_to = ", ".join(one.name for one in others)
        if fitted_to not in families:
            families[fitted_to] = fit_families(others)
        jobs.append(delayed(compare)(trace.paths[0], families[fitted_to], fitted_to, num_tokens))
    use_workers()
    for own in Parallel(n_jobs=num_jobs, return_as="generator")(jobs):
        print(f"{own[0].recording}: {sum(row.bracketed for row in own)} of {len(own)} bracketed", flush=True)
        rows += own
    return rows


def table_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV."""
    lines = [f"recording,fitted_to,residency,quantity,recorded,{','.join(SETTINGS)},bracketed"]
    for row in rows:
        assumed = ",".join(f"{value:.3f}" for value in row.assumed)
        lines.append(
            f'{row.recording},"{row.fitted_to}",{row.residency},{row.quantity},{row.recorded:.3f},{assumed},'
            f"{str(row.bracketed).lower()}"
        )
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row], command: str, num_tokens: int) -> str:
    """The report."""
    lines = [
        "# Assumed routing against recordings",
        "",
        "Made by (`$FOLDER`: recordings that are not shipped)",
        "",
        "```sh",
        command,
        "```",
        "",
        f"Low to high brackets the recording in **{sum(row.bracketed for row in rows)} of {len(rows)}** places:",
        "",
        "| families fitted to | places | bracketed | farthest outside |",
        "|---|---|---|---|",
    ]
    for fitted_to in dict.fromkeys(row.fitted_to for row in rows):
        some = [row for row in rows if row.fitted_to == fitted_to]
        worst = max(some, key=lambda row: row.off)
        inside = sum(row.bracketed for row in some)
        lines.append(f"| {fitted_to} | {len(some)} | {inside} | {_place(worst) if worst.off else '–'} |")
    lines += [
        "",
        f"Each recording, its first {num_tokens} tokens at most, is held against routing assumed for its topology,",
        "with its request lengths and prompts, on an A100 with the eager stack. The families of a row were fitted to",
        "recordings of other models alone, and to none that is named eval: what is named eval is judged, and nothing",
        "else done with it. `adaptive` takes what each trace has for its predictor: a recorded pre-gate or a fitted",
        "network where the recording has one, the transitions of the run itself where the routing is assumed.",
        "*History* predicts from those on recordings, too: what differs then is the routing. Hits, and the share of",
        "on-demand's stall that is left, in percent.",
        "",
    ]
    for name in dict.fromkeys(row.recording for row in rows):
        own = [row for row in rows if row.recording == name]
        lines += [
            f"## {name}",
            "",
            f"Fitted to {own[0].fitted_to}; {sum(row.bracketed for row in own)} of {len(own)} bracketed.",
            "",
            "| residency | quantity | recorded | low | usual | high | |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in own:
            mark = "" if row.bracketed else f"outside by {row.off:.1f}"
            values = " | ".join(f"{value:.1f}" for value in (row.recorded, *row.assumed))
            lines.append(f"| {row.residency:.0%} | {row.quantity} | {values} | {mark} |")
        lines.append("")
    return "\n".join([*lines, *_carried_lines()]) + "\n"


def _place(row: Row) -> str:
    return f"{row.quantity} of {row.recording} at {row.residency:.0%}, by {row.off:.1f} points"


def _carried_lines() -> list[str]:
    rows = carried()
    names = list(rows[0])
    lines = [
        "## What carries over",
        "",
        "The shipped families, fitted at 4 of 32 experts, made for other topologies and measured: correlations of an",
        "expert's scores (1 and 32 tokens apart, across requests, with the best expert of the layer before), and what",
        "follows from them and the topology: overlap beyond chance, the share of the most chosen tenth of experts.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    for row in rows:
        lines.append("| " + " | ".join(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Check and write; the exit code."""
    try:
        with keeping("nothing was written; give the same command again"):
            args = _parser().parse_args(argv)
            rows = check(args.folders, args.tokens, args.jobs)
            words = " ".join(["$FOLDER"] * len(args.folders))
            command = f"python -m sim.assumed {words} --tokens {args.tokens} --out results/assumed"
            write_text(args.out / "table.csv", table_csv(rows))
            write_text(args.out / "README.md", page(rows, command.replace("  ", " "), args.tokens))
            print(f"{sum(row.bracketed for row in rows)} of {len(rows)} bracketed; written to {args.out}")
            return 0
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PREFIX}{told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return stopped(error)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m sim.assumed",
        description="Hold assumed routing against recordings: does low to high locality bracket them?",
        epilog="example:\n  python -m sim.assumed my-recordings --tokens 512 --out assumed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders with recordings, beside the shipped ones")
    parser.add_argument("--tokens", type=whole(8), default=512, help="of each recording that are run (default: 512)")
    parser.add_argument("--jobs", type=whole(1, 4096), default=1, help="processes that work at once (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write README.md and table.csv to")
    return parser


if __name__ == "__main__":
    begin()
    sys.exit(main())
