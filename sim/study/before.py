"""What is looked at before the first cell of a study runs: that each trace is of the model that the study says, and
that a workload and a policy can be made of each cell. What is foreseeable is not found after minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sim.job.configure import configure
from sim.job.errors import one_line
from sim.job.limit import limited
from sim.job.model import told_model
from sim.job.output import to_json
from sim.job.run_cli import no_exit
from sim.job.setup import make_policy, make_workload
from sim.paths import config_files, own_folder
from sim.study.plan import Cell
from traces.messages import MOST, PREFIX
from traces.reader import Trace

_SHAPE = ("num_layers", "num_experts", "top_k")


class WrongRecordingError(ValueError):
    """A recording of another model than a parameter of the study must be of."""


def check_recordings(cell: Cell, cfg: Mapping[str, Any], trace: Trace) -> None:
    """ValueError where the cell's trace is not of the model that its study says: a result would bear the wrong name."""
    for parameter, given, model in cell.recordings:
        wanted = _shape_of(model, own_folder())
        found = [getattr(trace, key) for key in _SHAPE]
        name = trace.model.removesuffix("-twin")
        # Of the right shape and another known model: with model=auto a cell takes the sizes of that other.
        sizes_of_another = name != model and name in config_files("model") and told_model(cfg["model"]) is None
        # Fewer experts a token than the model has may have been recorded, as anywhere.
        if found[:2] != wanted[:2] or found[2] > wanted[2] or sizes_of_another:
            raise WrongRecordingError(
                f"{parameter}: needs a trace of {model} ({_shown(wanted)}), {given} is of {name} ({_shown(found)})"
            )


@lru_cache
def _shape_of(model: str, folder: Path | None) -> list[int]:
    """Layers, experts of a layer and top-k of a model of `conf/model`, or of the user's `folder`."""
    told = told_model(configure(["+hardware=a100", "+policy=lru", f"model={model}"])["model"])
    assert told is not None
    return [getattr(told, key) for key in _SHAPE]


def _shown(shape: Sequence[int]) -> str:
    num_layers, num_experts, top_k = shape
    return f"{num_layers}×{num_experts} top {top_k}"


def check_cells(cells: Sequence[tuple[Cell, Mapping[str, Any], Trace]], kind: str, optional: Sequence[str]) -> None:
    """ValueError, one line, with the first cause for which cells cannot run: a file that is not there, an unknown part,
    a capacity that is too small. Those of `optional` variants are left out when they fail.

    A policy is made once for all cells that have the same one over the same trace.
    """
    failed: dict[str, list[Cell]] = {}
    # An estimate needs no policy.
    made: dict[str, str | None] = {"": None}
    for cell, cfg, trace in cells:
        if cell.variant in optional:
            continue
        told = {key: cfg[key] for key in ("policy", "model", "seed")}
        line = _problem(cfg, trace, "" if kind == "estimates" else to_json({**told, "trace": trace.sha256()}), made)
        if line is not None:
            failed.setdefault(line, []).append(cell)
    if failed:
        line, found = next(iter(failed.items()))
        raise ValueError(_told(found, [cell for cell, _, _ in cells], line))


def _problem(cfg: Mapping[str, Any], trace: Trace, policy: str, made: dict[str, str | None]) -> str | None:
    """Why the cell cannot run, in a line; None if nothing is foreseen. made: the same of the policies made so far."""
    work = None
    try:
        with no_exit(), limited(cfg["timeout_s"]):
            work = make_workload(cfg, trace)
            if policy not in made:
                make_policy(cfg["policy"], work, cfg["seed"])
                made[policy] = None
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        if work is not None:
            made[policy] = line
        return line
    return made[policy]


def _told(found: Sequence[Cell], cells: Sequence[Cell], line: str) -> str:
    """The cause, before it which cells have it, and after it how to give something to them alone, if there is room."""
    common = _common(found) - _common(cells)
    shared = [(axis, value) for axis, value in _pairs(found[0]) if (axis, value) in common]
    variants = list(dict.fromkeys(cell.variant for cell in found))
    names = [value for _, value in shared]
    where = " ".join(f"{axis}={value}" for axis, value in shared)
    if not where and len(found) < len(cells):
        where, names = f"variant={variants[0]} and {len(variants) - 1} more", [variants[0], "…"]
    told = f"{where or 'every cell'} ({len(found)} of {len(cells)} cells): {line}"
    if names and line.startswith("policy."):
        remedy = f"; for these alone: --set {','.join(names)}:KEY=VALUE"
        told += remedy if len(told + remedy) <= MOST - len(PREFIX) else ""
    return told


def _pairs(cell: Cell) -> list[tuple[str, str]]:
    return [*cell.place, ("variant", cell.variant)]


def _common(cells: Sequence[Cell]) -> set[tuple[str, str]]:
    """What is said of all of them."""
    common = set(_pairs(cells[0]))
    for cell in cells:
        common &= set(_pairs(cell))
    return common
