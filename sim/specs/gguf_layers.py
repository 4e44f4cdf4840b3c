"""How each block of a GGUF model mixes tokens: letters of `ModelSpec.attention_pattern`, heads, windows and states.

Whether a block attends, keeps a state or does neither is told by its tensors; which attention is windowed by the keys,
or, where llama.cpp has no key for it, by the architecture (src/models of llama.cpp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expertflow.attention import CHUNKED, FULL, GQA, INDEXED, LINEAR, MLA, NONE, SHARED_INDEX, WINDOWED
from sim.specs.gguf_format import REWRITE
from sim.specs.gguf_keys import GgufKeys
from sim.specs.gguf_tensors import Block
from sim.specs.index_keys import fp8_key_bits
from traces.messages import cut, fault

_WIDTH = 1_000_000
_LLAMA4_CHUNK = 8192
"""Of Llama 4: no key has it, and llama.cpp knows no other."""


@dataclass(frozen=True)
class _Period:
    """Of so many blocks all but one attend to a window: the last one, or the first."""

    blocks: int
    full_first: bool = False

    def windowed(self, block: int) -> bool:
        place = block % self.blocks
        return place > 0 if self.full_first else place < self.blocks - 1


_PERIODS = {
    "gpt-oss": _Period(2),
    "llama4": _Period(4),
    "exaone-moe": _Period(4),
    "afmoe": _Period(4),
    "cohere2moe": _Period(4),
    "smallthinker": _Period(4, full_first=True),
}
"""Of architectures whose windows llama.cpp knows without a key for which blocks have one."""

_KNOWN = {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_q_a", "attn_q_b"}
_KNOWN |= {"attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b"}
"""Matrices of attention that the formulas of a spec have."""


@dataclass(frozen=True)
class Attention:
    """pattern: a letter a block. fields: what it makes of the spec. told: what was computed."""

    pattern: str
    fields: dict[str, Any]
    told: tuple[str, ...]


def read_attention(keys: GgufKeys, blocks: Sequence[Block]) -> Attention:
    """The attention of all blocks; TraceError where keys and tensors disagree."""
    told: list[str] = []
    kind = MLA if any(block.has("attn_kv_a_mqa") for block in blocks) else GQA
    letters, fields = _letters(keys, blocks, told)
    fields["attention"] = kind
    fields |= _mla(keys, blocks) if kind == MLA else _gqa(keys, blocks, letters, told)
    fields |= _linear(keys, blocks, letters, told)
    fields |= _indexer(keys, letters, told)
    attending = [block for block, letter in zip(blocks, letters, strict=True) if letter not in (LINEAR, NONE)]
    if further := sorted(set().union(*(_matrices(block) for block in attending)) - _KNOWN):
        names = cut(", ".join(further), 80)
        told.append(f"of {names} the weights are counted, whatever else these matrices do is not modelled")
    return Attention("".join(letters), fields, tuple(told))


# -- kinds ---------------------------------------------------------------------------------------------------


def _letters(keys: GgufKeys, blocks: Sequence[Block], told: list[str]) -> tuple[list[str], dict[str, Any]]:
    """A letter a block, and the width of windows or chunks."""
    from gguf.constants import Keys

    letters = [_kind(block) for block in blocks]
    if INDEXED in letters:
        letters = [SHARED_INDEX if letter == FULL else letter for letter in letters]
    width = keys.whole(Keys.Attention.SLIDING_WINDOW, 0, default=0)
    chunked = keys.arch == "llama4" and (width > 0 or not keys.given(Keys.Attention.SLIDING_WINDOW))
    windowed = _windowed(keys, len(blocks)) if width or chunked else None
    if windowed is None:
        if width:
            told.append(f"the window of {width} tokens is left out: llama.cpp has none for {keys.arch}")
        return letters, {}
    letter = CHUNKED if chunked else WINDOWED
    found = [letter if own == FULL and inside else own for own, inside in zip(letters, windowed, strict=True)]
    if letter not in found:
        return found, {}
    return found, {"chunk": _LLAMA4_CHUNK} if chunked else {"window": width}


def _kind(block: Block) -> str:
    """By its tensors: blocks with a state may have queries and keys, too."""
    if block.part("linear").num_bytes:
        return LINEAR
    if block.has("indexer.attn_k"):
        return INDEXED
    return FULL if block.part("attention").weights else NONE


def _matrices(block: Block) -> set[str]:
    """Those of its attention, by name."""
    return {name for name, shape in block.shapes.items() if name.startswith("attn_") and len(shape) > 1}


def _windowed(keys: GgufKeys, num_blocks: int) -> Sequence[bool] | None:
    """Whether each block has a window; None where the architecture has none."""
    from gguf.constants import Keys

    name = Keys.Attention.SLIDING_WINDOW_PATTERN
    if keys.is_list(name):
        return [bool(value) for value in keys.of_blocks(name, num_blocks, 0, 1)]
    period = _PERIODS.get(keys.arch)
    if keys.given(name):
        period = _Period(keys.whole(name, 1), period.full_first if period else False)
    return None if period is None else [period.windowed(block) for block in range(num_blocks)]


# -- widths --------------------------------------------------------------------------------------------------


def _gqa(keys: GgufKeys, blocks: Sequence[Block], letters: Sequence[str], told: list[str]) -> dict[str, Any]:
    """Heads and their widths, and those of windowed blocks where they differ."""
    from gguf.constants import Keys

    names = Keys.Attention
    heads = keys.of_blocks(names.HEAD_COUNT, len(blocks), 0, _WIDTH)
    kv_heads = keys.of_blocks(names.HEAD_COUNT_KV, len(blocks), 0, _WIDTH, default=max(heads))
    hidden = keys.whole(Keys.LLM.EMBEDDING_LENGTH, 1, _WIDTH)
    default = hidden // max(*heads, 1)
    if keys.arch == "bailingmoe":  # the one that lets positions say how wide heads are
        default = keys.whole(Keys.Rope.DIMENSION_COUNT, 1, _WIDTH, default=max(default, 1))
    width = keys.whole(names.KEY_LENGTH, 1, _WIDTH, default=max(default, 1))
    value = keys.whole(names.VALUE_LENGTH, 1, _WIDTH, default=width)
    plain = (width, value)
    windowed = (
        keys.whole(names.KEY_LENGTH_SWA, 1, _WIDTH, default=width),
        keys.whole(names.VALUE_LENGTH_SWA, 1, _WIDTH, default=value),
    )
    groups: dict[bool, list[tuple[int, int]]] = {}
    for index, (letter, block) in enumerate(zip(letters, blocks, strict=True)):
        if letter in (LINEAR, NONE):
            continue
        group = letter == WINDOWED
        _check_keys(keys, index, block, kv_heads[index], windowed[0] if group else width)
        groups.setdefault(group, []).append((heads[index], kv_heads[index]))
    # A model of windows alone, or one without any attention, has the figures of all blocks.
    others = _most(groups.get(False) or groups.get(True) or [(max(heads), max(kv_heads))], told, "blocks")
    if False not in groups and True in groups:
        plain = windowed
    fields: dict[str, Any] = {"num_heads": others[0], "num_kv_heads": others[1], "head_dim": plain[0]}
    fields["v_dim"] = plain[1] if plain[1] != plain[0] else 0
    tied = [block.has("attn_k") and not block.has("attn_v") for block in _unwindowed(blocks, letters)]
    if tied and all(tied):
        fields["tied_kv"] = True
        told.append("one matrix gives keys and values of blocks without a window: they have no attn_v")
    if True in groups:
        own = _most(groups[True], told, "windowed blocks")
        differing = {"heads": (own[0], others[0]), "kv_heads": (own[1], others[1]), "head_dim": (windowed[0], plain[0])}
        fields |= {f"window_{key}": mine for key, (mine, other) in differing.items() if mine != other}
        if windowed[1] != (fields["v_dim"] or windowed[0]):
            fields["window_v_dim"] = windowed[1]
    return fields


def _unwindowed(blocks: Sequence[Block], letters: Sequence[str]) -> list[Block]:
    pairs = zip(letters, blocks, strict=True)
    return [block for letter, block in pairs if letter not in (WINDOWED, LINEAR, NONE)]


def _most(found: Sequence[tuple[int, int]], told: list[str], what: str) -> tuple[int, int]:
    """The heads and KV heads that most blocks have."""
    counted = Counter(found).most_common()
    if len(counted) > 1:
        least, most = min(found), max(found)
        told.append(
            f"{what} have {least[0]} to {most[0]} heads and {min(kv for _, kv in found)} to "
            f"{max(kv for _, kv in found)} KV heads; {counted[0][0][0]} and {counted[0][0][1]} of most are used"
        )
    return counted[0][0]


def _rows(block: Block, name: str) -> int:
    """Rows of one of its matrices; 0 if it has none of that name."""
    return (*block.shapes.get(name, ()), 0, 0)[1]


def _check_keys(keys: GgufKeys, index: int, block: Block, kv_heads: int, width: int) -> None:
    """TraceError where the matrix of the keys has other rows than the heads say."""
    shape = block.shapes.get("attn_k")
    if shape and shape[1:2] != (kv_heads * width,):
        problem = f"has the shape {list(shape)}, and by the keys {kv_heads} KV heads of width {width}"
        raise fault(keys.path, f"tensor 'blk.{index}.attn_k.weight'", problem, REWRITE)


def _mla(keys: GgufKeys, blocks: Sequence[Block]) -> dict[str, Any]:
    """Ranks and widths of latent attention. Files until April 2025 have the expanded widths as key_length itself."""
    from gguf.constants import Keys

    names = Keys.Attention
    rank = keys.whole(names.KV_LORA_RANK, 1, _WIDTH)
    rows = max(_rows(block, "attn_kv_a_mqa") for block in blocks)
    rope = keys.whole(Keys.Rope.DIMENSION_COUNT, 1, _WIDTH, default=rows - rank)
    expanded = keys.given(names.KEY_LENGTH_MLA)
    key_width = keys.whole(names.KEY_LENGTH_MLA if expanded else names.KEY_LENGTH, rope + 1, _WIDTH)
    for index, block in enumerate(blocks):
        shape = block.shapes.get("attn_kv_a_mqa")
        if shape and shape[1:2] != (rank + rope,):
            problem = f"has the shape {list(shape)}, and by the keys a rank of {rank} and {rope} with positions"
            raise fault(keys.path, f"tensor 'blk.{index}.attn_kv_a_mqa.weight'", problem, REWRITE)
    return {
        "num_heads": max(keys.of_blocks(names.HEAD_COUNT, len(blocks), 0, _WIDTH)),
        "kv_rank": rank,
        "rope_dim": rope,
        "nope_dim": key_width - rope,
        "v_dim": keys.whole(names.VALUE_LENGTH_MLA if expanded else names.VALUE_LENGTH, 1, _WIDTH),
        "q_rank": keys.whole(names.Q_LORA_RANK, 0, _WIDTH, default=0),
    }


# -- what stands beside --------------------------------------------------------------------------------------


def _linear(keys: GgufKeys, blocks: Sequence[Block], letters: Sequence[str], told: list[str]) -> dict[str, Any]:
    """Weights and state of blocks whose cache does not grow: their mean, and as llama.cpp allots the state."""
    chosen = [block for block, letter in zip(blocks, letters, strict=True) if letter == LINEAR]
    own = [block.part("attention") + block.part("linear") for block in chosen]
    if not own:
        return {}
    weights = [size.weights for size in own]
    if min(weights) != max(weights):
        told.append(f"blocks of linear attention have {min(weights):,} to {max(weights):,} weights; their mean is used")
    return {"linear_params": round(sum(weights) / len(weights)), "linear_state": _state(keys, len(blocks))}


def _state(keys: GgufKeys, num_blocks: int) -> int:
    """Values of a request's state in one block, convolution included (n_embd_s and n_embd_r of llama-hparams.cpp)."""
    from gguf.constants import Keys

    most = 1 << 24
    if keys.given(Keys.ShortConv.L_CACHE):
        return keys.whole(Keys.LLM.EMBEDDING_LENGTH, 1, _WIDTH) * (keys.whole(Keys.ShortConv.L_CACHE, 1, most) - 1)
    conv = keys.whole(Keys.SSM.CONV_KERNEL, 0, most, default=0)
    if keys.given(Keys.KDA.HEAD_DIM):
        width = keys.whole(Keys.KDA.HEAD_DIM, 1, _WIDTH)
        heads = max(keys.of_blocks(Keys.Attention.HEAD_COUNT, num_blocks, 0, _WIDTH))
        return width * heads * (width + 3 * max(conv - 1, 0))
    inner, state = (keys.whole(name, 1, most) for name in (Keys.SSM.INNER_SIZE, Keys.SSM.STATE_SIZE))
    groups = keys.whole(Keys.SSM.GROUP_COUNT, 0, most, default=0)
    return state * inner + max(conv - 1, 0) * (inner + 2 * groups * state)


def _indexer(keys: GgufKeys, letters: Sequence[str], told: list[str]) -> dict[str, Any]:
    """What chooses the tokens that latent attention reads (DeepSeek-V3.2)."""
    from gguf.constants import Keys

    names = Keys.Attention.Indexer
    if INDEXED not in letters:
        return {}
    dim = keys.whole(names.KEY_LENGTH, 1, _WIDTH)
    told.append(f"index keys are kept in fp8 with a scale for each 128 values: {fp8_key_bits(dim):g} bits (index_bits)")
    return {
        "index_top_k": keys.whole(names.TOP_K, 1, 10_000_000),
        "index_heads": keys.whole(names.HEAD_COUNT, 1, _WIDTH),
        "index_dim": dim,
        "index_bits": fp8_key_bits(dim),
    }
