"""The options of `python -m traces record`, and what their texts mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from traces.container import TraceError


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What `record` may be told, as the command's `key=value` words.

    max_prompts 0: all. embedding_dims 0: none. lookahead_top: how many candidates are listed, `all`, or empty for
    twice top-k.
    """

    model: str
    prompts: str
    out: str
    name: str = ""
    max_new_tokens: int = 128
    batch_size: int = 1
    sampling: str = "greedy"
    seed: int = 0
    max_prompts: int = 0
    chat: bool = False
    lookahead: int = 2
    lookahead_top: str = ""
    logits: bool = False
    embedding_dims: int = 16
    dtype: str = "auto"
    device: str = "auto"
    license: str = "unknown"
    overwrite: bool = False

    def temperature(self) -> float:
        """Of the sampling, 0 = greedy. TraceError where it is neither greedy nor a temperature."""
        return _temperature(self.sampling)

    def num_listed(self) -> int | None:
        """How many candidates of the pre-gate are listed; 0 = twice top-k, None = all scores are stored."""
        if self.lookahead_top == "all":
            return None
        return _whole("lookahead_top", self.lookahead_top) if self.lookahead_top else 0


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
