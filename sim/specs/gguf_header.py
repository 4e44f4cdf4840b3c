"""A model by the header of its GGUF file: exact bytes of experts, widths, layers; the weights are not read.

Works for every architecture that names its tensors as llama.cpp does, since bytes come from what the header says of
each tensor. A file may end behind its header. Of a model split into parts (`-00001-of-00003.gguf`) those that lie
beside the file are read, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertflow.attention import LINEAR, NONE
from expertflow.layers import BARE, DENSE, MOE
from expertflow.model import ModelSpec
from sim.specs.gguf_format import REWRITE, Tensor
from sim.specs.gguf_keys import GgufKeys
from sim.specs.gguf_layers import read_attention
from sim.specs.gguf_parts import EMBEDDING, GgufFile, Model, read_blocks, read_parts
from sim.specs.gguf_tensors import Block, Experts, Size
from sim.specs.model_file import ReadModel
from traces.messages import fault

_MOST_WIDTH = 1_000_000
_HEAD = "output.weight"
_AT_WEIGHT_BITS = ("attention", "linear", "indexer", "shared", "dense")
"""Parts of a block whose matrices are stored at weight_bits."""


def read_gguf(path: Path) -> ReadModel:
    """The model that a GGUF file describes; TraceError, one line with file, place and remedy, where it does not."""
    file = read_parts(path)
    keys = GgufKeys(file.first)
    _check_model(keys)
    model = read_blocks(file, keys)
    experts = [block.experts for block in model.blocks if block.experts is not None]
    fields, told = _fields(file, keys, model, experts)
    attention = read_attention(keys, model.blocks)
    fields |= attention.fields | _layers(attention.pattern, list(map(_feed, model.blocks)))
    try:
        spec = _with_bits(ModelSpec(**fields), file, model, experts, attention.pattern)
        spec = replace(spec, mtp_bytes=model.mtp_bytes)
    except ValueError as error:
        raise fault(path, "header", f"makes no model: {error}", REWRITE) from None
    derived = [_about_experts(experts, spec), *told, *attention.told, *model.told, _about_rest(spec, file, model)]
    return ReadModel(spec, tuple(derived), tuple(_assumed(file, model)), tuple(model.incomplete))


def _check_model(keys: GgufKeys) -> None:
    """TraceError for what is not the weights of a Mixture-of-Experts model."""
    from gguf.constants import GGUFType, Keys

    kind = keys.text(Keys.General.TYPE, GGUFType.MODEL)
    if kind != GGUFType.MODEL:
        raise fault(keys.path, f"key {Keys.General.TYPE!r}", f"is {kind[:60]!r}, no model", "give the model itself")
    number = keys.whole(Keys.LLM.EXPERT_COUNT, 0, 65_535, default=0)
    if number < 2:
        problem = f"has {number} experts (architecture {keys.arch})"
        raise fault(keys.path, "file", problem, "give a Mixture-of-Experts model: only their offloading is simulated")


# -- dimensions ----------------------------------------------------------------------------------------------


def _fields(
    file: GgufFile, keys: GgufKeys, model: Model, experts: Sequence[Experts]
) -> tuple[dict[str, Any], list[str]]:
    """What the spec takes beside its attention and bits, and what was computed of it."""
    from gguf.constants import Keys

    told: list[str] = []
    hidden = keys.whole(Keys.LLM.EMBEDDING_LENGTH, 1, _MOST_WIDTH)
    number = keys.whole(Keys.LLM.EXPERT_COUNT, 2, 65_535)
    _check_shapes(file, model, hidden, number)
    matrices = _alike(file, "an expert has {} and {} matrices in different blocks", [own.matrices for own in experts])
    outer = _alike(file, "experts work in a width of {} and of {}", [own.outer for own in experts])
    moe = [block for block in model.blocks if _feed(block) == MOE]
    dense = [block for block in model.blocks if _feed(block) == DENSE]
    # Of some models (Gemma 4, Arctic) an ordinary feed-forward part works beside the experts: a shared one.
    shared = [(block.part("shared").weights + block.part("dense").weights) // (matrices * hidden) for block in moe]
    ordinary = [max(block.part("dense").weights // (matrices * hidden), 1) for block in dense]
    return {
        "name": _name(keys, file.path),
        "source": f"GGUF header of {file.path.name}",
        "num_experts": number,
        "top_k": keys.whole(Keys.LLM.EXPERT_USED_COUNT, 1, number),
        "hidden_size": hidden,
        "expert_hidden": outer if outer != hidden else 0,
        "expert_intermediate": _mean([own.width for own in experts], "experts", told),
        "expert_matrices": matrices,
        "shared_gate": any(block.has("ffn_gate_inp_shexp") for block in moe),
        "shared_intermediate": _mean(shared, "shared experts", told),
        "dense_intermediate": _mean(ordinary, "dense layers", told),
        "vocab_size": _vocabulary(keys, model.contents.outside),
        "tied_embeddings": _is_tied(file, model),
    }, told


def _layers(letters: str, feeds: Sequence[str]) -> dict[str, Any]:
    """Patterns and numbers of the layers. A block that only mixes and one behind it that only feeds are one layer."""
    layers: list[list[str]] = []
    for letter, feed in zip(letters, feeds, strict=True):
        if letter == NONE and feed != BARE and layers and layers[-1][1] == BARE:
            layers[-1][1] = feed
        else:
            layers.append([letter, feed])
    mixing, feeding = ("".join(column) for column in zip(*layers, strict=True))
    ordered = "".join(sorted(feeding, key=(DENSE + BARE + MOE).index))
    return {
        "attention_pattern": _shortest(mixing),
        "feed_pattern": None if feeding == ordered else _shortest(feeding),
        "num_layers": feeding.count(MOE),
        "num_dense_layers": feeding.count(DENSE),
        "num_bare_layers": feeding.count(BARE),
    }


def _feed(block: Block) -> str:
    """The letter of a block's feed-forward part."""
    if block.experts is not None:
        return MOE
    return DENSE if block.part("dense").weights else BARE


