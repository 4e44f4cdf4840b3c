"""A calibration's figures beside the shipped profile of the card, and beside those of the last calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from replay.calibration.hostspeed import drift
from replay.calibration.undisturbed import MeasurementError
from sim.paths import CONF
from traces.tables import print_columns
from traces.yamltext import read_yaml

_OTHER_CARD = {"ti", "super", "d", "laptop", "max", "mobile"}
"""Words behind a card's name that make it another card."""
_ABOVE_DATASHEET = 1.25
"""A rate may be so many times the datasheet's: cards are sold that are clocked higher. What is above is a mistake."""


def datasheet(device_name: str) -> tuple[str, dict[str, Any]] | None:
    """The profile of conf/hardware whose name stands in the device's name, as one word or several; None if there is
    none. A name with a number behind it, as a100_40, is of the card with so many GB."""
    words = device_name.lower().replace("-", " ").split()
    for path in sorted((CONF / "hardware").glob("*.yaml"), key=lambda p: -len(p.stem)):
        card, _, memory = path.stem.partition("_")
        if _stands_in(card, words) and (not memory or f"{memory}gb" in words):
            return path.stem, read_yaml(path)
    return None


def _stands_in(card: str, words: Sequence[str]) -> bool:
    """Whether consecutive words make up `card`, and none behind them says that another one is meant."""
    for first in range(len(words)):
        for end in range(first + 1, len(words) + 1):
            if "".join(words[first:end]) == card and not _OTHER_CARD.intersection(words[end:]):
                return True
    return False


def check_rates(raw: Mapping[str, Any]) -> None:
    """MeasurementError where memory or matrices seem faster than the card can be, by its datasheet in conf/hardware."""
    sheet = datasheet(raw["device"]["name"])
    if sheet is None:
        return
    for key, name, unit in (("memory_gb_per_s", "memory", "GB/s"), ("matrix_tflops", "matrices", "TFLOPS")):
        peak = sheet[1]["tflops" if key == "matrix_tflops" else key]
        if raw[key] > _ABOVE_DATASHEET * peak:
            raise MeasurementError(
                f"{name} at {raw[key]:.4g} {unit}, of which the datasheet of {sheet[0]} has {peak:.4g}: not all work "
                "was waited for; calibrate again"
            )


def print_beside(
    console: Console,
    hardware: Mapping[str, Any],
    stack: Mapping[str, Any],
    raw: Mapping[str, Any],
    last: Mapping[str, Any],
) -> None:
    """Each measured figure beside the last calibration's, and the datasheet's or the assumption in its place.

    hardware, stack: the two profiles; last: the same of the last calibration in one, empty for none.
    """
    sheet = datasheet(raw["device"]["name"])
    name, said = sheet or ("", {})
    rows: list[list[str]] = []
    for key, value in {**hardware, **stack}.items():
        if key in ("name", "sources", "kernel_ns", "memory_efficiency", "compute_efficiency"):
            continue
        told = _figure(said.get(key))
        if key in ("memory_gb_per_s", "tflops") and said:
            share = "memory_efficiency" if key == "memory_gb_per_s" else "compute_efficiency"
            told = f"{said[key]} x {said[share]}"
        rows.append([key, _figure(value), _figure(last.get(key)), told])
    for model, tables in hardware["kernel_ns"].items():
        before = dict(_kernels(last.get("kernel_ns", {}).get(model, {})))
        rows.append([model])
        rows += [[f"  {kernel}", text, before.get(kernel, "–")] for kernel, text in _kernels(tables)]
    for policy, times in raw["decisions"].items():
        rows += [[f"{policy} decides, {key[:3]}", f"{times[key] / 1e3:.1f} us"] for key in ("p50_ns", "p99_ns")]
    for kernels, times in next(iter(raw["prompt"].values())).items():
        rows += [[f"prompt's {kernels}, {key[:-3]}", f"{times[key] / 1e3:.0f} us"] for key in ("host_ns", "device_ns")]
    rows.append(["pads last", f"{100 * raw['pad_share']:.1f} %"])
    rows.append(["the host's speed varied by", f"{100 * drift(raw['python_loop_ns'])['drift']:.0f} %"])
    columns = ["figure", "measured", "last time", *([f"shipped {name}"] if sheet else [])]
    print_columns(console, columns, [[*row, *[""] * len(columns)][: len(columns)] for row in rows])


def _kernels(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The kernels of one model, a line each: what the smallest and the largest launch takes."""
    for name, table in tables.items():
        if not isinstance(table, list):
            yield {"kv": "a KV token, ns"}.get(name, name), _figure(table)
            continue
        ends = table[:1] if len(table) == 1 else [table[0], table[-1]]
        sizes, times = (
            " to ".join(found)
            for found in (
                [" x ".join(map(str, point[:-1])) for point in ends],
                [f"{point[-1] / 1e3:.4g}" for point in ends],
            )
        )
        yield f"{'experts x tokens' if name == 'groups' else f'{name}, tokens'} {sizes}", f"{times} us"


def _figure(value: Any) -> str:
    if isinstance(value, list):
        peak = max(rate for _, rate in value)
        return f"{value[0][1]:.3g} … {peak:.4g}"
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
