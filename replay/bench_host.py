"""`python -m replay.bench_host [TRACE]`: what a layer costs the host of a replay, the policy's own code apart.

The runtime, the machine and `replay.machine.cuda` run as on a GPU, but every call of the driver is one of an empty
function: what remains is Python, and how many calls a driver would get is counted beside it. All that was launched or
copied has ended at once, so the host never waits. Measured are, for each layer-step (one MoE layer of one forward):
from the moment at which the number of the gate is seen to the return of the experts' launch, which the device waits
for; all else of it, which the device can hide; in a run with copies what each chunk adds; and in one whose host
computes what is not resident (`policy/place=cheaper`) what each host task adds, for which there is no bar.

Bars, in us of Python: 15, 25, and 8 a chunk. Exit code: 0 they hold, 1 one does not, 2 a user's error in one line.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from replay.packages import asked_for_by
from sim.job.run_cli import run_cli
from traces.flags import Parser, whole
from traces.help_text import Wrapped
from traces.shipped import path_or_name

BARS_US = {"seen to launched": 15.0, "all else": 25.0, "a chunk": 8.0}


def measure(words: Sequence[str], repeat: int) -> dict[str, dict[str, float]]:
    """Medians over `repeat` runs, by what the time is spent on: us of Python, and calls of the driver."""
    with asked_for_by("python -m replay.bench_host"):
        from replay.host_times import HostTimes
    resident = ["residency=1.0", "start=resident", "+policy=lru", *words]
    copying = ["residency=0.5", "+policy=lru", *words]
    hosting = ["residency=0.5", "+policy=lru", "+policy/place=cheaper", "+host=server", *words]
    seen, rest, chunk, task = [], [], [], []
    for _ in range(repeat):
        without, timed, with_copies = HostTimes(resident), HostTimes(resident, timed_policy=True), HostTimes(copying)
        policy_ns = timed.policy_ns / timed.num_layers
        launched = statistics.median(without.launched_ns) - policy_ns
        seen.append(launched)
        rest.append(without.total_ns / without.num_layers - statistics.mean(without.launched_ns))
        timed = HostTimes(copying, timed_policy=True)
        more = with_copies.total_ns / with_copies.num_layers - without.total_ns / without.num_layers
        more -= timed.policy_ns / timed.num_layers - policy_ns
        chunk.append(more * with_copies.num_layers / with_copies.num_chunks)
        hosted, timed = HostTimes(hosting), HostTimes(hosting, timed_policy=True)
        more = hosted.total_ns / hosted.num_layers - without.total_ns / without.num_layers
        more -= timed.policy_ns / timed.num_layers - policy_ns
        task.append(more * hosted.num_layers / hosted.num_tasks)
    calls = [HostTimes(given, counting=True) for given in (resident, copying)]
    per_layer = {name: count / calls[0].num_layers for name, count in calls[0].calls.items()}
    added = {
        name: (count / calls[1].num_layers - per_layer.get(name, 0)) * calls[1].num_layers / calls[1].num_chunks
        for name, count in calls[1].calls.items()
    }
    return {
        "seen to launched": {"us": statistics.median(seen) / 1e3},
        "all else": {"us": statistics.median(rest) / 1e3},
        "a chunk": {"us": statistics.median(chunk) / 1e3},
        "a host task": {"us": statistics.median(task) / 1e3},
        "calls a layer-step": per_layer,
        "calls a chunk": added,
    }


def _print(found: dict[str, dict[str, float]]) -> bool:
    good = True
    print("Python time of runtime and machine, the policy apart, in us")
    for name, bar in BARS_US.items():
        holds = found[name]["us"] <= bar
        good &= holds
        print(f"  {name:18} {found[name]['us']:6.1f}   bar {bar:4.0f}: {'holds' if holds else 'missed'}")
    print(f"  {'a host task':18} {found['a host task']['us']:6.1f}")
    for name in ("calls a layer-step", "calls a chunk"):
        calls = ", ".join(f"{kind} {count:.2f}" for kind, count in sorted(found[name].items()))
        print(f"  driver {name}: {calls}")
    return good


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(prog="python -m replay.bench_host", description=__doc__, formatter_class=Wrapped)
    parser.add_argument("trace", nargs="?", help="a recorded trace, or its short name (default: the generated one)")
    parser.add_argument("--tokens", type=whole(1, 1_000_000), default=48, help="of the trace to run (default: 48)")
    parser.add_argument(
        "--repeat", type=whole(1, 10_000), default=5, help="runs of each kind; medians count (default: 5)"
    )
    args = parser.parse_args(words)
    given = (
        [f"trace.path={path_or_name(args.trace)}", f"max_tokens={args.tokens}"]
        if args.trace
        else [f"trace.num_tokens={args.tokens}", "trace.num_requests=1"]
    )
    return run_cli(lambda: 0 if _print(measure(given, args.repeat)) else 1, "nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
