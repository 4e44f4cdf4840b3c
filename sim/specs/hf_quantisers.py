"""Bits of a weight by quantisers whose config has a form of its own: HQQ, TorchAO, Quark, Quanto, ExLlama.

Each takes the table `quantization_config` and gives bits, scales and zero points included; None where it does not say
them in a way that is known.
"""

from __future__ import annotations

import re

from sim.specs.hf_values import Values

MXFP4 = 4.25
"""4 bits and an 8-bit scale for each 32 weights (OCP Microscaling 1.0)."""
NVFP4 = 4.5
"""4 bits and an 8-bit scale for each 16 weights."""
_WEIGHT = re.compile(r"(nvfp|mxfp|uint|int|float)(\d)weight")
"""In a name of TorchAO, in small letters without `_`, what it says of weights: those of activations come before."""
_DTYPE = re.compile(r"(uint|int|float|fp|mxfp|nvfp)(\d)(?:_?e\d+m\d+.*)?")


def exllama(table: Values) -> float | None:
    """ExLlama 2 and 3 choose bits by matrix; `bits` is the mean, with all that they store."""
    table.notes.derive("bits are the mean that the quantiser names, over all matrices of layers")
    return table.amount("bits", high=16)


def hqq(table: Values) -> float | None:
    """A scale and a zero point of 16 bits for each group (github.com/mobiusml/hqq)."""
    every = table.inner("quant_config")
    if every is None:
        return None
    params = every.inner("weight_quant_params")
    if params is None:
        # A table for each kind of module.
        found = {_hqq_group(one) for name in every.table if (one := every.inner(name)) is not None}
        found.discard(None)
        return found.pop() if len(found) == 1 else None
    return _grouped(params, "nbits", 32)


def _hqq_group(table: Values) -> float | None:
    params = table.inner("weight_quant_params")
    return None if params is None else _grouped(params, "nbits", 32)


def _grouped(table: Values, key: str, beside: int) -> float:
    """Bits of a weight, with so many bits beside for each group; a scale a row is left out."""
    bits = table.amount(key, high=16)
    size = table.count("group_size", low=-1, default=-1)
    return bits + (beside / size if size > 0 else 0)


def torchao(table: Values) -> float | None:
    """By the name of the scheme: `int4_weight_only`, or the class of a newer file."""
    named = table.raw("quant_type")
    if isinstance(named, str):
        return _by_name(named, table.inner("quant_type_kwargs"))
    schemes = table.inner("quant_type")
    scheme = None if schemes is None else schemes.inner("default")
    return None if scheme is None else _by_name(scheme.text("_type"), scheme.inner("_data"))


def _by_name(name: str, settings: Values | None) -> float | None:
    found = _WEIGHT.search(name[:200].lower().replace("_", ""))
    if found is None:
        return None
    kind, bits = found[1], int(found[2])
    if bits == 4 and kind in ("nvfp", "mxfp", "float"):
        return MXFP4 if kind == "mxfp" else NVFP4
    # Integers of 4 bits have a scale and a zero point of 16 bits for each group; of 8 bits, a scale a row.
    size = 128 if settings is None else settings.count("group_size", low=-1, default=128)
    return float(bits) if bits >= 8 or size < 1 else bits + 32 / size


def quark(table: Values) -> float | None:
    """AMD Quark: type and groups of all weights, those of some layers aside."""
    every = table.inner("global_quant_config")
    weight = None if every is None else every.inner("weight")
    if weight is None:
        return None
    if table.raw("layer_quant_config"):
        table.notes.assume(
            "layer_quant_config gives some modules other bits: all are taken by global_quant_config; check "
            "model.weight_bits and expert_bits"
        )
    found = _DTYPE.fullmatch(weight.text("dtype").lower())
    if found is None:
        return None
    kind, bits = found[1], int(found[2])
    if weight.text("qscheme") != "per_group":
        return float(bits)
    is_float = kind not in ("int", "uint")
    size = weight.count("group_size", default=32 if is_float else 128)
    zero = bits if kind == "uint" else 0
    return bits + ((8 if is_float else 16) + zero) / size


def quanto(table: Values) -> float | None:
    """Optimum Quanto: a type, and a scale and a shift for each 128 weights of few bits."""
    found = _DTYPE.fullmatch(table.text("weights").lower())
    if found is None:
        return None
    bits = int(found[2])
    return float(bits) if bits >= 8 else bits + 32 / 128
