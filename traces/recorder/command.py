"""`python -m traces record`: run a Hugging Face MoE model over prompts and write down its routing.

torch and transformers are loaded only once a recording begins. A folder is read without any network use; a model is
fetched only if its hub name was given. Weights are read from safetensors alone, and no code that comes with a model
is run, but for chat templates, which transformers renders in a sandbox. Prompts are untrusted text: they are parsed,
and their ids checked.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from traces.container import TraceError, check_file, fault
from traces.stream import TraceWriter, folder_of

EXAMPLES = """examples:
  python -m traces record model=models/olmoe prompts=prompts.jsonl out=olmoe.safetensors max_new_tokens=64
  python -m traces record model=Qwen/Qwen3-30B-A3B prompts=prompts.txt out=q.safetensors sampling=temperature=0.7
  python -m traces record --recover olmoe.safetensors"""
REQUIRED = ("model", "prompts", "out")
ZERO_ALLOWED = ("lookahead", "seed", "embedding_dims")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_MAX_LINE = 16 << 20
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    from traces.cli import listed_options

    parser.add_argument("options", nargs="*", metavar="key=value", help="model=, prompts=, out=, and more, see below")
    parser.add_argument("--recover", metavar="OUT", help="finish the recording of OUT that was killed, and do no more")
    lines = [
        "prompts: one a line. In a .jsonl file each line is a text, a list of token ids, or an object with one of",
        'prompt, tokens, messages ([{"role": …, "content": …}]) and, if you like, a label; in others, plain text.',
        "",
        "options (defaults shown):",
        f"  {listed_options(record)}",
        "  name: the model's name in the trace, that of conf/model (default: the last part of model, in small letters)",
        "  sampling: greedy, or temperature=0.8 and the like; lookahead: layers ahead of the pre-gate, 0 for none",
        "  lookahead_top: candidates listed for each (default: twice top-k), or all; chat: wrap texts as user messages",
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
    options = parse_options("record", record, args.options, ZERO_ALLOWED)
    for key in REQUIRED:
        if key not in options:
            raise TraceError(f"option {key} is missing; write {key}=…")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        try:
            print(record(progress, **options))
        except KeyboardInterrupt:
            if folder_of(Path(options["out"])).is_dir():
                kept = f"python -m traces record --recover {options['out']}"
                print(f"interrupted; what was whole is kept: {kept}", file=sys.stderr)
            raise
    return 0


def record(
    progress: Progress | None = None,
    *,
    model: str,
    prompts: str,
    out: str,
    name: str = "",
    max_new_tokens: int = 128,
    batch_size: int = 1,
    sampling: str = "greedy",
    seed: int = 0,
    max_prompts: int = 0,
    chat: bool = False,
    lookahead: int = 2,
    lookahead_top: str = "",
    logits: bool = False,
    embedding_dims: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    license: str = "unknown",
) -> str:
    """Record the prompts into the trace `out`; what to tell the user, several lines.

    max_prompts 0: all. embedding_dims 0: none. ValueError names the option, or file and line, at fault. An
    interrupted recording is finished with `TraceWriter.recover`.
    """
    temperature = _temperature(sampling)
    if dtype not in _DTYPES:
        raise TraceError(f"option dtype={dtype} is unknown; choose one of {', '.join(_DTYPES)}")
    full = lookahead_top == "all"
    num_listed = 0 if full or not lookahead_top else _whole("lookahead_top", lookahead_top)
    texts = list(itertools.islice(_read_prompts(Path(prompts)), max_prompts or None))
    if not texts:
        raise fault(prompts, "file", "holds no prompt", "write one a line")
    _check_output(Path(out))
    network, tokenize = _load(model, dtype, device, chat)

    from traces.recorder.generate import PROJECTION_SEED, Projection, Prompt, Sampling, record_batches
    from traces.recorder.locate import locate
    from traces.recorder.lookahead import Recall
    from traces.recorder.recording import Recording

    located = locate(network)
    if lookahead >= len(located.taps):
        most = len(located.taps) - 1
        raise TraceError(f"option lookahead={lookahead} reaches past the model; its {most + 1} MoE layers allow {most}")
    tokens = [tokenize(line, text) for line, text in texts]
    _check_tokens(prompts, network.config, [(line, ids) for (line, _), ids in zip(texts, tokens, strict=True)],
                  max_new_tokens)  # fmt: skip
    asked = [
        Prompt(tuple(ids), text.get("label") or f"line {line}") for (line, text), ids in zip(texts, tokens, strict=True)
    ]

    def make_recording(on_forward: Callable[[Any], None]) -> Recording:
        return Recording(
            network, located.taps, num_experts=located.num_experts, top_k=located.top_k, lookahead=lookahead,
            full=full, num_listed=num_listed, logits=logits, on_forward=on_forward,
        )  # fmt: skip

    make_recording(lambda rows: None)  # Refuses bad sizes before a file is begun.
    project = Projection(network.get_input_embeddings(), embedding_dims) if embedding_dims else None
    header = {
        "capture": "hooks on a Hugging Face model (traces.recorder)", "source_model": Path(model).name,
        "architecture": type(network).__name__, "dtype": str(network.dtype).removeprefix("torch."),
        "sampling": sampling, "max_new_tokens": str(max_new_tokens), "seed": str(seed),
        "batch_size": str(batch_size), "prompts": Path(prompts).name,
    }  # fmt: skip
    if project is not None:
        drawn = f"standard_normal of NumPy's default_rng({PROJECTION_SEED}), over sqrt({embedding_dims})"
        header["embedding_projection"] = f"input embeddings × {drawn}"
    recall = Recall(len(located.taps), lookahead) if lookahead else None
    task = progress.add_task("recording", total=len(asked)) if progress is not None else None
    with TraceWriter(
        out, model=name or Path(model).name.lower(), num_experts=located.num_experts, license=license,
        source=f"recorded from {Path(model).name}", moe_layer_ids=located.moe_layer_ids, **header,
    ) as writer:  # fmt: skip
        how = Sampling(max_new_tokens, temperature, seed)
        for answer in _in_memory(record_batches(network, make_recording, iter(asked), batch_size, how)):
            if recall is not None:
                recall.add(answer.rows.hits, answer.rows.arrays["experts"])
                writer.variant = recall.best()
                writer.header |= _pregate_header(recall)
            arrays = dict(answer.rows.arrays)
            if project is not None:
                arrays["embedding"] = project(answer.token_ids)
            writer.append(
                prompt_len=len(answer.prompt.tokens), context_len=0, label=answer.prompt.label,
                token_ids=answer.token_ids, forward_id=answer.forward_id, **arrays,
            )  # fmt: skip
            if progress is not None and task is not None:
                progress.advance(task)
    lines = [f"wrote {out}: {writer.num_requests} requests, {writer.num_tokens} tokens × {len(located.taps)} layers"]
    if recall is not None:
        lines.append(_recall_table(recall, located.top_k))
    return "\n".join(lines)


def _in_memory(answers: Iterator[Any]) -> Iterator[Any]:
    """The answers; a device that is too small is the user's to know of, not a fault of ours."""
    torch = importlib.import_module("torch")
    try:
        yield from answers
    except torch.OutOfMemoryError as error:
        problem = f"the device ran out of memory ({_first_line(error)})"
        raise TraceError(f"{problem}; lower batch_size or max_new_tokens, or shorten the prompts") from None


