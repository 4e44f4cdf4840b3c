"""`python -m replay.validate NAME`: is the simulator right about this machine?

Calibrates (or takes a record that is there), then simulates and replays the same trace for every policy, capacity and
batch size, again and again, checks stamps and lockstep on the side, and writes everything to results/validation-NAME: a
table, errors beside the noise of what they were measured against, rank agreement, a plot of predicted against measured,
and both timelines in one Perfetto file. What is finished is kept at once; what the time does not suffice for is left
out and said. On a GPU `--minutes 6` needs no other flag.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from replay.calibrate import check_name
from replay.calibration.words import HOST
from replay.gc_pause import keep_loaded
from replay.keys import MACHINES
from replay.packages import asked_for_by
from replay.validation.folder import check_own
from replay.validation.plan import MODELS, PLACED, POLICIES, SAMPLED_STACKS, SHORT_MINUTES, STACKS, Asked, tokens_for
from replay.validation.words import check_named, names, numbers, policies
from sim.job.keys import STARTS
from sim.job.run_cli import run_cli
from sim.paths import add_config_dir, use_own_folder
from sim.specs.hardware import LEAST_GB_PER_S
from traces.flags import Parser, number, whole
from traces.processes.locks import locked_folder
from traces.processes.whole import clear

STAMPED_EXECUTIONS = {"cuda": 1e6, "cpu": 0.0}


def parser() -> argparse.ArgumentParser:
    """The command line. What is not given depends on the machine: see `with_defaults`."""
    made = Parser(prog="python -m replay.validate", description=__doc__)
    made.add_argument("name", help="what to call this machine: results/validation-NAME")
    made.add_argument("--machine", default="auto", choices=MACHINES)
    made.add_argument("--models", help="default: gpt-oss-20b, on a GPU then deepseek-v2-lite")
    made.add_argument(
        "--policies",
        help="POLICY, or POLICY+PLACE for one whose experts the host computes where that place says (default: "
        f"{','.join(POLICIES)}, on a CPU {','.join(PLACED['cpu'])} as well)",
    )
    made.add_argument("--host", help=f"of policies with a place: a file of conf/host (default: {HOST})")
    made.add_argument("--residency", default="0.25,0.5")
    made.add_argument("--batch-sizes", default="1,8")
    made.add_argument(
        "--stacks",
        help="default: on a GPU graph and found, and eager for lru and adaptive at 50 %%; on a CPU eager and found",
    )
    made.add_argument("--tokens", type=whole(1, 1_000_000), help="of each run (default: by the minutes)")
    made.add_argument(
        "--repeat", type=whole(1, 10_000), default=3, help="replays of each case (default: 3); one judges nothing"
    )
    made.add_argument(
        "--beside",
        action=argparse.BooleanOptionalAction,
        help="measure the host's costs anew beside each replay (default: on a GPU)",
    )
    made.add_argument("--trace", type=Path, help="a recorded trace (default: the generated one)")
    made.add_argument("--start", choices=STARTS, help="what the cache holds at first (default: as python -m sim)")
    made.add_argument(
        "--minutes",
        type=number(0, 1e6),
        default=8.0,
        help="no replay begins that would end later; calibrating, a minute or more, takes what it takes (default: 8)",
    )
    made.add_argument("--calibration", type=Path, help="a record that is there, in place of a new calibration")
    made.add_argument("--hardware", help="profile whose link a CPU machine keeps pace with (default: a100)")
    made.add_argument(
        "--throttle",
        type=number(LEAST_GB_PER_S, 1e6),
        metavar="GB/s",
        help="another pace for it, at the experts' scale",
    )
    made.add_argument(
        "--scale", type=whole(1, 1024), help="divide the models' widths (default: 1 on a GPU, 16 on a CPU)"
    )
    made.add_argument("--host-memory-gb", type=number(0, 1e6, above=True))
    made.add_argument(
        "--storage", help="experts lie on this storage, below --host-memory-gb of host memory; of a CPU machine"
    )
    made.add_argument(
        "--verify-executions",
        type=number(0, 1e18),
        help="expert executions to check at least, in a sixth of the time at most (default: on a GPU 1e6)",
    )
    made.add_argument("--verify-tokens", type=whole(1, 1_000_000), default=1024)
    made.add_argument("--log-tokens", type=whole(1, 1_000_000), default=32, help="of each policy's lockstep log")
    made.add_argument(
        "--quick", action="store_true", help=f"a short calibration (so it is below {SHORT_MINUTES:.0f} minutes)"
    )
    made.add_argument("--out", type=Path, help="default: results/validation-NAME")
    add_config_dir(made)
    return made


def with_defaults(args: argparse.Namespace, world: str) -> Asked:
    """Fill in what was not given for a machine of `world` (cuda or cpu); the cases that are asked for."""
    _check_pairs(args)
    _check_storage(args, world)
    args.hardware = "a100" if args.hardware is None else args.hardware
    args.models = list(MODELS[world]) if args.models is None else names("--models", args.models, "model")
    args.beside = world == "cuda" if args.beside is None else args.beside
    args.tokens = tokens_for(world, args.minutes) if args.tokens is None else args.tokens
    args.quick = args.quick or args.minutes < SHORT_MINUTES
    if args.verify_executions is None:
        args.verify_executions = STAMPED_EXECUTIONS[world]
    residencies = [float(share) for share in numbers("--residency", args.residency, float)]
    batch_sizes = [int(size) for size in numbers("--batch-sizes", args.batch_sizes, int)]
    if not all(0 < share <= 1 for share in residencies):
        raise ValueError(f"--residency={args.residency} must be shares in (0, 1]")
    if min(batch_sizes) < 1:
        raise ValueError(f"--batch-sizes={args.batch_sizes} must be at least 1")
    if args.trace is not None and not args.trace.is_file():
        raise ValueError(f"--trace={args.trace} is no file")
    args.policies = ",".join([*POLICIES, *PLACED[world]]) if args.policies is None else args.policies
    if args.host is not None and "+" not in args.policies:
        raise ValueError(
            f"--host={args.host} is of policies with a place, and --policies names none; give POLICY+PLACE"
        )
    args.host = HOST if args.host is None else args.host
    for flag, group in (("hardware", "hardware"), ("host", "host"), ("storage", "storage")):
        if getattr(args, flag) is not None:
            check_named(f"--{flag}=", getattr(args, flag), group)
    return Asked(
        policies("--policies", args.policies),
        list(dict.fromkeys(residencies)),
        list(dict.fromkeys(batch_sizes)),
        STACKS[world] if args.stacks is None else names("--stacks", args.stacks, "stack"),
        SAMPLED_STACKS[world] if args.stacks is None else (),
    )


def _check_pairs(args: argparse.Namespace) -> None:
    """ValueError for two flags of which one would be ignored."""
    if args.throttle is not None and args.hardware is not None:
        raise ValueError(f"--throttle={args.throttle} and --hardware={args.hardware} both give the pace; leave one out")
    if args.calibration is not None and args.quick:
        raise ValueError(f"--quick is of a new calibration, and --calibration={args.calibration} is one; leave one out")


def _check_storage(args: argparse.Namespace, world: str) -> None:
    """ValueError for storage without host memory above it, or on a machine that has none."""
    if args.storage is None:
        return
    if world != "cpu":
        raise ValueError(f"--storage={args.storage} is of a CPU machine; add --machine cpu, or leave it out")
    if args.host_memory_gb is None:
        raise ValueError(f"--storage={args.storage} needs the host memory above it; add --host-memory-gb GB")
    if args.verify_executions:
        raise ValueError(f"--verify-executions={args.verify_executions:g}: stamps know no storage; leave it out")


def main(words: list[str] | None = None) -> int:
    """Command line; 1 if the simulator is not shown to be right, 2 on a user's error, 3 if the device is lost."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    args.words, args.begun = words, False
    return run_cli(lambda: _validate(args), lambda: _kept(args))


