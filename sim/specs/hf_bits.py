"""Bits of a model's weights by its Hugging Face config.json: scales and zero points included, where they count."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from expertflow.model import ModelSpec
from sim.specs.hf_values import Values

_DTYPES = {
    "float32": 32.0,
    "float": 32.0,
    "bfloat16": 16.0,
    "float16": 16.0,
    "half": 16.0,
    "float8_e4m3fn": 8.0,
    "float8_e5m2": 8.0,
}
MXFP4 = 4.25
"""4 bits and an 8-bit scale for each 32 weights (OCP Microscaling 1.0)."""
NVFP4 = 4.5
"""4 bits and an 8-bit scale for each 16 weights."""
_FP4 = ("fp4", "mxfp4", "float4_e2m1fn")
"""What `expert_dtype` calls the first of the two."""
_SMALL = 0.01
"""Scales below so many bits a weight are left out."""
_EXCLUDED = (
    "modules_to_not_convert",
    "ignore",
    "llm_int8_skip_modules",
    "exclude_modules",
    "ignored_layers",
    "exclude",
)
_MOST_NAMES = 1_000_000
_EXPERT = re.compile(r"(?<!shared_)(?<!shared)experts?(?!_gate)", re.IGNORECASE)
_PARTS: Mapping[str, re.Pattern[str]] = {
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "shared": re.compile(r"shared", re.IGNORECASE),
    "dense": re.compile(r"(gate|up|down)_proj|\bw[123]\b|mlp$|mlp\.\*$", re.IGNORECASE),
}
_ROUTER = re.compile(r"router|(^|[.\\])gate$|gate\$?$", re.IGNORECASE)
_LAYER = re.compile(r"layers?[.\\]+(\d{1,4})(?!\d)")


class Bits(NamedTuple):
    """Of weights that are converted. experts_only: no others are."""

    bits: float
    experts_only: bool = False
    experts: float | None = None
    """Of experts, where they have a form of their own."""


def with_bits(values: Values, top: Values, spec: Mapping[str, Any]) -> dict[str, Any]:
    """`spec`, keys of `ModelSpec`, with the bits that the file tells. top: the file's own table, which has them where
    the language part does not."""
    plain = _dtype_bits(values, top)
    table = values.inner("quantization_config") or top.inner("quantization_config", "compression_config")
    found = {**spec, "embedding_bits": plain, "weight_bits": plain, "expert_bits": plain}
    if table is None:
        return found
    known = _converted(table)
    if known is None:
        return found
    shares = _left_out(table, spec["num_layers"] + spec["num_dense_layers"])
    # DeepSeek-V4 says it beside its quantization_config, others within.
    own = MXFP4 if values.text("expert_dtype") in _FP4 else known.experts
    experts = known.bits if own is None else own
    found["expert_bits"] = _mixed(experts, plain, shares["experts"])
    if not known.experts_only:
        found["weight_bits"] = _mean_bits(values, found, known.bits, plain, shares)
    scheme = table.inner("kv_cache_scheme")
    if scheme is not None and scheme.has("num_bits"):
        found["kv_bits"] = float(scheme.count("num_bits", high=64))
    values.notes.derive(
        f"experts take {found['expert_bits']:g} bits a weight and the other matrices of layers "
        f"{found['weight_bits']:g}, by quantization_config"
    )
    return found


def _dtype_bits(values: Values, top: Values) -> float:
    """Bits of weights that are not quantised."""
    for table in (values, top):
        name = table.name_of("dtype", "torch_dtype")
        if name is not None:
            known = table.text(name).removeprefix("torch.")
            if known in ("auto", ""):
                continue
            if known not in _DTYPES:
                raise table.wrong(name, f"one of {', '.join(_DTYPES)}")
            return _DTYPES[known]
    values.notes.assume("weights take 16 bits: the file names no dtype")
    return 16.0


def _converted(table: Values) -> Bits | None:
    """What the quantiser makes of a weight; None, noted, where it is not known."""
    method = table.text("quant_method", "quant_algo", "quant_library").lower()
    if not method and (table.has("load_in_4bit") or table.has("load_in_8bit")):
        method = "bitsandbytes"
    rule = _METHODS.get(method.replace("_", "-"))
    if rule is None and table.has("bits", "w_bit", "wbits"):
        rule = _grouped
    if rule is None:
        table.notes.assume(
            f"quantization_config.quant_method={method[:40]!r} is not known: weights are taken as not quantised; say "
            "model.expert_bits and model.weight_bits"
        )
        return None
    return rule(table)


def _mxfp4(table: Values) -> Bits:
    return Bits(MXFP4, experts_only=True)


def _fp8(table: Values) -> Bits:
    block = table.raw("weight_block_size")
    experts = MXFP4 if table.text("expert_dtype") in _FP4 else None
    bits = 8.0
    if block is not None:
        sizes = table.items("weight_block_size", kinds=(int,))
        if not sizes or not all(1 <= one <= 1_000_000 for one in sizes):
            raise table.wrong("weight_block_size", "a list of two sizes")
        bits += _scale(table, 32, sizes[0] * sizes[-1])
    return Bits(bits, experts=experts)


def _scale(table: Values, scale_bits: float, weights: int) -> float:
    """Bits that a scale adds to each of the weights that share it."""
    added = scale_bits / weights
    if added < _SMALL:
        table.notes.derive(f"scales of {added:.2g} bits a weight are left out")
        return 0.0
    return added


def _grouped(table: Values) -> Bits:
    """GPTQ and AWQ: a 16-bit scale and a zero point of as many bits as a weight for each group."""
    bits = table.count("bits", "w_bit", "wbits", high=16)
    size = table.count("group_size", "q_group_size", low=-1, default=128)
    if not table.has("group_size", "q_group_size"):
        table.notes.assume("quantisation is in groups of 128 weights: the file gives no group_size")
    if size == 0:
        raise table.wrong(table.name_of("group_size", "q_group_size") or "group_size", "-1 or above 0")
    if size < 0:
        return Bits(float(bits))
    zero = bits if table.flag("zero_point", default=True) else 0
    return Bits(bits + (16 + zero) / size)


def _bitsandbytes(table: Values) -> Bits:
    """4 bits with a scale for each 64 weights, in 32 bits or, doubly quantised, in 8 and 32 for each 256 (QLoRA,
    arXiv 2305.14314); or 8 bits with a scale a row."""
    if table.flag("load_in_4bit", "_load_in_4bit"):
        double = table.flag("bnb_4bit_use_double_quant")
        return Bits(4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64))
    return Bits(8.0)


def _compressed_tensors(table: Values) -> Bits | None:
    """The weights of the groups; where they differ, of the first, which is noted."""
    groups = table.inner("config_groups")
    found: list[tuple[float, str]] = []
    for name in groups.table if groups is not None else ():
        group = groups.inner(name) if groups is not None else None
        weights = None if group is None else group.inner("weights")
        if weights is not None:
            targets = group.raw("targets") if group is not None else None
            names = [one[:300] for one in targets[:1000] if type(one) is str] if isinstance(targets, list) else []
            found.append((_weights_bits(weights), " ".join(names)))
    if not found:
        table.notes.assume("quantization_config has no weights that are quantised")
        return None
    experts = next((bits for bits, targets in found if _EXPERT.search(targets)), None)
    if len({bits for bits, _ in found}) > 1 and experts is None:
        table.notes.assume("quantization_config has several groups: the bits of the first are taken")
    return Bits(found[0][0], experts=experts)


def _weights_bits(weights: Values) -> float:
    bits = weights.count("num_bits", high=64, default=8)
    strategy = weights.text("strategy", default="tensor")
    size = weights.count("group_size", default=0, low=-1)
    if size <= 0 or strategy not in ("group", "tensor_group"):
        return float(bits)
    # nvfp4 and mxfp4 have scales of 8 bits; integers of 16, and a zero point where they are not symmetric.
    is_float = weights.text("type", default="int") == "float" and bits == 4
    zero = 0 if weights.flag("symmetric", default=True) else bits
    return bits + ((8 if is_float else 16) + zero) / size


def _modelopt(table: Values) -> Bits | None:
    algorithm = table.text("quant_algo").upper()
    inner = table.inner("quantization")
    if not algorithm and inner is not None:
        algorithm = inner.text("quant_algo").upper()
    known = {"NVFP4": NVFP4, "FP8": 8.0, "FP8_PB_WO": 8.0, "MXFP4": MXFP4, "MXFP8": 8.25, "W4A16_AWQ": 4 + 16 / 128}
    if algorithm in known:
        return Bits(known[algorithm])
    if table.inner("config_groups") is not None:
        return _compressed_tensors(table)
    table.notes.assume(f"quant_algo={algorithm[:40]!r} is not known: weights are taken as not quantised")
    return None


def _eight(table: Values) -> Bits:
    return Bits(8.0)


_METHODS: Mapping[str, Callable[[Values], Bits | None]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fbgemm-fp8": _eight,
    "gptq": _grouped,
    "awq": _grouped,
    "auto-round": _grouped,
    "auto-gptq": _grouped,
    "gptqmodel": _grouped,
    "intel/auto-round": _grouped,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
    "nvfp4": lambda table: Bits(NVFP4),
    "eetq": _eight,
}


# -- what is not converted -------------------------------------------------------------------------------------


def _left_out(table: Values, num_layers: int) -> dict[str, float]:
    """Share of each part's layers that stays as it is, by the names of modules that are not converted."""
    seen: dict[str, set[int]] = {part: set() for part in ("experts", *_PARTS)}
    whole: set[str] = set()
    for name in _names(table):
        parts = _parts_of(name)
        numbers = _LAYER.findall(name)
        for part in parts:
            if numbers:
                seen[part].update(int(one) for one in numbers)
            else:
                whole.add(part)
    shares = {part: min(1.0, len(found) / num_layers) for part, found in seen.items()}
    return shares | dict.fromkeys(whole, 1.0)


