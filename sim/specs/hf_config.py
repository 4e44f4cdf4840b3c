"""A model's sizes from its Hugging Face config.json.

What the file says is taken; what transformers would assume where it is silent is assumed and noted. Read for every
architecture with routed experts that transformers 5.24 knows; transformers itself is not needed.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from expertflow.attention import LINEAR, NONE
from expertflow.keys import LONGEST_TEXT
from expertflow.model import ModelSpec
from sim.paths import resolved
from sim.specs.hf_attention import read_attention
from sim.specs.hf_bits import with_bits
from sim.specs.hf_kinds import KNOWN
from sim.specs.hf_layers import layers_of_file, patterns, read_layers
from sim.specs.hf_mtp import with_heads
from sim.specs.hf_values import REMEDY, Values
from traces.jsontext import parse_json, shown
from traces.messages import TraceError, fault
from traces.reading import read_text

MOST_BYTES = 16 << 20
"""Of a config.json: the largest that are published list every module that is not quantised."""
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_experts",
    "num_moe_experts",
)
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "experts_per_token",
    "moe_router_topk",
)
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size", "moe_ffn_hidden_size")
_DENSE_WIDTH = ("dense_intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "intermediate_size", "d_ff")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
    "share_expert_dims",
)
_SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_INNER = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config", "text_model")
_TIED = (
    "cohere2_moe",
    "diffusion_gemma_text",
    "doge",
    "ernie4_5_moe",
    "ernie4_5_vl_moe_text",
    "gemma4_text",
    "jetmoe",
    "lara_mini",
    "lfm2_moe",
    "zaya",
)
"""Models whose head is the embedding matrix unless the file says otherwise."""
_SHARED_GATED = ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text")
_ENCODER_DECODER = ("switch_transformers", "nllb-moe", "nllb_moe", "t5", "umt5")
_REFUSED = {
    "vitpose_backbone": "its experts belong to a vision model",
    "doge": "its experts are rows of an embedding, which no layer copies as one",
}
_SLUG = re.compile(r"[^A-Za-z0-9._-]+")


def read_hf_config(path: Path) -> tuple[ModelSpec, tuple[str, ...], tuple[str, ...]]:
    """The model of a config.json, what was derived and what assumed; TraceError where it has no routed experts, or
    something in it cannot be."""
    text = read_text(path, MOST_BYTES, "give a model's config.json")
    table = parse_json(path, "file", text, infinite=True)
    if not isinstance(table, dict):
        raise fault(path, "file", "holds no table of keys", "give a model's config.json")
    top = Values(path, table)
    values = language_part(top)
    check_kind(values, top)
    try:
        keys = _keys(values, top)
        keys |= {"name": model_name(path), "source": f"config.json, sha256 {hashlib.sha256(text.encode()).hexdigest()}"}
        _note_doubts(values, top)
        num_layers = layers_of_file(values)
        spec = with_heads(values, top, ModelSpec(**with_bits(values, top, keys, num_layers)), num_layers)
    except TraceError:
        raise
    except ValueError as error:
        raise fault(path, "file", f"gives a model that cannot be ({error})", REMEDY) from None
    return spec, tuple(values.notes.derived), tuple(values.notes.assumed)


def language_part(top: Values) -> Values:
    """The table that tells of the language model: the file's own, or one within it; the first that names experts."""
    waiting = [top]
    for _ in range(3):
        found = next((one for one in waiting if _names_experts(one)), None)
        if found is not None:
            return found
        waiting = [inner for one in waiting for name in _INNER if (inner := one.inner(name)) is not None]
        if not waiting:
            break
    return top


def _names_experts(values: Values) -> bool:
    return values.has(*_EXPERTS) or (values.inner("ffn_config") is not None)