def _kept(args: argparse.Namespace) -> str:
    """What is said of a validation that is told to stop."""
    table = _folder_of(args) / "table.csv"
    if not args.begun or not table.exists():
        return "nothing was measured yet; give the same command again"
    return f"finished rows are kept in {table}; the same command begins anew"


def _folder_of(args: argparse.Namespace) -> Path:
    out: Path | None = args.out
    return out or Path("results") / f"validation-{args.name}"


def _validate(args: argparse.Namespace) -> int:
    with asked_for_by("python -m replay.validate"):
        from replay.machine.rig import choose_machine
    use_own_folder(args.config_dir)
    check_name(args.name)
    machine = choose_machine(args.machine)
    asked = with_defaults(args, machine)
    out = _folder_of(args)
    check_own(out, args.name)
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out):
        check_own(out, args.name)
        clear(out)
        return _measure(args, asked, machine, out)


def _measure(args: argparse.Namespace, asked: Asked, machine: str, out: Path) -> int:
    from replay.calibration.record import scale_of
    from replay.machine.rig import make_device
    from replay.validation.session import Validation
    from replay.validation.workbench import pace_gb_per_s

    scale = args.scale = scale_of(args.scale, machine)
    pace = args.throttle if args.throttle is not None or machine == "cuda" else pace_gb_per_s(args.hardware, scale)
    device = make_device(machine, pace)
    keep_loaded()
    try:
        summary = Validation(args, asked, device, out).run()
    finally:
        device.close()
    print((out / "README.md").read_text(encoding="utf-8"))
    print(f"{'NOT shown' if summary['not_shown'] else 'Shown'}: {summary['judged']['quote']}")
    for reason in summary["not_shown"]:
        print(f"not shown: {reason}")
    return 1 if summary["not_shown"] else 0


if __name__ == "__main__":
    sys.exit(main())
