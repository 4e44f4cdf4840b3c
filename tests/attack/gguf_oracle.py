"""A second reader of GGUF headers: what experts and all else weigh, added up from the bytes by the format's own words.

Takes the bytes of an accepted file and the model that was read of it, and says what is wrong, or "". It shares no code
with `sim.specs` and takes no sizes from the package `gguf`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from typing import Any

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BITS = {0: 32, 1: 16, 2: 4.5, 3: 5, 6: 5.5, 7: 6, 8: 8.5, 9: 10, 10: 2.625, 11: 3.4375, 12: 4.5, 13: 5.5, 14: 6.5625}
BITS |= {15: 9.125, 16: 2.0625, 17: 2.3125, 18: 3.0625, 19: 1.5625, 20: 4.5, 21: 3.4375, 22: 2.5625, 23: 4.25}
BITS |= {24: 8, 25: 16, 26: 32, 27: 64, 28: 64, 29: 1.75, 30: 16, 34: 1.6875, 35: 2.0625, 39: 4.25, 40: 4.5, 41: 1.125}
"""Bits a weight of each type, as llama.cpp and its papers state them."""
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up|up_gate)(_exps|\.\d+)\.\w+", re.ASCII)


def header(content: bytes) -> tuple[dict[str, Any], dict[str, tuple[list[int], int]]]:
    """Keys with their values, and tensors with shape and bytes."""
    at = 24

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize("<" + code)
        return value

    def value(kind: int) -> Any:
        if kind == 8:
            return take(f"{take('Q')}s")
        if kind == 9:
            inner = take("I")
            return [value(inner) for _ in range(take("Q"))]
        return take(_CODES[kind])

    num_tensors, num_keys = struct.unpack_from("<QQ", content, 8)
    keys = {take(f"{take('Q')}s").decode(): value(take("I")) for _ in range(num_keys)}
    tensors = {}
    for _ in range(num_tensors):
        name = take(f"{take('Q')}s").decode()
        dims = [take("Q") for _ in range(take("I"))]
        tensors[name] = dims, round(math.prod(dims) * BITS[take("I")] / 8)
        take("Q")
    return keys, tensors


def gguf(content: bytes, found: Any) -> str:
    """Blocks, experts, choices, widths and bytes."""
    keys, tensors = header(content)
    arch = architecture(keys)
    spec = found.spec
    wanted = {"num_experts": "expert_count", "top_k": "expert_used_count", "hidden_size": "embedding_length"}
    for field, key in wanted.items():
        if getattr(spec, field) != _number(keys[f"{arch}.{key}"]):
            return f"{field} is {getattr(spec, field)}, the key says {keys[f'{arch}.{key}']}"
    last = _number(keys[f"{arch}.block_count"]) - _number(keys.get(f"{arch}.nextn_predict_layers", 0))
    experts: dict[int, int] = {}
    rest = 0
    for name, (_, size) in tensors.items():
        inside = re.match(r"blk\.(\d+)\.", name, re.ASCII)
        if (inside and int(inside[1]) >= last) or (name.startswith("blk.") and ".nextn." in name):
            continue
        if chosen := _EXPERTS.fullmatch(name):
            experts[int(chosen[1])] = experts.get(int(chosen[1]), 0) + size
        else:
            rest += size
    if spec.num_layers != len(experts):
        return f"{spec.num_layers} MoE layers, by hand {len(experts)}"
    if not len(experts) <= spec.num_layers + spec.num_dense_layers + spec.num_bare_layers <= last:
        return f"at most {last} layers by hand"
    each = -(-sum(experts.values()) // (len(experts) * spec.num_experts))
    if spec.mean_expert_bytes != each:
        return f"an expert of {spec.mean_expert_bytes} bytes, by hand {each}"
    if round(spec.expert_params * spec.expert_bits / 8) != each:
        return f"experts of {spec.expert_bits} bits a weight, by hand {8 * each / spec.expert_params}"
    # What the formulas of a model make of its widths may be more than the tensors have, never less.
    if spec.non_expert_bytes < rest or (spec.extra_bytes and spec.non_expert_bytes != rest):
        return f"{spec.non_expert_bytes} bytes beside the experts, by hand {rest}"
    return _attention(spec, keys, tensors, last) or _ends(spec, keys, tensors)


def _attention(spec: Any, keys: dict[str, Any], tensors: dict[str, tuple[list[int], int]], last: int) -> str:
    """Blocks with a state, and the keys that a token leaves in those that attend."""
    linear = {int(name.split(".")[1]) for name in tensors if re.match(r"blk\.\d+\.(ssm_|shortconv\.)", name)}
    letters = [layer.attention for layer in spec.layers]
    if len(letters) == last and [at for at, letter in enumerate(letters) if letter == "l"] != sorted(
        number for number in linear if number < last
    ):
        return f"blocks with a state are {sorted(linear)} by hand, attention is {spec.attention_pattern}"
    rows = {
        dims[1]
        for name, (dims, _) in tensors.items()
        if (found := re.fullmatch(r"blk\.(\d+)\.attn_k\.weight", name, re.ASCII))
        and int(found[1]) < last
        and int(found[1]) not in linear
    }
    wanted = {spec.num_kv_heads * spec.head_dim}
    if spec.window:
        heads = spec.window_kv_heads or spec.num_kv_heads
        wanted.add(heads * (spec.window_head_dim or spec.head_dim))
    # An array may give each block its own number of heads, of which the spec has those of most.
    alike = not isinstance(keys.get(f"{architecture(keys)}.attention.head_count_kv"), list)
    return f"keys of {wanted}, by hand {rows}" if alike and not rows <= wanted else ""


def architecture(keys: dict[str, Any]) -> str:
    """What the names of a model's keys begin with."""
    return str(keys["general.architecture"].decode())


def _ends(spec: Any, keys: dict[str, Any], tensors: dict[str, tuple[list[int], int]]) -> str:
    embedding = tensors.get("token_embd.weight") or tensors.get("output.weight")
    if embedding and embedding[0] != [spec.hidden_size, spec.vocab_size]:
        return f"embeddings of {spec.hidden_size} x {spec.vocab_size}, by hand {embedding[0]}"
    return "" if spec.tied_embeddings == ("output.weight" not in tensors) else "the head is tied, or is not"


def _number(value: Any) -> Any:
    """An array whose values are alike stands for one of them."""
    return value[0] if isinstance(value, list) else value


RECHECKS: dict[str, Callable[[bytes, Any], str]] = {"gguf": gguf, "gguf-hybrid": gguf}
"""By the name of the reader; of a part of a model the bytes alone say too little."""
