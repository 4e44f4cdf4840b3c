"""Names of modules in a Hugging Face quantisation config, and the share of a model's weights that they speak of.

A name is that of a module, the end of one, a pattern with `*`, or a regular expression. None is matched against the
model's modules, which the config does not list: a name is cut into its words, and these tell the part and the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from expertflow.attention import LINEAR
from expertflow.layers import DENSE, MOE
from expertflow.model import ModelSpec

EXPERTS, ATTENTION, SHARED, FEED = "experts", "attention", "shared", "dense"
PARTS = (EXPERTS, ATTENTION, SHARED, FEED)
_MOST_ALTERNATIVES = 256
_GROUP = re.compile(r"\((?:\?:)?([^()]{0,200})\)")
_DIGITS = re.compile(r"\\d(?![+*{])|\[(\d)-(\d)\](?![+*{])|\[(\d{1,10})\](?![+*{])")
_NUMBERS = re.compile(r"(?:\\d|\[0-9\])[+*]|\.[*+]")
_WORD = re.compile(r"[a-z_][a-z0-9_]*|\d+")
_LAYER = re.compile(r"(?:^|[._])(?:layers?|h|blocks?)\.(\d{1,6})(?![\d*])")
_EXPERT_NUMBER = re.compile(r"experts?\.(\d{1,6})(?!\d)")

_ELSEWHERE = re.compile(
    r"visual|vision|^vit$|audio|image|img|video|speech|siglip|^mm_|^multi_?modal|projector|aligner|connector|"
    r"resampler|talker|code2wav|^mtp|nextn|^eh_proj$|shared_head|embed|lm_head|^output_layer$|router|^gate$|^indexer$"
)
"""A word that puts a name outside the matrices of layers: other inputs, tokens ahead, both ends, routers. An indexer is
among them, since it is a small part of its layer's attention."""
_SMALL = re.compile(
    r"norm\d?$|bias$|conv1d$|._conv$|gate$|sinks?$|scales?$|^a_log$|^d$|^in_proj_(a|b|ba)$|^b_proj$|^weights_proj$"
)
"""The last word of what quantisers leave alone and no size depends on."""
_SHARED = re.compile(r"(^|_)shared")
_EXPERTS = re.compile(r"expert|(^|_)moe$")
_FEED = re.compile(r"(^|_)(gate|up|down|gate_up)_proj$|^w[123]$")
_ATTENTION = re.compile(
    r"attn|attention|^mixer$|mamba|^conv$|^(q|k|v|o|qkv|out|kv)_proj$|^qkv$|^w[qkvo](_|$)|^(q|kv)_[ab]_proj|"
    r"^in_proj(_qkvz?|_z)?$"
)
_BLOCK = re.compile(r"(^|_)(mlp|ffn|feed_?forward)$")
_OF_LINEAR = re.compile(r"linear_attn|mamba|^conv$")


class Named(NamedTuple):
    """What a name speaks of. layer, expert: its number; None: all. linear: only of layers with linear attention, or
    only of others; None: of both."""

    parts: tuple[str, ...]
    layer: int | None = None
    expert: int | None = None
    linear: bool | None = None


def named(name: str) -> list[Named]:
    """What a name, a pattern of names or a regular expression speaks of: nothing, or an entry for each alternative."""
    found = []
    for one in _alternatives(name):
        parts, linear = _parts(re.sub(r"\d{2,}", "0", one))
        if parts:
            found.append(Named(parts, _number(_LAYER, one), _number(_EXPERT_NUMBER, one), linear))
    return found


def _number(rule: re.Pattern[str], text: str) -> int | None:
    match = rule.search(text)
    return None if match is None else int(match[1])


def is_readable(name: str) -> bool:
    """Whether the words of a name tell of what it means: a look-ahead says what it does not."""
    return "(?!" not in name and "(?<" not in name


def _alternatives(name: str) -> Sequence[str]:
    """The texts that a regular expression with groups of alternatives stands for, in small letters, dots unescaped."""
    text = _NUMBERS.sub("*", name.lower().removeprefix("re:").removeprefix("-:"))
    if "[" in text or "\\" in text:
        text = _DIGITS.sub(_as_group, text).replace("\\.", ".").replace("\\", "")
    found = [text]
    while any("(" in one for one in found):
        wider: list[str] = []
        for one in found:
            group = _GROUP.search(one)
            if group is None:
                wider.append(one.replace("(", " "))
            else:
                wider += [one[: group.start()] + choice + one[group.end() :] for choice in group[1].split("|")]
        # Groups within groups give some texts more than once.
        wider = list(dict.fromkeys(wider))
        if len(wider) > _MOST_ALTERNATIVES:
            return [one.replace("(", " ") for one in found]
        found = wider
    return found


