"""What Triton makes of the kernels for an H200, run on the CPU, see `tests.gpu.ptx`: no GPU is needed.

A row is staged against a host whose stores arrive one by one between the device's reads. Experts over few rows are
computed at gpt-oss-20b's widths, some blocks of each tile, and whole launches at small ones. Kernels and hosts with a
mistake go the same way, and it must show.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from replay.machine import slot_kernels
from replay.machine.rows import GAVE_UP, NUM_EXPERTS, SHARED_BLOCK, TOLD, RowLayout
from replay.machine.slot_kernels import SlotKernels, check_work, gate, stage
from tests.gpu.ptx.arithmetic import UnknownInstruction
from tests.gpu.ptx.hosts import Staged, mistakes
from tests.gpu.ptx.launches import CONSTRAINTS, Launches, Place, emulated, is_pinned, program_of, readable, run_launch
from tests.gpu.ptx.program import Program
from tests.gpu.ptx.state import Fault
from tests.gpu.slot_cases import UNTOUCHED, Bench, make_row, weights
from tests.gpu.test_slot_kernels import CASES
from tests.gpu.test_slot_launches import GPT_OSS, SHARED, kernels, words

pytest.importorskip("triton", reason="pip install 'expertflow[kernels]'")
SLOT_PROGRAMS = Path(slot_kernels.__file__).with_name("slot_programs.py")
CAPACITIES = [1, 4, 64]
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's own cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(slot_kernels, "_programs", lambda name="slot_programs": made)
    return made


# -- a row and its host --------------------------------------------------------------------------------------


def staging(launches: Launches, layout: RowLayout, programs: str | ModuleType = "slot_programs") -> Program:
    """What is compiled for a row of this layout."""
    launches.calls.clear()
    stage(make_row(layout, "cpu"))()
    return program_of(launches.calls[0], programs)[1]


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("words_per_expert", [0, 2])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_row_is_staged_whole_whenever_its_words_arrive(
    capacity: int, words_per_expert: int, launches: Launches
) -> None:
    layout = RowLayout(capacity, words_per_expert)
    assert mistakes(staging(launches, layout), layout, 100, seed=capacity) == []


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("missing", ["all", "a slot"])
def test_a_host_that_does_not_come_is_given_up(capacity: int, missing: str, launches: Launches) -> None:
    layout = RowLayout(capacity)
    staged = Staged(staging(launches, layout), layout, 1, most_polls=30)
    staged.row.spread([1] * capacity)
    staged.row.describe(list(range(capacity)), 3, 2)
    staged.row.tell()
    if missing == "a slot":
        staged.host.reorder({layout.first - 1})
        staged.host.arrive(len(staged.host.on_the_way) - 1)
    staged.launch()
    assert staged.device[[NUM_EXPERTS, SHARED_BLOCK, TOLD]].tolist() == [0, -1, 1]
    assert staged.host.arrived[GAVE_UP] == 1
    # A look before the loop and 30 in it; of a host that said MORE the others once.
    assert staged.host.reads == 31 * layout.first + (layout.num_words if missing == "a slot" else 0)


def mutant(folder: Path, right: str, wrong: str) -> ModuleType:
    """The kernels with a mistake. Triton reads the source of what it compiles: it lies in a file."""
    text = SLOT_PROGRAMS.read_text(encoding="utf-8")
    assert text.count(right) >= 1
    path = folder / "mutant_slot_programs.py"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS = {
    "numbers of slots are not looked at": (
        "_is_head(word, num_experts + SLOTS) & ((found",
        "(word <= SHARED_ROWS) & ((found",
    ),
    "the number of the first slot does for all": ("num_experts + SLOTS)", "tl.minimum(num_experts, 1) + SLOTS)"),
    "the words of the launch before will do": ("found >> TAG_SHIFT) < tag", "found >> TAG_SHIFT) < tag - 1"),
    "words have no sign": ("(found << TAG_SHIFT) >> TAG_SHIFT", "found & TAG_MASK"),
    "MORE is not looked at": ("(found & MORE) != 0", "(found & MORE) > MORE"),
    "it does not look again": ("while (missing > 0) & (polls < most_polls):", "while (missing < 0) & (polls < 1):"),
    "the shared block is not looked at": ("& ((found >>", "& (word != SHARED_BLOCK) & ((found >>"),
    "MORE comes without its words": ("tl.where(_is_head(each, end), _plain(each, value), value)", "value"),
    "the launch is not counted": ("tl.store(target + TOLD, launch)", "tl.store(target + TOLD, launch - 1)"),
}


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_staging_shows(mistake: str, launches: Launches, tmp_path: Path) -> None:
    layout = RowLayout(4, 2)
    assert mistakes(staging(launches, layout, mutant(tmp_path, *MUTANTS[mistake])), layout, 200, seed=1)


def test_a_read_that_a_cache_may_answer_shows(launches: Launches, tmp_path: Path) -> None:
    layout = RowLayout(4, 2)
    careless = mutant(tmp_path, "mask=each < num_words, other=0, volatile=True", "mask=each < num_words, other=0")
    with pytest.raises(Fault, match="a read of host that a cache may answer, while the host writes there"):
        mistakes(staging(launches, layout, careless), layout, 1, seed=1)


def test_a_host_whose_words_pass_each_other_shows(launches: Launches) -> None:
    """What carries no number must have arrived before what does."""
    layout = RowLayout(4, 2)
    assert mistakes(staging(launches, layout), layout, 40, seed=1, ordered=False)


# -- experts over few rows -----------------------------------------------------------------------------------

CAPACITY = 4
FIRSTS, IDLE = (0, 4), 2
"""Where the rows of the two experts of a launch begin; an expert that it does not have."""
TILES = [
    (product, rows, place)
    for product, tiles in slot_kernels._FEW_ROWS.items()
    for rows in (1, 4)
    for place in range(len(tiles))
]


class World(NamedTuple):
    """Kernels at gpt-oss-20b's widths, and what they read: garbage but for what a launch may read."""

    made: SlotKernels
    slots: dict[int, torch.Tensor]
    """Weights by slot."""
    block: torch.Tensor
    """Of the only block of shared experts."""


