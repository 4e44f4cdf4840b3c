"""Reading back what a run has written: `metrics.json`, checked for what a table of runs asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from traces.jsontext import kind_of, shown
from traces.messages import fault
from traces.reading import read_table

REMEDY = "remove the folder or run it again"
MAX_METRICS = 64 << 20
"""Bytes of a file."""
_MOST_DEPTH = 16
_MOST = 2**63 - 1

_TEXTS = ("policy", "hardware", "model", "stack")
_TABLES = ("capacity", "link", "tpot_ms")
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "num_tokens": (0, _MOST),
    "num_accesses": (0, _MOST),
    "num_hits": (0, _MOST),
    "elapsed_ns": (0, _MOST),
    "stall_ns": (0, _MOST),
    "late_stall_ns": (0, _MOST),
    "miss_stall_ns": (0, _MOST),
    "capacity.residency": (0, 1),
    "link.utilisation": (0, 1e6),
}
"""What every run has, and its range."""
_GROUPS = ("capacity", "prefetch", "bytes", "link", "host", "storage", "tpot_ms", "ttft_ms", "horizon")
"""Tables that hold figures alone."""
_PERHAPS: Mapping[str, tuple[float, float]] = {
    "tpot_ms.mean": (0, 1e15),
    "bounds.floor_ns": (0, _MOST),
    "host_stall_ns": (0, _MOST),
    "storage_stall_ns": (0, _MOST),
    "storage.utilisation": (0, 1e6),
    "num_host": (0, _MOST),
}
"""The same of what may be null."""


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics of a run. TraceError names file, key and value of what no run writes."""
    metrics = read_table(path, REMEDY, MAX_METRICS)
    _check_values(path, metrics, "", 0)
    check_run(path, metrics, "")
    compare = metrics.setdefault("compare", None)
    if not isinstance(compare, dict | None):
        raise fault(path, "compare", f"is {shown(compare)}, no table of runs", REMEDY)
    for name, other in (compare or {}).items():
        if not isinstance(other, dict):
            raise fault(path, f"compare.{name}", f"is {shown(other)}, no run", REMEDY)
        # A run beside another says only what is its own.
        check_run(path, {**metrics, **other, "bounds": None}, f"compare.{name}.")
    return metrics


def check_run(path: Path, metrics: Mapping[str, Any], prefix: str) -> None:
    """TraceError where a run lacks what a table asks of it, or has it out of range."""
    for key in _TABLES:
        if not isinstance(value := metrics.get(key), dict):
            raise fault(path, prefix + key, f"is {shown(value)}, no table", REMEDY)
    if "mean" not in metrics["tpot_ms"]:
        raise fault(path, f"{prefix}tpot_ms.mean", "is missing", REMEDY)
    bounds = metrics.get("bounds")
    if bounds is not None and not (isinstance(bounds, dict) and "floor_ns" in bounds):
        raise fault(path, f"{prefix}bounds", f"is {shown(bounds)}, no table of bounds", REMEDY)
    for key in _TEXTS:
        if not isinstance(value := metrics.get(key), str):
            raise fault(path, prefix + key, f"is {shown(value)}, no text", REMEDY)
    for key, (low, high) in _NUMBERS.items():
        value = _look_up(metrics, key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise fault(path, prefix + key, f"is {shown(value)}, no number from {low:g} to {high:g}", REMEDY)
    for key, (low, high) in _PERHAPS.items():
        value = _look_up(metrics, key)
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            raise fault(path, prefix + key, f"is {shown(value)}, no number from {low:g} to {high:g}, nor null", REMEDY)
    _check_figures(path, metrics, prefix)
    if metrics["num_hits"] > metrics["num_accesses"]:
        problem = f"is {metrics['num_hits']}, more than num_accesses, {metrics['num_accesses']}"
        raise fault(path, f"{prefix}num_hits", problem, REMEDY)


def _check_figures(path: Path, metrics: Mapping[str, Any], prefix: str) -> None:
    """TraceError where something else stands in the place of a figure: of any group of them, or named like one."""

    def check(key: str, value: Any, low: float) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                check(f"{key}.{name}", inner, low)
        elif value is not None and (type(value) not in (int, float) or value < low):
            bound = "" if low < 0 else " of 0 or more"
            raise fault(path, prefix + key, f"is {shown(value)}, no number{bound}", REMEDY)

    for key, value in metrics.items():
        if key in _GROUPS or key.startswith("num_"):
            check(key, value, 0)
        elif key.endswith(("_ns", "_per_s")):
            check(key, value, -_MOST)


def _look_up(metrics: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    value: Any = metrics
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_values(path: Path, table: Mapping[str, Any], prefix: str, depth: int) -> None:
    """TraceError for what no column of a table holds."""
    if depth > _MOST_DEPTH:
        raise fault(path, prefix[:80], "is nested too deeply", REMEDY)
    for key, value in table.items():
        if not _is_text(key):
            raise fault(path, f"{prefix}{key!a}", "has a broken character in its name", REMEDY)
        if isinstance(value, dict):
            _check_values(path, value, f"{prefix}{key}.", depth + 1)
            continue
        items = value if isinstance(value, list) else [value]
        if isinstance(value, list) and len({kind_of(item) for item in value}) > 1:
            raise fault(path, f"{prefix}{key}", f"is {shown(value)}, a list of several kinds", REMEDY)
        for item in items:
            if isinstance(item, dict | list) or (type(item) is int and abs(item) > _MOST):
                raise fault(path, f"{prefix}{key}", f"is {shown(item)}", f"numbers have 64 bits; {REMEDY}")
            if isinstance(item, str) and not _is_text(item):
                raise fault(path, f"{prefix}{key}", "holds a broken character", REMEDY)


def _is_text(text: str) -> bool:
    return text.isascii() or text.encode(errors="replace").decode() == text


def check_columns(rows: Iterable[tuple[Path, Mapping[str, Any]]]) -> None:
    """TraceError where runs of one table hold different kinds of values under one key. rows: with their files."""
    seen: dict[str, tuple[str, Path, Any]] = {}
    for path, row in rows:
        for key, value in row.items():
            if value is None:
                continue
            kind = kind_of(value) if not isinstance(value, list) else f"list of {kind_of(value[0]) if value else ''}"
            first = seen.setdefault(key, (kind, path, value))
            if kind != first[0] and "list of " not in (kind, first[0]):
                problem = f"is {shown(value)}, in {first[1]} it is {shown(first[2])}"
                raise fault(path, key, problem, "collect runs of one version; " + REMEDY)