def _as_group(match: re.Match[str]) -> str:
    first, last, given = match.groups()
    digits = given or "".join(str(digit) for digit in range(int(first or 0), int(last or 9) + 1))
    return f"({'|'.join(digits)})"


@lru_cache(maxsize=4096)
def _parts(text: str) -> tuple[tuple[str, ...], bool | None]:
    """The parts of a layer that a name speaks of, and `Named.linear`."""
    words: list[str] = _WORD.findall(text)
    while words and words[-1] in ("weight", "weights", "linear", "base_layer"):
        words.pop()
    plain = [word for word in words if not word.isdecimal()]
    if not plain or any(_ELSEWHERE.search(word) for word in plain) or _SMALL.search(plain[-1]):
        return (), None
    if re.fullmatch(r"layers?|h|blocks?", plain[-1]):
        return PARTS, None

    def has(rule: re.Pattern[str]) -> bool:
        return any(rule.search(word) for word in plain)

    if has(_SHARED):
        return (SHARED,), None
    if _BLOCK.search(plain[-1]) or re.search(r"(^|_)moe$", plain[-1]):
        return (EXPERTS, SHARED, FEED), None
    if has(_EXPERTS):
        return (EXPERTS,), None
    if has(_FEED):
        return (FEED,), None
    if has(_ATTENTION):
        return (ATTENTION,), has(_OF_LINEAR) or (None if "self_attn" not in plain else False)
    return ((FEED,) if has(_BLOCK) else ()), None


class LeftOut:
    """The share of each part that names speak of, by weights, over the layers of `model`."""

    def __init__(self, model: ModelSpec, num_layers: int, names: Iterable[str]) -> None:
        """num_layers: of the file, which counts some layers otherwise than `model` (two blocks of LongCat as one)."""
        self._model = model
        self._marked: dict[str, dict[int, float]] = {part: {} for part in PARTS}
        experts: dict[int | None, set[int]] = {}
        # Each once: a list has up to a million names.
        for one in {found for name in names for found in named(name)}:
            if EXPERTS in one.parts and one.expert is not None:
                if one.expert < model.num_experts:
                    experts.setdefault(one.layer, set()).add(one.expert)
                continue
            for at in self._layers(one, num_layers):
                for part in one.parts:
                    self._marked[part][at] = 1.0
        for layer, numbers in experts.items():
            share = len(numbers) / model.num_experts
            for at in self._layers(Named((EXPERTS,), layer), num_layers):
                self._marked[EXPERTS][at] = max(share, self._marked[EXPERTS].get(at, 0.0))

    def _layers(self, one: Named, num_layers: int) -> Iterable[int]:
        count = len(self._model.layers)
        if one.layer is not None:
            if one.layer >= num_layers:  # of multi-token prediction
                return ()
            first = one.layer * count // num_layers
            return range(first, max(first + 1, (one.layer + 1) * count // num_layers))
        if one.linear is None or LINEAR not in self._model.num_of:
            return range(count)
        return (at for at, layer in enumerate(self._model.layers) if (layer.attention == LINEAR) == one.linear)

    def weights(self) -> dict[str, tuple[float, float]]:
        """Of each part: its weights, and how many of them are left out."""
        model = self._model
        found = dict.fromkeys(PARTS, (0.0, 0.0))
        for at, layer in enumerate(model.layers):
            sizes = {ATTENTION: model.mixer_params(layer.attention)}
            if layer.feed == MOE:
                sizes |= {EXPERTS: model.num_experts * model.expert_params, SHARED: model.shared_params}
            elif layer.feed == DENSE:
                sizes[FEED] = model.dense_params
            for part, size in sizes.items():
                share = self._marked[part].get(at, 0.0)
                if part == SHARED and not model.num_dense_layers:
                    # The dense block beside the experts (Gemma 4) counts as a shared expert.
                    share = max(share, self._marked[FEED].get(at, 0.0))
                found[part] = (found[part][0] + size, found[part][1] + size * share)
        return found
