"""What a link can carry at most, one way: a measured rate above it was not measured."""

from __future__ import annotations

import subprocess

_LANE_GB_PER_S = {
    1: 2.5 * 8 / 10 / 8,
    2: 5 * 8 / 10 / 8,
    3: 8 * 128 / 130 / 8,
    4: 16 * 128 / 130 / 8,
    5: 32 * 128 / 130 / 8,
    6: 64 * 242 / 256 / 8,
}
"""By PCIe generation: 1e9 transfers a second of one lane, times the share that its coding leaves, in bytes."""
_QUERY = ("nvidia-smi", "--query-gpu=name,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader,nounits")
_C2C_GB_PER_S = 450.0
"""NVLink-C2C between Grace and Hopper or Blackwell, one way (NVIDIA, Grace Hopper whitepaper: 900 GB/s both ways)."""


def pcie_gb_per_s(generation: int, lanes: int) -> float:
    """GB/s of a PCIe link in one direction, packet headers included. ValueError for an unknown generation."""
    if generation not in _LANE_GB_PER_S:
        raise ValueError(f"PCIe generation {generation} is unknown; known: {', '.join(map(str, _LANE_GB_PER_S))}")
    return _LANE_GB_PER_S[generation] * lanes


def link_peak_gb_per_s(world: str, answer: str | None = None) -> float | None:
    """GB/s of the link between the first GPU and its host; None where it cannot be found out.

    answer: what nvidia-smi printed, if it was asked before.
    """
    if world != "cuda":
        return None
    if answer is None:
        try:
            answer = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    fields = [field.strip() for field in answer.splitlines()[0].split(",")] if answer.strip() else []
    if fields and any(word in fields[0] for word in ("GH200", "GB200", "GB300")):
        return _C2C_GB_PER_S
    try:
        return pcie_gb_per_s(int(fields[1]), int(fields[2]))
    except (IndexError, ValueError):
        return None
