"""Words of a command line as they are meant; and those of which one would be ignored, or which say something else than
they seem to, refused before anything is composed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from expertflow.expert_sizes import BY_BITS
from sim.job.keys import CHOSEN_BY_NAME, STORAGE

_WORD = re.compile(r"[+~]*([\w./-]+)(?:@[\w.:@/]*)?=(.*)", re.DOTALL)
_PAIR = re.compile(r"speculate=([^\[\],]+,[^\[\],]+)")
_SHOWN = 60
_SWEEP = ("-m", "--multirun")
_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c")
"""Flags of Hydra whose value is the next word."""


def _given(words: Iterable[str]) -> list[tuple[str, str]]:
    return [(match[1], match[2].strip()) for match in map(_WORD.fullmatch, words) if match]


def check_twice(words: Sequence[str]) -> None:
    """ValueError for a key that is given two values: Hydra takes the last. Of a group it says so itself."""
    seen: dict[str, str] = {}
    for key, value in _given(words):
        before = seen.setdefault(key, value)
        if before != value and key not in CHOSEN_BY_NAME and "/" not in key:
            name = key[:_SHOWN]
            raise ValueError(
                f"{name}={before[:_SHOWN]} and {name}={value[:_SHOWN]}: {name} is given twice; leave one out "
                "(to run both: -m and a comma list)"
            )


def check_trace_words(words: Sequence[str]) -> None:
    """ValueError for a trace that is named beside one whose file is given, which takes its place."""
    given = dict(_given(words))
    name, path = given.get("trace"), given.get("trace.path")
    if name is not None and name != "default" and path is not None:
        raise ValueError(f"trace={name[:_SHOWN]} and trace.path={path[:_SHOWN]} are two traces; leave one out")


def check_stack_words(words: Sequence[str]) -> None:
    """ValueError for an overhead that is given beside what it is solved from."""
    given = dict(_given(words))
    tpot = given.get("stack.resident_tpot_ms", "null")
    for key in ("stack.layer_overhead_ns", "stack.head_overhead_ns"):
        if tpot != "null" and key in given:
            raise ValueError(
                f"stack.resident_tpot_ms={tpot[:_SHOWN]} and {key}={given[key][:_SHOWN]} both say the stack's "
                "overhead; leave one out"
            )


def check_batch_words(words: Sequence[str]) -> None:
    """ValueError for a size of prefill chunks beside forwards that are taken as they were recorded."""
    given = dict(_given(words))
    if given.get("batch_size") == "as_recorded" and "prefill_chunk" in given:
        raise ValueError(
            f"prefill_chunk={given['prefill_chunk'][:_SHOWN]} means nothing with batch_size=as_recorded, whose prompts "
            "are cut as they were; leave one out"
        )


def check_absent_words(words: Sequence[str]) -> None:
    """ValueError for a key of a file that a run has only where it is added, and no word adds it: Hydra's composition,
    where a sweep may choose the file later, would leave it out without a word."""
    given = dict(_given(words))
    for key, value in given.items():
        group, dot, name = key.partition(".")
        told = f"{key[:_SHOWN]}={value[:_SHOWN]}"
        if dot and group == STORAGE and STORAGE not in given:
            raise ValueError(
                f"{told} is of a storage below host memory, and there is none; add +{STORAGE}=NAME and "
                "host_memory_gb=GB, or leave it out"
            )
        if dot and group == "host":
            raise ValueError(
                f"{told}: a file of host fills in keys of the hardware, and has none of its own; say "
                f"hardware.{name[:_SHOWN]}={value[:_SHOWN]}"
            )


def prepared(words: Sequence[str]) -> list[str]:
    """The words as Hydra takes them: flags before all keys, and the home folder in place of a ~ that no shell expands
    behind a key; the pair of speculate in brackets."""
    sweep, flags, keys = [], [], []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word in _SWEEP:
            sweep.append(word)
        elif word.startswith("-"):
            has_value = word in _WITH_VALUE and waiting and not waiting[0].startswith("-")
            flags += [word, waiting.pop(0)] if has_value else [word]
        else:
            keys.append(_as_pair(_at_home(word)))
    return [*sweep[:1], *flags, *keys]


def _as_pair(word: str) -> str:
    """The two numbers of speculate as the list that they are: to Hydra a bare comma is a sweep."""
    match = _PAIR.fullmatch(word)
    return word if match is None else f"speculate=[{match[1]}]"


def _at_home(word: str) -> str:
    key, sign, value = word.partition("=")
    if not sign or not value.startswith("~/"):
        return word
    try:
        path = str(Path(value).expanduser())
    except RuntimeError:
        return word
    return f"{key}={QuotedString(path, Quote.single).with_quotes()}"


def check_folders(words: Sequence[str], sweep: bool) -> None:
    """ValueError for the output folder of a sweep given to a single run, or the other way round."""
    wrong, right = ("run", "sweep") if sweep else ("sweep", "run")
    for key, value in _given(words):
        if key == f"hydra.{wrong}.dir" and "hydra.mode" not in dict(_given(words)):
            flag = "with -m" if sweep else "without -m"
            raise ValueError(f"{key}={value[:_SHOWN]} means nothing {flag}; say hydra.{right}.dir={value[:_SHOWN]}")


def check_model_words(words: Sequence[str]) -> None:
    """ValueError for a file where the name of a model belongs, for bytes of an expert beside its bits, and for those of
    heads that are not loaded."""
    given = dict(_given(words))
    bits, size = given.get("model.expert_bits"), given.get("model.expert_bytes", "null")
    if bits is not None and size not in ("null", BY_BITS):
        raise ValueError(
            f"model.expert_bits={bits[:_SHOWN]} and model.expert_bytes={size[:_SHOWN]} both say how large an expert "
            "is; leave one out"
        )
    if "model.mtp_bytes" in given and "model.mtp" not in given:
        raise ValueError(
            f"model.mtp_bytes={given['model.mtp_bytes'][:_SHOWN]} counts where heads are loaded; add model.mtp=true"
        )
    for key, value in _given(words):
        bare = value.strip("'\"")
        if key == "model" and bare.endswith((".gguf", ".json")):
            raise ValueError(
                f"model={value[:_SHOWN]} is a file, and model= takes a name; say model.path={value[:_SHOWN]}"
            )
