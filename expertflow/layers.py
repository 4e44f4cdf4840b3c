"""The layers of a model, by two patterns of letters: what each attends to, and what follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from expertflow.attention import CHUNKED, FULL, HEAVY, INDEXED, LINEAR, SHARED_INDEX, SPARSE, WINDOWED
from expertflow.keys import shown

MOE = "m"
DENSE = "d"
BARE = "n"
FEEDS = MOE + DENSE + BARE
"""Letters of `ModelSpec.feed_pattern`."""
_NEEDED = (
    ("window", WINDOWED + SPARSE + HEAVY),
    ("chunk", CHUNKED),
    ("sparse_ratio", SPARSE),
    ("heavy_ratio", HEAVY),
    ("linear_params", LINEAR),
    ("index_top_k", INDEXED + SHARED_INDEX + SPARSE),
)
"""A key, and the kinds of layers of which each needs it."""
_USED = (
    *((f"window_{name}", WINDOWED) for name in ("heads", "kv_heads", "head_dim", "kv_rank", "nope_dim", "v_dim")),
    ("linear_state", LINEAR),
)
"""A key, and the kinds of layers that may use it."""
_OF_KINDS = (
    ("index_bits", 16.0, INDEXED + SPARSE),
    ("index_block", 1, INDEXED),
    ("state_bits", 32.0, LINEAR),
    ("tied_kv", False, FULL + INDEXED + SHARED_INDEX + CHUNKED + SPARSE + HEAVY),
    ("extra_attention_params", 0, FULL + INDEXED + SHARED_INDEX + WINDOWED + CHUNKED + SPARSE + HEAVY),
)
"""A key, its default, and the kinds of layers without which another value would change nothing."""


class Layer(NamedTuple):
    """A layer by its letters: the kind of its attention, and of its feed-forward block."""

    attention: str
    feed: str


class Patterns(Protocol):
    """Numbers and patterns of a model's layers: keys of `expertflow.model.ModelSpec`."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_dense_layers(self) -> int: ...

    @property
    def num_bare_layers(self) -> int: ...

    @property
    def attention_pattern(self) -> str: ...

    @property
    def feed_pattern(self) -> str | None: ...

    @property
    def index_top_k(self) -> int: ...


def layers_of(model: Patterns) -> tuple[Layer, ...]:
    """Every layer, in the order in which a token passes them."""
    num_dense, num_bare, num_moe = model.num_dense_layers, model.num_bare_layers, model.num_layers
    total = num_dense + num_bare + num_moe
    feeds = DENSE * num_dense + BARE * num_bare + MOE * num_moe
    if model.feed_pattern is not None:
        feeds = _repeated(model.feed_pattern, total)
    return tuple(map(Layer, _repeated(model.attention_pattern, total), feeds))


def check_layers(model: Patterns) -> None:
    """ValueError, one line that names the key, where patterns, numbers of layers and what layers need do not fit."""
    if model.feed_pattern is not None:
        found = Counter(layer.feed for layer in layers_of(model))
        for letter, key in ((MOE, "num_layers"), (DENSE, "num_dense_layers"), (BARE, "num_bare_layers")):
            if found[letter] != getattr(model, key):
                raise ValueError(
                    f"model.feed_pattern gives {found[letter]} layers {letter} of {found.total()}, and "
                    f"model.{key}={getattr(model, key)}; change one of them"
                )
    there = {layer.attention for layer in layers_of(model)}
    for key, letters in _NEEDED:
        need = sorted(set(letters) & there)
        if need and not getattr(model, key):
            raise ValueError(f"model.{key}=0, and attention_pattern has layers {need[0]}, which need it; give it")
    for key, letters in (*_NEEDED, *_USED):
        if getattr(model, key) and not set(letters) & there:
            raise ValueError(
                f"model.{key}={shown(getattr(model, key))} is of layers {' or '.join(letters)}, and attention_pattern "
                "has none; change one of them"
            )
    _check_of_kinds(model, there)


def _check_of_kinds(model: Patterns, there: set[str]) -> None:
    for key, default, letters in _OF_KINDS:
        value = getattr(model, key)
        if value != default and not set(letters) & there:
            raise ValueError(
                f"model.{key}={shown(value)} changes nothing: it is of layers {' or '.join(letters)}, and "
                "attention_pattern has none; leave it out, or change the pattern"
            )


def with_pattern(values: Mapping[str, object]) -> Mapping[str, object]:
    """`values` with attention_pattern in place of the former window_every."""
    if "window_every" not in values:
        return values
    if "attention_pattern" in values:
        raise ValueError("model.window_every is called attention_pattern now, which is given, too; leave it out")
    every, num_dense, num_moe = (values.get(key, 0) for key in ("window_every", "num_dense_layers", "num_layers"))
    rest = {key: value for key, value in values.items() if key != "window_every"}
    if not all(type(one) is int and 0 <= one <= 10_000 for one in (every, num_dense, num_moe)):
        raise ValueError(f"model.window_every={shown(every)} must be a whole number; say model.attention_pattern=wf")
    return {**rest, "attention_pattern": _pattern(every, num_dense, num_moe)}  # type: ignore[arg-type]


def _pattern(every: int, num_dense: int, num_moe: int) -> str:
    """Dense layers first, all full; then a windowed layer every so many, from the first (0: none)."""
    if not every:
        return FULL
    moe = WINDOWED + FULL * (every - 1)
    return FULL * num_dense + _repeated(moe, num_moe) if num_dense else moe


def _repeated(pattern: str, length: int) -> str:
    """The first `length` letters of a pattern that is repeated."""
    return (pattern * -(-length // len(pattern)))[:length]
