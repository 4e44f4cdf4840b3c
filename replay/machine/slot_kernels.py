"""Experts by slot id: any experts in any slots, any numbers of rows, one pair of launches, ready to be captured.

A slot's weights are two matrices: gate and up [up, hidden], then down [middle, hidden]. Both have rows of `hidden`
values, which begin at 16-byte boundaries for any odd `middle`, and are read in whole rows. Nothing here allocates or
waits after it is made; work goes to torch's current stream. Work is done once before it is captured: its first
launch compiles. triton is imported where the first kernel is made: other machines need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch

from replay.machine.device import Work
from replay.machine.launch_row import Row
from replay.machine.pools import SlotPool
from replay.machine.rows import FEW_ROWS, NUM_EXPERTS, RowLayout, row_class

_PRODUCTS = "up", "down"
_ALIGNED = 16
"""Values: `up` begins at such a place in a row of the intermediate buffer, whatever `middle` is."""
_COPY_BLOCK = 1024
MOST_POLLS = 20_000_000
"""Looks of a waiting launch at the host's word: some 20 s, longer than any host is held up that goes on at all."""
_TUNING_BYTES = 256 << 20
"""Weights that one measured body reads at least, where the pool has them: more than a GPU's cache holds."""


class Feed(Protocol):
    """A feed-forward block: gate and up [up, hidden], down [middle, hidden]; gated where up is 2 * middle."""

    @property
    def hidden(self) -> int: ...

    @property
    def up(self) -> int: ...

    @property
    def middle(self) -> int: ...


class Tile(NamedTuple):
    """What one program computes at a time: `columns` wide, `depth` bytes of the summed dimension deep.

    few_rows: by the kernels of `replay.machine.few_row_programs`; else on tensor cores, 16 rows at least.
    """

    columns: int
    depth_bytes: int
    warps: int
    stages: int
    few_rows: bool = False


_FEW_ROWS: dict[str, tuple[Tile, ...]] = {
    "up": tuple(Tile(*tile, True) for tile in ((4, 512, 1, 4), (4, 512, 1, 6), (4, 1024, 2, 4), (2, 512, 1, 6))),
    "down": tuple(Tile(*tile, True) for tile in ((32, 128, 4, 5), (32, 128, 4, 8), (64, 64, 4, 8), (64, 128, 8, 5))),
}
"""By product. What `up` leaves of few rows only `down` of few rows can read: they are chosen in pairs."""
_TILES: dict[int, tuple[Tile, ...]] = {
    16: (Tile(16, 512, 4, 5), Tile(32, 256, 4, 5), Tile(64, 128, 4, 5), Tile(64, 256, 4, 4)),
    32: (Tile(32, 256, 4, 4), Tile(64, 128, 4, 4), Tile(64, 256, 4, 4), Tile(32, 128, 4, 5)),
    64: (Tile(64, 128, 4, 4), Tile(32, 128, 4, 4), Tile(128, 128, 8, 3)),
}
"""On tensor cores, by rows of a tile. None takes more than 96 KiB of shared memory, which every GPU with bfloat16 has.
"""


_tuned: dict[tuple[Any, ...], Tile] = {}
"""By (hidden, up, middle, dtype, capacity, class of rows, product): what was measured to be fastest."""


def tuned_tiles() -> dict[str, list[int]]:
    """What was chosen so far, for the record of a calibration."""
    return {" ".join(map(str, key)): list(tile) for key, tile in sorted(_tuned.items(), key=str)}


def tile_rows(max_rows: int, few_rows: bool = False) -> int:
    """Rows of a tile where no expert has more than `max_rows`."""
    if few_rows:
        return 1 if max_rows <= 1 else FEW_ROWS
    return next((rows for rows in _TILES if max_rows <= rows), max(_TILES))


def _rows_key(max_rows: int) -> int:
    """What is tuned together: the class of rows, as far as tiles grow with it."""
    return min(row_class(max_rows), max(_TILES))


def default_tile(capacity: int, max_rows: int, product: str) -> Tile:
    """Without a measurement: few experts need many narrow programs to keep the whole device busy."""
    if max_rows <= FEW_ROWS:
        return _FEW_ROWS[product][0]
    rows = tile_rows(max_rows)
    if rows > min(_TILES):
        return _TILES[rows][0]
    return _TILES[rows][0 if capacity <= 2 else 1 if capacity <= 8 else 2]


