"""Heads of multi-token prediction (MTP) by a config.json: how many there are, and what they weigh.

A head is a layer of the model, with its attention and its experts, behind a matrix that takes a hidden state and the
embedding of the next token together (DeepSeek-V3, arXiv 2412.19437, section 2.2). Embedding and head of the model serve
it, too. Engines load heads for speculative decoding alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from expertflow.attention import FULL, HEAVY, INDEXED, SPARSE, WINDOWED
from expertflow.layers import DENSE, MOE
from expertflow.model import ModelSpec
from sim.specs.hf_layers import LAYER_TYPES
from sim.specs.hf_values import Values
from traces.jsontext import shown

_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
_MODULES = "num_mtp_modules"
"""Of MiniMax-M2, whose files name heads that they do not hold (GitHub MiniMax-AI/MiniMax-M2#47)."""
_UNSAID = {"qwen3_next": 1}
"""Models whose files hold heads that config.json does not name (vLLM, qwen3_next_mtp.py)."""
_DENSE_HEADS = ("mimo_v2_flash", "longcat_flash")
"""Models whose heads have a dense block: GitHub XiaomiMiMo/MiMo-V2-Flash, meituan-longcat/LongCat-Flash-Chat."""
_MOST_HEADS = 64


def with_heads(values: Values, top: Values, spec: ModelSpec, num_layers: int) -> ModelSpec:
    """`spec` with the bytes of its heads. num_layers: as the file counts them."""
    count = _count(values, top)
    if not count:
        return spec
    heads = [(_attention(values, spec, num_layers, at), _feed(values, num_layers, at)) for at in range(count)]
    num_bytes = sum(head_bytes(spec, *head) for head in heads)
    values.notes.derive(
        f"{count} head{'s' if count > 1 else ''} of multi-token prediction: {num_bytes / 1e9:.2f} GB (mtp_bytes), not "
        "loaded unless model.mtp=true"
    )
    return replace(spec, mtp_bytes=num_bytes)


class Weights(NamedTuple):
    """Weights of one head by what their bits are: those of layers, of experts, of embeddings and routers."""

    plain: int
    experts: int
    wide: int


def head_params(spec: ModelSpec, attention: str, feed: str) -> Weights:
    """Weights of one head. attention, feed: letters of its layer."""
    found = spec.projections(attention)
    mixer = 0 if found is None else found.params
    if not set(spec.attention_pattern) & {SPARSE, HEAVY}:
        # Else what compresses KV, which a head of DeepSeek-V4 does not.
        mixer += spec.extra_attention_params
    mixer += spec.index_params if spec.has_indexer(attention) else 0
    joined = mixer + 2 * spec.hidden_size**2
    if feed == DENSE:
        width = spec.dense_intermediate or spec.shared_intermediate
        joined += spec.expert_matrices * spec.hidden_size * width
        return Weights(joined, 0, 0)
    return Weights(joined + spec.shared_params, spec.num_experts * spec.expert_params, spec.router_params)


def head_bytes(spec: ModelSpec, attention: str, feed: str = MOE) -> int:
    """Bytes of one head."""
    own = head_params(spec, attention, feed)
    return math.ceil(
        (own.plain * spec.weight_bits + own.experts * spec.expert_bits + own.wide * spec.embedding_bits) / 8
    )


def usual_attention(spec: ModelSpec) -> str:
    """The attention of a head where the file does not say it: the model's own full one, if it has that."""
    there = {layer.attention for layer in spec.layers}
    return next((kind for kind in (INDEXED, FULL, WINDOWED) if kind in there), FULL)


def _count(values: Values, top: Values) -> int:
    """How many heads there are; those that are named and not published are noted."""
    for table in (values, top):
        name = table.name_of(*_COUNTS)
        if name is not None:
            return table.count(name, low=0, high=_MOST_HEADS)
        if table.has(_MODULES):
            number = shown(table.raw(_MODULES))
            table.notes.assume(
                f"{_MODULES}={number}: heads that the published files do not hold (mtp_bytes would count them)"
            )
            return 0
    count = _UNSAID.get(values.text("model_type"), 0)
    if count:
        values.notes.assume(f"there is {count} head of multi-token prediction, which the file does not name")
    return count


def _attention(values: Values, spec: ModelSpec, num_layers: int, at: int) -> str:
    """The letter of the attention of head `at`."""
    told = _told(values, "mtp_layer_types", "layer_types", num_layers, at)
    if told in LAYER_TYPES:
        letter = LAYER_TYPES[told]
        usual = usual_attention(spec)
        return usual if letter == FULL and usual == INDEXED else letter
    if values.has("compress_ratios") or values.text("model_type") == "mimo_v2_flash":
        return WINDOWED
    return usual_attention(spec)


def _feed(values: Values, num_layers: int, at: int) -> str:
    """What follows the attention of head `at`: experts, or a dense block."""
    told = _told(values, "mtp_mlp_layer_types", "mlp_layer_types", num_layers, at)
    if told is not None:
        return DENSE if told == "dense" else MOE
    listed = values.raw("moe_layers_enum")
    if isinstance(listed, str):
        return MOE if str(num_layers + at) in [one.strip() for one in listed[:100_000].split(",")] else DENSE
    return DENSE if values.text("model_type") in _DENSE_HEADS else MOE


def _told(values: Values, own: str, of_all: str, num_layers: int, at: int) -> Any:
    """The entry for head `at` of a list of the heads' own, or of one that goes on behind the layers."""
    for name, place in ((own, at), (of_all, num_layers + at)):
        entries = values.raw(name)
        if isinstance(entries, list) and place < len(entries):
            return entries[place]
    return None
