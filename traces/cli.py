"""`python -m traces`: check, describe, import, record, fit and generate traces; fit and compare predictors.

A user's error is one line on stderr and exit code 2; of what is told to stop see `traces.processes.ending`. Knows no
formats itself: each sub-command is a module, loaded only when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from rich.console import Console
from rich.progress import Progress

from traces.flags import Parser
from traces.importers.known_models import topology_note
from traces.messages import PREFIX, TraceError, cut, plain, told
from traces.processes.ending import keeping, stopped
from traces.reader import Trace, open_trace
from traces.recorded_batches import settings_line

KINDS = {
    "gpt-oss-json": "gpt_oss_json",
    "moe-beyond-csv": "moe_beyond_csv",
    "route-csv": "route_csv",
    "event-csr": "event_csr",
    "engine-dumps": "engine_dumps",
    "vllm-log": "vllm_log",
    "llama-csv": "llama_csv",
    "sglang-recorder": "sglang_recorder",
    "nested-json": "nested_json",
    "megatron": "megatron",
    "table": "table",
}
AUTO = "auto"
"""The kind that recognises what it is given; see `traces.importers.auto`."""
DELEGATED = {
    "stats": "print what a trace looks like: reuse, popularity, predictability, best cache hits",
    "fit": "fit the parameters of the trace generator to a trace",
    "generate": "write a generated trace",
    "record": "run a Hugging Face MoE model over prompts and write down its routing",
    "fit-predictor": "fit a predictor of later layers' experts to a trace",
    "score-predictors": "compare predictors, fitted to one trace, by distance on another",
}
_OPTION = re.compile(r"[a-z_]+=")
MODULES = {
    "record": "recorder.command",
    "fit": "fitting.generator",
    "fit-predictor": "fitting.command",
    "score-predictors": "fitting.score",
}
"""Where a delegated command lives, if not in the module of its name."""
EXAMPLES = {
    "": """examples:
  python -m traces validate my.safetensors
  python -m traces import route-csv route.csv my.safetensors model=qwen3-30b-a3b
  python -m traces stats my.safetensors""",
    "validate": """examples:
  python -m traces validate my.safetensors
  python -m traces validate 'recorded/*.safetensors'""",
    "stats": """examples:
  python -m traces stats my.safetensors
  python -m traces stats my.safetensors --max-tokens 4096 --json stats.json""",
    "fit": """examples:
  python -m traces fit my.safetensors my-params.safetensors""",
    "generate": """examples:
  python -m traces generate made.safetensors --tokens 4096 --seed 1""",
    "record": "",
    "fit-predictor": "",
    "score-predictors": """examples:
  python -m traces score-predictors train.safetensors eval.safetensors --out accuracy
  python -m traces score-predictors train.safetensors eval.safetensors --out accuracy --only pregate,forest""",
}
_IMPORT_EXAMPLES = (
    "python -m traces import gpt-oss-json GPT-OSS-MoE-ExpertFingerprinting/data train.safetensors split=train",
    "python -m traces import moe-beyond-csv prompts/ moe-beyond.safetensors",
    "python -m traces import route-csv route.csv my.safetensors model=gpt-oss-120b incomplete=repeat",
    "python -m traces import event-csr events.safetensors my.safetensors model=qwen3-30b-a3b num_experts=128",
    "python -m traces import engine-dumps answers.jsonl my.safetensors model=qwen3-30b-a3b num_experts=128 top_k=8",
    "python -m traces import auto layer0.jsonl layer1.jsonl my.safetensors model=qwen3-30b-a3b num_experts=128",
    "python -m traces import table log.csv my.safetensors token=pos layer=l expert=e0,e1 prompt_len=12",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with keeping("nothing was written; give the same command again"):
            args = build_parser(next((word for word in given if not word.startswith("-")), "")).parse_args(given)
            return int(args.run(args))
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PREFIX}{told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return stopped(error)


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser; arguments that live in another module are filled in for `command` alone, to load no more."""
    parser = _command(Parser, "Check, describe, import, record, fit and generate routing traces.", EXAMPLES[""])
    parser.prog = "python -m traces"
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def add(name: str, about: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    validate = add("validate", "check trace files: each PATH is a file or a quoted glob", EXAMPLES["validate"])
    validate.add_argument("paths", nargs="+", metavar="PATH")
    validate.set_defaults(run=run_validate)
    importing = add("import", "turn other routing records into a trace", "")
    kinds = [AUTO, *sorted(KINDS)]
    importing.add_argument("kind", metavar="KIND", choices=kinds, help=", ".join(kinds))
    importing.add_argument(
        "source", metavar="SOURCE…", help="recorded files, or a folder of them (event-csr: one file)"
    )
    importing.add_argument(
        "output", nargs="+", metavar="OUT [key=value …]", help="the trace to write (.safetensors); options"
    )
    importing.usage = "python -m traces import [-h] KIND SOURCE… OUT [key=value …]"
    importing.set_defaults(run=run_import)
    if command == "import":
        words = importlib.import_module("traces.importers.option_words")
        options = {kind: listed_options(importer_of(kind)) for kind in sorted(KINDS)}
        importing.epilog = words.described(options, _IMPORT_EXAMPLES, words.help_width())
    for name, about in DELEGATED.items():
        delegate = add(name, about, EXAMPLES[name])
        if command == name:
            module = importlib.import_module(f"traces.{MODULES.get(name, name)}")
            module.add_arguments(delegate)
            delegate.set_defaults(run=module.run)
    return parser


def _command(kind: type[Parser], about: str, examples: str) -> Parser:
    return kind(description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_validate(args: argparse.Namespace) -> int:
    """Check each path and print a line for it; 2 if any is faulty."""
    code = 0
    for path in args.paths:
        try:
            print(f"ok: {describe(open_trace(path))}")
        except (ValueError, OSError, MemoryError) as error:
            print(f"{PREFIX}{told(error)}", file=sys.stderr)
            code = 2
    return code


def describe(trace: Trace) -> str:
    """One line: what the trace holds."""
    arrays = ", ".join(trace.layout_arrays())
    return (
        f"{cut(plain(trace.name), 80)}: {cut(plain(trace.model), 80)}, "
        f"{trace.num_requests} requests, {shape(trace)}; {arrays}; "
        f"sha256 {trace.sha256()[:12]}"
    )


def shape(trace: Trace) -> str:
    """Tokens, layers, top-k and experts of a trace."""
    topology = f"{trace.num_layers} layers × top-{trace.top_k} of {trace.num_experts} experts"
    return f"{trace.num_tokens} tokens × {topology}"


# -- import --------------------------------------------------------------------------------------------------


def importer_of(kind: str) -> Callable[..., Any]:
    """The function that imports `kind`."""
    name = KINDS[kind]
    function: Callable[..., Any] = getattr(importlib.import_module(f"traces.importers.{name}"), f"import_{name}")
    return function


def run_import(args: argparse.Namespace) -> int:
    """Import, and say what was left out or approximated."""
    sources, output, words = _split_words([args.source, *args.output])
    kind = args.kind
    if kind == AUTO:
        given = dict(word.split("=", 1) for word in words if "=" in word)
        guess = importlib.import_module("traces.importers.auto").recognise(sources, given)
        kind = guess.kind
        print(f"taken for {kind}: {guess.seen}")
    importer = importer_of(kind)
    options = parse_options(kind, importer, words, zero_allowed=("rank",))
    console = Console(stderr=True)
    # Without a terminal a progress bar would leave blank lines among the messages.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        report = importer(sources if len(sources) > 1 else sources[0], output, progress, **options)
    trace = open_trace(report.path, validate=False)
    print(f"wrote {report.path}: {report.num_requests} requests, {shape(trace)}")
    more = (topology_note(trace), settings_line(trace, str(report.path)))
    for note in [*report.notes, *filter(None, more)]:
        print(f"note: {note}")
    return 0


def _split_words(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Sources, output and `key=value` options of the words after KIND: options come last, the output before them."""
    num_paths = next((n for n, word in enumerate(words) if _OPTION.match(word) and n >= 2), len(words))
    if num_paths > 2 and not words[num_paths - 1].endswith(".safetensors"):
        # Several sources are told from a misspelt option by the suffix of what is to be written.
        num_paths = 2
    if num_paths < 2:
        raise TraceError("no output is named; write python -m traces import KIND SOURCE… OUT.safetensors key=value…")
    return list(words[: num_paths - 1]), words[num_paths - 1], list(words[num_paths:])


def _options_of(importer: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(importer).parameters
    return {name: item for name, item in parameters.items() if item.kind is item.KEYWORD_ONLY}


def parse_options(
    kind: str, importer: Callable[..., Any], words: Sequence[str], zero_allowed: Sequence[str] = ()
) -> dict[str, Any]:
    """`key=value` words as keyword arguments of a function, or as the fields of a dataclass (kw_only).

    TraceError on an unknown key or a wrong value.

    Whole numbers begin at 1, those of the keys in `zero_allowed` at 0.
    """
    known, types = _options_of(importer), get_type_hints(importer)
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise TraceError(f"option {word!r} has no value; write {word}=<value>")
        if key not in known:
            raise TraceError(f"option {key!r} is unknown to {kind}; known are {', '.join(known)}")
        if key in options:
            raise TraceError(f"option {key} is given twice; keep one")
        options[key] = _value(key, text, types[key], 0 if key in zero_allowed else 1)
    return options


def _value(key: str, text: str, wanted: type, least: int) -> Any:
    if wanted is bool:
        if text not in ("true", "false"):
            raise TraceError(f"option {key}={text} must be true or false")
        return text == "true"
    if wanted is int:
        if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text) >= least):
            raise TraceError(f"option {key}={text} must be a whole number from {least} to 999999999")
        return int(text)
    if not text:
        raise TraceError(f"option {key} is empty; give it a value, or leave it out")
    return text


def listed_options(function: Callable[..., Any]) -> str:
    """The options of a function with their defaults, as the user would write them."""
    shown = []
    for name, item in _options_of(function).items():
        value = "" if item.default is item.empty else item.default
        value = str(value).lower() if isinstance(value, bool) else value
        shown.append(f"{name}={value}" if value else f"{name}=")
    return " ".join(shown)
