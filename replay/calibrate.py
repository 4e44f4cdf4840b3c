"""`python -m replay.calibrate NAME`: measure this machine, for `+hardware=NAME stack=NAME` in simulations.

Device times are taken with the host far ahead of the device: copies by size, pinned and pageable, in one and several
chunks, beside idle and busy compute; memory bandwidth and matrix rate; every kernel of the models' shapes as a run
launches it, by number of experts and tokens, beside an idle and a busy link. Host times are taken in place, in short
replays of each policy, with their spread, and a fixed loop is timed before, between and after: a host that changes its
speed shows. A figure that cannot be is refused. Writes hardware/NAME.yaml, the raw record beside it, and
stack/NAME.yaml into the folder of --config-dir (in a checkout, by default, conf/), and prints each figure beside the
datasheet's and the last calibration's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from expertflow.model import ModelSpec, model_from_dict
from expertflow.runtime import Runtime
from replay.bench_decide import measure_decisions
from replay.device import Device
from replay.drive import drive
from replay.hostspeed import drift, python_loop_ns
from replay.measure import (
    Copier,
    chunked,
    copy_beside,
    launch_costs,
    link_curves,
    matrix_tflops,
    memory_gb_per_s,
    pad_share,
)
from replay.memory import available_bytes
from replay.peak import link_peak_gb_per_s
from replay.probe import HostProbe, HostRun, without_own_costs
from replay.profile import link_fit, profiles, summary
from replay.programs import DEFAULT_KV_GRID
from replay.rig import MACHINES, Needs, Rig, choose_machine, make_device
from replay.run import needs_of, scaled_workload
from replay.scale import scaled_model
from replay.settings import CPU_SCALE
from replay.slot_kernels import tuned_tiles
from replay.standin import standin_trace
from replay.steady import keep_loaded, steady
from replay.tables import KernelBench, kernel_tables, prompt_launches
from sim.configure import configure
from sim.entry import as_command
from sim.hardware import hardware_from_dict, stack_from_dict
from sim.link import DEFAULT_CHUNK_BYTES, chunk_sizes
from sim.output import provenance, to_json, write_text
from sim.paths import CONF, add_config_dir, config_files, folder_to_write
from sim.setup import Workload, load_chunks, make_policy, make_trace, make_workload, run_config

RECORD_VERSION = 2
"""Of what the raw record means; records of others are refused."""
POLICIES = ("lru", "adaptive")
MODELS = ("gpt-oss-20b",)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_TOKENS = 64
"""Of the largest launch of experts that is measured at least: batches give an expert more than one token."""
PROMPT_TOKENS = 512
"""Of the prompt whose launches are held against its kernels."""
SEED = 1
"""Of the generated trace that is replayed in place: not the one that results are published on."""


def named_model(name: str) -> ModelSpec:
    """The model of a file in conf/model, or of the user's own."""
    known = config_files("model")
    del known["auto"]
    if name not in known:
        raise ValueError(f"model {name!r} is unknown; choose from: {', '.join(sorted(known))}")
    return model_from_dict(yaml.safe_load(known[name].read_text(encoding="utf-8")))


def in_place_workload(model: ModelSpec, hardware: str, policy: str, num_tokens: int, batch_size: int,
                      stack: str = "found", residency: float = 0.5,
                      start: str | None = None) -> tuple[dict[str, Any], Workload]:  # fmt: skip
    """A short generated trace of the model's shape. start: what the cache holds at first (None: as configured)."""
    overrides = [f"+hardware={hardware}", f"+policy={policy}", f"trace.seed={SEED}", f"stack={stack}", "compare=none",
                 f"batch_size={batch_size}", f"trace.num_tokens={num_tokens}", f"residency={residency}",
                 f"trace.num_requests={batch_size}"]  # fmt: skip
    cfg = configure(overrides if start is None else [*overrides, f"start={start}"])
    return cfg, make_workload(cfg, standin_trace(make_trace(cfg["trace"]), model))