def kinds_of_tiles(max_rows: int) -> list[dict[str, tuple[Tile, ...]]]:
    """What may compute experts of at most `max_rows` rows: kinds of kernels, each with its tiles by product."""
    tensor = dict.fromkeys(_PRODUCTS, _TILES[tile_rows(max_rows)])
    return [_FEW_ROWS, tensor] if max_rows <= FEW_ROWS else [tensor]


def _programs(name: str = "slot_programs") -> Any:
    try:
        return import_module(f"replay.machine.{name}")
    except ImportError as error:
        raise ValueError(
            f"device=cuda needs triton, which torch's CUDA build brings ({error}); pip install 'expertflow[kernels]'"
        ) from None


def gate(source: torch.Tensor, words: torch.Tensor, counter: torch.Tensor, flag: torch.Tensor) -> Work:
    """Give `source` int64 to the host in `words` (pinned), and the next number of `counter` [1] in `flag` [1].

    The host that sees the number in `flag` (pinned) sees the words. There may be none.
    """
    count = source.numel()
    if words.numel() != count or {source.dtype, words.dtype, counter.dtype, flag.dtype} != {torch.int64}:
        raise ValueError(f"gate: {count} words into {words.numel()}, all of int64; give as many places as words")
    if not (source.is_contiguous() and words.is_contiguous()):
        raise ValueError("gate: words lie apart from each other; give contiguous tensors")
    kernel = _programs().gate
    if not count:
        # An empty tensor may have no address.
        source = words = counter

    def work() -> None:
        kernel[(1,)](source, words, count, counter, flag, BLOCK=_block(count), num_warps=4)

    return work


def check_work(
    row: Row,
    words: torch.Tensor,
    words_per_slot: int,
    within: torch.Tensor,
    wrong: torch.Tensor,
    first_bad: torch.Tensor,
) -> Work:
    """Compare the words at `within` [W] of the slots named in `row` with those expected there, on the device.

    words: the pool as int64. wrong [1] grows by the number that differ; first_bad [1] becomes the least number of a
    launch where any does (begin with a number above all). The row must have been staged.
    """
    layout, num_words, there = row.layout, row.layout.words_per_expert, _there(row)
    if within.numel() != num_words:
        raise ValueError(
            f"a row holds {num_words} expected words an expert, the check compares {within.numel()}; "
            "make both from the same chunks"
        )
    kernel = _programs().check

    def work() -> None:
        kernel[(layout.capacity,)](
            there,
            words,
            within,
            wrong,
            first_bad,
            words_per_slot,
            WORDS=num_words,
            BLOCK=_power(num_words),
            num_warps=4,
        )

    return work


def stage(row: Row, most_polls: int = MOST_POLLS) -> Work:
    """Wait until the host has told the row (`Row.tell`) once for each launch of this, then bring it to the device.

    most_polls: looks at the host's word, of about 1 us each over PCIe, before it gives up and nothing is computed.
    """
    kernel, there, layout = _programs().stage, _there(row), row.layout
    head, block = _power(layout.first), _block(layout.num_words)

    def work() -> None:
        kernel[(1,)](
            row.host, there, layout.num_words, layout.capacity, most_polls, HEAD=head, BLOCK=block, num_warps=1
        )

    return work


