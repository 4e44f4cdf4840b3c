"""Experts by slot id: any experts in any slots, any numbers of rows, one pair of launches, ready to be captured.

A slot's weights are two matrices: gate and up [up, hidden], then down [middle, hidden]. Both have rows of `hidden`
values, which begin at 16-byte boundaries for any odd `middle`, and are read in whole rows. Nothing here allocates or
waits after it is made; work goes to torch's current stream. A body is run once before it is captured: its first
launch compiles. triton is imported where the kernels are made: other machines need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch

from replay.rows import RowLayout

Work = Callable[[], None]
_ALIGNED = 16
"""Values: `up` begins at such a place in a row of the intermediate buffer, whatever `middle` is."""
_COPY_BLOCK = 1024
_TUNING_BYTES = 256 << 20
"""Weights that one measured body reads at least, where the pool has them: more than a GPU's cache holds."""


class Widths(NamedTuple):
    """A feed-forward block: gate and up [up, hidden], down [middle, hidden]; gated where up is 2 * middle."""

    hidden: int
    up: int
    middle: int

    @property
    def num_values(self) -> int:
        """Weights of the block."""
        return self.hidden * (self.up + self.middle)

    @property
    def half(self) -> int:
        """Where `up` begins in a row of the intermediate buffer."""
        return -(-self.middle // _ALIGNED) * _ALIGNED

    @property
    def pitch(self) -> int:
        """Values in a row of the intermediate buffer."""
        return self.half * (self.up // self.middle)


class SharedExperts(NamedTuple):
    """Shared experts: their widths, weights [blocks, at least num_values], and most rows of a launch."""

    widths: Widths
    weights: torch.Tensor
    max_rows: int


@dataclass(frozen=True)
class SlotCheck:
    """What a check of stamps needs, on the device.

    words: the pool as int64; within [W]: places of the expected words in a slot; wrong [1]: how many differed;
    first_bad [1]: the least number of a launch with a wrong one (begin with a number above all).
    """

    words: torch.Tensor
    within: torch.Tensor
    words_per_slot: int
    wrong: torch.Tensor
    first_bad: torch.Tensor


class Tile(NamedTuple):
    """What one program computes at a time: `columns` wide, `depth` bytes of the summed dimension deep."""

    columns: int
    depth_bytes: int
    warps: int
    stages: int


_TILES: dict[int, tuple[Tile, ...]] = {
    16: (Tile(16, 512, 4, 5), Tile(32, 256, 4, 5), Tile(64, 128, 4, 5), Tile(64, 256, 4, 4)),
    32: (Tile(32, 256, 4, 4), Tile(64, 128, 4, 4), Tile(64, 256, 4, 4), Tile(32, 128, 4, 5)),
    64: (Tile(64, 128, 4, 4), Tile(32, 128, 4, 4), Tile(128, 128, 8, 3)),
}
"""By rows of a tile. None takes more than 96 KiB of shared memory, which every GPU with bfloat16 has."""


def tile_rows(max_rows: int) -> int:
    """Rows of a tile where no expert has more than `max_rows`."""
    return next((rows for rows in _TILES if max_rows <= rows), max(_TILES))


def default_tile(capacity: int, rows: int) -> Tile:
    """Without a measurement: few experts need many narrow programs to keep the whole device busy."""
    if rows > min(_TILES):
        return _TILES[rows][0]
    return _TILES[rows][0 if capacity <= 2 else 1 if capacity <= 8 else 2]


def _programs() -> Any:
    try:
        return import_module("replay.slot_programs")
    except ImportError as error:
        raise ValueError(f"device=cuda needs triton, which torch's CUDA build brings ({error}); "
                         "pip install 'expertflow[kernels]'") from None  # fmt: skip


class _Block:
    """Widths with the weights and activations of a block."""

    def __init__(self, widths: Widths, weights: torch.Tensor, max_rows: int, name: str) -> None:
        if widths.up not in (widths.middle, 2 * widths.middle):
            raise ValueError(f"{name}: up={widths.up} is neither middle={widths.middle} nor twice that; "
                             "give a gated or an ungated block")  # fmt: skip
        if weights.size(1) < widths.num_values:
            raise ValueError(f"{name}: {weights.size(1)} values in a slot, {widths.num_values} needed; "
                             "enlarge the slots")  # fmt: skip
        self.widths, self.weights, self.stride = widths, weights, weights.stride(0)
        # Zeros: what lies between `middle` and `half` is read, never written.
        self.middle = weights.new_zeros((max_rows, widths.pitch))
        self.out = weights.new_zeros((max_rows, widths.hidden))


class SlotKernels:
    """Launches of one model's expert kernels on one device.

    widths, pool [num_slots, stride] uint8: the routed experts. inputs [rows, hidden]: what every expert multiplies,
    from its first row; its dtype is that of the weights. max_rows: rows of all routed experts of a launch together.
    ValueError where triton is missing or sizes do not fit.
    """

    def __init__(self, widths: Widths, pool: torch.Tensor, inputs: torch.Tensor, max_rows: int,
                 shared: SharedExperts | None = None) -> None:  # fmt: skip
        self._programs = _programs()
        self._inputs = inputs
        self._pool_slots = pool.size(0)
        self._max_rows = max_rows
        self._routed = _Block(widths, pool.view(inputs.dtype), max_rows, "routed experts")
        self._shared = self._routed
        self._has_shared = shared is not None
        if shared is not None:
            self._shared = _Block(shared.widths, shared.weights, shared.max_rows, "shared experts")
        if not inputs.size(1) == widths.hidden == self._shared.widths.hidden:
            raise ValueError(f"inputs are {inputs.size(1)} wide, experts {widths.hidden}, shared experts "
                             f"{self._shared.widths.hidden}; give one hidden size")  # fmt: skip
        if _is_gated(widths) != _is_gated(self._shared.widths):
            raise ValueError("routed and shared experts differ in having a gate; give both or neither one")
        self._tiles: dict[tuple[int, int, str], Tile] = {}

    @property
    def out(self) -> torch.Tensor:
        """Outputs of the routed experts [max_rows, hidden], each from its first row."""
        return self._routed.out

    @property
    def shared_out(self) -> torch.Tensor:
        """Outputs of the shared experts [their max_rows, hidden]."""
        return self._shared.out

    def tile(self, capacity: int, max_rows: int, product: str) -> Tile:
        """What is used for `product` (up, down) in launches of at most `capacity` experts of `max_rows` rows."""
        rows = tile_rows(max_rows)
        return self._tiles.get((capacity, rows, product), default_tile(capacity, rows))

    def stage(self, row_host: torch.Tensor, row_dev: torch.Tensor, layout: RowLayout) -> Work:
        """Copy a row of `layout` from pinned memory to the device: the first kernel of a graph."""
        kernel = self._programs.stage

        def work() -> None:
            kernel[(1,)](row_host, row_dev, layout.num_words, BLOCK=_block(layout.num_words), num_warps=4)

        return work

    def experts(self, row_host: torch.Tensor, row_dev: torch.Tensor, layout: RowLayout, max_rows: int,
                has_shared: bool, check: SlotCheck | None = None) -> Work:  # fmt: skip
        """Stage the row, then compute its experts: up and down, with a check of the slots' words before and after.

        row_host (pinned), row_dev [layout.num_words] int64. max_rows: most rows of one expert, the shared ones too.
        has_shared: whether launches may name a block of shared experts.
        """
        if has_shared and not self._has_shared:
            raise ValueError("has_shared=true, but no shared experts were given; give them where the kernels are made")
        if check is not None and check.within.numel() != layout.words_per_expert:
            raise ValueError(f"a row holds {layout.words_per_expert} expected words an expert, the check compares "
                             f"{check.within.numel()}; make both from the same chunks")  # fmt: skip
        steps = [self.stage(row_host, row_dev, layout)]
        steps += [self._product(name, row_dev, layout.capacity, max_rows, has_shared) for name in ("up", "down")]
        if check is not None:
            checked = self._check(row_dev, layout, check)
            steps[1:] = [checked, *steps[1:], checked]

        def work() -> None:
            for step in steps:
                step()

        return work

    def gate(self, source: torch.Tensor, words: torch.Tensor, counter: torch.Tensor, flag: torch.Tensor) -> Work:
        """Give `source` int64 to the host in `words` (pinned), and the next number of `counter` [1] in `flag` [1].

        The host that sees the number in `flag` (pinned) sees the words: the last kernel of a graph.
        """
        count = source.numel()
        if words.numel() < count or {source.dtype, words.dtype, counter.dtype, flag.dtype} != {torch.int64}:
            raise ValueError(f"gate: {count} words into {words.numel()}, all of int64; give room for all of them")
        kernel = self._programs.gate

        def work() -> None:
            kernel[(1,)](source, words, count, counter, flag, BLOCK=_block(count), num_warps=4)

        return work

    def tune(self, device_ns: Callable[[Work], float], buckets: Iterable[tuple[int, int]]) -> None:
        """Choose each bucket's tiles by measured time. Before anything is captured: bodies keep what was chosen.

        device_ns: nanoseconds that the device takes for a body. buckets: (capacity, most rows of an expert).
        """
        for capacity, max_rows in buckets:
            rows = tile_rows(max_rows)
            launches = self._tuning_rows(capacity, max_rows)
            for name in ("up", "down"):
                times = []
                for tile in _TILES[rows]:
                    bodies = [self._product(name, row, capacity, max_rows, False, tile) for row in launches]
                    times.append(device_ns(_all(bodies)))
                self._tiles[capacity, rows, name] = _TILES[rows][times.index(min(times))]

    def _tuning_rows(self, capacity: int, max_rows: int) -> list[torch.Tensor]:
        """Full launches on the device, over as many slots as keep the weights out of its cache."""
        layout = RowLayout(capacity)
        count = min(capacity, self._pool_slots, self._max_rows)
        rows = [max(1, min(max_rows, self._max_rows // count))] * count
        expert_bytes = self._routed.widths.num_values * self._inputs.element_size()
        num_launches = max(1, min(self._pool_slots // count, -(-_TUNING_BYTES // (expert_bytes * count)), 64))
        made = []
        for launch in range(num_launches):
            row = torch.zeros(layout.num_words, dtype=torch.int64)
            layout.fill(row.numpy(), [launch * count + place for place in range(count)], rows)
            made.append(row.to(self._inputs.device))
        return made

    def _product(self, name: str, row: torch.Tensor, capacity: int, max_rows: int, has_shared: bool,
                 tile: Tile | None = None) -> Work:  # fmt: skip
        """The launch of `up` or `down`."""
        routed, shared = self._routed, self._shared
        tile = tile or self.tile(capacity, max_rows, name)
        rows = tile_rows(max_rows)
        if name == "up":
            tensors = (self._inputs, routed.weights, routed.middle, shared.weights, shared.middle)
            width = max(routed.widths.up, shared.widths.up if has_shared else 0)
        else:
            tensors = (routed.middle, routed.weights, routed.out, shared.middle, shared.weights, shared.out)
            width = routed.widths.hidden
        grid = (-(-width // tile.columns), capacity + has_shared, -(-max_rows // rows))
        own, other = routed.widths, shared.widths
        sizes = {
            "CAPACITY": capacity, "HAS_SHARED": has_shared, "HIDDEN": own.hidden,
            "UP": own.up, "MIDDLE": own.middle, "HALF": own.half, "PITCH": own.pitch,
            "SHARED_UP": other.up, "SHARED_MIDDLE": other.middle, "SHARED_HALF": other.half,
            "SHARED_PITCH": other.pitch,
            "BT": rows, "BN": tile.columns, "BK": tile.depth_bytes // self._inputs.element_size(),
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        kernel = getattr(self._programs, name)

        def work() -> None:
            kernel[grid](row, *tensors, routed.stride, shared.stride, **sizes)

        return work

    def _check(self, row: torch.Tensor, layout: RowLayout, check: SlotCheck) -> Work:
        """The launch of `check`."""
        kernel = self._programs.check
        num_words = layout.words_per_expert

        def work() -> None:
            kernel[(layout.capacity,)](row, check.words, check.within, check.wrong, check.first_bad,
                                       check.words_per_slot, CAPACITY=layout.capacity, WORDS=num_words,
                                       BLOCK=_power(num_words), num_warps=1)  # fmt: skip

        return work


def _is_gated(widths: Widths) -> bool:
    return widths.up > widths.middle


def _power(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _block(count: int) -> int:
    """Words that a copy moves at a time."""
    return min(_power(count), _COPY_BLOCK)


def _all(bodies: list[Work]) -> Work:
    def work() -> None:
        for body in bodies:
            body()

    return work