class InPlace:
    """Short replays of policies on another trace than results are published on: what the host spends on what."""

    def __init__(self, device: Device, model: ModelSpec, scale: int, num_tokens: int) -> None:
        self.device, self.model, self.scale, self.num_tokens = device, model, scale, num_tokens
        self._rig: Rig | None = None
        self._workloads: dict[tuple[Any, ...], tuple[dict[str, Any], Workload]] = {}

    def run(self, policy_name: str, stack: str, batch_size: int = 1, residency: float = 0.5,
            start: str | None = None) -> HostRun:  # fmt: skip
        """(ms a forward, samples by kind) of one replay."""
        num_tokens = self.num_tokens if batch_size == 1 else self.num_tokens * batch_size // 2
        key = policy_name, stack, batch_size, residency, start
        if key not in self._workloads:
            self._workloads[key] = in_place_workload(self.model, "a100", policy_name, num_tokens, batch_size, stack,
                                                     residency, start)  # fmt: skip
        cfg, full = self._workloads[key]
        work = scaled_workload(full, self.scale)
        policy, transfer = make_policy(cfg["policy"], full, 0)
        needs = needs_of(work, policy, transfer)
        if self._rig is None or not self._rig.suffices(needs):
            self.release()
            pinned = transfer.memory == "pinned"
            self._rig = Rig(self.device, work.model, needs, _host_budget_gb(work.model), pinned)
        chunk_bytes = load_chunks(work)
        machine = self._rig.machine(chunk_bytes, work.stack, transfer.memory)
        probe = HostProbe(machine)
        runtime = Runtime(run_config(work, transfer, chunk_bytes), probe, policy, list(work.batches))
        machine.prepare(work.batches)
        with steady():
            self.device.restart_clock()
            drive(runtime, probe)
        self.device.synchronize()
        probe.samples["rows"].append(batch_size)
        per_forward_ms = runtime.counters.elapsed_ns / runtime.counters.num_forwards / 1e6
        return per_forward_ms, summary(without_own_costs(probe.samples))

    def release(self) -> None:
        """Give the memory back."""
        if self._rig is not None:
            self._rig.release()
            self._rig = None


