"""Users' errors as one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import re

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sim.job.former_names import present_key, renamed


def one_line(error: BaseException) -> str | None:
    """The message for a user, or None if the error is a mistake of ours and deserves its traceback."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra(error)
    if isinstance(error, OSError) and error.filename:
        remedy = "check the path, or choose an output folder with hydra.run.dir=FOLDER"
        return f"{error.filename}: {error.strerror}; {remedy}"
    if isinstance(error, ValueError | OSError | MemoryError):
        return _first_line(str(error) or type(error).__name__)
    return None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else text


def _hydra(error: BaseException) -> str:
    """Hydra says what and, on further lines, which choices there are: join them, and add the remedy it leaves out."""
    text = str(error)
    chain = error.__cause__
    message = _first_line(text)
    missing = re.search(r"Could not find '([\w./-]+)/([\w.@-]+)'", text)
    if missing:
        found = re.search(r"Available options in '[^']+':\n((?:\t.*\n?)+)", text)
        options = [line.strip() for line in found.group(1).splitlines()] if found else []
        near = difflib.get_close_matches(missing.group(2), options, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        if missing.groups() == ("hardware", "local"):
            hint = " in a simulation: local is the machine that a replay runs on (python -m replay)"
        return f"{missing.group(1)}={missing.group(2)} does not exist{hint}; choose one of: {', '.join(options)}"
    plus = re.search(r"Could not override '(hardware|policy)'", text)
    if plus:
        return f"{plus.group(1)} has no default to override; say +{plus.group(1)}=NAME, with the plus sign"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}; give key=value, +group=NAME or key=[a,b] (in quotes)"
    if "An item is already at" in text:
        key = text.split("'")[1]
        return f"{key} exists already; leave out the plus sign: {key}=VALUE"
    unknown = re.search(r"Could not override '([^']+)'", text)
    present = present_key(unknown.group(1)) if unknown else None
    if unknown and present:
        return renamed(unknown.group(1), present)
    if "Could not override" in text or "Key '" in text or "not in struct" in str(chain or ""):
        return f"{message.rstrip('.')}; unknown keys are refused: see conf/run.yaml for those there are"
    return message