@pytest.fixture(scope="module", params=[False, True], ids=["routed", "with-shared"])
def world(request: pytest.FixtureRequest) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_kernels, "_programs", lambda name="slot_programs": Launches())
        made = kernels(shared=request.param)
    slots = dict(zip((2, 0), weights(GPT_OSS, 2, torch.bfloat16, 1), strict=True))
    made._routed.weights.fill_(NAN)
    for slot, values in slots.items():
        made._routed.weights[slot, : GPT_OSS.num_values] = values
    block = weights(SHARED, 1, torch.bfloat16, 2)[0]
    if request.param:
        made._shared.weights.fill_(NAN)
        made._shared.weights[1] = block
    return World(made, slots, block)


class Expert(NamedTuple):
    """One of a launch: its weights, its rows, and the buffers between and behind the two products."""

    middle: int
    weights: torch.Tensor
    first: int
    num_rows: int
    values: torch.Tensor
    out: torch.Tensor

    @property
    def rows(self) -> slice:
        """In the buffers."""
        return slice(self.first, self.first + self.num_rows)

    def activated(self, inputs: torch.Tensor, columns: slice) -> torch.Tensor:
        """What `up` makes of the inputs in float64, some columns."""
        hidden = inputs.size(1)
        both = self.weights[: 2 * self.middle * hidden].view(2, self.middle, hidden)[:, columns].double()
        gate, up = (inputs[: self.num_rows].double() @ half.T for half in both)
        found: torch.Tensor = torch.nn.functional.silu(gate) * up
        return found

    def output(self, hidden: int, columns: slice) -> torch.Tensor:
        """What `down` makes of the activated values in float64, some columns."""
        second = self.weights[2 * self.middle * hidden : 3 * self.middle * hidden].view(self.middle, hidden)
        return self.values[self.rows, : self.middle].double() @ second[:, columns].double()


