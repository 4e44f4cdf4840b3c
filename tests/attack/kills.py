"""Long commands that are killed at random moments, again and again, until they are let through.

After each kill nothing half may pass as whole; a command that was told to stop says so in one line, without a
traceback, and leaves no process behind; and what is there in the end is, byte for byte, what an undisturbed command
writes. `python -m tests.attack.kills --minutes 15` runs a round on its own. Linux only: it looks into /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from tests.attack.commands import SMALL, Command, commands, make_inputs
from traces.processes.ending import GRACE_S, WORDS

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KILLS_A_CHAIN = 4
"""So often one command is killed, at most, before it is let through."""
TOGETHER = 0.15
"""How often a second command of the same kind runs beside the one that is killed."""
CHILDREN_S = 5.0
"""In so many seconds all children of what was killed are gone."""
LIMIT_S = 240.0
MOST_JOBS = 64
TRIES = 3
"""Of a command that finds the machine too busy to be measured."""


@dataclass
class Started:
    """A command that runs, and what it writes."""

    process: subprocess.Popen[bytes]
    error: Path

    @property
    def said(self) -> str:
        """What it has written to its standard error."""
        return self.error.read_text(errors="replace")


class Busy(Exception):
    """The machine is too busy for a command that measures it."""


class Attack:
    """One round's folder, inputs, and what undisturbed commands leave."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.inputs = folder / "inputs"
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._undisturbed: dict[str, tuple[float, dict[str, bytes]]] = {}
        make_inputs(self.inputs)
        self.commands = commands(self.inputs)

    def start(self, command: Command, folder: Path) -> Started:
        """Start it in a session of its own."""
        error = folder / f"stderr-{time.monotonic_ns()}"
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.folder / "cache")}
        environ |= {"OMP_NUM_THREADS": "1", "EXPERTFLOW_KEEP_SCORES": "1"}
        with error.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command.words],
                cwd=folder,
                env=environ,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                preexec_fn=_heeding,
            )
        return Started(process, error)

    def undisturbed(self, command: Command) -> tuple[float, dict[str, bytes]]:
        """Seconds that it takes, and what it leaves."""
        if command.name not in self._undisturbed:
            if command.name == "validate" and not (self.inputs / "hardware" / "mine.calibration.json").exists():
                words = ["-m", "replay.calibrate", "mine", *SMALL, "--config-dir", str(self.inputs)]
                self._let_through(Command("calibrate", words), self.inputs)
            place = self.folder / f"undisturbed-{command.name}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            began = time.monotonic()
            self._let_through(command, place)
            command.check(place)
            self._undisturbed[command.name] = (time.monotonic() - began, command.files(place))
        return self._undisturbed[command.name]

    def _let_through(self, command: Command, folder: Path) -> None:
        for _ in range(TRIES):
            run = self.start(command, folder)
            code = run.process.wait(LIMIT_S)
            if not _found_it_busy(code, run.said):
                break
            self.counts["busy"] += 1
        else:
            raise Busy
        assert code in command.codes, f"it ended with {code}: {run.said[-500:]}"
        assert "Traceback" not in run.said, run.said[-500:]

    def chain(self, command: Command, deadline: float) -> None:
        """Kill it some times in one folder, then let it through and compare."""
        seconds, whole = self.undisturbed(command)
        self.counts["chains"] += 1
        folder = self.folder / f"{command.name}-{self.counts['chains']}"
        folder.mkdir()
        for _ in range(self.rng.randint(1, KILLS_A_CHAIN)):
            if time.monotonic() >= deadline:
                break
            command.before(folder)
            self._kill_once(command, folder, seconds)
            command.check(folder)
            there = command.files(folder)
            half = [name for name, content in there.items() if content != whole.get(name)]
            assert not half, f"other bytes than undisturbed, after a kill: {', '.join(half)}"
        command.before(folder)
        self._let_through(command, folder)
        self.counts["completed"] += 1
        command.check(folder)
        found = command.files(folder)
        assert found.keys() == whole.keys(), f"other files: {sorted(found.keys() ^ whole.keys())}"
        for name, content in whole.items():
            assert found[name] == content, f"{name} has other bytes than undisturbed"
        left = [path.name for path in folder.rglob("*") if re.fullmatch(r"\..+\.tmp|\.lock|.+\.lock", path.name)]
        assert not left, f"left over: {', '.join(left)}"
        shutil.rmtree(folder)

    def _kill_once(self, command: Command, folder: Path, seconds: float) -> None:
        signum, delay = self.rng.choice(SIGNALS), self.rng.uniform(0, 1.05 * seconds)
        beside = command.together and self.rng.random() < TOGETHER
        other = self.start(command, folder) if beside else None
        run = self.start(command, folder)
        pid = run.process.pid
        try:
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(delay)
            if signum != signal.SIGKILL:
                while run.process.poll() is None and not _hears(pid):
                    time.sleep(0.005)
            if run.process.poll() is None:
                os.kill(pid, signum)
                self.counts["kills"] += 1
                self.counts[f"kills of {command.name}"] += 1
            began = time.monotonic()
            code = run.process.wait(GRACE_S + 20)
            took = time.monotonic() - began
            self.counts["ended before"] += code in command.codes
            self._check_end(command, run, code, signum, took)
            while living(pid):
                assert time.monotonic() - began < took + CHILDREN_S, f"children outlive {signum.name}"
                time.sleep(0.02)
            if other is not None:
                code = other.process.wait(LIMIT_S)
                assert code in command.codes, f"the one beside it ended with {code}: {other.said[-500:]}"
                self.counts["beside another"] += 1
        finally:
            for one in (run, other):
                if one is not None and one.process.poll() is None:
                    os.killpg(one.process.pid, signal.SIGKILL)
                    one.process.wait()

    def _check_end(self, command: Command, run: Started, code: int, signum: signal.Signals, took: float) -> None:
        said = run.said
        assert "Traceback" not in said, f"{signum.name}: {said[-800:]}"
        assert took < GRACE_S, f"{signum.name} was obeyed after {took:.1f} s"
        if code in (-signum, *command.codes):
            return
        if _found_it_busy(code, said):
            self.counts["busy"] += 1
            raise Busy
        assert code == 128 + signum, f"{signum.name} ended it with {code}: {said[-500:]}"
        told = [line for line in said.splitlines() if line.startswith(f"{WORDS[signum]}; ")]
        assert len(told) == 1, f"{signum.name} is not told of in one line: {said[-500:]}"
        assert len(told[0]) <= 300, told[0]