def median_run(runs: Sequence[HostRun]) -> HostRun:
    """Of replays in place the one of median length."""
    return sorted(runs, key=lambda run: run[0])[len(runs) // 2]


def _host_budget_gb(model: ModelSpec) -> float | None:
    """A few GB do: which buffer a copy is from makes no difference to its time, and pinning takes long."""
    enough = 4.0
    return enough if model.total_expert_bytes > enough * 1e9 and available_bytes() > 2 * enough * 1e9 else None


def calibrate(device: Device, models: Sequence[str], policies: Sequence[str], scale: int, *,
              stacks: Sequence[str] = ("found",), quick: bool = False, say: Any = print) -> dict[str, Any]:  # fmt: skip
    """The raw record of a calibration; say: told of the progress. stacks: under which the host is measured."""
    started = time.perf_counter()

    def step(text: str) -> None:
        say(f"[{time.perf_counter() - started:5.1f} s] {text}")

    raw: dict[str, Any] = {
        "format": "expertflow-calibration",
        "version": RECORD_VERSION,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": dict(device.describe()),
        "scale": scale,
        "threads_share_interpreter": device.world == "cpu",
        "kv_grid": DEFAULT_KV_GRID if device.captures else 0,
        "link_peak_gb_per_s": link_peak_gb_per_s(device.world),
        "python_loop_ns": [python_loop_ns()],
        "memory_gb": (device.describe()["memory_bytes"] or available_bytes()) / 1e9,
    }
    step("launches and waits")
    raw["launches"] = launch_costs(device)
    raw["pad_share"] = pad_share(device)
    step("copies by size")
    raw["link"] = link_curves(device, scale, 10.0 if quick else 40.0)
    step("memory and matrices")
    raw["memory_gb_per_s"] = memory_gb_per_s(device)
    raw["matrix_tflops"] = matrix_tflops(device)
    # What cannot be shows before minutes are spent on the rest.
    link_fit(raw["link"], raw["link_peak_gb_per_s"])
    raw |= {part: {} for part in ("prompt", "chunked", "chunk_ns", "beside", "kernels", "kernel_launch_ns", "host")}
    for name in models:
        model = scaled_model(named_model(name), scale)
        step(f"{name}: kernels")
        tokens = TOKENS[:4] if quick else TOKENS
        num_slots = min(64, model.num_layers * model.num_experts)
        needs = Needs(num_slots, max(tokens[-1], BATCH_TOKENS), 4096)
        rig = Rig(device, model, needs, 64 * (model.expert_bytes + 512) / 1e9)
        sizes = chunk_sizes(model.expert_bytes, int(DEFAULT_CHUNK_BYTES / scale**2))
        tables, launch_ns = kernel_tables(rig, tokens, 2048, 5 if quick else 15, sizes[0])
        raw["kernels"][model.name], raw["kernel_launch_ns"][model.name] = tables, launch_ns
        raw["prompt"][model.name] = prompt_launches(rig, min(tokens[-1], PROMPT_TOKENS), 5)
        raw["chunked"][model.name] = chunked(device, model.expert_bytes)
        raw["chunk_ns"][model.name] = Copier(device, sizes[0]).in_a_row_ns(sizes[0], 8, 5)
        busy = KernelBench(rig, 1).experts(min(model.top_k, needs.num_slots), 1)
        raw["beside"][model.name] = copy_beside(device, busy, sizes[0])
        del busy
        rig.release()
        raw["python_loop_ns"].append(python_loop_ns())
        step(f"{name}: the host, in place")
        length, repeat = (24, 1) if quick else (64, 3)
        in_place = InPlace(device, named_model(name), scale, length)
        found: dict[str, dict[str, Any]] = {stack: {} for stack in stacks}
        raw["host"][model.name] = found
        for stack, policy_name in product(stacks, policies):
            per_forward, found[stack][policy_name] = median_run(
                [in_place.run(policy_name, stack) for _ in range(repeat)])  # fmt: skip
            step(f"  {policy_name}, stack {stack}: {per_forward:.2f} ms a forward in place")
        in_place.release()
        raw["python_loop_ns"].append(python_loop_ns())
    step("decisions by themselves")
    raw["decisions"] = {}
    for name in policies:
        cfg, full = in_place_workload(named_model(models[0]), "a100", name, 24 if quick else 256, 1)
        policy, transfer = make_policy(cfg["policy"], full, 0)
        times = measure_decisions(full, policy, transfer)
        raw["decisions"][name] = {"p50_ns": times.p50_ns, "p99_ns": times.p99_ns, "decide_ns": times.decide_ns,
                                  "effort": policy.mean_effort()}  # fmt: skip
    raw["python_loop_ns"].append(python_loop_ns())
    raw["tiles"] = tuned_tiles()
    step("done")
    return raw


def datasheet(device_name: str) -> tuple[str, dict[str, Any]] | None:
    """The profile in conf/hardware whose name is a word of the device's."""
    words = device_name.lower().replace("-", " ").split()
    joined = "".join(words)
    for path in sorted((CONF / "hardware").glob("*.yaml"), key=lambda p: -len(p.stem)):
        if path.stem in words or (path.stem in joined and "_" not in path.stem):
            return path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))
    return None


def print_beside(console: Console, hardware: dict[str, Any], raw: dict[str, Any],
                 last: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Each measured figure beside the last calibration's, and the datasheet's or the assumption in its place."""
    sheet = datasheet(raw["device"]["name"])
    title = "no profile to compare with" if sheet is None else f"conf/hardware/{sheet[0]}.yaml"
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, justify in (("figure", "left"), ("measured", "right"), ("last time", "right"), (title, "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, value in hardware.items():
        if key in ("name", "sources", "kernel_ns", "memory_efficiency", "compute_efficiency"):
            continue
        said = "–" if sheet is None else sheet[1].get(key)
        if key in ("memory_gb_per_s", "tflops") and sheet is not None:
            share = "memory_efficiency" if key == "memory_gb_per_s" else "compute_efficiency"
            said = f"{said} x {sheet[1][share]}"
        before = "–" if last is None else _figure(key, last.get(key))
        table.add_row(key, _figure(key, value), before, said if isinstance(said, str) else _figure(key, said))
    for name, times in raw["decisions"].items():
        table.add_row(f"decisions of {name}, a layer", f"p50 {times['p50_ns'] / 1e3:.1f} us, p99 "
                      f"{times['p99_ns'] / 1e3:.1f} us", "", "")  # fmt: skip
    for kernels, times in next(iter(raw["prompt"].values())).items():
        table.add_row(f"prompt's {kernels}, launched", f"host {times['host_ns'] / 1e3:.0f} us, device "
                      f"{times['device_ns'] / 1e3:.0f} us", "", "")  # fmt: skip
    table.add_row("pads last", f"{100 * raw['pad_share']:.1f} %", "", "")
    table.add_row("the host's speed varied by", f"{100 * drift(raw['python_loop_ns'])['drift']:.0f} %", "", "")
    console.print(table)


def _figure(key: str, value: Any) -> str:
    if isinstance(value, list):
        peak = max(rate for _, rate in value)
        return f"{value[0][1]:.3g} … {peak:.4g}"
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def write_profile(raw: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Write the two configuration files and the raw record below `folder` (as in conf/); returns their paths."""
    hardware, stack = profiles(raw, name)
    # What no simulation would take is not written.
    hardware_from_dict(hardware)
    stack_from_dict(stack)
    paths = [folder / "hardware" / f"{name}.yaml", folder / "stack" / f"{name}.yaml",
             folder / "hardware" / f"{name}.calibration.json"]  # fmt: skip
    for path in paths[:2]:
        path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Measured by python -m replay.calibrate on {raw['date']}; the raw record: {paths[2].name}\n"
    for path, content in zip(paths, (hardware, stack), strict=False):
        write_text(path, head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110))
    write_text(paths[2], to_json(raw))
    return paths


