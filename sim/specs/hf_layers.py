"""The layers of a model by its Hugging Face config.json: what each attends to, and which has experts.

The keys of every architecture that transformers 5.24 knows, and those of the published files that it translates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from expertflow.attention import CHUNKED, FULL, HEAVY, INDEXED, LINEAR, NONE, SHARED_INDEX, SPARSE, WINDOWED
from expertflow.layers import BARE, DENSE, MOE
from sim.specs.hf_values import MOST_LAYERS, Values
from traces.messages import fault

LAYER_TYPES: Mapping[str, str] = {
    "full_attention": FULL,
    "attention": FULL,
    "hybrid": FULL,
    "sliding_attention": WINDOWED,
    "hybrid_sliding": WINDOWED,
    "reference_sliding_attention": WINDOWED,
    "chunked_attention": CHUNKED,
    "linear_attention": LINEAR,
    "mamba": LINEAR,
    "mamba2": LINEAR,
    "conv": LINEAR,
    "indexed_attention": INDEXED,
    "deepseek_sparse_attention": INDEXED,
    "minimax_m3_sparse": INDEXED,
    "qwen_sparse_attention": INDEXED,
    "compressed_sparse_attention": SPARSE,
    "heavily_compressed_attention": HEAVY,
}
"""Entries of layer_types: those that transformers 5.24 writes, and the older ones that it translates."""
_ALWAYS_INDEXED = (
    "axk2",
    "deepseek_v32",
    "glm5_next_text",
    "glm_moe_dsa",
    "hy_v4",
    "hy_v4_vl_text",
    "mistral_large4_text",
    "qwen4_exp_text",
)
"""Models whose every attention over keys and values has an indexer, whether layer_types calls it full or sparse."""
_BLOCKS: Mapping[str, tuple[str, str]] = {
    **{name: (kind, "") for name, kind in LAYER_TYPES.items()},
    "moe": ("", MOE),
    "mlp": ("", DENSE),
}
"""Entries of layers_block_type: an attention block, or a feed-forward block (Nemotron-H)."""
_FEED_BLOCKS = ("moe", "mlp")
_BLOCK_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Letters of hybrid_override_pattern."""
_SPARSE_FEED = ("sparse", "moe", "hash_moe")
_DENSE_FIRST = {
    "kimi_linear": 1,
    "hy_v3": 1,
    "hy_v4": 1,
    "hy_v4_vl_text": 1,
    "laguna": 1,
    "mimo_v2_flash": 1,
    "ernie4_5_vl_moe_text": 1,
    "glm5_next_text": 3,
    "step3p5": 3,
    "axk1": 1,
    "axk2": 1,
}
"""Dense layers that transformers puts first where the file says nothing of them."""

_EVERY_NTH_FULL = {"gpt_oss": 2, "gemma4_text": 6}
"""Windows that transformers takes where the file has no layer_types; the last layer of Gemma 4 is always full."""


class Layers(NamedTuple):
    """Letters of `expertflow.layers`, one for each layer of the model."""

    attention: str
    feed: str


def read_layers(values: Values) -> Layers:
    """The layers of the language part; TraceError where keys contradict each other, or tell of unknown kinds."""
    if (blocks := _block_names(values)) is not None:
        return _blocks(values, blocks)
    num_layers = layers_of_file(values)
    attention, feed = _attention(values, num_layers), _feed(values, num_layers)
    if values.text("model_type") == "longcat_flash" or values.has("zero_expert_num"):
        values.notes.derive("each layer has two attention blocks and two dense ones, the second beside the experts")
        return Layers("".join(kind * 2 for kind in attention), (DENSE + MOE) * num_layers)
    return Layers(attention, feed)


def layers_of_file(values: Values) -> int:
    """How many layers the names of the file's modules count, blocks of Nemotron-H each as one."""
    blocks = _block_names(values)
    if blocks:
        return len(blocks)
    return values.count("num_hidden_layers", "num_layers", "n_layers", "n_layer", high=MOST_LAYERS)


def shortest(pattern: str) -> str:
    """The shortest text of which `pattern` is a repetition, the last one perhaps cut."""
    for length in range(1, len(pattern)):
        if all(pattern[at] == pattern[at - length] for at in range(length, len(pattern))):
            return pattern[:length]
    return pattern


