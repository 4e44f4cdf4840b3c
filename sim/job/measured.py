"""Whether a measured kernel table is that of the model that runs: it is found by the model's name, and its sizes may
have been changed since."""

from __future__ import annotations

from typing import Any

from expertflow.attention import GQA
from expertflow.keys import declared, shown
from expertflow.model import ModelSpec, model_from_dict
from sim.job.compose import composed_file
from sim.paths import config_files
from sim.specs.hardware import Hardware

_COUNTED = {
    *("name", "source", "num_layers", "num_dense_layers", "num_bare_layers", "feed_pattern", "top_k"),
    *("window", "chunk", "index_top_k", "index_block", "sparse_ratio", "heavy_ratio"),
    *("extra_params", "extra_bytes", "mtp_bytes", "mtp", "tied_embeddings"),
}
"""What no kernel's time depends on but by how often it runs, or over how many tokens: a run counts these itself."""
_OF_WINDOW = {
    "window_heads": "num_heads",
    "window_kv_heads": "num_kv_heads",
    "window_head_dim": "head_dim",
    "window_kv_rank": "kv_rank",
    "window_nope_dim": "nope_dim",
    "window_v_dim": "v_dim",
}


def check_table(model: ModelSpec, hardware: Hardware) -> None:
    """ValueError where `hardware` has a measured table of a model of that name and of other sizes than `model`'s.

    Tables are measured with the models of `conf/model` and of the user's own folder. Of a name that is in neither
    nothing is known but the table, which is then taken.
    """
    if model.name not in hardware.kernel_ns or model.name not in config_files("model"):
        return
    of_table, own = _sizes(model_from_dict(composed_file("model", model.name))), _sizes(model)
    for key, value in own.items():
        if value != of_table[key]:
            raise ValueError(
                f"model.{key}={shown(value)}: hardware.kernel_ns.{model.name} was measured with {shown(of_table[key])}"
                "; leave it at that, give the model another model.name, or take the roofline: "
                "hardware.kernel_ns={}"
            )


def _sizes(model: ModelSpec) -> dict[str, Any]:
    """Every size that a kernel's time depends on, 0 for "as the others" filled in."""
    found = {key: getattr(model, key) for key in declared(ModelSpec) if key not in _COUNTED}
    found["attention_pattern"] = "".join(sorted(model.num_of))
    if model.attention == GQA:
        found["v_dim"] = found["v_dim"] or found["head_dim"]
    return found | {key: found[key] or found[other] for key, other in _OF_WINDOW.items()}
