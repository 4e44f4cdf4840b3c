"""Is there room? Host and GPU memory as found, what pinning allows, and what would fit: asked before anything is
allocated."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PINNED_SHARE = 0.6
"""Share of the available memory that is pinned where no budget is given; the rest is left to the host."""
WSL_SHARE = 0.45
"""WSL and Windows refuse to pin more than about half of the memory (GitHub FreeToken#27, #55)."""
ALIGNMENT = 512
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class HostPlan:
    """Where the experts wait: `num_buffers` buffers for `num_keys` experts; fewer are shared round-robin."""

    num_keys: int
    num_buffers: int
    stride: int
    available_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether several experts are copied from one buffer."""
        return self.num_buffers < self.num_keys


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to where a buffer may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def is_wsl() -> bool:
    """Linux under Windows: its driver limits pinned memory."""
    try:
        return "microsoft" in Path("/proc/version").read_text(encoding="utf-8").lower()
    except OSError:
        return False


def available_bytes() -> int:
    """Host memory that can be taken now: what the system has left, or less in a container with a limit."""
    left = _system_bytes()
    for limit, used in _CGROUP_FILES:
        try:
            room = int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())
        except (OSError, ValueError):
            continue
        left = min(left, max(room, 0))
    return left


def _system_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def plan_host(
    num_keys: int,
    expert_bytes: int,
    host_memory_gb: float | None,
    pinned: bool,
    available: int | None = None,
    wsl: bool | None = None,
) -> HostPlan:
    """How many experts get a host buffer of their own. host_memory_gb: the budget; None = what is prudent.

    ValueError if the budget is not there, or holds not even two experts.
    """
    available = available_bytes() if available is None else available
    limited = (is_wsl() or platform.system() == "Windows") if wsl is None else wsl
    stride = align(expert_bytes)
    whole = stride * num_keys
    warnings: list[str] = []
    share = PINNED_SHARE
    if limited and pinned:
        share = WSL_SHARE
        warnings.append("Windows (WDDM, WSL) pins at most about half of the memory, and copies more slowly")
    prudent = int(available * share)
    if host_memory_gb is None:
        budget = prudent
    else:
        budget = int(host_memory_gb * 1e9)
        if budget > available:
            raise ValueError(
                f"host_memory_gb={host_memory_gb} is more than the host has left "
                f"({available / 1e9:.2f} GB); host_memory_gb={max(prudent // 10**7 / 100, 0.01)} "
                "would fit"
            )
    num_buffers = min(num_keys, budget // stride)
    if num_buffers < 2:
        raise ValueError(
            f"host memory: {budget / 1e9:.3g} GB hold no two experts of {expert_bytes / 1e6:.3g} MB; "
            f"give host_memory_gb={_gigabytes_above(2 * stride)} or more (the host has {available / 1e9:.2f} GB left)"
        )
    if num_buffers < num_keys:
        warnings.append(
            f"the host holds {num_buffers} of {num_keys} experts ({num_buffers * stride / 1e9:.2f} of "
            f"{whole / 1e9:.2f} GB): buffers are shared round-robin, same bytes, same copies"
        )
    return HostPlan(num_keys, num_buffers, stride, available, tuple(warnings))


def _gigabytes_above(num_bytes: int) -> str:
    """GB with three digits that count, rounded up: enough, if someone copies it."""
    step = 10 ** max(len(str(num_bytes)) - 3, 0)
    return f"{-(-num_bytes // step) * step / 1e9:.9f}".rstrip("0")


def plan_arenas(num_buffers: int, stride: int, largest: int = 1 << 30) -> list[tuple[int, int]]:
    """(bytes, buffers) of each arena that the buffers are carved from: powers of two, since pinned allocators round
    up to those, and no larger than they must be."""
    largest = max(largest, 1 << (stride - 1).bit_length())
    arenas = []
    left = num_buffers
    while left:
        size = min(largest, 1 << (left * stride - 1).bit_length())
        # The power of two below wastes nothing; the last arena may have to be the one above.
        if size > left * stride and size // 2 >= stride:
            size //= 2
        count = min(left, size // stride)
        arenas.append((size, count))
        left -= count
    return arenas


def check_gpu(
    need: Sequence[tuple[str, int]], free: int, stride: int, num_slots: int, memory: str = "GPU memory"
) -> None:
    """ValueError if the parts of `need` (name, bytes) do not fit into `free` bytes of `memory`; says what would."""
    total = sum(num_bytes for _, num_bytes in need)
    if total <= free:
        return
    parts = ", ".join(f"{name} {num_bytes / 1e9:.2f}" for name, num_bytes in need)
    fitting = max(num_slots - -(-(total - free) // stride), 0)
    remedy = "not one slot would fit: choose a smaller model or batch_size"
    if fitting:
        share = fitting / num_slots
        remedy = f"{fitting} of the {num_slots} slots would fit: lower residency to {share:.2f} of what it is"
    raise ValueError(f"{memory}: needs {total / 1e9:.2f} GB ({parts}), free are {free / 1e9:.2f}; {remedy}")