def patterns(layers: Layers) -> dict[str, int | str]:
    """The keys of `ModelSpec` that tell of layers."""
    counts = {letter: layers.feed.count(letter) for letter in (DENSE, BARE, MOE)}
    found: dict[str, int | str] = {
        "num_layers": counts[MOE],
        "num_dense_layers": counts[DENSE],
        "num_bare_layers": counts[BARE],
        "attention_pattern": shortest(layers.attention),
    }
    if layers.feed != DENSE * counts[DENSE] + BARE * counts[BARE] + MOE * counts[MOE]:
        found["feed_pattern"] = shortest(layers.feed)
    return found


# -- attention -----------------------------------------------------------------------------------------------


def _attention(values: Values, num_layers: int) -> str:
    """The letter of each layer's attention."""
    key = values.name_of("layer_types", "layers_block_type")  # the latter in files of Granite 4
    if key is not None:
        letters = "".join(_letter(values, key, one) for one in values.items(key, num_layers))
    else:
        letters = _attention_by_rule(values, num_layers)
    window = values.raw("sliding_window", "sliding_window_size")
    longest = values.raw("max_position_embeddings", "model_max_length", "max_seq_len")
    if WINDOWED in letters and type(window) is int and type(longest) is int and window >= longest > 0:
        values.notes.derive(f"the window of {window} tokens is no shorter than the longest context: attention is full")
        letters = letters.replace(WINDOWED, FULL)
    kind = values.text("model_type")
    if kind == "qwen4_exp_text" and not values.has("indexer_budget"):
        letters = letters.replace(INDEXED, FULL)
    elif kind in _ALWAYS_INDEXED or (kind == "dots3_note_text" and values.flag("use_dsa")):
        letters = letters.replace(FULL, INDEXED)
    return _shared_indexers(values, letters) if INDEXED in letters else letters


def _letter(values: Values, key: str, name: str) -> str:
    if name not in LAYER_TYPES:
        raise values.wrong(key, f"made of known kinds ({name[:40]!r} is none)", "give attention_pattern in a YAML")
    return LAYER_TYPES[name]


def _attention_by_rule(values: Values, num_layers: int) -> str:
    """The same where layer_types is not there: by the first rule whose key is."""
    every = range(num_layers)
    if values.has("compress_ratios"):
        ratios = values.items("compress_ratios", num_layers, (int,))
        known = {0: WINDOWED, 1: WINDOWED, 4: SPARSE, 128: HEAVY}
        if not set(ratios) <= set(known):
            raise values.wrong("compress_ratios", "made of 0, 4 and 128")
        return "".join(known[ratio] for ratio in ratios)
    if values.has("attn_type_list"):
        return "".join(FULL if one else LINEAR for one in values.items("attn_type_list", num_layers, (int,)))
    if values.has("hybrid_layer_pattern"):
        marks = values.items("hybrid_layer_pattern", num_layers, (int,))
        return "".join(WINDOWED if one else FULL for one in marks)
    linear = values.inner("linear_attn_config")
    if linear is not None and linear.has("full_attn_layers"):
        full = set(linear.items("full_attn_layers", kinds=(int,)))  # counted from 1
        return "".join(FULL if at + 1 in full else LINEAR for at in every)
    sparse = values.inner("sparse_attention_config")
    if sparse is not None and sparse.has("sparse_attention_freq"):
        marks = sparse.items("sparse_attention_freq", num_layers, (int,))
        return "".join(INDEXED if one else FULL for one in marks)
    if values.has("local_layer_ids"):
        local = set(values.items("local_layer_ids", kinds=(int,)))
        return "".join(WINDOWED if at in local else FULL for at in every)
    return _attention_by_period(values, num_layers)


def _attention_by_period(values: Values, num_layers: int) -> str:
    every = range(num_layers)
    if values.has("attn_layer_period"):
        period = values.count("attn_layer_period", high=MOST_LAYERS)
        offset = values.count("attn_layer_offset", low=0, high=MOST_LAYERS, default=0)
        return "".join(FULL if at % period == offset else LINEAR for at in every)
    for key, other in (
        ("full_attention_interval", LINEAR),
        ("layer_group_size", LINEAR),
        ("global_attn_every_n_layers", WINDOWED),
    ):
        if values.has(key):
            period = values.count(key, high=MOST_LAYERS)
            return "".join(other if (at + 1) % period else FULL for at in every)
    if values.has("no_rope_layers", "attention_chunk_size"):
        return _llama4(values, num_layers)
    if values.text("model_type") == "glm5_next_text":
        values.notes.assume("every fourth layer has an indexer, the others linear attention, as transformers has them")
        return "".join(INDEXED if at % 4 == 3 else LINEAR for at in every)
    if values.has("kv_lora_rank") and values.has("index_topk"):
        return INDEXED * num_layers
    return _windows(values, num_layers)


