"""The keys that a replay has beside those of a simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertflow.keys import declared, shown
from replay.keys import DEFAULT_FAULT_AT, UNSTAMPED, ReplayKeys
from replay.machine.device import Device
from replay.machine.memory import available_bytes
from replay.machine.rig import choose_machine, make_device
from sim.job.keys import STORAGE, check_storage_pair
from sim.specs.hardware import hardware_from_dict
from sim.specs.links import PROFILE

CPU_SCALE = 16
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
    launch_ahead: bool = True

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Settings:
        """From a composed configuration; ValueError names key, value and remedy."""
        for name, key in declared(ReplayKeys).items():
            key.check(cfg[name], name)
        machine = choose_machine(cfg["machine"])
        fault, at = cfg["fault"], cfg["fault_at"]
        if fault is None and at is not None:
            raise ValueError(f"fault_at={at} is for a fault, and none is asked for; add fault=NAME, or leave it out")
        if fault not in (None, *UNSTAMPED) and not cfg["verify"]:
            raise ValueError(f"fault={fault} would pass unseen; add verify=true")
        _check_local(cfg["hardware"])
        _check_link(cfg, machine)
        _check_stack(cfg)
        if cfg["launch_ahead"] and machine != "cuda":
            raise ValueError(
                "launch_ahead=true is for a GPU; a CPU's kernels are launched as they are known: leave it out"
            )
        if cfg["draft_ms"]:
            raise ValueError(
                f"draft_ms={cfg['draft_ms']} is time of a draft model, which a replay does not run; leave it out"
            )
        if STORAGE in cfg:
            _check_storage(cfg, machine)
        scale = cfg["scale"] or (1 if machine == "cuda" else CPU_SCALE)
        return cls(
            machine,
            cfg["host_memory_gb"],
            cfg["verify"],
            cfg["log"],
            None if fault is None else (fault, at or DEFAULT_FAULT_AT),
            scale,
            _throttle(cfg, machine, scale),
            cfg["launch_ahead"] is not False,
        )

    def device(self) -> Device:
        """The device that these settings ask for."""
        device = make_device(self.machine, self.throttle_gb_per_s)
        device.launches_ahead = device.launches_ahead and self.launch_ahead
        return device


def _check_local(hardware: Mapping[str, Any]) -> None:
    """ValueError for a host beside `hardware=local`, which has no figures for its own to stand beside."""
    more = set(hardware) - {"name", "sources"}
    if hardware.get("name") == "local" and more and all(key.startswith("host_") for key in more):
        raise ValueError(
            "hardware=local is the machine that this runs on, of which no figure is known, so that those of a host say "
            "nothing beside it; give a profile, as +hardware=a100 +host=server"
        )


def _check_link(cfg: Mapping[str, Any], machine: str) -> None:
    """ValueError for a chosen link that nothing here would follow."""
    name = cfg["link"]["name"]
    if name == PROFILE:
        return
    if machine != "cpu":
        raise ValueError(
            f"link={name} is for a simulation or machine=cpu; a GPU's link is as fast as it is: leave it out"
        )
    if is_local(cfg["hardware"]):
        raise ValueError(f"link={name} stands for the link of a profile, and hardware=local has none; leave it out")
    if cfg["throttle_gb_per_s"] is not None:
        raise ValueError(
            f"link={name} and throttle_gb_per_s={cfg['throttle_gb_per_s']} both say how fast copies are; leave one out"
        )


def _check_stack(cfg: Mapping[str, Any]) -> None:
    """ValueError for a stack whose overheads only the times of simulated kernels tell."""
    tpot = cfg["stack"].get("resident_tpot_ms")
    if tpot is not None:
        raise ValueError(
            f"stack.resident_tpot_ms={tpot} is solved with simulated kernels; give here what `python -m sim` says that "
            "it solved: stack.layer_overhead_ns and stack.head_overhead_ns"
        )


def _check_storage(cfg: Mapping[str, Any], machine: str) -> None:
    """ValueError where experts on storage are asked of a machine, or with a check, that does not know it."""
    check_storage_pair(cfg)
    name = shown(cfg[STORAGE].get("name"))
    if machine != "cpu":
        raise ValueError(f"storage={name} is simulated, or replayed with machine=cpu; leave it out on a GPU")
    if cfg["verify"] or cfg["fault"] is not None:
        raise ValueError(f"storage={name}: verify and fault know no storage; reads are checked anyway: leave them out")


def _throttle(cfg: Mapping[str, Any], machine: str, scale: int) -> float | None:
    """GB/s of the link on a CPU: as asked for, else the profile's rate at the scale of the experts."""
    given = cfg["throttle_gb_per_s"]
    if given is not None:
        if machine != "cpu":
            raise ValueError(f"throttle_gb_per_s={given} is for machine=cpu; a GPU's link is as fast as it is")
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
