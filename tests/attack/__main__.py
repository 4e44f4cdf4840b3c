"""`python -m tests.attack`: a round of the attack; exit code 1 if anything failed."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

from tests.attack import report
from tests.attack.kinds import registry
from tests.attack.outcome import Warned, bounded, watchdog
from tests.attack.round import Round
from tests.attack.work import Bench, attempt, retry
from traces.files import replace_text

TARGETS = {"traces": 1_000_000, "each": 100_000, "slow": 100_000, "configurations": 5_000, "parts": 600, "kills": 200}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m tests.attack",
        description="Try seeded mutants of every kind of input, until each kind has its number or the time is up.",
        epilog="examples:\n  python -m tests.attack --minutes 30\n  python -m tests.attack --minutes 1 --only trace\n"
        "  python -m tests.attack --replay attack-failures/trace-traceback-24.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--minutes", type=float, default=1.0, help="how long (default 1)")
    made.add_argument("--seed", type=int, default=0, help="rounds of different seeds have no input in common")
    made.add_argument("--only", action="append", metavar="KIND", help="this kind; may be given again")
    made.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    for key, value in TARGETS.items():
        made.add_argument(f"--{key}", type=int, default=value, help=f"how many at most (default {value:,})")
    made.add_argument("--out", type=Path, action="append", default=[], help="also write the table: .md or .json")
    made.add_argument("--keep", type=Path, default=Path("attack-failures"), help="folder for inputs that failed")
    made.add_argument("--state", type=Path, metavar="FILE", help="go on with the round in FILE, and keep it there")
    made.add_argument("--replay", type=Path, metavar="FILE", help="try an input that was kept once more")
    made.add_argument("--list", action="store_true", help="print the kinds")
    return made


def replay(path: Path) -> int:
    """Try a kept input once more and say what becomes of it; 1 if it still fails."""
    failure = report.load(path)
    with tempfile.TemporaryDirectory() as folder:
        kind = Bench(Path(folder), array("q", [0] * 9)).kind(failure.kind)
        with Warned().watch() as warned, bounded(kind.most_bytes), watchdog(kind.hang_s) as begin:
            begin()
            again = retry(kind, failure.content, warned) if failure.content else attempt(kind, failure.seed, warned)
    steps = ", ".join(failure.steps)
    print(f"{failure.kind}, seed {failure.seed} ({steps}): was {failure.verdict}, now {again.verdict}\n{again.text}")
    return int(again.failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a round and print its table."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    kinds = registry()
    if args.list:
        print("\n".join(kinds))
        return 0
    if args.replay:
        return replay(args.replay)
    if unknown := set(args.only or ()) - set(kinds):
        parser().error(f"--only {unknown.pop()}: the kinds are {', '.join(kinds)}")
    if other := [path for path in args.out if path.suffix not in (".md", ".json")]:
        parser().error(f"--out {other[0]}: end it in .md or .json")
    chosen = {name: kind for name, kind in kinds.items() if not args.only or name in args.only}
    kept = report.Kept(args.keep)
    targets = {key: getattr(args, key) for key in TARGETS}
    attack = Round(chosen, targets, args.seed, kept)
    command = shlex.join(["python", "-m", "tests.attack", *given])
    if args.state and args.state.is_file():
        try:
            report.go_on_from(args.state, attack.tallies, args.seed)
        except ValueError as error:
            parser().error(f"--state {error}")

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if args.state:
            replace_text(args.state, report.as_json(attack.tallies, command, args.seed))

    attack.run(args.minutes * 60, args.jobs, tell)
    tell(attack.progress())
    failed = sum(tally.failures.total() for tally in attack.tallies.values())
    print(report.text_table(attack.tallies))
    for path in args.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_json = path.suffix == ".json"
        tallies = attack.tallies
        text = report.as_json(tallies, command, args.seed) if is_json else report.markdown(tallies, command, failed)
        path.write_text(text, encoding="utf-8")
    for path in kept.paths:
        print(f"failed: python -m tests.attack --replay {shlex.quote(str(path))}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