def check_name(name: str) -> str:
    """A name that may stand for a file of conf/hardware."""
    if not name.replace("-", "").replace("_", "").isalnum() or name in ("local", "auto"):
        raise ValueError(f"NAME={name!r} must be letters, digits, - and _, and not local or auto")
    return name


def check_free(name: str, folder: Path) -> None:
    """ValueError if `name` stands for a profile in `folder` that no calibration has written, or for a shipped one."""
    record = folder / "hardware" / f"{name}.calibration.json"
    names = [f"{kind}/{name}.yaml" for kind in ("hardware", "stack")]
    shipped = folder.resolve() != CONF and any((CONF / path).exists() for path in names)
    if shipped or (not record.exists() and any((folder / path).exists() for path in names)):
        raise ValueError(f"NAME={name!r} is a profile that was not measured here, and would be overwritten; choose "
                         f"another name, such as {name}-measured")  # fmt: skip


def scale_of(given: int | None, machine: str) -> int:
    """What the models' widths are divided by."""
    if given is not None and not 1 <= given <= 1024:
        raise ValueError(f"--scale={given} must be from 1 to 1024")
    return given or (1 if machine == "cuda" else CPU_SCALE)


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m replay.calibrate", description=__doc__)
    parser.add_argument("name", help="what to call this machine: +hardware=NAME")
    parser.add_argument("--machine", default="auto", choices=MACHINES)
    parser.add_argument("--models", default=",".join(MODELS), help="whose kernels are measured (default: %(default)s)")
    parser.add_argument("--policies", default=",".join(POLICIES), help="whose host time is (default: %(default)s)")
    parser.add_argument("--scale", type=int, help="divide the models' widths (default: 1 on a GPU, 16 on a CPU)")
    parser.add_argument("--throttle", type=float, metavar="GB/s", help="pace of the CPU machine's link")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    add_config_dir(parser)
    args = parser.parse_args(words)
    return as_command(lambda: _calibrate(args, sys.argv[1:] if words is None else words), "no profile was written")


def _calibrate(args: argparse.Namespace, words: list[str]) -> None:
    name = check_name(args.name)
    folder = folder_to_write(args.config_dir)
    check_free(name, folder)
    policies, models = args.policies.split(","), args.models.split(",")
    for policy in policies:
        configure(["+hardware=a100", f"+policy={policy}"])
    for model in models:
        named_model(model)
    machine = choose_machine(args.machine)
    scale = scale_of(args.scale, machine)
    device = make_device(machine, args.throttle)
    keep_loaded()
    try:
        raw = calibrate(device, models, policies, scale, quick=args.quick)
    finally:
        device.close()
    raw["provenance"] = provenance(words, "", 0.0, "replay")
    there = folder / "hardware" / f"{name}.yaml"
    last = yaml.safe_load(there.read_text(encoding="utf-8")) if there.exists() else None
    paths = write_profile(raw, name, folder)
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 120)
    print_beside(console, profiles(raw, name)[0], raw, last)
    for path in paths:
        print(f"written {path}")
    if scale > 1:
        print(f"the models' widths were divided by {scale}: python -m replay.validate simulates them at that scale, "
              "python -m sim knows only their own")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
