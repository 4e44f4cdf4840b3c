"""`python -m sim.regress record|check FILE`: pin the metrics of chosen runs on chosen traces, and say what moved.

The file is JSON: {"runs": {NAME: {"overrides": [...], "metrics": {...}}}}. `record` runs the overrides and
writes the metrics; `check` runs them again, prints every number that moved and by how much, and fails if one
did. Paths of traces in the overrides are taken relative to the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sim.collect import flatten
from sim.execute import run_job
from sim.job.configure import configure
from sim.job.errors import one_line
from sim.job.output import to_json, write_text
from sim.job.setup import make_workload
from sim.paths import add_config_dir, resolved, use_own_folder
from traces.flags import Parser
from traces.jsontext import shown
from traces.messages import PREFIX, fault
from traces.reading import read_json
from traces.shipped import RECORDINGS

Pins = dict[str, Any]


def read_pins(path: Path) -> Pins:
    """The runs of a golden file. ValueError if it is not one."""
    remedy = "write one with runs and overrides, then record"
    content = read_json(path, remedy)
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, dict) or not runs:
        raise fault(path, "file", 'lacks {"runs": {NAME: {"overrides": [...]}}} with at least one run', remedy)
    for name, run in runs.items():
        where = f"run {name[:60]!r}"
        overrides = run.get("overrides") if isinstance(run, dict) else None
        if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
            raise fault(path, where, "lacks overrides, a list of strings", "give them as on the command line")
        metrics = run.get("metrics", {})
        if not isinstance(metrics, dict):
            raise fault(path, where, f"metrics is {shown(metrics)}, no table", "record it again")
        for key, value in metrics.items():
            if isinstance(value, dict) or (type(value) is int and abs(value) >= 1 << 63):
                raise fault(path, f"{where}, {key[:60]}", f"is {shown(value)}, no figure of a run", "record it again")
    return runs


def run_once(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Metrics of one configuration, flat."""
    words = [_resolve(word, folder) for word in overrides]
    cfg = configure(words)
    return flatten(run_job(cfg, make_workload(cfg), None))


def _resolve(word: str, folder: Path) -> str:
    key, _, value = word.partition("=")
    is_file = key == "trace.path" and (value not in RECORDINGS or (folder / value).exists())
    return f"{key}={resolved(folder / value)}" if is_file else word


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each metric that moved, appeared or went."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            lines.append(f"{key}: {old[key]} → gone")
        elif key not in old:
            lines.append(f"{key}: new, {new[key]}")
        elif old[key] != new[key]:
            lines.append(f"{key}: {old[key]} → {new[key]}{_change(old[key], new[key])}")
    return lines


def _change(old: Any, new: Any) -> str:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    return f" ({100 * (new - old) / old:+.3f} %)" if numbers and old else ""


def record(path: Path) -> int:
    """Run everything and pin it."""
    runs = read_pins(path)
    for name, run in runs.items():
        run["metrics"] = run_once(run["overrides"], path.parent)
        print(f"recorded {name}")
    write_text(path, to_json({"runs": runs}))
    return 0


def check(path: Path) -> int:
    """Run everything and compare; 1 if something moved."""
    runs = read_pins(path)
    moved = 0
    for name, run in runs.items():
        if not run.get("metrics"):
            raise fault(path, f"run {name[:60]!r}", "has no metrics yet", f"python -m sim.regress record {path}")
        lines = differences(run["metrics"], json.loads(to_json(run_once(run["overrides"], path.parent))))
        moved += bool(lines)
        print(f"{name}: {'identical' if not lines else f'{len(lines)} metrics moved'}")
        for line in lines:
            print(f"    {line}")
    print(f"{len(runs) - moved} of {len(runs)} runs identical")
    return 1 if moved else 0


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(prog="python -m sim.regress", description=__doc__)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    add_config_dir(parser)
    args = parser.parse_args(words)
    try:
        use_own_folder(args.config_dir)
        return record(args.file) if args.action == "record" else check(args.file)
    except (ValueError, OSError, MemoryError, HydraException, OmegaConfBaseException) as error:
        print(f"{PREFIX}{one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
