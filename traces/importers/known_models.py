"""Whether an imported trace has the layers and experts of the shipped model that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from traces.trace import Trace
from traces.yamltext import read_yaml

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = (_ROOT / "sim" / "conf" / "model", _ROOT / "conf" / "model")
"""Of an installed wheel, and of a checkout: files of plain figures, the sizes of the models."""
_AUTO = "auto"


def topology_note(trace: Trace) -> str | None:
    """A note where the trace's numbers are not those of the shipped model of its name: a run under that name would
    refuse it. None where they are, or no model of that name is shipped."""
    # A twin has its original's topology.
    found = _shipped(trace.model.removesuffix("-twin"))
    if found is None:
        return None
    wrong = [
        f"{found[key]} {what}, the trace {have}"
        for key, what, have in (
            ("num_layers", "MoE layers", trace.num_layers),
            ("num_experts", "experts a layer", trace.num_experts),
        )
        if found.get(key) != have
    ]
    if trace.top_k > found.get("top_k", trace.top_k):
        wrong.append(f"top-{found['top_k']}, the trace top-{trace.top_k}")
    if not wrong:
        return None
    return (
        f"{trace.model} has {'; '.join(wrong)}: a run refuses it under that name; check num_experts= and that no layer "
        "is missing, or give it another name, and model.path= in a run"
    )


def model_layers(name: str) -> int | None:
    """MoE layers of the shipped model of this name; None where there is none."""
    found = _shipped(name.removesuffix("-twin"))
    layers = found.get("num_layers") if found else None
    return layers if isinstance(layers, int) else None


def _shipped(name: str) -> dict[str, Any] | None:
    for folder in _FOLDERS:
        path = folder / f"{name}.yaml"
        # A name from a trace is no path.
        if name != _AUTO and folder.is_dir() and name in {file.stem for file in folder.glob("*.yaml")}:
            return dict(read_yaml(path))
    return None
