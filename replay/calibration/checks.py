"""Whether the raw record of a calibration says what one can say, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traces.jsontext import shown

_MOST = 1e15
_MOST_PADDED = 1_000
"""A pad of a stack's largest overhead, 1 ms a layer, is then at most a second."""
_TEXTS = ("date",)
_POSITIVE = ("memory_gb", "memory_gb_per_s", "matrix_tflops", "pad_share")
_LINK = ("bytes", "in_a_row_ns", "pageable_ns")
_BESIDE = ("idle_ns", "busy_ns", "bytes")
_MAY_BE_NEGATIVE = ("kernel_start", "release_start", "load_sync", "lone_copy", "gate_sync", "token_sync", "issue_gap")
"""Differences of two clocks, or of two times."""


def check_record(raw: Mapping[str, Any]) -> None:
    """ValueError that names the key of the first value that is missing, of another kind or out of range."""
    for key in _TEXTS:
        if not isinstance(raw.get(key), str):
            raise ValueError(f"{key} is {shown(raw.get(key))}, no text")
    device = _table(raw, "device")
    for key in ("name", "torch"):
        if not isinstance(device.get(key), str):
            raise ValueError(f"device.{key} is {shown(device.get(key))}, no text")
    if not isinstance(raw.get("threads_share_interpreter"), bool):
        raise ValueError("threads_share_interpreter is neither true nor false")
    for key in _POSITIVE:
        _number(key, raw.get(key), above=True)
    if raw["pad_share"] > _MOST_PADDED:
        raise ValueError(f"pad_share is {shown(raw['pad_share'])}, more than {_MOST_PADDED} times what was asked for")
    for index, row in enumerate(_list(raw, "link")):
        for key in _LINK:
            _number(f"link[{index}].{key}", _inside(row, f"link[{index}]").get(key), above=True)
    for key in ("chunk_ns", "kernel_launch_ns"):
        for model, value in _table(raw, key).items():
            _number(f"{key}.{model}", value, above=key == "chunk_ns")
    for model, row in _table(raw, "beside").items():
        for key in _BESIDE:
            if key in _inside(row, f"beside.{model}") or key != "bytes":
                _number(f"beside.{model}.{key}", row.get(key), above=True)
    for index, value in enumerate(_list(raw, "python_loop_ns")):
        _number(f"python_loop_ns[{index}]", value, above=True)
    for policy, times in _table(raw, "decisions").items():
        for name, value in _inside(times, f"decisions.{policy}").items():
            _number(f"decisions.{policy}.{name}", value, above=name == "effort")
    _check_host(_table(raw, "host"))
    models = _table(raw, "kernels")
    for key in ("chunk_ns", "kernel_launch_ns", "host"):
        for model in models:
            if model not in raw[key]:
                raise ValueError(f"{key} lacks {model}, whose kernels are there")


def _check_host(host: Mapping[str, Any]) -> None:
    for model, stacks in host.items():
        for stack, policies in _inside(stacks, f"host.{model}").items():
            for policy, samples in _inside(policies, f"host.{model}.{stack}").items():
                for name, sample in _inside(samples, f"host.{model}.{stack}.{policy}").items():
                    _check_sample(f"host.{model}.{stack}.{policy}.{name}", name, sample)


def _check_sample(place: str, name: str, sample: Any) -> None:
    for key, value in _inside(sample, place).items():
        free = name in _MAY_BE_NEGATIVE and key != "count"
        _number(f"{place}.{key}", value, least=-_MOST if free else 0)
    for key in ("mean", "count"):
        if key not in sample:
            raise ValueError(f"{place} lacks {key}")


def _inside(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {shown(value)}, no table")
    return value


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = _inside(raw.get(key), key)
    if not found:
        raise ValueError(f"{key} is an empty table")
    return found


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {shown(value)}, no list of figures")
    return value


def _number(place: str, value: Any, *, above: bool = False, least: float = 0) -> None:
    if type(value) not in (int, float) or not least <= value <= _MOST or (above and value <= 0):
        bound = "above 0" if above else f"from {least:g}"
        raise ValueError(f"{place} is {shown(value)}, no number {bound}")
