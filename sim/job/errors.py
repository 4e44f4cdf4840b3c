"""Users' errors as one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from expertflow.keys import near_to, nearest, shown
from sim.job.former_names import present_key, renamed
from sim.job.known import LISTED, no_key
from traces.messages import line, shortened, told, why

_DEEPEST_CAUSE = 1000
_ROOM = 150
"""Characters of a list of choices."""


def one_line(error: BaseException, remedy: str = "") -> str | None:
    """The message for a user, or None if the error is a mistake of ours and deserves its traceback.

    remedy: what helps, beside the usual, where the file system refuses what a command writes.
    """
    if isinstance(error, HydraException | OmegaConfBaseException):
        outgrown = _outgrown(error)
        return shortened(_hydra(error)) if outgrown is None else told(outgrown)
    if isinstance(error, yaml.YAMLError):
        return shortened(f"{_place(error)}: no YAML ({_first_line(str(error))}); mend the file")
    if isinstance(error, ValueError):
        return shortened(_value(_first_line(str(error) or type(error).__name__)))
    if isinstance(error, OSError) and error.filename:
        problem, usual = why(error)
        return line(str(error.filename), problem, f"{usual}, or {remedy}" if remedy else usual)
    if _is_lost_worker(error):
        return (
            "a worker process ended before its run had: it was killed, ran out of memory, or hung beyond timeout_s; "
            "finished runs are kept: the same command with skip_done=true goes on (a study goes on by itself)"
        )
    return told(error)


def _outgrown(error: BaseException) -> BaseException | None:
    """The want of memory or depth that the error of Hydra wraps, whose own text is then empty: aliases of YAML that
    stand for aliases unfold to more than any file holds."""
    seen = 0
    cause: BaseException | None = error
    while cause is not None and seen < _DEEPEST_CAUSE:
        if isinstance(cause, MemoryError | RecursionError):
            return cause
        cause, seen = cause.__cause__ or cause.__context__, seen + 1
    return None


def _is_lost_worker(error: BaseException) -> bool:
    """Whether a pool of processes has lost one; where nothing has loaded those, none has been lost."""
    pools = sys.modules.get("concurrent.futures.process")
    return pools is not None and isinstance(error, pools.BrokenProcessPool)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else text


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "a file of configuration" if mark is None else f"{mark.name}, line {mark.line + 1}"


def _value(text: str) -> str:
    """What Hydra and Python themselves say of a value, which is not for a user."""
    if text.startswith("Config group override must be"):
        return "a group such as +hardware= must be given the name of one file; see python -m sim --help"
    return text


def _hydra(error: BaseException) -> str:
    """Hydra says what and, on further lines, which choices there are: join them, and add the remedy it leaves out."""
    text = str(error)
    message = _first_line(text)
    found = re.search(r"Could not find '([\w./-]+)/([^'/]+)'", text)
    if found:
        return _no_such_choice(found[1], found[2], text)
    plus = re.search(r"Could not override '(hardware|policy)'", text)
    if plus:
        return f"{plus[1]} has no default to override; say +{plus[1]}=NAME, with the plus sign"
    if isinstance(error, OverrideParseException):
        word = shown(error.override)
        remedy = _quoted(error.override) or "give key=value, +group=NAME or key=[a,b] (in quotes)"
        return f"cannot read the override {word}; {remedy}"
    if text.startswith("Ambiguous value for argument"):
        word = message.partition("'")[2].rstrip("'")
        return f"{word} is a comma list: add -m to sweep over it, or give one value, or a list in brackets (in quotes)"
    twice = re.match(r"Multiple values for (\S+)\. ", message)
    if twice:
        return f"{twice[1]} is chosen twice; choose it once"
    gone = re.match(r"Could not delete from config\. '([^']+)'", message)
    if gone:
        return f"{gone[1]} cannot be taken out: it is not there, or null; leave it, or give it another value"
    if "An item is already at" in text:
        key = text.split("'")[1]
        return f"{key} exists already; leave out the plus sign: {key}=VALUE"
    laid = re.match(r"In '([^']+)': \w+ raised while composing config:\n([^\n]+)", text)
    if laid and "Cannot merge" in laid[2]:
        return f"{laid[1]}: a key holds a list or table where another file has the other ({laid[2]}); make them alike"
    return _of_a_value(error, message)


def _quoted(word: str | None) -> str:
    """What to write where the value needs quotes, for which Hydra looks itself; empty where these do not help."""
    key, sign, value = (word or "").partition("=")
    if not sign or not value or len(value) > 90 or value[0] in "'\"[{":
        return ""
    meant = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    try:
        OverridesParser.create().parse_override(meant)
    except HydraException:
        return ""
    return f'quote the value: "{meant}"'


def _of_a_value(error: BaseException, message: str) -> str:
    text, key = str(error), getattr(error, "full_key", None)
    words = message.rstrip(".")
    unknown = re.search(r"Could not override '([^']+)'", text)
    present = present_key(unknown[1]) if unknown else None
    if unknown and present:
        return renamed(unknown[1], present)
    if "nterpolation" in text:
        # Where Hydra itself resolves, it does not say of what; the command's words do.
        place = key or next((shown(word) for word in sys.argv[1:] if "${" in word), "")
        place = f"{place}: " if place and place not in words else ""
        return f"{place}{words}; an interpolation names a key or resolver that is there and not itself"
    if unknown:
        return no_key(unknown[1])
    if "Key '" in text or "not in struct" in str(error.__cause__ or ""):
        return f"{words}; {LISTED}"
    # Of what it cannot take in from a file Hydra says nothing, the error that it wraps does.
    wrapped = _first_line(str(error.__cause__ or "")) if not message else ""
    if wrapped:
        return f"a file of configuration cannot be read ({wrapped}); correct it"
    return f"{key}: {words}" if key and key not in words else message


def _joined(name: str) -> str:
    """A name without what stands between its words, which is easily left out."""
    return name.casefold().replace("-", "").replace("_", "").replace(".", "")


def _no_such_choice(group: str, name: str, text: str) -> str:
    """hardware=nosuch: what there is, the nearest first."""
    listed = re.search(r"Available options in '[^']+':\n((?:\t.*\n?)+)", text)
    options: Sequence[str] = [line.strip() for line in listed[1].splitlines()] if listed else []
    begun = [one for one in options if _joined(one).startswith(_joined(name))]
    if begun:
        # Of links the widest is meant: cards are made for it.
        begun = sorted(begun, key=lambda one: one != f"{name.casefold()}x16")
        hint = f" (did you mean {begun[0]}?)"
    else:
        hint = near_to(name, options)
    if (group, name) == ("hardware", "local"):
        hint = " in a simulation: local is the machine that a replay runs on (python -m replay)"
    first, others = ", ".join(begun), [one for one in options if one not in begun]
    rest = nearest(name, others, max(_ROOM - len(first), 40)) if others else ""
    told = f"{group}={name[:60]} does not exist{hint}; choose one of: {', '.join(filter(None, (first, rest)))}"
    return f"{told}; a file of yours: trace.path=FILE" if group == "trace" else told
