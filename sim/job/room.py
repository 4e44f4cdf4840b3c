"""How much room for experts a configuration leaves in GPU memory: slots, or bytes where they have unlike sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from expertflow.model import ModelSpec
from traces.reader import Trace

WORKSPACE_GB = 1.5


def room_for(
    cfg: Mapping[str, Any], model: ModelSpec, trace: Trace, batch_size: int, memory_gb: float
) -> tuple[int, int | None]:
    """Slots, and bytes where experts have unlike sizes: the slots are then how many experts of mean size that is.

    ValueError, one line, where no expert finds room.
    """
    gigabytes = cfg["gpu_memory_gb"]
    fixed = None if gigabytes is None else _fixed_bytes(gigabytes, model, trace, batch_size, memory_gb)
    if model.bytes_by_key is None:
        return _num_slots(cfg, model, fixed), None
    largest, total = max(model.bytes_by_key), model.total_expert_bytes
    if fixed is None:
        room = min(int(cfg["residency"] * total + 1e-9), total)
        if room < largest:
            raise ValueError(
                f"residency={cfg['residency']} of {total} bytes leaves {room}, and an expert takes up to {largest}; "
                f"the least is residency={largest / total + 5e-7:.6f}"
            )
    else:
        room = min(int(gigabytes * 1e9 - fixed), total)
        if room < largest:
            raise _too_little(gigabytes, fixed, largest)
    return max(room // model.mean_expert_bytes, 1), room


def last_layers(model: ModelSpec, num_slots: int, room_bytes: int | None) -> int:
    """How many of the last layers find room for all their experts."""
    sizes = model.bytes_by_key
    if sizes is None or room_bytes is None:
        return num_slots // model.num_experts
    count, room = 0, room_bytes
    for first in range(len(sizes) - model.num_experts, -1, -model.num_experts):
        room -= sum(sizes[first : first + model.num_experts])
        if room < 0:
            break
        count += 1
    return count


def _fixed_bytes(gigabytes: float, model: ModelSpec, trace: Trace, batch_size: int, memory_gb: float) -> int:
    """Bytes of all that is no routed expert: weights, KV of the longest requests, workspace."""
    # Makers' gigabytes are of 2^30 bytes; those between them and 10^9 an engine cannot count on, but may be asked of.
    most = memory_gb * 2**30 / 1e9
    if gigabytes > most:
        raise ValueError(
            f"gpu_memory_gb={gigabytes} is more than the GPU has (hardware.memory_gb={memory_gb}: {most:.4g} GB with "
            f"what driver and context take); give {memory_gb:g} or less"
        )
    context = int(np.max(np.diff(trace.request_start)))
    if trace.context_len is not None:
        context = int(np.max(np.diff(trace.request_start) + np.asarray(trace.context_len)))
    return model.non_expert_bytes + model.kv_bytes(context) * batch_size + int(WORKSPACE_GB * 1e9)


def _num_slots(cfg: Mapping[str, Any], model: ModelSpec, fixed: int | None) -> int:
    num_keys = model.num_layers * model.num_experts
    gigabytes, residency = cfg["gpu_memory_gb"], cfg["residency"]
    if fixed is None:
        slots = int(residency * num_keys + 1e-9)
        if slots < 1:
            raise ValueError(
                f"residency={residency} of {num_keys} experts leaves no slot at all; "
                f"the least is residency={1 / num_keys:.6f}"
            )
        return slots
    slots = int((gigabytes * 1e9 - fixed) // model.mean_expert_bytes)
    if slots < 1:
        raise _too_little(gigabytes, fixed, model.mean_expert_bytes)
    return min(slots, num_keys)


def _too_little(gigabytes: float, fixed: int, expert_bytes: int) -> ValueError:
    return ValueError(
        f"gpu_memory_gb={gigabytes}: weights outside the experts, KV and workspace take "
        f"{fixed / 1e9:.2f} GB and leave no slot for an expert; give at least {(fixed + expert_bytes) / 1e9:.2f}"
    )