def _check_shapes(file: GgufFile, model: Model, hidden: int, num_experts: int) -> None:
    """TraceError where embeddings or routers have other widths than the keys say."""
    for name in (EMBEDDING, _HEAD):
        found = model.contents.outside.get(name)
        if found and (len(found.shape) != 2 or found.shape[0] != hidden):
            problem = f"has the shape {list(found.shape)}, and the model a width of {hidden}"
            raise file.fault(f"tensor {name!r}", problem)
    for index, block in enumerate(model.blocks):
        shape = block.shapes.get("ffn_gate_inp")
        if shape and block.experts and (*shape, 1)[1] != num_experts:
            problem = f"has the shape {list(shape)}, and the model {num_experts} experts"
            raise file.fault(f"tensor 'blk.{index}.ffn_gate_inp.weight'", problem)


def _alike(file: GgufFile, problem: str, values: Sequence[int]) -> int:
    """The value that all have; TraceError where they differ."""
    if min(values) != max(values):
        raise file.fault("file", problem.format(min(values), max(values)), "models of such blocks are not modelled")
    return values[0]


def _mean(values: Sequence[int], what: str, told: list[str]) -> int:
    """The mean width; 0 if there is none."""
    if not values:
        return 0
    if min(values) != max(values):
        told.append(f"{what} are {min(values)} to {max(values)} wide by layer; their mean width is used")
    return max(round(sum(values) / len(values)), 1 if max(values) else 0)


def _vocabulary(keys: GgufKeys, outside: dict[str, Tensor]) -> int:
    """Rows of the embedding; by the keys where it is in a part that is not there."""
    from gguf.constants import Keys

    found = outside.get(EMBEDDING) or outside.get(_HEAD)
    if found:
        return found.shape[1]
    default = keys.length(Keys.Tokenizer.LIST) or None
    return keys.whole(Keys.LLM.VOCAB_SIZE, 1, _MOST_WIDTH, default=default)


def _name(keys: GgufKeys, path: Path) -> str:
    """As traces name models: `qwen3-30b-a3b`."""
    from gguf.constants import Keys

    for text in (keys.text(Keys.General.NAME, ""), path.stem):
        if name := re.sub(r"[^a-z0-9._+]+", "-", text.lower()).strip("-")[:100]:
            return name
    return keys.arch


def _shortest(letters: str) -> str:
    """The shortest pattern that repeated gives these letters."""
    for length in range(1, len(letters)):
        if letters.startswith(letters[length:]):
            return letters[:length]
    return letters


def _is_tied(file: GgufFile, model: Model) -> bool:
    """Whether the head is the embedding: there is no matrix of its own, and no part of which that is unknown."""
    return _HEAD not in model.contents.outside and not file.missing


# -- bits ----------------------------------------------------------------------------------------------------