def _llama4(values: Values, num_layers: int) -> str:
    if not values.has("attention_chunk_size"):
        return FULL * num_layers
    if values.raw("no_rope_layers"):
        marks = values.items("no_rope_layers", num_layers, (int,))
    else:
        period = values.count("no_rope_layer_interval", default=4, high=MOST_LAYERS)
        marks = [int((at + 1) % period != 0) for at in range(num_layers)]
    return "".join(CHUNKED if one else FULL for one in marks)


def _windows(values: Values, num_layers: int) -> str:
    """Sliding windows: by a pattern, from some layer on, or everywhere."""
    if not values.flag("use_sliding_window", default=True) or not values.raw("sliding_window", "sliding_window_size"):
        return FULL * num_layers
    name = values.name_of("sliding_window_pattern", "swa_pattern")
    if name is not None and isinstance(values.table[name], str):
        letters = {"L": WINDOWED, "G": FULL}
        pattern = values.text(name)
        if not pattern or not set(pattern) <= set(letters):
            raise values.wrong(name, "a number, or a text of L and G")
        marks = (pattern * num_layers)[:num_layers]
        return "".join(letters[one] for one in marks)
    if name is not None:
        period = values.count(name, high=MOST_LAYERS)
        first = values.count("first_k_dense_replace", low=0, high=num_layers, default=0)
        first = first if values.has("prefix_dense_sliding_window_pattern") else 0
        rest = "".join(WINDOWED if (at + 1) % period else FULL for at in range(num_layers - first))
        return FULL * first + rest
    if values.has("max_window_layers"):
        first = values.count("max_window_layers", low=0, high=MOST_LAYERS)
        return FULL * min(first, num_layers) + WINDOWED * max(0, num_layers - first)
    kind = values.text("model_type")
    if kind in _EVERY_NTH_FULL:
        period = _EVERY_NTH_FULL[kind]
        values.notes.assume(
            f"every layer number {period} is full, the others windowed, as transformers takes them to be"
        )
        found = "".join(WINDOWED if (at + 1) % period else FULL for at in range(num_layers))
        return found if kind == "gpt_oss" else found[:-1] + FULL
    values.notes.assume("every layer has the window: the file names no pattern")
    return WINDOWED * num_layers


def _shared_indexers(values: Values, letters: str) -> str:
    """Layers that take the choice of the last indexer before them get their own letter."""
    num_layers = len(letters)
    if values.has("indexer_types"):
        shares = [one == "shared" for one in values.items("indexer_types", num_layers)]
    elif isinstance(values.raw("index_topk_pattern"), str):
        pattern = values.text("index_topk_pattern")
        shares = [one == "S" for one in pattern.ljust(num_layers, "F")[:num_layers]]
    else:
        period = values.count("index_topk_freq", default=1, high=MOST_LAYERS)
        offset = values.count("index_skip_topk_offset", low=0, default=2, high=MOST_LAYERS)
        shares = [max(at - offset + 1, 0) % period != 0 for at in range(num_layers)]
    pairs = zip(letters, shares, strict=True)
    return "".join(SHARED_INDEX if kind == INDEXED and share else kind for kind, share in pairs)


# -- experts -------------------------------------------------------------------------------------------------


def _feed(values: Values, num_layers: int) -> str:
    """Which layers have routed experts."""
    for key, rule in _FEEDS:
        if values.has(key):
            return "".join(MOE if one else DENSE for one in rule(values, num_layers))
    first = _DENSE_FIRST.get(values.text("model_type"))
    if first is not None:
        values.notes.assume(f"the first {first} of {num_layers} layers are dense, as transformers takes them to be")
        return (DENSE * first + MOE * num_layers)[:num_layers]
    return MOE * num_layers


def _by_type(values: Values, num_layers: int) -> list[bool]:
    found = values.items("mlp_layer_types", num_layers)
    if not set(found) <= {*_SPARSE_FEED, "dense"}:
        raise values.wrong("mlp_layer_types", f"made of {', '.join(_SPARSE_FEED)} and dense")
    return [one != "dense" for one in found]


def _by_enumeration(values: Values, num_layers: int) -> list[bool]:
    name = values.name_of("moe_layers_enum", "moe_layers") or ""
    found = values.table[name]
    if isinstance(found, str) and len(found) <= 10 * MOST_LAYERS:
        parts = [one.strip() for one in found.split(",")]
        if not all(one.isascii() and one.isdecimal() and len(one) < 6 for one in parts):
            raise values.wrong(name, "numbers of layers")
        numbers = {int(one) for one in parts}
    else:
        numbers = set(values.items(name, kinds=(int,)))
    return [at in numbers for at in range(num_layers)]


