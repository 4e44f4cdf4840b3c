"""Kernel times of one model as measured on one GPU: what a profile holds, how it is read and checked.

Data only: `sim.machine.kernels` and `sim.machine.groups` turn it into times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated

from expertflow.keys import Rule, check_fields, check_range, from_mapping

Points = tuple[tuple[int, float], ...]
"""Points (tokens or rows, ns) of a measured kernel, tokens rising."""

GroupPoints = tuple[tuple[int, float, float], ...]
"""Points (experts, tokens per expert, ns) of a launch of several experts, on a full grid, both rising."""

_TABLES = ("expert", "shared", "head", "attention", "dense")
_TABLE_NS = 1e12
_TABLE_REMEDY = "give nanoseconds as measured, 1 at least"
_MOST_EXPERTS = 65_535
_MOST_TOKENS = 1e6
_SLOWDOWN = Rule(1, 100, remedy="measure both with the host far ahead; 1: copies slow no kernel")
_PREFILL_KV = Rule(
    0, _TABLE_NS, unit="ns", remedy="give ns per (query, key) pair, or leave it out for the roofline's share"
)


@dataclass(frozen=True)
class KernelTable:
    """Kernel times of one model as measured on one GPU, by number of tokens; `sim.machine.kernels` reads between them.

    expert: one routed expert. shared: all shared experts of a layer; empty if the model has none. head: by rows.
    attention: attention and router of one MoE layer, every row with a KV length of 1. dense: one leading dense layer,
    its attention (KV length 1) included; empty if the model has none. kv: ns for each token of KV that a layer reads
    beyond that one a row, on top of attention or dense layer. prefill_kv: ns for each (query, key) pair of a prefill
    beyond one a row, on top too; None takes what the roofline gives a pair. groups: routed experts launched at once,
    [experts, tokens per expert, ns], the launch on the device included; every number of experts, from 1 on, with the
    same numbers of tokens. With it `expert` is not read (`sim.machine.groups`); without it a group takes as long as its
    experts one by one. attention_slowdown, experts_slowdown, head_slowdown: factor on the time of that kernel while the
    link is busy all the time that it runs, 1 if it takes no longer (`sim.machine.slowed`). All other times are those on
    an idle link.
    """

    expert: Points
    head: Points
    attention: Points
    kv: Annotated[float, Rule(0, _TABLE_NS, unit="ns", remedy="give ns per token of KV in a layer")]
    shared: Points = ()
    dense: Points = ()
    prefill_kv: Annotated[float | None, _PREFILL_KV] = None
    groups: GroupPoints = ()
    attention_slowdown: Annotated[float, _SLOWDOWN] = 1.0
    experts_slowdown: Annotated[float, _SLOWDOWN] = 1.0
    head_slowdown: Annotated[float, _SLOWDOWN] = 1.0

    def check(self, key: str) -> None:
        """ValueError naming `key`.field where a value is out of range or a needed table has no point."""
        for name in _TABLES:
            self._check_points(f"{key}.{name}", getattr(self, name), needed=name not in ("shared", "dense"))
        check_fields(self, key)
        if self.groups:
            _check_groups(f"{key}.groups", self.groups)

    @staticmethod
    def _check_points(key: str, points: Points, needed: bool) -> None:
        if needed and not points:
            raise ValueError(f"{key}=() has no points; give at least one [tokens, ns]")
        last = 0
        for num_tokens, ns in points:
            at = f"{key}[{num_tokens} tokens]"
            check_range(at, ns, 1, _TABLE_NS, remedy=_TABLE_REMEDY)
            if num_tokens <= last:
                raise ValueError(f"{at} follows {last} tokens; tokens must rise and be at least 1")
            last = num_tokens


def _check_groups(key: str, points: GroupPoints) -> None:
    """ValueError unless `points` are a full grid that begins with one expert, in order."""
    rows: dict[int, list[float]] = {}
    last = (0, 0.0)
    for num_experts, tokens, ns in points:
        at = f"{key}[{num_experts} experts, {tokens:g} tokens each]"
        check_range(at, ns, 1, _TABLE_NS, remedy=_TABLE_REMEDY)
        check_range(f"{at}: experts", num_experts, 1, _MOST_EXPERTS)
        check_range(f"{at}: tokens", tokens, 1, _MOST_TOKENS, remedy="give the tokens of each expert")
        if (num_experts, tokens) <= last:
            raise ValueError(f"{at} follows {last[0]} experts, {last[1]:g} tokens each; sort by experts, then tokens")
        last = (num_experts, tokens)
        rows.setdefault(num_experts, []).append(tokens)
    first = next(iter(rows))
    if first != 1 or len(rows) < 2:
        raise ValueError(f"{key} has {', '.join(map(str, rows))} experts; measure 1 and at least one more number")
    for num_experts, tokens_of in rows.items():
        if tokens_of != rows[1]:
            raise ValueError(
                f"{key}: {num_experts} experts have {_listed(tokens_of)} tokens each, 1 has "
                f"{_listed(rows[1])}; measure every number of experts with the same tokens"
            )


def _listed(tokens: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in tokens)


def kernel_table(key: str, values: object) -> KernelTable:
    """A table from the keys of one model; ranges are checked by the hardware that takes it."""
    if isinstance(values, KernelTable):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}={values!r} must map expert, head, attention and so on to points [tokens, ns]")
    missing = [item.name for item in fields(KernelTable) if item.default is MISSING and item.name not in values]
    if missing:
        raise ValueError(f"{key} lacks {', '.join(missing)}; measure all, or leave the model out for the roofline")
    tables: dict[str, object] = {name: _table(f"{key}.{name}", values[name]) for name in _TABLES if name in values}
    if "groups" in values:
        tables["groups"] = _groups(f"{key}.groups", values["groups"])
    prefill = values.get("prefill_kv")
    if isinstance(prefill, bool) or not isinstance(prefill, int | float | None):
        raise ValueError(f"{key}.prefill_kv={prefill!r} must be ns per (query, key) pair, or be left out")
    return from_mapping(KernelTable, {**values, **tables}, key)


def _table(key: str, points: object) -> Points:
    if not isinstance(points, list | tuple):
        raise ValueError(f"{key}={points!r} must be a list of points [tokens, ns]")
    return tuple(_tokens_point(key, point) for point in points)


def _tokens_point(key: str, point: object) -> tuple[int, float]:
    match point:
        case [int(num_tokens), int() | float() as ns] if not isinstance(num_tokens, bool) and not isinstance(ns, bool):
            return num_tokens, _real(key, ns)
    raise ValueError(f"{key}: {point!r} must be a point [tokens, ns] with whole tokens")


def _groups(key: str, points: object) -> GroupPoints:
    if not isinstance(points, list | tuple):
        raise ValueError(f"{key}={points!r} must be a list of points [experts, tokens per expert, ns]")
    return tuple(_group_point(key, point) for point in points)


def _group_point(key: str, point: object) -> tuple[int, float, float]:
    match point:
        case [int(num_experts), int() | float() as tokens, int() | float() as ns] if not any(
            isinstance(value, bool) for value in (num_experts, tokens, ns)
        ):
            return num_experts, _real(key, tokens), _real(key, ns)
    raise ValueError(f"{key}: {point!r} must be a point [experts, tokens per expert, ns] with whole experts")


def _real(key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key} holds a number of more than 300 digits; measure again") from None
