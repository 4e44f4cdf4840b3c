"""What a trace file holds: names, shapes and types of its arrays, keys of its header, and how they must agree.

Knows the layout only: what the rows say is checked by `traces.validate`. Shape letters: T tokens, L MoE layers,
K top-k, E experts, R requests, D distances ahead, M listed candidates, d width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.container import DTYPE_NAMES, Array, fault
from traces.expert_sizes import sizes_of
from traces.jsontext import parse_json
from traces.messages import TraceError

FORMAT = "expertflow-trace"
FORMAT_VERSION = "1"
MAX_EXPERTS = 65_535
COUNTS = ("num_layers", "num_experts", "top_k", "num_requests", "num_tokens")
TEXTS = ("model", "source", "license")
_REWRITE = "write the file again with traces.format.write_trace"


@dataclass(frozen=True)
class ArraySpec:
    """Shape letters and allowed safetensors types of one array."""

    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    required: bool = False


ARRAYS: Mapping[str, ArraySpec] = {
    "experts": ArraySpec(("T", "L", "K"), ("U8", "U16"), required=True),
    "weights": ArraySpec(("T", "L", "K"), ("F16",)),
    "request_start": ArraySpec(("R+1",), ("I64",), required=True),
    "prompt_len": ArraySpec(("R",), ("I32",), required=True),
    "context_len": ArraySpec(("R",), ("I32",)),
    "forward_id": ArraySpec(("T",), ("I64",)),
    "token_ids": ArraySpec(("T",), ("I32",)),
    "embedding": ArraySpec(("T", "d"), ("F16",)),
    "logits": ArraySpec(("T", "L", "E"), ("F16",)),
    "lookahead": ArraySpec(("T", "L", "D", "E"), ("F16",)),
    "lookahead_ids": ArraySpec(("T", "L", "D", "M"), ("U8", "U16")),
    "lookahead_scores": ArraySpec(("T", "L", "D", "M"), ("U8",)),
}
PER_REQUEST = ("request_start", "prompt_len", "context_len")
PER_TOKEN = tuple(name for name, spec in ARRAYS.items() if spec.dims[0] == "T")


@dataclass(frozen=True)
class Sizes:
    """The numbers of the header."""

    num_layers: int
    num_experts: int
    top_k: int
    num_requests: int
    num_tokens: int


def padding_of(dtype: np.dtype[Any]) -> int:
    """The all-ones value of an unsigned type: it pads rows that have fewer experts."""
    return int(np.iinfo(dtype).max)


def check_layout(path: Path, header: Mapping[str, str], arrays: Mapping[str, Array]) -> Sizes:
    """Header and shapes against each other; the sizes on success, TraceError on the first fault."""
    _check_format(path, header, arrays)
    sizes = _read_sizes(path, header)
    dims = {
        "T": sizes.num_tokens,
        "L": sizes.num_layers,
        "K": sizes.top_k,
        "E": sizes.num_experts,
        "R": sizes.num_requests,
        "R+1": sizes.num_requests + 1,
    }
    for name, spec in ARRAYS.items():
        if name in arrays:
            _check_array(path, name, spec, arrays[name], dims)
        elif spec.required:
            raise fault(path, name, "is missing", f"a trace needs {', '.join(_required())}")
    _check_lookahead(path, arrays, dims)
    _check_expert_type(path, sizes, arrays["experts"])
    _check_lists(path, header, sizes)
    sizes_of(path, header, sizes.num_layers, sizes.num_experts)
    return sizes


def _required() -> list[str]:
    return [name for name, spec in ARRAYS.items() if spec.required]


def _check_format(path: Path, header: Mapping[str, str], arrays: Mapping[str, Array]) -> None:
    if header.get("format") != FORMAT:
        found = f"format is {header['format']!r}" if "format" in header else "names no format"
        remedy = f"a trace has format={FORMAT}; convert other files: python -m traces import --help"
        raise fault(path, "header", found, remedy)
    if header.get("format_version") != FORMAT_VERSION:
        problem = f"format_version is {header.get('format_version')!r}, this release reads {FORMAT_VERSION!r}"
        raise fault(path, "header", problem, "update expertflow, or convert the file again")
    for name in arrays:
        if name not in ARRAYS:
            raise fault(path, f"array {name!r}", "is unknown", f"known are {', '.join(ARRAYS)}; remove it")


def _read_sizes(path: Path, header: Mapping[str, str]) -> Sizes:
    for key in TEXTS:
        if not header.get(key, "").strip():
            raise fault(path, "header", f"{key} is missing or empty", f"write it: {key}=…")
    counts = {}
    for key in COUNTS:
        text = header.get(key)
        if text is None or not (text.isascii() and text.isdecimal() and len(text) < 16):
            shown = "is missing" if text is None else f"is {text[:40]!r}, not a whole number"
            raise fault(path, "header", f"{key} {shown}", _REWRITE)
        counts[key] = int(text)
    sizes = Sizes(**counts)
    if sizes.num_tokens == 0 or sizes.num_requests == 0:
        what = "num_tokens" if sizes.num_tokens == 0 else "num_requests"
        raise fault(path, "header", f"the trace is empty ({what} is 0)", "record or import at least one token")
    if sizes.num_layers == 0 or sizes.num_experts == 0 or sizes.top_k == 0:
        raise fault(path, "header", "num_layers, num_experts or top_k is 0", _REWRITE)
    if sizes.num_experts > MAX_EXPERTS:
        raise fault(path, "header", f"num_experts is {sizes.num_experts}", f"at most {MAX_EXPERTS} are supported")
    if sizes.top_k > sizes.num_experts:
        problem = f"top_k is {sizes.top_k}, more than num_experts, {sizes.num_experts}"
        raise fault(path, "header", problem, "a token cannot choose more experts than there are; correct it")
    return sizes


def _check_array(path: Path, name: str, spec: ArraySpec, array: Array, dims: dict[str, int]) -> None:
    """Type and shape; a letter that the header does not fix (D, M, d) is fixed by the first array with it."""
    dtype = DTYPE_NAMES.get(array.dtype, str(array.dtype))
    if dtype not in spec.dtypes:
        raise fault(path, name, f"has the type {dtype}", f"it must be {' or '.join(spec.dtypes)}")
    letters = ", ".join(spec.dims)
    if array.ndim != len(spec.dims):
        raise fault(path, name, f"has the shape {list(array.shape)}", f"it must be [{letters}]")
    wanted = [dims.setdefault(letter, size) for letter, size in zip(spec.dims, array.shape, strict=True)]
    if list(array.shape) != wanted:
        problem = f"has the shape {list(array.shape)}, the header and the other arrays say {wanted} ([{letters}])"
        raise fault(path, name, problem, _REWRITE)
    if 0 in array.shape:
        raise fault(path, name, f"has the shape {list(array.shape)}, which holds nothing", "leave the array out")


def _check_lookahead(path: Path, arrays: Mapping[str, Array], dims: Mapping[str, int]) -> None:
    both = ("lookahead_ids", "lookahead_scores")
    for name, other in (both, both[::-1]):
        if name in arrays and other not in arrays:
            raise fault(path, other, f"is missing beside {name}", "they come together; write both or neither")
    if "lookahead" in arrays and both[0] in arrays:
        raise fault(path, "lookahead", "stands beside lookahead_ids", "keep one of the two forms")
    if dims.get("D", 1) > dims["L"]:
        problem = f"looks {dims['D']} layers ahead in a model of {dims['L']}"
        name = "lookahead" if "lookahead" in arrays else both[0]
        raise fault(path, name, problem, "keep at most num_layers distances")
    if dims.get("M", 1) > dims["E"]:
        problem = f"lists {dims['M']} candidates of {dims['E']} experts"
        raise fault(path, both[0], problem, "keep at most num_experts candidates")


def _check_expert_type(path: Path, sizes: Sizes, experts: Array) -> None:
    if sizes.num_experts > padding_of(experts.dtype) + 1:
        problem = f"is {experts.dtype}, too small for num_experts={sizes.num_experts}"
        raise fault(path, "experts", problem, "store uint16")


def _check_lists(path: Path, header: Mapping[str, str], sizes: Sizes) -> None:
    for key, kind, length in (("request_labels", str, sizes.num_requests), ("moe_layer_ids", int, sizes.num_layers)):
        if key not in header:
            continue
        values = json_list(header[key])
        if values is None or not all(type(value) is kind for value in values):
            remedy = f"write a JSON list of {kind.__name__}, or leave it out"
            raise fault(path, "header", f"{key} is no JSON list of {kind.__name__}", remedy)
        if len(values) != length:
            problem = f"{key} has {len(values)} entries, the trace needs {length}"
            raise fault(path, "header", problem, "give one each, or leave it out")
        if kind is str and any("\ud800" <= letter <= "\udfff" for value in values for letter in value):
            raise fault(path, "header", f"{key} holds a broken character", "give valid Unicode")
        if kind is int and any(b <= a for a, b in zip([-1, *values[:-1]], values, strict=True)):
            raise fault(path, "header", f"{key} does not rise from 0 or more", "list the MoE layers in order")


def json_list(text: str) -> list[Any] | None:
    """The list that `text` is in JSON; None if it is anything else."""
    try:
        values = parse_json("header", "text", text)
    except TraceError:
        return None
    return values if isinstance(values, list) else None