def check_kind(values: Values, top: Values) -> None:
    """TraceError, which says why, for a model that is no decoder with routed experts."""
    kind = values.text("model_type")
    if values.flag("is_encoder_decoder") or kind in _ENCODER_DECODER:
        problem = "is of an encoder and a decoder, of which a spec has one"
        raise fault(values.path, "file", problem, "give the sizes of its decoder in a model YAML of your own")
    if kind in _REFUSED:
        raise fault(values.path, "file", f"is of the kind {kind}: {_REFUSED[kind]}", "choose another model")
    experts = _experts(values)
    if experts is None or experts < 2 or values.raw("enable_moe_block") is False:
        names = ", ".join(_EXPERTS[:3])
        told = kind[:40] or top.text("model_type")[:40] or "no model_type"
        raise fault(values.path, "file", f"is of no Mixture of Experts ({told}; {names} …)", "give one that is")
    if not values.has(*_VOCABULARY):
        raise fault(values.path, "file", f"is of no language model ({_VOCABULARY[0]} is not there)", "give one that is")


def _note_doubts(values: Values, top: Values) -> None:
    """Note a kind of model that is not known, and keys of one meaning that differ."""
    kind = values.text("model_type") or top.text("model_type")
    if not KNOWN.intersection((kind, top.text("model_type"))):
        told = f"model_type {kind[:60]!r} is not known here" if kind else "there is no model_type"
        values.notes.assume(f"{told}: its keys are read as those of others")
    for names in (_EXPERTS, _TOP_K):
        first = values.name_of(*names)
        for other in names:
            value = values.table.get(other)
            if first is not None and type(value) is int and value not in (0, values.table[first]):
                values.notes.assume(f"{first}={shown(values.table[first])} is taken, and {other}={value} left aside")


def _experts(values: Values) -> int | None:
    """How many routed experts a layer has."""
    inner = values.inner("ffn_config")
    table = inner if inner is not None and inner.has(*_EXPERTS) else values
    return table.count(*_EXPERTS, low=0, high=65_535) if table.has(*_EXPERTS) else None


def _keys(values: Values, top: Values) -> dict[str, Any]:
    """Every key of `ModelSpec` but name, source and bits."""
    layers = read_layers(values)
    hidden = values.count("hidden_size", "d_model", "n_embd")
    inner = values.inner("ffn_config")
    ffn = values if inner is None or not inner.has(*_EXPERTS) else inner
    found: dict[str, Any] = {
        "num_experts": _experts(values),
        "top_k": ffn.count(*_TOP_K, high=65_535),
        "hidden_size": hidden,
        "vocab_size": values.count(*_VOCABULARY),
        **patterns(layers),
        **read_attention(values, layers.attention),
        **_feeds(values, ffn, hidden),
    }
    found["tied_embeddings"] = _is_tied(values, top)
    if found["num_dense_layers"]:
        found["dense_intermediate"] = _dense_width(values)
    if set(layers.attention) <= {LINEAR, NONE}:
        values.notes.derive("no layer has attention over keys and values")
    shared, sources = values.raw("num_kv_shared_layers"), values.raw("kv_source_layers")
    if (type(shared) is int and shared > 0) or (type(sources) is list and sources != list(range(len(sources)))):
        values.notes.assume("layers that read another layer's KV cache are counted with one of their own")
    if top is not values and any(name.startswith(("vision", "audio")) for name in top.table):
        values.notes.assume("the parts for pictures and sound are not loaded (extra_bytes would count them)")
    if len(found["attention_pattern"]) > LONGEST_TEXT:
        raise values.wrong("layer_types", f"a pattern of at most {LONGEST_TEXT} layers")
    return found


def _is_tied(values: Values, top: Values) -> bool:
    """Whether the head is the embedding matrix."""
    for table in (top, values) if top is not values else (values,):
        if table.has("tie_word_embeddings"):
            return table.flag("tie_word_embeddings")
    tied = values.text("model_type") in _TIED
    values.notes.assume(f"tie_word_embeddings is {str(tied).lower()}: the file does not say")
    return tied


# -- feed-forward blocks ---------------------------------------------------------------------------------------