def _with_bits(
    spec: ModelSpec, file: GgufFile, model: Model, experts: Sequence[Experts], letters: Sequence[str]
) -> ModelSpec:
    """The spec with the bits of the tensors, and with what the formulas do not have of them."""
    total = sum(own.num_bytes for own in experts)
    each = -(-total // (len(experts) * spec.num_experts))
    beyond = [
        (block.part("attention") + block.part("indexer")).weights - spec.mixer_params(letter)
        for block, letter in zip(model.blocks, letters, strict=True)
        if letter not in (LINEAR, NONE)
    ]
    plain = sum((block.part(name) for block in model.blocks for name in _AT_WEIGHT_BITS), Size())
    wide = sum((block.part("router") for block in model.blocks), _ends(file, model))
    spec = replace(
        spec,
        expert_bits=_bits_of(each, spec.expert_params),
        expert_bytes=_unlike(experts, spec.num_experts),
        weight_bits=_mean_bits(plain),
        embedding_bits=_mean_bits(wide),
        extra_attention_params=max(round(sum(beyond) / len(beyond)), 0) if beyond else 0,
    )
    # Norms, biases, convolutions, and matrices that no formula has.
    return replace(spec, extra_bytes=max(_rest(file, model) - spec.non_expert_bytes, 0))


def _unlike(experts: Sequence[Experts], num_experts: int) -> tuple[int, ...] | None:
    """Bytes of an expert by layer; None where they are alike, which the bits say as well."""
    sizes = tuple(-(-own.num_bytes // num_experts) for own in experts)
    return None if min(sizes) == max(sizes) else sizes


def _bits_of(num_bytes: int, weights: int) -> float:
    """Bits a weight by which `weights` weights take `num_bytes` bytes, exactly, rounded up as `ModelSpec` does."""
    bits = 8 * num_bytes / weights
    while math.ceil(weights * bits / 8) > num_bytes:
        bits = math.nextafter(bits, 0)
    return bits


def _mean_bits(size: Size) -> float:
    return 8 * size.matrix_bytes / size.weights if size.weights else 16.0


def _ends(file: GgufFile, model: Model) -> Size:
    """Embedding and head; of one that is in a part that is not there the other stands for both."""
    size = Size()
    there = [model.contents.outside[name] for name in (EMBEDDING, _HEAD) if name in model.contents.outside]
    for tensor in there:
        size.add(tensor)
    return size + size if file.missing and len(there) == 1 else size


def _rest(file: GgufFile, model: Model) -> int:
    """Bytes of all tensors that are not routed experts', those of blocks that predict further tokens left out."""
    parts = (size.num_bytes for block in model.blocks for name, size in block.parts.items() if name != "nextn")
    others = (tensor for name, tensor in model.contents.outside.items() if name not in (EMBEDDING, _HEAD))
    return sum(parts) + sum(tensor.num_bytes for tensor in others) + _ends(file, model).num_bytes


# -- what is said of it --------------------------------------------------------------------------------------


def _about_experts(experts: Sequence[Experts], spec: ModelSpec) -> str:
    """How much an expert takes."""
    sizes = [own.num_bytes / spec.num_experts for own in experts]
    kinds = ", ".join(sorted(set().union(*(own.kinds for own in experts))))
    mean = _amount(spec.mean_expert_bytes)
    if min(sizes) == max(sizes):
        return f"an expert takes {mean} ({kinds})"
    return f"experts take {_amount(min(sizes))} to {_amount(max(sizes))} by layer ({kinds}), {mean} in the mean"


def _amount(num_bytes: float) -> str:
    """Bytes to three digits."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((one for one in units if num_bytes >= one[1]), ("bytes", 1))
    return f"{num_bytes / size:.3g} {unit}"


def _about_rest(spec: ModelSpec, file: GgufFile, model: Model) -> str:
    """How much all else takes, and the formulas beside it where they do not give that."""
    there, by_formula = _rest(file, model), spec.non_expert_bytes
    text = f"all experts take {_amount(spec.total_expert_bytes)}, all else {_amount(there)}"
    return text if by_formula < 1.005 * there else f"{text}, which the formulas of the model make {_amount(by_formula)}"


def _assumed(file: GgufFile, model: Model) -> Iterable[str]:
    """What the file does not say."""
    if file.missing and _HEAD not in model.contents.outside:
        yield f"the head is a matrix of its own, in a part that is not there ({file.missing[-1]})"
    yield "the KV cache takes 16 bits a value"