def launched(world: World, rows: int, draws: random.Random) -> tuple[torch.Tensor, dict[int, Expert]]:
    """The row of a launch with up to so many rows an expert, and its experts by their place in the grid."""
    made, layout = world.made, RowLayout(CAPACITY)
    counts, shared_rows = ((4, 3), 5) if rows == 4 else ((1, 2), 1)
    row = torch.full((layout.num_words,), 1 << 40)
    row[:TOLD] = torch.tensor([len(counts), 1, shared_rows, 0])
    for first, numbers in ((layout.slots, list(world.slots)), (layout.first, FIRSTS), (layout.counts, counts)):
        row[first : first + len(counts)] = torch.tensor(numbers)
    routed, shared = made._routed, made._shared
    experts = {
        which: Expert(GPT_OSS.middle, values, FIRSTS[which], counts[which], routed.activated, routed.out)
        for which, values in enumerate(world.slots.values())
    }
    if shared is not routed:
        experts[CAPACITY] = Expert(SHARED.middle, world.block, 0, shared_rows, shared.activated, shared.out)
    generator = torch.Generator().manual_seed(draws.getrandbits(32))
    for tensor in (made._inputs, routed.activated, shared.activated):
        tensor.fill_(NAN)
    used = made._inputs[: max(*counts, shared_rows)]
    used[:] = torch.randn(used.shape, generator=generator)
    for expert in experts.values():
        values = expert.values[expert.rows, : expert.middle]
        values[:] = torch.randn(values.shape, generator=generator)
    return row, experts


def check_blocks(
    world: World, product: str, rows: int, place: int, launches: Launches, spoil: Callable[[str], str] | None = None
) -> list[str]:
    """Run some blocks of a tile's launch, compare all outputs, and tell the hazards and what is wrong."""
    made, tile = world.made, slot_kernels._FEW_ROWS[product][place]
    has_shared = made._shared is not made._routed
    draws = random.Random(f"{product} {rows} {place} {has_shared}")
    row, experts = launched(world, rows, draws)
    made._few_row_programs = launches
    launches.calls.clear()
    made._product(product, row, CAPACITY, rows, has_shared, tile)()
    (call,) = launches.calls
    widths = {which: GPT_OSS.hidden if product == "down" else expert.middle for which, expert in experts.items()}
    # Of each expert the first columns, the last, or others; and an expert that the launch does not have.
    blocks: list[Place] = [(0, IDLE, 0)]
    for which, kind in zip(experts, draws.sample(["first", "last", "any"], 3), strict=False):
        last = (widths[which] - 1) // tile.columns
        blocks.append(({"first": 0, "last": last, "any": draws.randint(0, last)}[kind], which, 0))
    if widths[0] < widths.get(CAPACITY, 0):
        # The grid is that of the shared experts, which are wider.
        blocks.append((call[1][0] - 1, 0, 0))
    outputs = [block.activated if product == "up" else block.out for block in (made._routed, made._shared)]
    for out in outputs:
        out.fill_(UNTOUCHED)
    seed = draws.getrandbits(32)
    wrong = run_launch(call, "few_row_programs", seed=seed, places=blocks, outputs=outputs, spoil=spoil)
    for number, which, _ in blocks:
        if which == IDLE or number * tile.columns >= widths[which]:
            continue
        expert = experts[which]
        columns = slice(number * tile.columns, min((number + 1) * tile.columns, widths[which]))
        is_up = product == "up"
        found = (expert.values if is_up else expert.out)[expert.rows, columns]
        wanted = expert.activated(made._inputs, columns) if is_up else expert.output(GPT_OSS.hidden, columns)
        # Sums in float32; of `down` rounded to bfloat16.
        off = 1e-5 * wanted.abs().max() + (1e-5 if is_up else 2**-8) * wanted.abs()
        if not bool(((found.double() - wanted).abs() <= off).all()):
            wrong.append(f"{product}, {tile}, seed {seed}: block {number} of expert {which} is off")
        found.fill_(UNTOUCHED)
    if not all(bool((out == UNTOUCHED).all()) for out in outputs):
        wrong.append(f"{product}, {tile}, seed {seed}: something else was written")
    return wrong


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize(("product", "rows", "place"), TILES)
def test_every_tile_of_few_rows_computes_gpt_oss_as_float64_does(
    product: str, rows: int, place: int, world: World, launches: Launches
) -> None:
    assert check_blocks(world, product, rows, place, launches) == []