def _names(table: Values) -> Sequence[str]:
    for key in _EXCLUDED:
        if table.has(key):
            names = table.raw(key)
            if not isinstance(names, list) or len(names) > _MOST_NAMES or not all(type(one) is str for one in names):
                raise table.wrong(key, "a list of names")
            return [name[:300] for name in names]
    return ()


def _parts_of(name: str) -> list[str]:
    """The parts of a layer that a name of modules, or a pattern of names, speaks of."""
    if _EXPERT.search(name):
        return ["experts"]
    if _PARTS["shared"].search(name):
        return ["shared"]
    if _PARTS["attention"].search(name):
        return ["attention"]
    if _ROUTER.search(name):
        return []
    if _PARTS["dense"].search(name):
        return ["dense"]
    if re.search(r"layers?[.\\]+\d{1,4}[.*$\\]*$", name):
        return ["experts", *_PARTS]
    return []


def _mean_bits(
    values: Values, spec: Mapping[str, Any], bits: float, plain: float, shares: Mapping[str, float]
) -> float:
    """Bits of the other matrices of layers, as the mean over their weights where some are not converted."""
    if not any(shares[part] for part in _PARTS):
        return bits
    model = ModelSpec(**spec)
    attention = sum(count * model.mixer_params(kind) for kind, count in model.num_of.items())
    weights = {
        "attention": attention,
        "shared": model.num_layers * model.shared_params,
        "dense": model.num_dense_layers * model.dense_params,
    }
    total = sum(weights.values())
    if not total:
        return bits
    left = sum(weights[part] * shares[part] for part in weights) / total
    if 0 < left < 1:
        values.notes.derive(f"{100 * left:.0f} % of attention, shared and dense weights are not converted: a mean")
    return _mixed(bits, plain, left)


def _mixed(bits: float, plain: float, share: float) -> float:
    return bits * (1 - share) + plain * share
