"""The raw record of a calibration: measured in order, written beside the profile it gives, and read again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from expertflow.core import described
from expertflow.model import ModelSpec, model_from_dict
from replay.bench_decide import measure_decisions
from replay.calibration.checks import check_record
from replay.calibration.compared import check_rates
from replay.calibration.hostspeed import python_loop_ns
from replay.calibration.in_place import InPlace, in_place_workload, median_run
from replay.calibration.measure import (
    Copier,
    chunked,
    copy_beside,
    launch_costs,
    link_curves,
    matrix_tflops,
    memory_gb_per_s,
    pad_share,
)
from replay.calibration.peak import link_peak_gb_per_s
from replay.calibration.profile import copy_rates, profiles, simulated_as, slowdown
from replay.calibration.tables import KernelBench, kernel_tables, prompt_launches
from replay.calibration.undisturbed import undisturbed
from replay.machine.device import Device
from replay.machine.memory import available_bytes
from replay.machine.programs import DEFAULT_KV_GRID
from replay.machine.rig import Needs, Rig
from replay.machine.scale import scaled_model
from replay.machine.slot_kernels import tuned_tiles
from replay.settings import CPU_SCALE
from sim.job.compose import composed_file
from sim.job.output import to_json, write_text
from sim.job.setup import make_policy
from sim.paths import config_files
from sim.specs.chunks import DEFAULT_CHUNK_BYTES, chunk_sizes
from sim.specs.hardware import hardware_from_dict, stack_from_dict
from traces.jsontext import shown
from traces.messages import fault
from traces.reading import read_table

RECORD_VERSION = 2
"""Version of the raw record's format; records of other versions are refused."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_TOKENS = 64
"""The largest launch of experts that is measured has at least so many tokens: in batches an expert has several."""
PROMPT_TOKENS = 512
"""Tokens of the prompt for which the time of the launches is compared with the time of the kernels."""
_RECORD_REMEDY = "write one with python -m replay.calibrate: NAME.calibration.json"


def named_model(name: str) -> ModelSpec:
    """The model of a file in conf/model, or of the user's own."""
    known = config_files("model")
    del known["auto"]
    if name not in known:
        raise ValueError(f"model {name!r} is unknown; choose from: {', '.join(sorted(known))}")
    return model_from_dict(composed_file("model", name))


def scale_of(given: int | None, machine: str) -> int:
    """What the models' widths are divided by."""
    if given is not None and not 1 <= given <= 1024:
        raise ValueError(f"--scale={given} must be from 1 to 1024")
    return given or (1 if machine == "cuda" else CPU_SCALE)


def calibrate(
    device: Device,
    models: Sequence[str],
    policies: Sequence[str],
    scale: int,
    *,
    stacks: Sequence[str] = ("found",),
    quick: bool = False,
    say: Any = print,
) -> dict[str, Any]:
    """The raw record of a calibration; say: told of the progress. stacks: under which the host is measured."""
    started = time.perf_counter()

    def step(text: str) -> None:
        say(f"[{time.perf_counter() - started:5.1f} s] {text}")

    raw = _described(device, scale)
    _measure_device(raw, device, quick, step)
    raw |= {part: {} for part in ("prompt", "chunked", "chunk_ns", "beside", "kernels", "kernel_launch_ns", "host")}
    for name in models:
        step(f"{name}: kernels")
        _measure_kernels(raw, device, scaled_model(named_model(name), scale), quick, step)
        raw["python_loop_ns"].append(python_loop_ns())
        step(f"{name}: the host, in place")
        _measure_host(raw, device, name, list(product(stacks, policies)), quick, step)
        raw["python_loop_ns"].append(python_loop_ns())
    step("decisions by themselves")
    raw["decisions"] = {name: _decision_times(models[0], name, 24 if quick else 256) for name in policies}
    raw["python_loop_ns"].append(python_loop_ns())
    raw["tiles"] = tuned_tiles()
    step("done")
    return raw


def _described(device: Device, scale: int) -> dict[str, Any]:
    """The head of a record: which machine it is of, and how fast its host is."""
    return {
        "format": "expertflow-calibration",
        "version": RECORD_VERSION,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": dict(device.describe()),
        # What the host takes for a launch or a copy depends on it.
        "core": described(),
        "scale": scale,
        "threads_share_interpreter": device.world == "cpu",
        "kv_grid": DEFAULT_KV_GRID if device.captures else 0,
        "link_peak_gb_per_s": link_peak_gb_per_s(device.world),
        "python_loop_ns": [python_loop_ns()],
        "memory_gb": (device.describe()["memory_bytes"] or available_bytes()) / 1e9,
    }


def _measure_device(raw: dict[str, Any], device: Device, quick: bool, step: Callable[[str], None]) -> None:
    """What no model is needed for. MeasurementError where times cannot be those of a link, or of this card."""

    def copies() -> None:
        raw["link"] = link_curves(device, raw["scale"], 10.0 if quick else 40.0)
        # What cannot be shows before minutes are spent on the rest.
        copy_rates(raw)

    def rates() -> None:
        raw["memory_gb_per_s"], raw["matrix_tflops"] = memory_gb_per_s(device), matrix_tflops(device)
        check_rates(raw)

    step("launches and waits")
    raw["launches"] = launch_costs(device)
    raw["pad_share"] = pad_share(device)
    step("copies by size")
    undisturbed(copies, step)
    step("memory and matrices")
    undisturbed(rates, step)


