"""`python -m sim.model PATH`: a model's file as a file of conf/model, with what was derived and what was assumed.

PATH: a Hugging Face config.json, the folder that holds it, or a GGUF file. Prints the YAML, or writes it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from expertflow.keys import REQUIRED, declared, plain
from expertflow.model import ModelSpec
from sim.job.run_cli import run_cli
from sim.specs.model_file import ReadModel, read_model_file
from traces.files import replace_text
from traces.flags import Parser
from traces.messages import fault

_WIDTH = 116


def as_yaml(found: ReadModel, named: str | None = None) -> str:
    """The text of a file of conf/model: every key that is not at its default, and the remarks as comments.

    named: the model's name, where that is not to be the one that was read.
    """
    lines = [f"# {line}" for line in _remarks(found)]
    spec = found.spec if named is None else replace(found.spec, name=named)
    for name, key in declared(ModelSpec).items():
        value = getattr(spec, name)
        if key.default is REQUIRED or value != key.default:
            lines.append(f"{name}: {_sizes_text(value)}" if isinstance(value, tuple) else _line(name, value))
    return "\n".join(lines) + "\n"


def _line(name: str, value: object) -> str:
    return yaml.safe_dump({name: value}, width=1000, allow_unicode=True).rstrip("\n")


def _sizes_text(value: tuple[object, ...]) -> str:
    """A list in one line, or in a line for each that is a list itself."""
    texts = [f"[{', '.join(map(str, one))}]" if isinstance(one, tuple) else str(one) for one in value]
    if not any(isinstance(one, tuple) for one in value):
        return f"[{', '.join(texts)}]"
    return "\n" + "\n".join(f"  - {text}" for text in texts)


def _remarks(found: ReadModel) -> Iterator[str]:
    kinds = (("incomplete", found.incomplete), ("derived", found.derived), ("assumed", found.assumed))
    for title, texts in kinds:
        for text in texts:
            yield plain(f"{title}: {text}", _WIDTH)


def summary(spec: ModelSpec) -> str:
    """What the model weighs, in a line."""
    heads = f", MTP heads beside {spec.mtp_bytes / 1e9:.2f} GB" if spec.mtp_bytes and not spec.mtp else ""
    return (
        f"{spec.num_layers} MoE layers of {spec.num_experts} experts, {spec.top_k} a token; an expert takes "
        f"{_expert_size(spec)} MB, all {spec.total_expert_bytes / 1e9:.1f} GB, the rest "
        f"{spec.non_expert_bytes / 1e9:.2f} GB{heads}; {spec.num_params / 1e9:.2f} G weights"
    )


def _expert_size(spec: ModelSpec) -> str:
    """MB of an expert, least and most where they differ."""
    sizes = spec.bytes_by_key
    if sizes is None:
        return f"{spec.mean_expert_bytes / 1e6:.2f}"
    return f"{min(sizes) / 1e6:.2f} to {max(sizes) / 1e6:.2f}"


def _parser() -> Parser:
    parser = Parser(prog="python -m sim.model", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="a config.json, its folder, or a GGUF file")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the YAML there, as the model FILE without suffix; a file that is there already stays",
    )
    parser.add_argument("--overwrite", action="store_true", help="but overwrite it")
    return parser


def run(args: Namespace) -> int:
    """Read, print or write."""
    found = read_model_file(Path(args.path))
    for text in found.incomplete:
        print(f"incomplete: {text}", file=sys.stderr)
    if args.out is None:
        sys.stdout.write(as_yaml(found))
        print(summary(found.spec), file=sys.stderr)
        return 0
    path = Path(args.out)
    if path.exists() and not args.overwrite:
        raise fault(path, "file", "is there already", "choose another name, or add --overwrite")
    # model=NAME finds the file by its name, and so results call the model.
    text = as_yaml(found, path.stem or None)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    print(f"{summary(found.spec)}; written to {path}")
    return 0


def main(words: list[str] | None = None) -> int:
    """Command line."""
    args = _parser().parse_args(words)
    return run_cli(lambda: run(args), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