# -- options -------------------------------------------------------------------------------------------------


def _temperature(sampling: str) -> float:
    if sampling == "greedy":
        return 0.0
    key, _, text = sampling.partition("=")
    try:
        value = float(text) if key == "temperature" else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise TraceError(f"option sampling={sampling} must be greedy or temperature=<above 0, at most 100>")
    return value


def _whole(key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise TraceError(f"option {key}={text} must be a whole number from 1, or all")
    return int(text)


def _check_output(path: Path) -> None:
    """The faults that TraceWriter would find, before minutes are spent on loading a model."""
    if not path.parent.is_dir():
        raise fault(path, "file", f"the folder {path.parent} does not exist", "create it first")
    if path.is_dir():
        raise fault(path, "file", "is a folder", "name a file in it")


# -- prompts -------------------------------------------------------------------------------------------------


def _read_prompts(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, table with one of prompt, tokens, messages, and perhaps label) of each line that is not empty."""
    check_file(path)
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise fault(path, f"line {number}", "is longer than 16 MiB", "shorten it")
                if line.strip():
                    yield number, (_parsed(path, number, line) if path.suffix == ".jsonl" else {"prompt": line.strip()})
    except UnicodeDecodeError:
        raise fault(path, "file", "is not UTF-8 text", "give prompts in UTF-8") from None
    except OSError as error:
        raise fault(path, "file", f"cannot be read ({error.strerror})", "check the path and its rights") from None


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    place = f"line {number}"
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise fault(path, place, "is no JSON", "give a text, a list of token ids or an object a line") from None
    if isinstance(value, str):
        value = {"prompt": value}
    elif isinstance(value, list):
        value = {"tokens": value}
    if not isinstance(value, dict):
        value = {}
    known = {"prompt": str, "tokens": list, "messages": list}
    given = [key for key in known if key in value]
    if len(given) != 1 or not isinstance(value[given[0]], known[given[0]]):
        raise fault(path, place, "holds no prompt", f"give one of {', '.join(known)}")
    if not isinstance(value.get("label", ""), str):
        raise fault(path, place, "has a label that is no text", "write it in quotes")
    table: dict[str, Any] = value
    return table


def _check_tokens(path: str, config: Any, prompts: Sequence[tuple[int, list[int]]], max_new_tokens: int) -> None:
    text = config.get_text_config()
    size, longest = int(text.vocab_size), getattr(text, "max_position_embeddings", None)
    for line, ids in prompts:
        if not ids:
            raise fault(path, f"line {line}", "is an empty prompt", "give at least one token")
        wrong = next((t for t in ids if type(t) is not int or not 0 <= t < size), None)
        if wrong is not None:
            raise fault(path, f"line {line}", f"holds the token {str(wrong)[:40]}", f"ids are 0 … {size - 1}")
        if type(longest) is int and len(ids) + max_new_tokens > longest:
            problem = f"has {len(ids)} tokens, with max_new_tokens={max_new_tokens} more than the model's {longest}"
            raise fault(path, f"line {line}", problem, "shorten it, or lower max_new_tokens")


# -- model ---------------------------------------------------------------------------------------------------


def _load(model: str, dtype: str, device: str, chat: bool) -> tuple[Any, Callable[[int, dict[str, Any]], list[int]]]:
    """The network in eval mode on its device, and what turns a prompt into token ids."""
    local = Path(model).is_dir()
    if not local and not _HUB_NAME.fullmatch(model):
        raise TraceError(f"option model={model} is no folder, and no name on the hub; check the path")
    if local:
        # Read when the hub's client is first imported: nothing may be fetched for a folder.
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise TraceError(f"recording needs {error.name}; install it: pip install 'expertflow[record]'") from None
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    place = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    safe: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        target = torch.device(place)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, **safe
        )
        network = network.to(target).eval()
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, AssertionError) as error:
        raise TraceError(f"model={model} on device={place} cannot be loaded ({_first_line(error)})") from None
    loaded: list[Any] = []

    def tokenize(line: int, prompt: dict[str, Any]) -> list[int]:
        if "tokens" in prompt:
            return list(prompt["tokens"])
        try:
            if not loaded:
                loaded.append(transformers.AutoTokenizer.from_pretrained(model, **safe))
            messages = prompt.get("messages")
            if messages is None and chat:
                messages = [{"role": "user", "content": prompt["prompt"]}]
            if messages is None:
                return list(loaded[0](prompt["prompt"])["input_ids"])
            text = loaded[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(loaded[0](text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # A tokenizer, and the template of a model, may fail in any way.
            problem = f"prompt of line {line}: cannot be turned into tokens ({_first_line(error)})"
            raise TraceError(f"{problem}; give token ids in a .jsonl file, or a model with a tokenizer") from None

    return network, tokenize


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# -- recall --------------------------------------------------------------------------------------------------


def _pregate_header(recall: Any) -> dict[str, str]:
    """Which pre-gate the trace holds, and how good both were."""
    table = {kind: [round(value, 4) for value in values] for kind, values in recall.by_distance().items()}
    return {"pregate": recall.best(), "pregate_recall": json.dumps(table)}


def _recall_table(recall: Any, top_k: int) -> str:
    table, best = recall.by_distance(), recall.best()
    width = max(len(kind) for kind in table) + len(" (kept)")
    distances = range(1, recall.distances + 1)
    lines = [f"{f'recall@{top_k}':<{width}}" + "".join(f"{f'd={d}':>9}" for d in distances)]
    for kind, values in table.items():
        shown = f"{kind} (kept)" if kind == best else kind
        lines.append(f"{shown:<{width}}" + "".join(f"{value:9.1%}" for value in values))
    return "\n".join(lines)