def _measure_kernels(
    raw: dict[str, Any], device: Device, model: ModelSpec, quick: bool, step: Callable[[str], None]
) -> None:
    """The kernels and the copies of one model, alone and beside each other. model: at the scale of the record.

    MeasurementError where a copy or a kernel cannot have been slowed so by the other.
    """
    tokens = TOKENS[:4] if quick else TOKENS
    num_slots = min(64, model.num_layers * model.num_experts)
    needs = Needs(num_slots, max(tokens[-1], BATCH_TOKENS, PROMPT_TOKENS), 4096)
    rig = Rig(device, model, needs, 64 * (model.mean_expert_bytes + 512) / 1e9)
    sizes = chunk_sizes(model.mean_expert_bytes, int(DEFAULT_CHUNK_BYTES / raw["scale"] ** 2))
    tables, launch_ns = kernel_tables(rig, tokens, 2048, 5 if quick else 15, sizes[0], step)
    raw["kernels"][model.name], raw["kernel_launch_ns"][model.name] = tables, launch_ns
    raw["prompt"][model.name] = prompt_launches(rig, PROMPT_TOKENS, 5)
    raw["chunked"][model.name] = chunked(device, model.mean_expert_bytes)
    raw["chunk_ns"][model.name] = Copier(device, sizes[0]).in_a_row_ns(sizes[0], 8, 5)
    undisturbed(lambda: _measure_beside(raw, rig, sizes[0]), step)
    rig.release()


def _measure_beside(raw: dict[str, Any], rig: Rig, chunk_bytes: int) -> None:
    """A copy of `chunk_bytes` beside the experts of one token. What it leaves holds no memory of the rig."""
    busy = KernelBench(rig, 1).experts(min(rig.model.top_k, rig.slots.num_slots), 1)
    found = raw["beside"][rig.model.name] = copy_beside(rig.device, busy, chunk_bytes)
    slowdown(found, copy_rates(raw)[0])


def _measure_host(
    raw: dict[str, Any],
    device: Device,
    name: str,
    runs: Sequence[tuple[str, str]],
    quick: bool,
    step: Callable[[str], None],
) -> None:
    """What the host does in short replays of the model `name`. runs: (stack, policy) of each."""
    length, repeat = (24, 1) if quick else (64, 3)
    in_place = InPlace(device, named_model(name), raw["scale"], length)
    found: dict[str, dict[str, Any]] = {stack: {} for stack, _ in runs}
    raw["host"][scaled_model(named_model(name), raw["scale"]).name] = found
    for stack, policy_name in runs:
        per_forward, found[stack][policy_name] = median_run([in_place.run(policy_name, stack) for _ in range(repeat)])
        step(f"  {policy_name}, stack {stack}: {per_forward:.2f} ms a forward in place")
    in_place.release()


def _decision_times(model: str, policy_name: str, length: int) -> dict[str, float]:
    """What a policy's own code takes over `length` tokens, on the simulated machine."""
    cfg, full = in_place_workload(named_model(model), "a100", policy_name, length, 1)
    policy, transfer = make_policy(cfg["policy"], full, 0)
    times = measure_decisions(full, policy, transfer)
    return {
        "p50_ns": times.p50_ns,
        "p99_ns": times.p99_ns,
        "decide_ns": times.decide_ns,
        "effort": policy.mean_effort(),
    }


def write_profile(raw: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Write the two configuration files and the raw record below `folder` (as in conf/); returns their paths."""
    hardware, stack = profiles(raw, name)
    # What no simulation would take is not written.
    hardware_from_dict(hardware)
    stack_from_dict(stack)
    paths = [
        folder / "hardware" / f"{name}.yaml",
        folder / "stack" / f"{name}.yaml",
        folder / "hardware" / f"{name}.calibration.json",
    ]
    for path in paths[:2]:
        path.parent.mkdir(parents=True, exist_ok=True)
    # The record first: it says that the name is this program's. And at no moment do profiles of two measurements stand
    # beside each other.
    write_text(paths[2], to_json(raw))
    paths[1].unlink(missing_ok=True)
    head = f"# Measured by python -m replay.calibrate on {raw['date']}; the raw record: {paths[2].name}\n"
    for path, content in zip(paths, (hardware, stack), strict=False):
        write_text(path, head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110))
    return paths


def load_record(path: Path, scale: int) -> dict[str, Any]:
    """The raw record of a calibration; ValueError if it is something else, of another scale, or of another core."""
    raw = read_table(path, _RECORD_REMEDY)
    if raw.get("format") != "expertflow-calibration":
        raise ValueError(f"{path} is no calibration record; {_RECORD_REMEDY}")
    if raw.get("version") != RECORD_VERSION:
        raise ValueError(
            f"{path} is a record of version {shown(raw.get('version', 1))}, this program writes "
            f"{RECORD_VERSION}; {_RECORD_REMEDY}"
        )
    if raw.get("scale") != scale or isinstance(raw["scale"], bool):
        raise ValueError(
            f"{path} was measured at scale {shown(raw.get('scale'))}, this run has {scale}; calibrate at that scale"
        )
    if raw.get("core", described()) != described():
        raise ValueError(
            f"{path} was measured with {shown(raw['core'])}, this run has {described()}, whose host takes another "
            "time; calibrate again, or choose by EXPERTFLOW_COMPILED=0 or 1"
        )
    try:
        check_record(raw)
        hardware, stack = profiles(raw, "record")
        hardware_from_dict(hardware)
        found = stack_from_dict(stack)
        for model, stacks in raw["host"].items():
            for name, policies in stacks.items():
                for policy in policies:
                    simulated_as(raw, "record", model, policy, replace(found, name=name))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, StopIteration) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise fault(
            path, "record", f"is damaged, or of another version of this program: {what}", "calibrate again"
        ) from None
    return raw
