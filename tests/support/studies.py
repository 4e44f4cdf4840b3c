"""A tiny study of a tiny trace, and what a finished command left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sim.study.command import cli

TINY: dict[str, Any] = {
    "name": "tiny",
    "about": "Two stacks, three variants.",
    "parameters": {"recording": "a recording"},
    "base": ["+hardware=a100", "residency=0.25"],
    "axes": {
        "model": {"small": ["trace.path={recording}"]},
        "stack": {"eager": ["stack=eager"], "graph": ["stack=graph"]},
    },
    "variants": {
        "on_demand": ["+policy=on_demand"],
        "lru": ["+policy=lru"],
        "fixed_1": ["+policy=fixed_1"],
        "fixed_2": ["+policy=fixed_2"],
        "adaptive": ["+policy=adaptive", "count_redundant=true"],
        "perfect": ["+policy=adaptive", "policy/predictor=oracle"],
    },
    "claims": [{"name": "Below", "variants": ["adaptive"], "column": "stall_left_on_demand", "at_most": 1.0}],
    "best": [{"name": "Best", "variant": "adaptive", "of": ["fixed_1", "fixed_2"], "column": "ms_per_token"}],
    "tables": [{"title": "Stall", "value": "stall_ms_per_token", "columns": ["model", "stack"]}],
}


def write_study(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """The tiny study as a file, with changes; a change to None takes a key out."""
    content = {**TINY, "name": name, **changes}
    path = folder / "study" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def command(folder: Path, *words: str, name: str = "tiny") -> int:
    """Exit code of the command, with the studies of `folder` beside the project's, into `folder`/out."""
    return cli([name, "--config-dir", str(folder), "--out", str(folder / "out"), *words])


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "out" / "table.csv")


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8"))
    return found
