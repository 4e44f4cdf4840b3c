"""Prompts from a file, one a line: untrusted text, which is parsed and whose token ids are checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from traces.container import fault
from traces.jsontext import parse_json
from traces.reading import text_lines

_MAX_LINE = 16 << 20


def read_prompts(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, table with one of prompt, tokens, messages, and perhaps label) of each line that is not empty."""
    for number, line in text_lines(path, "give prompts in UTF-8", _MAX_LINE):
        if line.strip():
            yield number, (_parsed(path, number, line) if path.suffix == ".jsonl" else {"prompt": line.strip()})


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    place = f"line {number}"
    value: Any = parse_json(path, place, line, "give a text, a list of token ids or an object a line")
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


def check_tokens(path: str, config: Any, prompts: Sequence[tuple[int, list[int]]], max_new_tokens: int) -> None:
    """TraceError where a prompt, (line, ids), is empty, holds an id the model lacks, or is too long for it."""
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