MISTAKES = {
    "a group of copies is not waited for": (r"cp\.async\.wait_group\s+(\d+);", 0, "cp.async.wait_group 9;", "either"),
    "a copy is left out": (r"cp\.async\.cg[^;]*;", 0, "", "either"),
    "warps do not meet before they read what was copied": (r"(wait_group\s+\d+;.*?)bar\.sync\s+0;", 0, r"\1", "down"),
    "warps do not meet before they read each other's sums": (r"bar\.sync\s+0;", -1, "", "either"),
    "lanes do not meet before they read each other's sums": (r"bar\.warp\.sync[^;]*;", -1, "", "up"),
}
"""By what it is: a pattern, which of the places where it is found, what is put there, in which product."""


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(
    ("mistake", "product"),
    [(name, one) for name, (*_, of) in MISTAKES.items() for one in ("up", "down") if of in (one, "either")],
)
def test_a_mistake_in_what_was_compiled_shows(mistake: str, product: str, world: World, launches: Launches) -> None:
    pattern, place, wrong, _ = MISTAKES[mistake]

    def spoil(text: str) -> str:
        found = list(re.finditer(pattern, text, re.DOTALL))[place]
        return text[: found.start()] + found.expand(wrong) + text[found.end() :]

    assert check_blocks(world, product, 1, 0, launches, spoil)


WHOLE = {
    "few-rows-ungated": [torch.bfloat16],
    "few-rows-shared-is-wider": [torch.bfloat16],
    "one-row-each-and-of-the-shared": [torch.bfloat16, torch.float32],
    "few-rows-whole-tiles": [torch.bfloat16, torch.float32, torch.float16],
}


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, of in WHOLE.items() for dtype in of], ids=str)
def test_whole_launches_at_small_widths_are_what_float64_says(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is staged, then all blocks of both products run; in bfloat16 too, which the interpreter does not know."""
    monkeypatch.setattr(slot_kernels, "_programs", lambda name="slot_programs": emulated(name, seed=len(name)))
    case = CASES[name]
    bench = Bench(case, dtype)
    bench.check(case.slots, case.rows, case.shared_block, case.shared_rows)


# -- gate and check ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_words", [0, 1, 33, 100])
def test_the_gate_gives_the_words_before_the_number(num_words: int, launches: Launches) -> None:
    source, there, counter, flag = torch.arange(num_words) + 1, words(num_words), words(1) + 6, words(1)
    gate(source, there, counter, flag)()
    (call,) = launches.calls
    assert run_launch(call, seed=num_words, outputs=[there, counter, flag]) == []
    assert there.tolist() == source.tolist()
    assert counter.tolist() == flag.tolist() == [7]


def test_a_check_counts_the_words_that_differ_and_keeps_the_first_launch(launches: Launches) -> None:
    layout = RowLayout(3, 2)
    row, pool = make_row(layout, "cpu"), torch.arange(4 * 9)
    assert row.device is not None
    row.device[: layout.first] = torch.tensor([2, -1, 0, 5, 0, 0, 3, 1, 1 << 40])
    # Words 4 and 7 of nine: of slot 3 31 and 34, of slot 1 13 and 16; then what no expert has.
    row.device[layout.expected :] = torch.tensor([31, 34, 14, 17, 0, 0])
    wrong, first_bad = words(1) + 10, words(1) + 99
    check_work(row, pool, 9, torch.tensor([4, 7]), wrong, first_bad)()
    (call,) = launches.calls
    assert run_launch(call, seed=1, outputs=[wrong, first_bad]) == []
    assert (wrong.tolist(), first_bad.tolist()) == ([12], [5])


# -- versions ------------------------------------------------------------------------------------------------


def test_an_unknown_instruction_is_skipped_by_name_but_for_the_version_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ".visible .entry one()\n.reqntid 32\n{\n\ttanh.approx.f32 %r1, %r2;\n}\n"
    import triton

    monkeypatch.setattr(triton, "__version__", "3.0.0")
    assert not is_pinned("3.0.0")
    with pytest.raises(pytest.skip.Exception, match=r"Triton 3\.0\.0 emits what the emulator does not know: tanh"):
        readable(text)
    (pinned,) = re.findall(r"^triton==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.setattr(triton, "__version__", pinned)
    with pytest.raises(UnknownInstruction, match="tanh"):
        readable(text)
