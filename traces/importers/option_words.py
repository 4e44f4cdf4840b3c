"""What the option words of `python -m traces import` mean, and the list of them in its help."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping

MEANINGS: Mapping[str, str] = {
    "context": "true: keep the position at which each request's first token stands, as context_len",
    "dense_layers": "how many layers without experts lead; they are left out",
    "expert": "column of experts: lists, several columns with commas between, or one expert a row",
    "fields": "of format=binary: NAME:TYPE with commas between, such as token:u4,layer:u2,expert:u2*8",
    "format": "of the file, where its suffix does not tell",
    "incomplete": "prompt tokens that lack a layer: drop counts them as context, repeat takes the next token's",
    "keep_all": "true: also requests that repeat themselves or did not finish",
    "layer": "column of the layer",
    "license": "of the recording, for the header",
    "model": "what was recorded: a model that `expertflow sim --help` lists, or one of your own",
    "num_experts": "routed experts a layer",
    "num_layers": "layers of the model, dense ones too",
    "phase": "moe-beyond-csv: prefill or decode, what all rows are; table: column of 0 or prefill, 1 or decode",
    "positions": "true: token= counts from the beginning of the context, not of the request",
    "prefill_phase": "0 or 1, the number that stands for prefill",
    "prompt_len": "how many tokens of each request are its prompt",
    "rank": "megatron, sglang-recorder: only this rank (-1: all); table: column that orders experts",
    "request": "column that tells requests apart",
    "split": "train or eval: the published halves; other: what is in neither; all",
    "step": "column of the forward's number",
    "token": "column of the token's number in its request",
    "top_k": "experts a token chooses in a layer, where the file does not tell",
    "weight": "column, or columns, of gate weights",
}
"""By option, in the order of the alphabet."""
_LEAST, _MOST = 80, 120
"""Characters of a line, whatever the terminal says."""


def help_width() -> int:
    """Characters of a line of help in this terminal."""
    return min(max(shutil.get_terminal_size().columns, _LEAST), _MOST)


def described(options: Mapping[str, str], examples: Iterable[str], width: int) -> str:
    """The epilog of the help: options by kind, what each means, and examples. options: kind -> its words."""

    def block(lines: Iterable[str]) -> list[str]:
        return [
            textwrap.fill(line, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
            for line in lines
        ]

    head = "options, by kind (defaults shown; those without one are read from the file if it has them):"
    return "\n".join(
        [
            textwrap.fill(head, width),
            *block(f"{kind}: {words}" for kind, words in options.items()),
            "",
            "what they mean:",
            *block(f"{name}=  {meaning}" for name, meaning in MEANINGS.items()),
            "",
            "examples:",
            *(_command(example, width) for example in examples),
        ]
    )


def _command(example: str, width: int) -> str:
    """A command over several lines, which a shell reads as one."""
    lines = textwrap.wrap(
        example,
        width - 2,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return " \\\n".join(lines)
