"""The keys that a replay has beside those of a simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replay.machine.device import Device
from replay.machine.faults import FAULTS
from replay.machine.memory import available_bytes
from replay.machine.rig import choose_machine, make_device
from sim.specs.hardware import hardware_from_dict

KEYS = ("machine", "host_memory_gb", "verify", "log", "fault", "fault_at", "scale", "throttle_gb_per_s")
CPU_SCALE = 16
LEAST_PACE = 1e-4
"""GB/s: slower links would make a copy of one small expert last for minutes."""
_COSTS = (
    "launch_host_ns",
    "launch_latency_ns",
    "issue_copy_ns",
    "gate_sync_ns",
    "token_sync_ns",
    "decide_ns",
    "link_latency_ns",
)
_RATES = ("memory_gb_per_s", "tflops", "link_gb_per_s", "pageable_gb_per_s", "memory_efficiency", "compute_efficiency")


@dataclass(frozen=True)
class Settings:
    """A replay's own keys, checked. machine is `cuda` or `cpu`; scale divides the model's widths."""

    machine: str
    host_memory_gb: float | None
    verify: bool
    log: bool
    fault: tuple[str, int] | None
    scale: int
    throttle_gb_per_s: float | None

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Settings:
        """From a composed configuration; ValueError names key, value and remedy."""
        machine = choose_machine(cfg["machine"])
        for key in ("verify", "log"):
            if not isinstance(cfg[key], bool):
                raise ValueError(f"{key}={cfg[key]!r} must be true or false")
        at = cfg["fault_at"]
        if not isinstance(at, int) or isinstance(at, bool) or at < 1:
            raise ValueError(f"fault_at={at!r} must be a whole number of at least 1")
        fault = cfg["fault"]
        if fault is not None and fault not in FAULTS:
            raise ValueError(f"fault={fault!r} is unknown; choose one of: {', '.join(FAULTS)}")
        if fault not in (None, "lost") and not cfg["verify"]:
            raise ValueError(f"fault={fault} would pass unseen; add verify=true")
        scale = cfg["scale"]
        if scale is None:
            scale = 1 if machine == "cuda" else CPU_SCALE
        if not isinstance(scale, int) or isinstance(scale, bool) or not 1 <= scale <= 1024:
            raise ValueError(f"scale={scale!r} must be a whole number from 1 to 1024, or null")
        return cls(
            machine,
            _gigabytes("host_memory_gb", cfg["host_memory_gb"]),
            cfg["verify"],
            cfg["log"],
            None if fault is None else (fault, at),
            scale,
            _throttle(cfg, machine, scale),
        )

    def device(self) -> Device:
        """The device that these settings ask for."""
        return make_device(self.machine, self.throttle_gb_per_s)


def _gigabytes(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r} must be a number of GB above 0, or null")
    return float(value)


def _throttle(cfg: Mapping[str, Any], machine: str, scale: int) -> float | None:
    """GB/s of the link on a CPU: as asked for, else the profile's rate at the scale of the experts."""
    given = cfg["throttle_gb_per_s"]
    if given is not None:
        if machine != "cpu":
            raise ValueError(f"throttle_gb_per_s={given} is for machine=cpu; a GPU's link is as fast as it is")
        if not isinstance(given, int | float) or isinstance(given, bool) or not LEAST_PACE <= given < math.inf:
            raise ValueError(f"throttle_gb_per_s={given!r} must be GB/s, at least {LEAST_PACE}, or null")
        return float(given)
    if machine != "cpu" or is_local(cfg["hardware"]):
        return None
    link = hardware_from_dict(cfg["hardware"]).link_gb_per_s
    full = link if isinstance(link, int | float) else max(gb_per_s for _, gb_per_s in link)
    return None if math.isinf(full) else full / scale**2


def is_local(hardware: Mapping[str, Any]) -> bool:
    """Whether the configuration names no hardware but `local`, the machine that this runs on."""
    return set(hardware) == {"name"} and hardware["name"] == "local"


def as_found(cfg: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """`cfg` with the memory that is there in place of `hardware=local`, which names no figure."""
    if not is_local(cfg["hardware"]):
        return dict(cfg)
    found = device.describe()["memory_bytes"] or available_bytes()
    # The rest is what only a simulation reads: nothing here may look like a measurement.
    local = {"name": "local", "memory_gb": found / 1e9, **dict.fromkeys(_COSTS, 0), **dict.fromkeys(_RATES, 1.0)}
    return {**cfg, "hardware": local}
