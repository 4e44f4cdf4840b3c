"""From a calibration's raw record to what a simulation reads: `conf/hardware/NAME.yaml` and `conf/stack/NAME.yaml`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from replay.calibration.measure import MOST_SLOWDOWN
from replay.calibration.probe import steady_mean
from replay.calibration.undisturbed import MeasurementError
from sim.specs.hardware import HOST_COSTS, Hardware, Stack, hardware_from_dict, stack_from_dict

DEFAULT_POLICY = "adaptive"
"""The policy whose host costs stand in the profile. A validation takes the costs of each policy itself."""
_FITS = 0.03
"""Share by which the time of a size may differ from latency + bytes / rate, for the link to be described so."""

_LEAST_CHUNKS = 32
"""So many chunks must have followed one another in place to tell what one takes there."""

_HARDWARE_COSTS = ("launch_host_ns", "launch_latency_ns", "issue_copy_ns", "gate_sync_ns", "token_sync_ns", "decide_ns")
_SOURCES = {
    "memory_gb": "as the device reports it",
    "memory_gb_per_s": "one kernel over large arrays, bytes read plus bytes written",
    "tflops": "one large matrix product",
    "memory_efficiency": "definition: the figure it belongs to is measured, not a peak",
    "compute_efficiency": "definition: the figure it belongs to is measured, not a peak",
    "link_gb_per_s": "copies of each size in a row, the host far ahead; latency + bytes / rate by least squares",
    "link_latency_ns": "the same fit: the part of a copy's time that does not grow with size",
    "pageable_gb_per_s": "one copy of a chunk of 4 MiB (at the scale of the experts), alone",
    "link_slowdown": "a copy of one expert while experts are computed, against an idle device",
    "kernel_ns": "each kernel of the model's shapes, as a run launches it",
    "decide_ns": f"mean of a replay of {DEFAULT_POLICY}",
}
"""How each figure of a hardware file was measured, where it is not the mean of a replay in place."""


def link_fit(rows: Sequence[Mapping[str, Any]], peak_gb_per_s: float | None) -> tuple[int, float | list[list[float]]]:
    """(latency ns, GB/s without it) of copies in a row: time = latency + bytes / rate by least squares of the shares.

    Where the line misses a size by more than `_FITS`, the rate is a curve: points [bytes, GB/s]. A rate above
    `peak_gb_per_s` (None: not known), or none at all, is a mistake of measuring: MeasurementError.
    """
    weights = [1.0 / row["in_a_row_ns"] for row in rows]
    # Of (latency + bytes / rate) * weight = 1.
    columns = [(weight, row["bytes"] * weight) for weight, row in zip(weights, rows, strict=True)]
    ones, both, sizes = (sum(one[i] * one[j] for one in columns) for i, j in ((0, 0), (0, 1), (1, 1)))
    right = sum(one[0] for one in columns), sum(one[1] for one in columns)
    det = ones * sizes - both * both
    if det <= 0 or len({row["bytes"] for row in rows}) < 2:
        raise MeasurementError("copies of a single size tell no latency from rate; measure more sizes")
    latency = max((right[0] * sizes - right[1] * both) / det, 0.0)
    per_byte = (right[1] - latency * both) / sizes
    misses = [abs((latency + row["bytes"] * per_byte) / row["in_a_row_ns"] - 1) for row in rows]
    rate = 1 / per_byte if per_byte > 0 else math.inf
    curve: float | list[list[float]] = round(rate, 6)
    if max(misses) > _FITS:
        latency = min(latency, 0.9 * min(row["in_a_row_ns"] for row in rows))
        curve = [[row["bytes"], round(row["bytes"] / (row["in_a_row_ns"] - latency), 6)] for row in rows]
        rate = max(gb_per_s for _, gb_per_s in curve)
    if math.isinf(rate):
        raise MeasurementError(
            "copies seem to take no longer for more bytes: they were not timed back to back; "
            "calibrate again when the machine is idle"
        )
    if peak_gb_per_s is not None and rate > peak_gb_per_s:
        raise MeasurementError(
            f"copies seem to run at {rate:.4g} GB/s on a link of {peak_gb_per_s:.4g} at most: they "
            "were not timed back to back; calibrate again when the machine is idle"
        )
    return round(latency), curve


def host_costs(samples: Mapping[str, Mapping[str, float]], lone_copy_ns: float) -> dict[str, int]:
    """Hardware and stack costs in ns of one policy's run in place. samples: {kind: {mean, count}} of a `HostProbe`.

    lone_copy_ns: what a chunk takes in a row; what it takes longer on an idle link is how late the link begins.
    """

    def mean(name: str) -> float:
        return samples[name]["mean"] if name in samples else 0.0

    # A launch of experts also writes down which: that much longer it takes than one of attention. A kernel that starts
    # before its launch returns leaves no latency, and less of the launch before it.
    start = mean("kernel_start")
    if "release" in samples:
        # Experts were launched ahead: to write down which is all that is left, and a part of telling them.
        launch, describe = max(mean("attention") + min(start, 0.0), 0.0), 0.0
    else:
        launch = max(min(mean("attention"), mean("experts")) + min(start, 0.0), 0.0)
        describe = max(mean("experts") - launch, 0.0)
    told = mean("release_start")
    issues = samples.get("issue", {"count": 0})["count"]
    gaps = samples.get("issue_gap", {"count": 0})["count"]
    found = {
        "launch_host_ns": launch,
        "launch_latency_ns": max(start, 0.0),
        "issue_copy_ns": mean("issue") + (mean("issue_gap") * gaps / issues if issues else 0.0),
        "gate_sync_ns": mean("gate_sync"),
        "token_sync_ns": mean("token_sync"),
        "decide_ns": mean("decide"),
        "classify_ns": mean("classify") + describe,
        "observe_ns": mean("observe") + max(mean("load_sync"), 0.0) + describe,
        "forward_ns": mean("forward"),
        "group_ns": 0.0,
        "release_ns": max(mean("release") + min(told, 0.0), 0.0),
        "release_latency_ns": max(told, 0.0),
        "copy_start_ns": max(mean("lone_copy") - lone_copy_ns, 0.0) if "lone_copy" in samples else 0.0,
    }
    return {name: round(cost) for name, cost in found.items()}


def _count(name: str) -> int:
    return int(name[name.index("[") + 1 : -1])


def summary(samples: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Mean, count and spread of each kind of sample, as it goes into the record."""
    return {
        name: {"mean": steady_mean(values), "count": len(values), **_spread(values)}
        for name, values in sorted(samples.items())
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """The 10th, 50th and 90th percentile."""
    ordered = sorted(values)
    return {f"p{percent}": ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] for percent in (10, 50, 90)}