def _feeds(values: Values, ffn: Values, hidden: int) -> dict[str, Any]:
    """Experts, routed and shared."""
    kind = values.text("model_type")
    width = _expert_width(values, ffn)
    found: dict[str, Any] = {"expert_intermediate": width}
    if _is_plain(values, kind):
        found["expert_matrices"] = 2
        values.notes.derive("a feed-forward block has two matrices: its activation has no gate")
    latent = values.count("moe_latent_size", "moe_hidden_size", low=0, default=0)
    if latent and latent != hidden:
        found["expert_hidden"] = latent
    shared = _shared_width(values, kind, width)
    if shared:
        found["shared_intermediate"] = shared
        if kind in _SHARED_GATED:
            found["shared_gate"] = True
    extra = _extra_params(values, kind, hidden)
    return found | ({"extra_params": extra} if extra else {})


def _is_plain(values: Values, kind: str) -> bool:
    """Whether feed-forward blocks are up and down alone."""
    return kind == "nemotron_h" or values.raw("mlp_hidden_act") == "relu2"


def _expert_width(values: Values, ffn: Values) -> int:
    if ffn is not values:
        return ffn.count("ffn_hidden_size", *_WIDTH)
    if isinstance(values.raw("moe_intermediate_size"), list):
        widths = values.items("moe_intermediate_size", kinds=(int,))
        if widths and 1 <= widths[0] <= 1_000_000:
            return int(widths[0])
        raise values.wrong("moe_intermediate_size", "a list of widths")
    if values.has(*_WIDTH) and not (values.text("model_type") == "inkling_text" and "dense_mlp_idx" in values.table):
        return values.count(*_WIDTH)
    values.notes.derive("experts are intermediate_size wide: the file gives no width of their own")
    return values.count("intermediate_size", "ffn_hidden_size")


def _shared_width(values: Values, kind: str, width: int) -> int:
    """Inner width of all shared experts of a layer together, and of a dense block beside the experts."""
    if kind in ("gemma4_text", "diffusion_gemma_text"):
        values.notes.derive("the dense block beside the experts counts as a shared expert")
        return values.count("intermediate_size")
    if kind == "longcat_flash" or values.has("zero_expert_num"):
        return values.count("ffn_hidden_size", "intermediate_size")
    if kind == "llama4_text":
        return values.count("intermediate_size")
    count = values.count(*_SHARED_COUNT, low=0, high=65_535, default=0)
    if kind == "hunyuan_v1_moe":
        return values.count("intermediate_size") * max(1, count)
    if values.has(*_SHARED_WIDTH):
        given = values.count(*_SHARED_WIDTH, low=0)
        return given * (max(1, count) if kind == "minimax_m3_vl_text" else 1)
    return count * width


def _dense_width(values: Values) -> int:
    name = values.name_of(*_DENSE_WIDTH)
    if name is None:
        raise values.lacking("intermediate_size")
    return values.count(name)


def _extra_params(values: Values, kind: str, hidden: int) -> int:
    """Weights that belong to no matrix of the formulas."""
    extra = 0
    if kind == "diffusion_gemma_text":
        extra += 3 * hidden * values.count("intermediate_size")  # what a step knows of the one before
    if kind == "gemma4_text" and values.count("hidden_size_per_layer_input", low=0, default=0):
        width = values.count("hidden_size_per_layer_input")
        layers = values.count("num_hidden_layers", high=4096)
        vocab = values.count("vocab_size_per_layer_input", default=values.count("vocab_size"))
        extra += layers * width * (vocab + 3 * hidden)
        values.notes.derive("embeddings of each layer's own count as extra_params")
    if kind == "ernie4_5_vl_moe_text" and isinstance(values.raw("moe_intermediate_size"), list):
        widths = values.items("moe_intermediate_size", kinds=(int,))
        layers = values.count("num_hidden_layers", high=4096)
        if len(widths) > 1 and 0 < widths[1] <= 1_000_000:
            extra += (layers - 1) * (_experts(values) or 0) * 3 * hidden * widths[1]
            values.notes.derive("the experts of pictures stay in GPU memory (extra_params)")
    return extra


def model_name(path: Path) -> str:
    """The name of the folder of a config.json, or of the file, in small letters; of a hub cache that of the model."""
    whole = resolved(path)
    name = whole.parent.name if whole.stem == "config" else whole.stem
    name = next((part.split("--")[-1] for part in reversed(whole.parts) if part.startswith("models--")), name)
    return _SLUG.sub("-", name).strip("-.").lower()[:120] or "model"
