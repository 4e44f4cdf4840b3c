"""`python -m traces.twin`: train a twin, record it, check its routing, ship small traces.

A user's error is one line on stderr and exit code 2; of what is told to stop see `traces.processes.ending`. torch is
loaded only once a command needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from traces.messages import PREFIX, shortened, told
from traces.processes.ending import keeping, stopped
from traces.processes.locks import locked
from traces.twin.config import TOPOLOGIES, TwinConfig, preset

if TYPE_CHECKING:
    from traces.twin import train

EXAMPLES = {
    "": """examples:
  python -m traces.twin train twins/deepseek deepseek-v2-lite --minutes=25
  python -m traces.twin train twins/deepseek --minutes=25       # goes on where it stopped
  python -m traces.twin record twins/deepseek
  python -m traces.twin check twins/deepseek
  python -m traces.twin ship small twins/deepseek twins/qwen twins/gpt-oss --max-mb=24""",
    "train": """examples:
  python -m traces.twin train twins/qwen qwen1.5-moe-a2.7b --minutes=25
  python -m traces.twin train twins/qwen --steps=3000
  python -m traces.twin train twins/gpt-oss gpt-oss-20b --minutes=25 --batch=64 --device=cuda --bf16

given again, a folder goes on from its last checkpoint; its settings stay.""",
    "record": """examples:
  python -m traces.twin record twins/qwen
  python -m traces.twin record twins/qwen --how=sample --temperature=0.8 --train-tokens=4096""",
    "check": """examples:
  python -m traces.twin check twins/qwen""",
    "ship": """examples:
  python -m traces.twin ship small twins/deepseek twins/qwen twins/gpt-oss --max-mb=24""",
}
# Fixed when a twin is begun; all absent unless given, so that a resumed run can tell what was asked.
_FIXED: dict[str, tuple[type, str]] = {
    "width": (int, "of the residual stream, a multiple of 16 (128)"),
    "context": (int, "tokens of a sequence (256)"),
    "vocab": (int, "tokens of the vocabulary (4096)"),
    "seed": (int, "of weights and windows (0)"),
    "batch": (int, "sequences a step (8)"),
    "lr": (float, "peak learning rate (0.002)"),
    "warmup": (int, "steps up to the peak (100)"),
    "balance": (float, "weight of each layer's load-balancing loss (0.01)"),
    "tokenizer": (str, "bpe, or bytes, which needs no package (bpe)"),
    "text": (str, "a folder of .py, .txt, .md, .rst files (the standard library)"),
}


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        print(f"{PREFIX}{shortened(f'{message}; see {self.prog} --help')}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit code."""
    try:
        with keeping("nothing was written; give the same command again"):
            args = build_parser().parse_args(argv)
            return int(args.run(args))
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PREFIX}{told(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; install it: pip install 'expertflow[record]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return stopped(error)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    about = "Train narrow twins of MoE models on text at hand, and record their routing."
    parser = _Parser(
        prog="python -m traces.twin",
        description=about,
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_train(add("train", "train a twin, or go on training it"))
    _add_record(add("record", "record a twin on documents it has not learned"))
    _add_check(add("check", "print whether routing was learned and is even, and write check.json"))
    _add_ship(add("ship", "write small traces of recorded twins"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the twin's folder")
    parser.add_argument("topology", nargs="?", help=f"to begin one: {', '.join(TOPOLOGIES)}")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--steps", type=int, help="stop at so many steps in all")
    for key, (kind, text) in _FIXED.items():
        parser.add_argument(f"--{key}", type=kind, help=text)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines (10)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="of torch (its own choice)")
    parser.set_defaults(run=run_train)


def _add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the twin's folder; the traces go there")
    parser.add_argument("--train-tokens", type=int, default=6144, help="rows to fit predictors on (6144)")
    parser.add_argument("--eval-tokens", type=int, default=2048, help="rows to judge them on (2048)")
    parser.add_argument("--prompt", type=int, default=64, help="rows of prefill of a request (64)")
    parser.add_argument("--decode", type=int, default=128, help="rows of decode of a request (128)")
    parser.add_argument("--how", default="teacher", help="teacher, greedy or sample (teacher)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --how=sample (1)")
    parser.add_argument("--seed", type=int, default=0, help="of --how=sample (0)")
    parser.add_argument("--ahead", type=int, default=8, help="layers ahead of the pre-gate (8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.set_defaults(run=run_record)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the twin's folder, recorded")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the eval split to look at (2048)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.set_defaults(run=run_check)


def _add_ship(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="the folder to write to")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of twins, recorded")
    parser.add_argument("--max-mb", type=float, default=24.0, help="10^6 bytes of all together (24)")
    parser.add_argument("--train-share", type=float, default=0.75, help="of a twin's bytes, for its train file (0.75)")
    parser.add_argument("--pregate", default="residual", help="the kind to keep: residual or normed (residual)")
    parser.set_defaults(run=run_ship)


def run_train(args: argparse.Namespace) -> int:
    """Begin a twin or go on with one, and train it."""
    from traces.twin import train

    pace = train.Pace(args.minutes, args.steps, args.save_every, args.log_every, args.device, args.bf16, args.threads)
    train.open_device(args.device)
    asked = None if (args.folder / "twin.json").exists() else _asked(args)
    with _lock(args.folder), keeping(lambda: _kept(args.folder)):
        if asked is None or (args.folder / "twin.json").exists():
            _check_unchanged(args)
        else:
            train.begin(args.folder, *asked)
        return _train(args, pace)


def _lock(folder: Path) -> AbstractContextManager[None]:
    """Against a second training of the same twin. Beside its folder, which may be yet to be made."""
    place = folder.absolute()
    if not place.parent.is_dir():
        return nullcontext()
    return locked(place.with_name(f".{place.name}.lock"), str(folder))


def _kept(folder: Path) -> str:
    """What is said of a training that is told to stop."""
    from traces.twin.checkpoint import checkpoints

    found = checkpoints(folder) if folder.is_dir() else []
    if not found:
        return "there is no checkpoint yet; the same command begins anew"
    return f"{folder} holds the checkpoint of step {found[-1][0]}; the same command goes on from there"


def _train(args: argparse.Namespace, pace: train.Pace) -> int:
    from traces.twin import train

    trainer = train.Trainer(args.folder, pace)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    config = trainer.settings.config
    print(
        f"{config.name}: {count / 1e6:.1f} M parameters, {len(trainer.stream)} tokens of text, "
        f"from step {trainer.step}",
        flush=True,
    )
    step = trainer.run(lambda line: print(line, flush=True))
    print(f"stopped at step {step}; {args.folder} holds its checkpoint")
    return 0


def _asked(args: argparse.Namespace) -> tuple[TwinConfig, train.Start]:
    """What a new twin is to be; ValueError where it cannot be."""
    from traces.twin import train

    if args.topology is None:
        raise ValueError(f"{args.folder} holds no twin yet; say which to begin: {', '.join(TOPOLOGIES)}")
    given = {key: getattr(args, key) for key in _FIXED if getattr(args, key) is not None}
    sizes = {"width": "width", "context": "context", "vocab": "vocab_size"}
    shape = {name: given.pop(key) for key, name in sizes.items() if key in given}
    if "balance" in given:
        given["balance_weight"] = given.pop("balance")
    if given.get("tokenizer") == "bytes":
        shape["vocab_size"] = 257
    return preset(args.topology, **shape), train.Start(**given)


def _check_unchanged(args: argparse.Namespace) -> None:
    """What was given must be what the twin was begun with."""
    from traces.twin.checkpoint import read_settings

    settings = read_settings(args.folder)
    config = settings.config
    have: dict[str, Any] = {
        **vars(settings),
        "width": config.width,
        "context": config.context,
        "vocab": config.vocab_size,
        "topology": config.name.removesuffix("-twin"),
    }
    for key in ("topology", *_FIXED):
        value = getattr(args, key)
        if key == "vocab" and value is not None and value >= have[key]:
            continue  # little text makes fewer tokens than were asked for
        if value is not None and value != have[key]:
            shown = key if key == "topology" else f"--{key}"
            raise ValueError(
                f"{shown} {value}: {args.folder} was begun with {have[key]}; leave it out, "
                "or begin another in a new folder"
            )


def run_record(args: argparse.Namespace) -> int:
    """Record both splits."""
    from traces.twin.record import Plan, record

    plan = Plan(
        (args.train_tokens, args.eval_tokens),
        args.prompt,
        args.decode,
        args.how,
        args.temperature,
        args.seed,
        args.ahead,
        args.device,
    )
    with keeping("traces that were finished are kept; the same command records all anew"):
        record(args.folder, plan, lambda line: print(line, flush=True))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Compare with new routers; 1 where routing was not learned or is not even."""
    from traces.twin.check import check

    if args.tokens < 1:
        raise ValueError(f"--tokens={args.tokens} must be at least 1")
    result = check(args.folder, args.tokens, args.device, Console())
    return 0 if result["even"] and result["learned"] else 1


def run_ship(args: argparse.Namespace) -> int:
    """Write the small traces."""
    from traces.twin.compact import ship

    if not 0 < args.max_mb <= 1_000_000:
        raise ValueError(f"--max-mb={args.max_mb} must be above 0 and at most 1000000")
    if not 0 < args.train_share < 1:
        raise ValueError(f"--train-share={args.train_share} must be between 0 and 1")
    if args.pregate not in ("residual", "normed"):
        raise ValueError(f"--pregate={args.pregate} is unknown; choose residual or normed")
    pairs = [(_one(folder, "train", args.pregate), _one(folder, "eval", args.pregate)) for folder in args.folders]
    ship(pairs, args.output, int(args.max_mb * 1e6), print, args.train_share)
    return 0


def _one(folder: Path, split: str, kind: str) -> Path:
    found = sorted(folder.glob(f"*-{split}.{kind}.safetensors"))
    if len(found) != 1:
        problem = f"{folder} holds {len(found)} recordings *-{split}.{kind}.safetensors, one is needed"
        raise ValueError(f"{problem}; record it: python -m traces.twin record {folder}")
    return found[0]
