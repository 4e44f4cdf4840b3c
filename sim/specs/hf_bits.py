"""Bits of a model's weights by its Hugging Face config.json: scales and zero points included, where they count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from expertflow.model import ModelSpec
from sim.specs.hf_modules import ATTENTION, EXPERTS, FEED, PARTS, SHARED, LeftOut, is_readable, named
from sim.specs.hf_quantisers import MXFP4, NVFP4, exllama, hqq, quanto, quark, torchao
from sim.specs.hf_values import REMEDY, Values
from traces.messages import fault, plain

_DTYPES = {
    "float32": 32.0,
    "float": 32.0,
    "bfloat16": 16.0,
    "float16": 16.0,
    "half": 16.0,
    "float8_e4m3fn": 8.0,
    "float8_e5m2": 8.0,
}
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
    "skip_modules",
)
_MOST_NAMES = 1_000_000
_MOST_PATTERNS = 1000
"""With alternatives, of which each may have hundreds."""
_KV = {"FP8": 8.0, "INT8": 8.0, "NVFP4": NVFP4}
"""kv_cache_quant_algo."""


class Bits(NamedTuple):
    """Of weights that are converted, by part; None: the part is not. ends: of embeddings, head and router."""

    experts: float | None
    attention: float | None = None
    shared: float | None = None
    dense: float | None = None
    ends: float | None = None


def _every(bits: float, experts: float | None = None) -> Bits:
    return Bits(bits if experts is None else experts, bits, bits, bits)


def with_bits(values: Values, top: Values, spec: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """`spec`, keys of `ModelSpec`, with the bits that the file tells. top: the file's own table, which has them where
    the language part does not. num_layers: as the file counts them."""
    plain = _dtype_bits(values, top)
    found = {**spec, "embedding_bits": plain, "weight_bits": plain, "expert_bits": plain}
    if plain > 16:
        found["kv_bits"] = plain
        values.notes.derive(f"cached keys and values take {plain:g} bits, as the weights")
    table = _table(values, top)
    if table is None:
        return found
    kv_bits = _kv_bits(table)
    if kv_bits is not None:
        found["kv_bits"] = kv_bits
    known = _converted(table)
    if known is None:
        return found
    # DeepSeek-V4 says it beside its quantization_config, others within.
    if values.text("expert_dtype") in _FP4:
        known = known._replace(experts=MXFP4)
    if known.ends is not None:
        found["embedding_bits"] = known.ends
    weights = LeftOut(ModelSpec(**spec), num_layers, _names(table)).weights()
    found["expert_bits"] = _mean(known, plain, weights, (EXPERTS,))
    others = (ATTENTION, SHARED, FEED)
    found["weight_bits"] = _mean(known, plain, weights, others)
    total, left = (sum(weights[part][at] for part in others) for at in (0, 1))
    if 0 < left < total:
        share = 100 * left / total
        values.notes.derive(f"{share:.0f} % of attention, shared and dense weights are not converted: a mean")
    elif len({getattr(known, part) for part in others if weights[part][0]}) > 1:
        values.notes.derive("attention, shared and dense weights have different bits: a mean over them")
    values.notes.derive(
        f"experts take {found['expert_bits']:g} bits a weight and the other matrices of layers "
        f"{found['weight_bits']:g}, by {table.place.rstrip('.')}"
    )
    return found


def _mean(bits: Bits, plain: float, weights: Mapping[str, tuple[float, float]], parts: tuple[str, ...]) -> float:
    """Bits of a weight of these parts, as the mean over their weights."""
    total = summed = 0.0
    for part in parts:
        of_part = getattr(bits, part)
        size, left = weights[part]
        total += size
        summed += size * plain if of_part is None else (size - left) * of_part + left * plain
    return summed / total if total else plain


def _table(values: Values, top: Values) -> Values | None:
    """The table of the quantiser: MLX names it `quantization`."""
    for names in (("quantization_config", "compression_config"), ("quantization",)):
        for one in (values, top):
            found = one.inner(*names)
            if found is not None:
                return found
            word = one.raw(*names)
            if isinstance(word, str):
                values.notes.assume(
                    f"{names[0]} is a word, {plain(word[:40])!r}, without bits: weights are taken as not quantised; "
                    "say model.expert_bits and model.weight_bits"
                )
    return None


def _kv_bits(table: Values) -> float | None:
    """Bits of a cached value, where the quantiser says them."""
    scheme = table.inner("kv_cache_scheme")
    if scheme is not None and scheme.has("num_bits"):
        return float(scheme.count("num_bits", high=64))
    for one in (table, table.inner("quantization")):
        algorithm = "" if one is None else one.text("kv_cache_quant_algo").upper()
        if algorithm in _KV:
            return _KV[algorithm]
        if algorithm:
            table.notes.assume(f"kv_cache_quant_algo={algorithm[:40]!r} is not known: say model.kv_bits")
    return None


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
        rule = _mlx if not method and table.has("bits") else _grouped
    if rule is None:
        table.notes.assume(
            f"quantization_config.quant_method={method[:40]!r} is not known: weights are taken as not quantised; say "
            "model.expert_bits and model.weight_bits"
        )
        return None
    return rule(table)


def _mxfp4(table: Values) -> Bits:
    return Bits(MXFP4)


def _fp8(table: Values) -> Bits:
    block = table.raw("weight_block_size")
    experts = MXFP4 if table.text("expert_dtype") in _FP4 else None
    bits = 8.0
    if block is not None:
        sizes = table.items("weight_block_size", kinds=(int,))
        if not sizes or not all(1 <= one <= 1_000_000 for one in sizes):
            raise table.wrong("weight_block_size", "a list of two sizes")
        bits += _scale(table, 32, sizes[0] * sizes[-1])
    return _every(bits, experts)


def _scale(table: Values, scale_bits: float, weights: int) -> float:
    """Bits that a scale adds to each of the weights that share it."""
    added = scale_bits / weights
    if added < _SMALL:
        table.notes.derive(f"scales of {added:.2g} bits a weight are left out")
        return 0.0
    return added


def _grouped(table: Values) -> Bits:
    """GPTQ and AWQ: a 16-bit scale and a zero point of as many bits as a weight for each group."""
    bits = table.amount("bits", "w_bit", "wbits", high=16)
    size = table.count("group_size", "q_group_size", low=-1, default=128)
    if not table.has("group_size", "q_group_size"):
        table.notes.assume("quantisation is in groups of 128 weights: the file gives no group_size")
    if size == 0:
        raise table.wrong(table.name_of("group_size", "q_group_size") or "group_size", "-1 or above 0")
    if size < 0:
        return _every(bits)
    zero = bits if table.flag("zero_point", default=True) else 0
    return _every(bits + (16 + zero) / size)


def _bitsandbytes(table: Values) -> Bits:
    """4 bits with a scale for each 64 weights, in 32 bits or, doubly quantised, in 8 and 32 for each 256 (QLoRA,
    arXiv 2305.14314); or 8 bits with a scale a row."""
    if table.flag("load_in_4bit", "_load_in_4bit"):
        double = table.flag("bnb_4bit_use_double_quant")
        return _every(4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64))
    return _every(8.0)


def _mlx(table: Values) -> Bits:
    """MLX: a scale and a bias of 16 bits for each group, or as mxfp4 and nvfp4; embeddings, head and router alike."""
    bits, size = table.amount("bits", high=16), table.count("group_size", default=64)
    mode = table.text("mode", default="affine")
    found = bits + (32 if mode == "affine" else 8) / size
    table.notes.assume(
        f"weights take {found:g} bits, scales included, embeddings and head too: bits and group_size without a "
        "quant_method are taken as MLX's"
    )
    return _every(found)._replace(ends=found)


def _compressed_tensors(table: Values) -> Bits | None:
    """The weights of the groups, each of the parts that its targets name; a class of modules, such as Linear, names
    those that no other group does."""
    groups = table.inner("config_groups")
    of_all: list[float] = []
    of_part: dict[str, list[float]] = {}
    for name in groups.table if groups is not None else ():
        group = groups.inner(name) if groups is not None else None
        weights = None if group is None else group.inner("weights")
        if group is None or weights is None:
            continue
        bits = _weights_bits(weights)
        parts = _targeted(group)
        if parts is None:
            of_all.append(bits)
        for part in parts or ():
            of_part.setdefault(part, []).append(bits)
    if not of_all and not of_part:
        table.notes.assume("quantization_config has no weights that are quantised")
        return None
    if len({*of_all, *(bits for found in of_part.values() for bits in found)}) > 1:
        table.notes.assume(
            "groups of quantization_config differ in bits: each part of a layer takes those of the first that names it"
        )
    rest = of_all[0] if of_all else None
    return Bits(**{part: of_part[part][0] if part in of_part else rest for part in PARTS})


def _targeted(group: Values) -> set[str] | None:
    """The parts that a group's targets name; None: all, as by the name of a class."""
    targets = group.raw("targets")
    if not isinstance(targets, list) or not targets:
        return None
    names = [one[:300] for one in targets[:_MOST_NAMES] if type(one) is str]
    if any(one[:1].isupper() and "." not in one for one in names):
        return None
    return {part for name in names if is_readable(name) for one in named(name) for part in one.parts}


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
        return _every(known[algorithm])
    if table.inner("config_groups") is not None:
        return _compressed_tensors(table)
    table.notes.assume(f"quant_algo={algorithm[:40]!r} is not known: weights are taken as not quantised")
    return None