def profiles(raw: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two configuration files of a calibration, as plain mappings: (hardware, stack)."""
    by_model = {model: _costs(raw, model, "found", DEFAULT_POLICY) for model in raw["kernels"]}
    costs = next(iter(by_model.values()))[0]
    # A profile's decide_ns is that of a decision of effort 1.
    effort = raw["decisions"].get(DEFAULT_POLICY, {}).get("effort", 1.0)
    costs = {**costs, "decide_ns": round(costs["decide_ns"] / effort)}
    device = raw["device"]
    how = f"measured {raw['date']} by python -m replay.calibrate on {device['name']}, torch {device['torch']}"
    hardware = {
        "name": name,
        "memory_gb": round(raw["memory_gb"], 3),
        "memory_gb_per_s": round(raw["memory_gb_per_s"], 3),
        "tflops": round(raw["matrix_tflops"], 6),
        "memory_efficiency": 1.0,
        "compute_efficiency": 1.0,
        **_link_figures(raw),
        **{key: costs[key] for key in _HARDWARE_COSTS},
        "kernel_ns": {model: table for model, (_, table) in by_model.items()},
    }
    hardware["sources"] = {
        key: f"{how}: {_SOURCES.get(key, 'mean of a replay in place')}" for key in hardware if key != "name"
    }
    return hardware, _stack_figures(raw, name, costs, how)


def _link_figures(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the link for a hardware file, from copies alone and beside kernels.

    MeasurementError where they cannot be those of a link.
    """
    latency, curve, pageable = copy_rates(raw)
    return {
        "link_gb_per_s": curve,
        "link_latency_ns": latency,
        "pageable_gb_per_s": round(pageable, 6),
        "link_slowdown": round(slowdown(next(iter(raw["beside"].values())), latency), 4),
    }


def copy_rates(raw: Mapping[str, Any]) -> tuple[int, float | list[list[float]], float]:
    """Of copies alone: latency in ns, GB/s without it (see `link_fit`), and GB/s from pageable memory.

    MeasurementError where they cannot be those of a link.
    """
    peak = raw.get("link_peak_gb_per_s")
    latency, curve = link_fit(raw["link"], peak)
    # One rate for every size: that of a chunk as the runs cut them by default.
    chunk = (4 << 20) / raw["scale"] ** 2
    row = min(raw["link"], key=lambda row: abs(row["bytes"] - chunk))
    pageable = row["bytes"] / row["pageable_ns"]
    if peak is not None and pageable > peak:
        raise MeasurementError(
            f"pageable copies seem to run at {pageable:.4g} GB/s on a link of {peak:.4g} at most; "
            "calibrate again when the machine is idle"
        )
    return latency, curve, pageable


def slowdown(beside: Mapping[str, float], latency_ns: int) -> float:
    """How much longer a copy takes beside kernels than on an idle device, its latency apart, as a factor.

    MeasurementError for a factor that no kernel causes.
    """
    found = max(1.0, (beside["busy_ns"] - latency_ns) / max(beside["idle_ns"] - latency_ns, 1.0))
    if found > MOST_SLOWDOWN:
        raise MeasurementError(
            f"link_slowdown={found:.4g}: no kernel slows a copy so; calibrate again when the machine is idle"
        )
    return found


def _stack_figures(raw: Mapping[str, Any], name: str, costs: Mapping[str, int], how: str) -> dict[str, Any]:
    """The stack file. how: the words that every measured figure's source begins with."""
    stack: dict[str, Any] = {"name": name, "layer_overhead_ns": 0, "head_overhead_ns": 0}
    if raw.get("kv_grid"):
        stack["kv_grid"] = raw["kv_grid"]
    stack |= {key: costs[key] for key in HOST_COSTS}
    stack["sources"] = {key: f"{how}: mean of a replay in place" for key in stack if key != "name"}
    stack["sources"] |= dict.fromkeys(("layer_overhead_ns", "head_overhead_ns"), "definition: a replay adds none")
    if raw.get("kv_grid"):
        stack["sources"]["kv_grid"] = "definition: the lengths that a replay captures its kernels for"
    return stack


def _costs(raw: Mapping[str, Any], model: str, stack: str, policy: str) -> tuple[dict[str, int], dict[str, Any]]:
    """(host costs in place, kernel table of the model)."""
    samples = _host(raw, model, stack, policy)
    costs = host_costs(samples, _chunk_ns(samples) or raw["chunk_ns"][model])
    table, launch = raw["kernels"][model], raw["kernel_launch_ns"][model]
    if raw["threads_share_interpreter"]:
        table, launch = slowed(table, samples)
    costs["group_ns"] = round(launch)
    return costs, table


def _chunk_ns(samples: Mapping[str, Mapping[str, float]]) -> float:
    """What a chunk takes in place that follows another at once; 0 where too few do."""
    chunk = samples.get("chunk", {"count": 0, "mean": 0.0})
    return chunk["mean"] if chunk["count"] >= _LEAST_CHUNKS else 0.0


def slowed(table: Mapping[str, Any], samples: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, Any], float]:
    """The kernel table with the times that kernels take in place, and the ns that a launch takes by itself.

    Meant for a machine whose streams are threads beside the host's thread, where all wait for one interpreter. How much
    longer a kernel takes is measured at a few numbers of rows and applied to all of them.
    """
    points = [
        (row["count"], _count(name), row["mean"])
        for name, row in samples.items()
        if name.startswith("run experts[") and row["count"] >= 8
    ]
    points += [
        (row["count"], _count(name), row["mean"])
        for name, row in samples.items()
        if name.startswith("run experts_shared[") and "shared" not in table and row["count"] >= 8
    ]
    launch, more = _line(points) if points else (0.0, 0.0)
    shares = {"expert": more / table["expert"][0][1]}
    rows = round(samples["rows"]["mean"]) if "rows" in samples else 1
    for name in ("attention", "head"):
        alone = min(table[name], key=lambda point: abs(point[0] - rows))[1]
        shares[name] = (samples[f"run {name}"]["mean"] - launch) / alone
    shares["shared"] = shares["dense"] = shares["attention"]
    if not points:
        # The host has computed them all: one on the GPU would be slowed as attention is.
        shares["expert"] = shares["attention"]
    made = {
        name: [[count, max(1, round(taken * max(shares[name], 0.1)))] for count, taken in points]
        for name, points in table.items()
        if name in shares
    }
    return {**table, **made}, launch


