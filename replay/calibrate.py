"""`python -m replay.calibrate NAME`: measure this machine, for `+hardware=NAME stack=NAME` in simulations.

Device times are taken with the host far ahead of the device: copies by size, pinned and pageable, in one and several
chunks, beside idle and busy compute; memory bandwidth and matrix rate; every kernel of the models' shapes as a run
launches it, by number of experts and tokens, beside an idle and a busy link. Host times are taken in place, in short
replays of each policy, with their spread, and a fixed loop is timed before, between and after: a host that changes its
speed shows. A figure that cannot be is refused. Writes hardware/NAME.yaml, the raw record beside it, and
stack/NAME.yaml into the folder of --config-dir (in a checkout, by default, conf/), and prints each figure beside the
datasheet's and the last calibration's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from replay.calibration.compared import print_beside
from replay.calibration.words import HOST, policy_words
from replay.gc_pause import keep_loaded
from replay.keys import MACHINES
from replay.packages import asked_for_by, copies_note
from sim.job.configure import configure
from sim.job.output import provenance
from sim.job.run_cli import run_cli
from sim.paths import CONF, add_config_dir, folder_to_write, resolved
from sim.specs.hardware import LEAST_GB_PER_S
from traces.flags import Parser, number, whole
from traces.processes.locks import locked
from traces.tables import console_for_tables
from traces.yamltext import read_yaml

POLICIES = ("lru", "adaptive")
MODELS = ("gpt-oss-20b",)


def check_name(name: str) -> str:
    """A name that may stand for a file of conf/hardware."""
    if not name.replace("-", "").replace("_", "").isalnum() or name in ("local", "auto"):
        raise ValueError(f"NAME={name!r} must be letters, digits, - and _, and not local or auto")
    return name


def check_free(name: str, folder: Path) -> None:
    """ValueError if `name` stands for a profile in `folder` that no calibration has written, or for a shipped one."""
    record = folder / "hardware" / f"{name}.calibration.json"
    names = [f"{kind}/{name}.yaml" for kind in ("hardware", "stack")]
    shipped = resolved(folder) != CONF and any((CONF / path).exists() for path in names)
    if shipped or (not record.exists() and any((folder / path).exists() for path in names)):
        raise ValueError(
            f"NAME={name!r} is a profile that was not measured here, and would be overwritten; choose "
            f"another name, such as {name}-measured"
        )


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(prog="python -m replay.calibrate", description=__doc__)
    parser.add_argument("name", help="what to call this machine: +hardware=NAME")
    parser.add_argument("--machine", default="auto", choices=MACHINES)
    parser.add_argument("--models", default=",".join(MODELS), help="whose kernels are measured (default: %(default)s)")
    parser.add_argument("--policies", default=",".join(POLICIES), help="whose host time is (default: %(default)s)")
    parser.add_argument(
        "--scale", type=whole(1, 1024), help="divide the models' widths (default: 1 on a GPU, 16 on a CPU)"
    )
    parser.add_argument(
        "--throttle", type=number(LEAST_GB_PER_S, 1e6), metavar="GB/s", help="pace of the CPU machine's link"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    add_config_dir(parser)
    args = parser.parse_args(words)
    given = sys.argv[1:] if words is None else words
    return run_cli(lambda: _calibrate(args, given), "no profile was written; give the same command again")


def _calibrate(args: argparse.Namespace, words: list[str]) -> None:
    name = check_name(args.name)
    folder = folder_to_write(args.config_dir)
    check_free(name, folder)
    with locked(folder / f".{name}.lock", f"the profile {name}"):
        _measure(args, words, name, folder)


def _measure(args: argparse.Namespace, words: list[str], name: str, folder: Path) -> None:
    with asked_for_by("python -m replay.calibrate"):
        from replay.calibration.profile import profiles
        from replay.calibration.record import calibrate, named_model, scale_of, write_profile
        from replay.machine.rig import choose_machine, make_device
    policies, models = args.policies.split(","), args.models.split(",")
    for policy in policies:
        configure(["+hardware=a100", f"+host={HOST}", *policy_words(policy)])
    for model in models:
        named_model(model)
    machine = choose_machine(args.machine)
    scale = scale_of(args.scale, machine)
    device = make_device(machine, args.throttle)
    keep_loaded()
    try:
        raw = calibrate(device, models, policies, scale, quick=args.quick)
    finally:
        device.close()
    raw["provenance"] = provenance(words, "", 0.0, "replay")
    last: dict[str, Any] = {}
    for there in (folder / kind / f"{name}.yaml" for kind in ("hardware", "stack")):
        last |= read_yaml(there, "delete it, and calibrate again") if there.exists() else {}
    paths = write_profile(raw, name, folder)
    hardware, stack = profiles(raw, name)
    print_beside(console_for_tables(), hardware, stack, raw, last)
    if note := copies_note(raw["device"]):
        print(note)
    for path in paths:
        print(f"written {path}")
    if scale > 1:
        print(
            f"the models' widths were divided by {scale}: python -m replay.validate simulates them at that scale, "
            "python -m sim knows only their own"
        )


if __name__ == "__main__":
    sys.exit(main())