def _eight(table: Values) -> Bits:
    return _every(8.0)


def _by_own_form(rule: Callable[[Values], float | None]) -> Callable[[Values], Bits | None]:
    """The rule of a quantiser that has one bits for all, as a rule of `_METHODS`."""

    def found(table: Values) -> Bits | None:
        bits = rule(table)
        if bits is None:
            table.notes.assume(
                f"{table.place.rstrip('.')} does not tell the bits of a weight in a known way: weights are taken as "
                "not quantised; say model.expert_bits and model.weight_bits"
            )
        return None if bits is None else _every(bits)

    return found


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
    "nvfp4": lambda table: _every(NVFP4),
    "eetq": _eight,
    "exl2": _by_own_form(exllama),
    "exl3": _by_own_form(exllama),
    "hqq": _by_own_form(hqq),
    "torchao": _by_own_form(torchao),
    "quark": _by_own_form(quark),
    "quanto": _by_own_form(quanto),
}


# -- what is not converted -------------------------------------------------------------------------------------


def _names(table: Values) -> list[str]:
    """Names of modules that stay as they are, of all keys that have some. What is not read of them is noted."""
    found: list[str] = []
    for one in (table, table.inner("quantization")):
        if one is not None:
            for key in _EXCLUDED:
                found += _listed(one, key)
    found += _by_table(table)
    names = [name[:300] for name in found]
    if not all(is_readable(name) for name in names):
        table.notes.assume("names of modules with a look-ahead are not read: check model.weight_bits and expert_bits")
    patterns = [name for name in names if "(" in name or "[" in name]
    if len(patterns) > _MOST_PATTERNS:
        raise fault(table.path, table.place.rstrip("."), f"has more than {_MOST_PATTERNS} patterns of names", REMEDY)
    return [name for name in names if is_readable(name)]