def _by_frequency(values: Values, num_layers: int) -> list[bool]:
    if isinstance(values.raw("moe_layer_freq"), list):
        return [bool(one) for one in values.items("moe_layer_freq", num_layers, (int,))]
    period = values.count("moe_layer_freq", high=MOST_LAYERS)
    first = values.count("first_k_dense_replace", low=0, high=MOST_LAYERS, default=0)
    return [at >= first and at % period == 0 for at in range(num_layers)]


def _by_step(values: Values, num_layers: int) -> list[bool]:
    step = values.count("interleave_moe_layer_step", "decoder_sparse_step", low=1, high=MOST_LAYERS)
    plain = set(values.items("mlp_only_layers", kinds=(int,))) if values.has("mlp_only_layers") else set()
    return [at not in plain and (at + 1) % step == 0 for at in range(num_layers)]


def _by_period(values: Values, num_layers: int) -> list[bool]:
    period = values.count("expert_layer_period", high=MOST_LAYERS)
    offset = values.count("expert_layer_offset", low=0, high=MOST_LAYERS, default=0)
    return [at % period == offset for at in range(num_layers)]


def _by_range(values: Values, num_layers: int) -> list[bool]:
    """Ernie 4.5: from one layer to another, every so many."""
    first = _first(values.raw("moe_layer_start_index"))
    last = _first(values.raw("moe_layer_end_index"))
    period = values.count("moe_layer_interval", default=1, high=MOST_LAYERS)
    if type(first) is not int:
        raise values.wrong("moe_layer_start_index", "a whole number")
    last = last if type(last) is int and last >= 0 else num_layers - 1
    return [first <= at <= last and (at + 1) % period == 0 for at in range(num_layers)]


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value


def _behind_first(key: str) -> Callable[[Values, int], list[bool]]:
    def rule(values: Values, num_layers: int) -> list[bool]:
        first = values.count(key, low=0, high=MOST_LAYERS)
        return [at >= first for at in range(num_layers)]

    return rule


_FEEDS: tuple[tuple[str, Callable[[Values, int], list[bool]]], ...] = (
    ("mlp_layer_types", _by_type),
    ("moe_layers_enum", _by_enumeration),
    ("moe_layers", _by_enumeration),
    ("moe_layer_freq", _by_frequency),
    ("interleave_moe_layer_step", _by_step),
    ("decoder_sparse_step", _by_step),
    ("expert_layer_period", _by_period),
    ("moe_layer_start_index", _by_range),
    *((key, _behind_first(key)) for key in ("first_k_dense_replace", "num_dense_layers", "dense_mlp_idx")),
)


def _block_names(values: Values) -> list[str] | None:
    """Nemotron-H: the kind of each block, of attention or feed-forward; None for a model whose layers are both."""
    if values.has("expert_layer_period"):
        return None
    for key in ("layers_block_type", "layer_types"):
        names = values.raw(key)
        if isinstance(names, list) and any(one in _FEED_BLOCKS for one in names if type(one) is str):
            return values.items(key)
    if not values.has("hybrid_override_pattern"):
        return None
    letters = values.raw("hybrid_override_pattern")
    if not isinstance(letters, str) or len(letters) > MOST_LAYERS or not set(letters) <= set(_BLOCK_LETTERS):
        raise values.wrong("hybrid_override_pattern", f"a text of {', '.join(_BLOCK_LETTERS)}")
    return [_BLOCK_LETTERS[one] for one in letters]


def _blocks(values: Values, names: list[str]) -> Layers:
    """Nemotron-H: two blocks that follow each other, of attention and of feed-forward, are a layer."""
    attention, feed, waiting = "", "", ""
    for name in names:
        if name not in _BLOCKS:
            raise values.wrong("layers_block_type", f"made of known kinds ({name[:40]!r} is none)")
        kind, block = _BLOCKS[name]
        if kind:
            attention, feed, waiting = attention + waiting, feed + BARE * len(waiting), kind
        else:
            attention, feed, waiting = attention + (waiting or NONE), feed + block, ""
    layers = Layers(attention + waiting, feed + BARE * len(waiting))
    if MOE not in layers.feed:
        raise fault(values.path, f"{values.place}layers_block_type", "has no layer with experts", "check the file")
    return layers
