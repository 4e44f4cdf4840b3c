"""`python -m traces record`: run a Hugging Face MoE model over prompts and write down its routing.

torch and transformers are loaded only once a recording begins. What is read of a model stands in
`traces.recorder.load`, of prompts in `traces.recorder.prompts`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from traces.container import TraceError, fault
from traces.help_text import Wrapped
from traces.processes.ending import keeping
from traces.recorder.load import load_model
from traces.recorder.options import RecordOptions
from traces.recorder.prompts import check_tokens, read_prompts
from traces.stream import TraceWriter, config_of, folder_of, unfinished

EXAMPLES = """examples:
  python -m traces record model=models/olmoe prompts=prompts.jsonl out=olmoe.safetensors max_new_tokens=64
  python -m traces record model=Qwen/Qwen3-30B-A3B prompts=prompts.txt out=q.safetensors sampling=temperature=0.7
  python -m traces record --recover olmoe.safetensors"""
REQUIRED = ("model", "prompts", "out")
ZERO_ALLOWED = ("lookahead", "seed", "embedding_dims")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    from traces.cli import listed_options

    parser.formatter_class = Wrapped
    parser.add_argument("options", nargs="*", metavar="key=value", help="model=, prompts=, out=, and more, see below")
    parser.add_argument("--recover", metavar="OUT", help="finish the recording of OUT that was killed, and do no more")
    lines = [
        "prompts: one a line. In a .jsonl file each line is a text, a list of token ids, or an object with one of",
        'prompt, tokens, messages ([{"role": …, "content": …}]) and, if you like, a label; in others, plain text.',
        "",
        "options (defaults shown):",
        f"  {listed_options(RecordOptions)}",
        "  name: the model's name in the trace, as `expertflow sim --help` lists it (default: the last part of model, "
        "in small letters)",
        "  sampling: greedy, or temperature=0.8 and the like",
        "  lookahead: layers ahead of the pre-gate, 0 for none",
        "  lookahead_top: candidates listed for each (default: twice top-k), or all",
        "  chat: wrap texts as user messages",
        "",
        EXAMPLES,
    ]
    parser.epilog = "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Record or recover, and say what was written."""
    from traces.cli import parse_options

    if args.recover is not None:
        if args.options:
            raise TraceError(f"--recover takes no options ({args.options[0]!r}); they were given when it was recorded")
        print(f"recovered {TraceWriter.recover(args.recover)}; check it: python -m traces validate {args.recover}")
        return 0
    options = parse_options("record", RecordOptions, args.options, ZERO_ALLOWED)
    for key in REQUIRED:
        if key not in options:
            raise TraceError(f"option {key} is missing; write {key}=…")
    console = Console(stderr=True)
    with (
        keeping(lambda: _kept(Path(options["out"]))),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        print(record(RecordOptions(**options), progress))
    return 0


def _kept(out: Path) -> str:
    """What is said of a recording that is told to stop."""
    if folder_of(out).is_dir():
        return f"what was whole is kept: python -m traces record --recover {out}"
    return "nothing was written; give the same command again"


def record(options: RecordOptions, progress: Progress | None = None) -> str:
    """Record the prompts into the trace `options.out`; what to tell the user, several lines.

    ValueError names the option, or file and line, at fault. An interrupted recording is finished with
    `TraceWriter.recover`.
    """
    temperature = options.temperature()
    if options.dtype not in _DTYPES:
        raise TraceError(f"option dtype={options.dtype} is unknown; choose one of {', '.join(_DTYPES)}")
    num_listed = options.num_listed()
    texts = list(itertools.islice(read_prompts(Path(options.prompts)), options.max_prompts or None))
    if not texts:
        raise fault(options.prompts, "file", "holds no prompt", "write one a line")
    _check_output(Path(options.out), options.overwrite)
    network, tokenize = load_model(options.model, options.dtype, options.device, options.chat)

    from traces.recorder.generate import Prompt, Sampling
    from traces.recorder.locate import locate
    from traces.recorder.session import Session

    located = locate(network)
    if options.lookahead >= (num_layers := len(located.taps)):
        raise TraceError(
            f"option lookahead={options.lookahead} reaches past the model; its {num_layers} MoE layers allow "
            f"{num_layers - 1}"
        )
    tokens = [tokenize(line, text) for line, text in texts]
    lines = [line for line, _ in texts]
    check_tokens(options.prompts, network.config, list(zip(lines, tokens, strict=True)), options.max_new_tokens)
    asked = [
        Prompt(tuple(ids), text.get("label") or f"line {line}") for (line, text), ids in zip(texts, tokens, strict=True)
    ]
    sampling = Sampling(options.max_new_tokens, temperature, options.seed)
    session = Session(options, network, located, sampling, num_listed)
    return session.record(asked, progress)


def _check_output(path: Path, overwrite: bool) -> None:
    """The faults that TraceWriter would find, before minutes are spent on loading a model."""
    if not path.parent.is_dir():
        raise fault(path, "file", f"the folder {path.parent} does not exist", "create it first")
    if path.is_dir():
        raise fault(path, "file", "is a folder", "name a file in it")
    if folder_of(path).is_dir():
        raise unfinished(path)
    for one in (path, config_of(path)):
        if one.exists() and not overwrite:
            remedy = "name another, or give overwrite=true: it is replaced when the new one is whole"
            raise fault(one, "file", "is there already", remedy)