class _Block:
    """A block's widths, weights and activations."""

    def __init__(self, feed: Feed, weights: torch.Tensor, max_rows: int, name: str) -> None:
        self.hidden, self.up, self.middle = feed.hidden, feed.up, feed.middle
        if self.up not in (self.middle, 2 * self.middle):
            raise ValueError(
                f"{name}: up={self.up} is neither middle={self.middle} nor twice that; give a gated or an ungated block"
            )
        self.num_values = self.hidden * (self.up + self.middle)
        if weights.size(1) < self.num_values:
            raise ValueError(f"{name}: {weights.size(1)} values in a slot, {self.num_values} needed; enlarge the slots")
        self.weights, self.stride = weights, weights.stride(0)
        # Where `up` begins in a row of intermediate values: rows and halves at addresses for wide reads.
        self.half = -(-self.middle // _ALIGNED) * _ALIGNED
        self.pitch = self.half * (self.up // self.middle)
        # Zeros: what lies between `middle` and `half` is read, never written.
        self.values = weights.new_zeros((max_rows, self.pitch))
        # The same of few rows, see `replay.machine.few_row_programs`.
        self.activated = weights.new_zeros((max_rows, self.half), dtype=torch.float32)
        self.out = weights.new_zeros((max_rows, self.hidden))


class SlotKernels:
    """Launches of one model's expert kernels on one device.

    feed, slots: the routed experts; inputs [rows, hidden]: what every expert multiplies, from its first row. max_rows:
    rows of all routed experts of a launch together, and where their first rows may lie. shared: a feed and the weights
    [blocks, at least its values]. No row beyond inputs or max_rows is computed. ValueError where triton is missing or
    sizes do not fit.
    """

    def __init__(
        self,
        feed: Feed,
        slots: SlotPool,
        inputs: torch.Tensor,
        max_rows: int,
        dtype: torch.dtype,
        shared: tuple[Feed, torch.Tensor] | None = None,
    ) -> None:
        self._programs, self._few_row_programs = _programs(), _programs("few_row_programs")
        self._inputs, self._max_rows, self._num_slots = inputs, max_rows, slots.num_slots
        self._routed = self._shared = _Block(feed, slots.bytes.view(dtype), max_rows, "routed experts")
        self._has_shared = shared is not None
        if shared is not None:
            self._shared = _Block(*shared, inputs.size(0), "shared experts")
        routed, other = self._routed, self._shared
        if not inputs.size(1) == routed.hidden == other.hidden:
            raise ValueError(
                f"inputs are {inputs.size(1)} wide, experts {routed.hidden}, shared experts "
                f"{other.hidden}; give one hidden size"
            )
        if (routed.up > routed.middle) != (other.up > other.middle):
            raise ValueError("routed and shared experts differ in having a gate; give both or neither one")
        self._shape = self._routed.hidden, self._routed.up, self._routed.middle, str(dtype)

    @property
    def out(self) -> torch.Tensor:
        """Outputs of the routed experts [max_rows, hidden], each expert's from its first row."""
        return self._routed.out

    @property
    def shared_out(self) -> torch.Tensor:
        """Outputs of the shared experts [rows of the inputs, hidden]."""
        return self._shared.out

    def tile(self, capacity: int, max_rows: int, product: str) -> Tile:
        """What is used for `product` (up, down) in launches of at most `capacity` experts of `max_rows` rows."""
        found = _tuned.get((*self._shape, capacity, _rows_key(max_rows), product))
        return found or default_tile(capacity, max_rows, product)

    def experts(self, row: Row, max_rows: int, has_shared: bool, check: Work | None = None) -> Work:
        """Compute what the row on the device describes: routed experts, each over its rows, and shared ones.

        The row must have been staged. max_rows: the most that a routed expert has, for speed only. has_shared: whether
        a block of shared experts may stand in the row. check: runs before and after the experts, on the staged row.
        """
        if has_shared and not self._has_shared:
            raise ValueError("has_shared=true, but no shared experts were given; give them where the kernels are made")
        there, capacity = _there(row), row.layout.capacity
        steps = [self._product(name, there, capacity, max_rows, has_shared) for name in _PRODUCTS]
        if check is not None:
            steps = [check, *steps, check]
        return _all(steps)

    def tune(self, device_ns: Callable[[Work], float], buckets: Iterable[tuple[int, int]]) -> None:
        """Choose each bucket's tiles by measured time. Before anything is captured: bodies keep what was chosen.

        device_ns: nanoseconds that the device takes for a body. buckets: (capacity, most rows of an expert). What was
        chosen holds for all kernels of this shape in this process: a calibration and the runs it is for take the same.
        """
        for capacity, max_rows in buckets:
            key = (*self._shape, capacity, _rows_key(max_rows))
            if (*key, "down") in _tuned:
                continue
            launches = self._tuning_rows(capacity, max_rows)
            pairs = []
            for tiles in kinds_of_tiles(max_rows):
                fastest = [
                    self._fastest(name, tiles[name], launches, capacity, max_rows, device_ns) for name in _PRODUCTS
                ]
                pairs.append((sum(ns for ns, _ in fastest), [tile for _, tile in fastest]))
            for name, tile in zip(_PRODUCTS, min(pairs)[1], strict=True):
                _tuned[(*key, name)] = tile

    def _fastest(
        self,
        name: str,
        tiles: Sequence[Tile],
        launches: Sequence[torch.Tensor],
        capacity: int,
        max_rows: int,
        device_ns: Callable[[Work], float],
    ) -> tuple[float, Tile]:
        """(nanoseconds, the tile that took them) of the product's launches."""
        candidates = [
            _all([self._product(name, row, capacity, max_rows, False, tile) for row in launches]) for tile in tiles
        ]
        for body in candidates:
            # Compiled before any of them is timed: a device that idles meanwhile slows down.
            body()
        return min(zip(map(device_ns, candidates), tiles, strict=True))

    def _tuning_rows(self, capacity: int, max_rows: int) -> list[torch.Tensor]:
        """Full launches on the device, over as many slots as keep the weights out of its cache."""
        layout = RowLayout(capacity)
        count = min(capacity, self._num_slots, self._max_rows)
        rows = max(1, min(max_rows, self._max_rows // count, self._inputs.size(0)))
        num_bytes = self._routed.num_values * self._inputs.element_size() * count
        made = []
        for launch in range(max(1, min(self._num_slots // count, -(-_TUNING_BYTES // num_bytes)))):
            words = torch.zeros(layout.num_words, dtype=torch.int64)
            places = torch.arange(count)
            words[NUM_EXPERTS] = count
            words[layout.slots : layout.slots + count] = launch * count + places
            words[layout.first : layout.first + count] = places * rows
            words[layout.counts : layout.counts + count] = rows
            made.append(words.to(self._inputs.device))
        return made

    def _product(
        self, name: str, row: torch.Tensor, capacity: int, max_rows: int, has_shared: bool, tile: Tile | None = None
    ) -> Work:
        """The launch of `up` or `down`."""
        own, other = self._routed, self._shared
        tile = tile or self.tile(capacity, max_rows, name)
        rows = tile_rows(max_rows, tile.few_rows)
        tensors: tuple[torch.Tensor, ...]
        values, shared_values = (block.activated if tile.few_rows else block.values for block in (own, other))
        if name == "up":
            tensors = (self._inputs, own.weights, values, other.weights, shared_values)
            # Of few rows one program computes a gate and what it opens.
            widths = [block.middle if tile.few_rows else block.up for block in (own, other)]
            width = max(widths) if has_shared else widths[0]
        else:
            tensors = (values, own.weights, own.out, shared_values, other.weights, other.out)
            width = own.hidden
        grid = (-(-width // tile.columns), capacity + has_shared, -(-max_rows // rows))
        numbers = (own.stride, other.stride, self._inputs.size(0), self._max_rows)
        sizes = {
            "HAS_SHARED": has_shared,
            "HIDDEN": own.hidden,
            "UP": own.up,
            "MIDDLE": own.middle,
            "HALF": own.half,
            "SHARED_UP": other.up,
            "SHARED_MIDDLE": other.middle,
            "SHARED_HALF": other.half,
            "BT": rows,
            "BN": tile.columns,
            "BK": tile.depth_bytes // self._inputs.element_size(),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        if not tile.few_rows:
            sizes |= {"PITCH": own.pitch, "SHARED_PITCH": other.pitch}
        else:
            sizes["STAGES"] = tile.stages
            if name == "down":
                # Rows that the threads of a program read at once, eight values each.
                sizes["HELD"] = min(32 * tile.warps * 8 // tile.columns, sizes["BK"])
        kernel = getattr(self._few_row_programs if tile.few_rows else self._programs, name)

        def work() -> None:
            kernel[grid](row, *tensors, *numbers, **sizes)

        return work


def _there(row: Row) -> torch.Tensor:
    """The row on the device."""
    if row.device is None:
        raise ValueError("a row for these kernels needs a copy on the device; make it for a CUDA device")
    return row.device


def _power(count: int) -> int:
    """The least power of two that is not below `count`, and no less than a warp."""
    return max(32, 1 << max(count - 1, 0).bit_length())


def _block(count: int) -> int:
    """Words that a copy moves at a time."""
    return min(_power(count), _COPY_BLOCK)


def _all(bodies: list[Work]) -> Work:
    def work() -> None:
        for body in bodies:
            body()

    return work
