"""Room for experts in GPU memory: which expert is where, and which slots are free.

A slot is taken when the first chunk of a load is issued. Weights are read-only, so giving up a slot copies
nothing. A slot whose last reader may still run hands on that reader's mark: the copy waits for it on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from expertflow.view import ABSENT, RESIDENT


def split_by_layer(num_slots: int, num_layers: int) -> list[int]:
    """Per-layer capacity [num_layers]: the floor of the share, the first layers get one more."""
    base, extra = divmod(num_slots, num_layers)
    return [base + (layer < extra) for layer in range(num_layers)]


class Slots:
    """`num_slots` slots in one pool (`global`) or split by layer (`layer`), plus staging buffers per pool.

    state: bytearray by expert key (ABSENT, LOADING, RESIDENT). slot_of: slot by key, -1 when absent.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, scope: str, num_staging: int) -> None:
        if scope not in ("global", "layer"):
            raise ValueError(f"eviction scope={scope!r} is unknown; choose global or layer")
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: no expert fits; raise residency or gpu_memory_gb")
        self.num_experts = num_experts
        self.num_staging = num_staging
        self.span = num_experts if scope == "layer" else num_experts * num_layers
        """Keys per pool: `key // span` is the pool's index."""
        self.by_layer = scope == "layer"
        if self.by_layer and num_slots < num_layers:
            raise ValueError(
                f"num_slots={num_slots} cannot be split over {num_layers} layers: a per-layer cache needs at "
                "least one slot a layer; raise residency or choose an eviction with scope=global"
            )
        self.capacities = split_by_layer(num_slots, num_layers) if self.by_layer else [num_slots]
        total = num_slots + num_staging * len(self.capacities)
        self.state = bytearray(num_layers * num_experts)
        self.shown: bytearray | None = None
        """A copy of `state` for parts whose answers are checked, if there are any: who writes `state` writes it too."""
        self.slot_of = [-1] * (num_layers * num_experts)
        self.reader = [0] * total
        """Mark that must end before the slot may be rewritten, by slot; 0 = none."""
        self.free: list[list[int]] = []
        start = 0
        for capacity in self.capacities:
            size = capacity + num_staging
            self.free.append(list(range(start + size - 1, start - 1, -1)))
            start += size

    @property
    def all_room(self) -> str:
        """What there is for experts, in words."""
        return f"all {sum(self.capacities)} slots"

    def fill(self, keys: Sequence[int]) -> list[int]:
        """Make `keys` resident, in order, as long as their pool has room beside staging; returns those placed."""
        placed = []
        for key in keys:
            free = self.free[key // self.span]
            if self.state[key] == ABSENT and len(free) > self.num_staging:
                self.slot_of[key] = free.pop()
                self.state[key] = RESIDENT
                placed.append(key)
        if self.shown is not None:
            self.shown[:] = self.state
        return placed

    def show_copy(self) -> bytearray:
        """A copy of `state`, kept up to date from now on."""
        self.shown = bytearray(self.state)
        return self.shown

    def lacks_staging(self, key: int) -> bool:
        """Whether the pool of `key` has less room free than its staging buffers take."""
        return len(self.free[key // self.span]) < self.num_staging

    def is_blocked(self, pool: int, stays: Collection[int], fixed: Collection[int]) -> bool:
        """Whether what never leaves (`fixed`) leaves no room for an expert that is absent and may be demanded: that
        is not of `stays`."""
        first = pool * self.span
        own = range(first, min(first + self.span, len(self.state)))
        if self.free[pool] or any(self.state[key] and key not in fixed for key in own):
            return False
        return any(not self.state[key] and key not in stays for key in own)
