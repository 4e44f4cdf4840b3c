"""`python -m sim.bench`: speed of the simulator, as a ratio to bare SimPy timeouts of the same run.

A layer-step is one MoE layer of one forward. Machines differ and are shared, so that only ratios compare: how many
`timeout` events of SimPy one layer-step takes, by the process's own time. Both are measured in turn, and the median of
several runs counts. A generated trace, one chunk per load, batch 1, residency 0.5, nothing beside the run. `adaptive`
is run twice: where an earlier run has kept what its network says of the trace, as in a sweep, and on its own. The first
line says which core runs, compiled or in pure Python (docs/installation.md); the two have ratios of their own.

The bars are for the generated trace on an idle machine of two cores; where one is missed the exit code is 1. A trace
that is given is timed and not judged. `--check` asks another question: is any ratio worse by more than a fifth than
that of `bench.json`, which `--update` writes? `--foreign` asks a third: what do the checks around parts of others'
classes cost (`sim.bench_checks`)?
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import simpy

from expertflow.core import described, is_compiled
from expertflow.network import compiled_functions
from sim.bench_checks import BAR, measure_checks
from sim.job.configure import configure
from sim.job.errors import one_line
from sim.job.forwards import KEEP_SCORES
from sim.job.output import to_json, write_text
from sim.job.setup import Workload, make_policy, make_workload
from sim.machine.run import run_policy
from traces.batching import BatchConfig, Batches
from traces.flags import Parser, whole
from traces.jsontext import shown
from traces.messages import PREFIX, fault
from traces.reading import read_table
from traces.shipped import path_or_name

ALONE = "adaptive, alone"
BARS = {"lru": 8.0 if is_compiled() else 16.0, "adaptive": 32.0, ALONE: 32.0}
TRACE = ("trace.num_tokens=2048", "trace.num_requests=8", "trace.seed=0")
COMMITTED = Path(__file__).with_name("bench.json")
WORSE = 1.2
"""By what factor a ratio may be above the committed one."""
_TIMEOUTS = 100_000


def bare_timeout_s() -> float:
    """Seconds of this process for one event of bare SimPy: one process that does nothing but wait."""
    env = simpy.Environment()

    def wait() -> Any:
        for _ in range(_TIMEOUTS):
            yield env.timeout(1)

    env.process(wait())
    started = time.process_time()
    env.run()
    return (time.process_time() - started) / _TIMEOUTS


def layer_step_s(cfg: dict[str, Any], work: Workload) -> tuple[float, float]:
    """Seconds a layer-step, of this process and by the clock, of one run of the configured policy over `work`."""
    policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    clock, started = time.perf_counter(), time.process_time()
    metrics = run_policy(work, policy, transfer)
    seconds, elapsed = time.process_time() - started, time.perf_counter() - clock
    num = metrics["num_forwards"] * work.model.num_layers
    return seconds / num, elapsed / num


def composed(policy: str, hardware: str, trace: str | None) -> dict[str, Any]:
    """The configuration that is timed."""
    chosen = [f"+hardware={hardware}", f"+policy={policy}", "compare=none", "chunk_mib=64"]
    return configure([*chosen, *(TRACE if trace is None else (f"trace.path={trace}",))])


def measure(trace: str | None, hardware: str, repeat: int) -> dict[str, float]:
    """Print times and timeouts per layer-step; the latter."""
    found: dict[str, float] = {}
    print(described())
    print(f"{'policy':16} {'us a layer-step':>16} {'by the clock':>13} {'us a timeout':>13} {'timeouts':>9} {'bar':>4}")
    for name, bar in BARS.items():
        os.environ[KEEP_SCORES] = "0" if name == ALONE else "1"
        cfg = composed(name.partition(",")[0], hardware, trace)
        work = make_workload(cfg)
        # Not timed: files are read, functions compiled, and kept is what is to be found.
        layer_step_s(cfg, work)
        rows = []
        for _ in range(repeat):
            # Bare SimPy before and after: a neighbour's load hits both.
            before, (step, clock), after = bare_timeout_s(), layer_step_s(cfg, work), bare_timeout_s()
            bare = (before + after) / 2
            rows.append((step / bare, step, clock, bare))
        ratio, step, clock, bare = sorted(rows)[len(rows) // 2]
        found[name] = ratio
        told = f"{step * 1e6:16.2f} {clock * 1e6:13.2f} {bare * 1e6:13.3f} {ratio:9.1f}"
        judged = "   –" if trace else f" {bar:3.0f}{'' if ratio <= bar else '  missed'}"
        print(f"{name:16} {told} {judged}")
    return found


def compare_length(trace: str | None, hardware: str) -> None:
    """Print time and memory at a tenth of the tokens and at all of them."""
    cfg = composed("adaptive", hardware, trace)
    work = make_workload(cfg)
    tokens = work.batches.num_tokens
    short = replace(work, batches=Batches(work.trace, BatchConfig(max_tokens=max(tokens // 10, 1))))
    layer_step_s(cfg, short)
    rows = []
    for one in (short, work):
        ratio = layer_step_s(cfg, one)[0] / bare_timeout_s()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows.append((one.batches.num_tokens, ratio, peak / 1024))
    (few, few_ratio, few_mib), (tokens, ratio, mib) = rows
    print(
        f"{ALONE}: {tokens / few:.1f} times the tokens ({few} to {tokens}) take {ratio / few_ratio:.2f} times the time "
        f"per token and {mib - few_mib:.0f} MiB more, {mib:.0f} MiB in all"
    )


def read_ratios(path: Path) -> dict[str, dict[str, float]]:
    """The ratios of a file such as `bench.json`, by core. TraceError names file and key of what is none."""
    remedy = "write it with python -m sim.bench --update"
    found: dict[str, dict[str, float]] = {}
    for core, ratios in read_table(path, remedy).items():
        if not isinstance(ratios, dict):
            raise fault(path, core, f"is {shown(ratios)}, no table of ratios", remedy)
        for name, ratio in ratios.items():
            if type(ratio) not in (int, float) or not 0 < ratio < 1e6:
                raise fault(path, f"{core}, {name}", f"is {shown(ratio)}, no ratio above 0", remedy)
        found[core] = {name: float(ratio) for name, ratio in ratios.items()}
    return found


def worse_than(committed: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """One line for each ratio that is worse than the committed one by more than `WORSE`, or has none."""
    return [
        f"{name}: {ratio:.1f} timeouts a layer-step, {committed[name]:.1f} committed"
        if name in committed
        else f"{name}: nothing committed"
        for name, ratio in found.items()
        if name not in committed or ratio > WORSE * committed[name]
    ]


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(prog="python -m sim.bench", description=__doc__)
    parser.add_argument("trace", nargs="?", help="a trace, or a recording's short name, of which --check knows nothing")
    parser.add_argument("--hardware", default="a100")
    parser.add_argument(
        "--repeat", type=whole(1, 10_000), default=5, help="runs a policy; the median counts (default: 5)"
    )
    parser.add_argument("--check", action="store_true", help=f"compare with {COMMITTED.name}")
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED.name}")
    parser.add_argument("--foreign", action="store_true", help="only what the checks around parts of others cost")
    args = parser.parse_args(words)
    if args.foreign and (args.trace is not None or args.check or args.update):
        parser.error("--foreign runs over a trace of its own and compares with nothing that is committed")
    if args.trace is not None and (args.check or args.update):
        parser.error(f"{COMMITTED.name} is of the generated trace: leave {args.trace} out")
    trace = path_or_name(args.trace) if args.trace else None
    before = {name: os.environ.get(name) for name in (KEEP_SCORES, "XDG_CACHE_HOME")}
    # Compiled code stays where it is; what this run keeps goes with it.
    compiled_functions()
    try:
        committed = read_ratios(COMMITTED) if args.check or args.update else {}
        with tempfile.TemporaryDirectory(prefix="expertflow-") as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            if args.foreign:
                os.environ[KEEP_SCORES] = "0"
                return int(any(share > BAR for share in measure_checks(args.hardware, args.repeat).values()))
            found = measure(trace, args.hardware, args.repeat)
            compare_length(trace, args.hardware)
        if args.update:
            rounded = {name: round(ratio, 1) for name, ratio in found.items()}
            committed |= {described(): rounded}
            write_text(COMMITTED, to_json(committed))
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PREFIX}{one_line(error)}", file=sys.stderr)
        return 2
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if not args.check:
        return 0 if trace else int(any(ratio > BARS[name] for name, ratio in found.items()))
    worse = worse_than(committed.get(described(), {}), found)
    for line in worse:
        print(f"worse by more than a fifth: {line}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