def _line(points: list[tuple[float, int, float]]) -> tuple[float, float]:
    """(value at 0, growth per unit of x) of the least-squares line through (weight, x, y); neither is negative."""
    total = sum(weight for weight, _, _ in points)
    mean_x = sum(weight * x for weight, x, _ in points) / total
    mean_y = sum(weight * y for weight, _, y in points) / total
    spread = sum(weight * (x - mean_x) ** 2 for weight, x, _ in points)
    slope = sum(weight * (x - mean_x) * (y - mean_y) for weight, x, y in points) / spread if spread else mean_y / mean_x
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def _host(raw: Mapping[str, Any], model: str, stack: str, policy: str) -> Mapping[str, Mapping[str, float]]:
    """Samples of one run in place. For a stack or policy that was not measured: those of the first one measured."""
    by_stack = raw["host"][model]
    by_policy = by_stack.get(stack) or next(iter(by_stack.values()))
    found: Mapping[str, Mapping[str, float]] = by_policy.get(policy) or next(iter(by_policy.values()))
    return found


def simulated_as(raw: Mapping[str, Any], name: str, model: str, policy: str, stack: Stack) -> tuple[Hardware, Stack]:
    """Hardware and stack that simulate a replay of `policy` under `stack`: with the host costs measured for this
    policy, and with pads as long as they really last."""
    plain_hardware, plain_stack = profiles(raw, name)
    hardware, found = hardware_from_dict(plain_hardware), stack_from_dict(plain_stack)
    if model not in raw["kernels"]:
        raise ValueError(
            f"model {model} is not in the calibration, which has: {', '.join(raw['kernels'])}; calibrate with --models"
        )
    costs, table = _costs(raw, model, stack.name, policy)
    hardware = replace(hardware, kernel_ns=hardware_from_dict(plain_hardware | {"kernel_ns": {model: table}}).kernel_ns)
    if chunk_ns := _chunk_ns(_host(raw, model, stack.name, policy)):
        # Issued while the one before it runs, from all of the experts' memory, beside kernels: it takes so long, not as
        # long as copies that were all issued before the first of them began.
        latency = hardware.link_latency_ns + round(chunk_ns - raw["beside"][model]["idle_ns"])
        hardware = replace(hardware, link_latency_ns=max(latency, 0), link_slowdown=1.0)
    known = {field.name for field in fields(Hardware)}
    hardware = replace(hardware, **{key: cost for key, cost in costs.items() if key in known})  # type: ignore[arg-type]
    pads = {key: round(getattr(stack, key) * raw["pad_share"]) for key in ("layer_overhead_ns", "head_overhead_ns")}
    own: dict[str, Any] = {key: costs[key] for key in HOST_COSTS} | pads
    return hardware, replace(found, **own)