def _found_it_busy(code: int, said: str) -> bool:
    """Whether a command that measures has refused to, since the machine does other things: no fault."""
    return code == 2 and "when the machine is idle" in said


def _heeding() -> None:
    """Whoever started this round in the background may have had SIGINT ignored: the command is not to inherit that."""
    for signum in WORDS:
        signal.signal(signum, signal.SIG_DFL)


def _hears(pid: int) -> bool:
    """Whether the process is a command by now; before, it is Python that starts."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def living(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state not in "ZX":
                    found.append(int(entry.name))
    return found


def kill_round(seed: int, deadline: float, only: Sequence[str] = (), most: int | None = None) -> dict[str, Any]:
    """Kill commands in turn until `time.monotonic()` is `deadline`, or there were so many kills.

    only: names of commands; empty = all. most: kills. What came of it: `kills`, commands that `ended before` they
    were hit, `completed` and compared, `beside another` of the same kind, `kills of NAME`, and `failures`, a text each.
    """
    folder = Path(tempfile.mkdtemp(prefix="expertflow-kills-"))
    attack = Attack(folder, seed)
    names = list(only) or list(attack.commands)
    attack.rng.shuffle(names)
    spent_s = dict.fromkeys(names, 0.0)
    try:
        while (began := time.monotonic()) < deadline and (most is None or attack.counts["kills"] < most):
            # Each has its share of the time, so that short ones are killed more often.
            name = min(spent_s, key=spent_s.__getitem__)
            try:
                attack.chain(attack.commands[name], deadline)
            except Busy:
                pass
            except Exception as error:
                attack.failures.append(f"{name}, seed {seed}: {error!r:.1500}")
            spent_s[name] += time.monotonic() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**attack.counts, "failures": attack.failures}


def main() -> int:
    """Run a round and print what came of it; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.kills", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--most", type=int, help="kills of each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only these commands")
    parser.add_argument("--jobs", type=int, default=2, choices=range(1, MOST_JOBS + 1), help="rounds at once (2)")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    with ProcessPoolExecutor(args.jobs) as pool:
        # Seeds of rounds that follow each other have nothing in common.
        seeds = [args.seed * MOST_JOBS + number for number in range(args.jobs)]
        rounds = list(pool.map(kill_round, seeds, *(repeat(one) for one in (deadline, args.only, args.most))))
    failures = [line for one in rounds for line in one.pop("failures")]
    counts: Counter[str] = Counter()
    for one in rounds:
        counts.update(one)
    found: dict[str, Any] = {**counts, "failures": failures}
    print(json.dumps(found, indent=1))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