def _listed(table: Values, key: str) -> list[str]:
    names = table.table.get(key)
    if names is None:
        return []
    if not isinstance(names, list) or len(names) > _MOST_NAMES or not all(type(one) is str for one in names):
        raise table.wrong(key, "a list of names")
    return names


def _by_table(table: Values) -> list[str]:
    """The same of tables: `dynamic` of GPTQModel, `extra_config` of AutoRound, and MLX's entries for modules."""
    dynamic, extra = table.inner("dynamic"), table.inner("extra_config")
    found, others = [], False
    for name in () if dynamic is None else dynamic.table:
        if name.startswith("-:"):
            found.append(name[2:])
        else:
            others = True
    bits = table.raw("bits")
    for name, setting in (*(() if extra is None else extra.table.items()), *_of_mlx(table)):
        own = setting.get("bits") if isinstance(setting, dict) else 16 if setting is False else None
        if own is not None and type(own) in (int, float) and own >= 16:
            found.append(name)
        else:
            others = others or (own is not None and own != bits)
    if others:
        table.notes.assume("the quantiser gives some modules other bits, which are not read: check model.weight_bits")
    return found


def _of_mlx(table: Values) -> list[tuple[str, object]]:
    if table.has("quant_method"):
        return []
    return [(name, one) for name, one in table.table.items() if "." in name and (one is False or isinstance(one, dict))]
