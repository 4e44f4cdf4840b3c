"""What each block of a GGUF model holds, told by the names of its tensors, whatever the architecture is called.

llama.cpp names tensors alike in every architecture: `blk.7.ffn_gate_exps.weight` is what an MoE layer streams,
`ffn_up_shexp` its shared expert, `attn_*`, `ssm_*` and `shortconv.*` what mixes tokens. `gguf.constants.TENSOR_NAMES`
has the whole list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from sim.specs.gguf_format import REWRITE, Tensor
from traces.messages import TraceError

Refuse = Callable[[str, str, str], TraceError]
"""Makes the error of (place, problem, remedy), which names the file that the tensor stands in."""

GATE, UP, DOWN, GATE_UP = "gate", "up", "down", "gate_up"
_BLOCK = re.compile(r"blk\.(0|[1-9]\d*)\.(.+)", re.ASCII | re.DOTALL)
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up|up_gate)_exps\.(\w+)", re.ASCII)
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(0|[1-9]\d*)\.(\w+)", re.ASCII)
"""Until spring of 2024 each expert was a tensor of its own."""
_PARTS = (
    (re.compile(r"nextn\."), "nextn"),
    (re.compile(r"ffn_gate_inp\.|ffn_gate_tid2eid|exp_probs_b|ffn_latent_"), "router"),
    (re.compile(r"ffn_(\w+)_(shexp|chexps)\.|ffn_gate_inp_shexp\."), "shared"),
    (re.compile(r"ffn_(gate|up|down)\."), "dense"),
    (re.compile(r"indexer\."), "indexer"),
    (re.compile(r"ssm_|shortconv\."), "linear"),
    (re.compile(r"attn_"), "attention"),
)
"""Part of a block by how the rest of a name begins; what is nothing of these, such as norms, is `other`."""


@dataclass
class Size:
    """Of several tensors. weights, matrix_bytes: of those with two dimensions and more but norms; num_bytes: of all."""

    weights: int = 0
    matrix_bytes: int = 0
    num_bytes: int = 0

    def add(self, tensor: Tensor) -> None:
        self.num_bytes += tensor.num_bytes
        if sum(size > 1 for size in tensor.shape) > 1 and "_norm." not in tensor.name:
            self.weights += tensor.weights
            self.matrix_bytes += tensor.num_bytes

    def __add__(self, other: Size) -> Size:
        return Size(
            self.weights + other.weights, self.matrix_bytes + other.matrix_bytes, self.num_bytes + other.num_bytes
        )


@dataclass
class Experts:
    """The routed experts of one block. shapes: (input, output) of each of an expert's matrices. kinds: their types.
    num_bytes: of all experts, with biases and scales."""

    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    num_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether what leads into the experts and out of them is there."""
        return DOWN in self.shapes and (UP in self.shapes or GATE_UP in self.shapes)

    @property
    def matrices(self) -> int:
        """3 for gated experts, 2 for others."""
        return 3 if GATE in self.shapes or GATE_UP in self.shapes else 2

    @property
    def width(self) -> int:
        """Inner width of one expert."""
        return self.shapes[DOWN][0]

    @property
    def outer(self) -> int:
        """Width of what goes into and out of an expert."""
        return self.shapes[DOWN][1]


@dataclass
class Block:
    """One block. shapes: of the matrices that are not routed experts, by what follows `blk.N.`."""

    experts: Experts | None = None
    parts: dict[str, Size] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all its tensors, experts' included."""
        experts = 0 if self.experts is None else self.experts.num_bytes
        return experts + sum(size.num_bytes for size in self.parts.values())

    def part(self, name: str) -> Size:
        """Its tensors of that part together."""
        return self.parts.get(name, Size())

    def add(self, rest: str, tensor: Tensor) -> None:
        """Count a tensor that is no routed expert's."""
        name = next((part for pattern, part in _PARTS if pattern.match(rest)), "other")
        self.parts.setdefault(name, Size()).add(tensor)
        self.shapes[rest.removesuffix(".weight")] = tensor.shape

    def has(self, *names: str) -> bool:
        """Whether it has one of these matrices."""
        return any(name in self.shapes for name in names)


@dataclass
class Contents:
    """Blocks by their number, and the tensors outside of blocks by name."""

    blocks: dict[int, Block]
    outside: dict[str, Tensor]


def block_number(name: str) -> int | None:
    """Of the block that a tensor of that name is of; None if it is of none."""
    found = _BLOCK.fullmatch(name)
    return int(found[1]) if found else None


def sort_tensors(tensors: Iterable[Tensor], num_blocks: int, num_experts: int, refuse: Refuse) -> Contents:
    """The tensors by block and part; TraceError where those of experts do not fit the numbers or each other."""
    blocks: dict[int, Block] = {}
    outside: dict[str, Tensor] = {}
    single: dict[tuple[int, str, str], dict[int, Tensor]] = {}
    for tensor in tensors:
        found = _BLOCK.fullmatch(tensor.name)
        if not found:
            if tensor.name.startswith("blk."):
                raise refuse(f"tensor {tensor.name!r}", "is of no block that has a number", REWRITE)
            outside[tensor.name] = tensor
            continue
        number, rest = int(found[1]), found[2]
        if number >= num_blocks:
            raise refuse(f"tensor {tensor.name!r}", f"is of block {number}, the file says it has {num_blocks}", REWRITE)
        block = blocks.setdefault(number, Block())
        if many := _EXPERTS.fullmatch(rest):
            _add_stacked(block, tensor, many[1], many[2], num_experts, refuse)
        elif one := _ONE_EXPERT.fullmatch(rest):
            single.setdefault((number, one[1], one[3]), {})[int(one[2])] = tensor
        else:
            block.add(rest, tensor)
    for (number, role, kind), members in single.items():
        _add_single(blocks[number], members, role, kind, num_experts, refuse)
    for number, block in blocks.items():
        if block.experts is not None:
            _check_experts(f"block {number}", block.experts, refuse)
    return Contents(blocks, outside)


def _add_stacked(block: Block, tensor: Tensor, role: str, kind: str, num_experts: int, refuse: Refuse) -> None:
    """Count a tensor of all experts of a layer: matrices have the experts last, and so have biases and scales."""
    experts = block.experts = block.experts or Experts()
    shape = tensor.shape
    if kind != "weight":
        if shape[-1] not in (num_experts, 1):
            raise refuse(f"tensor {tensor.name!r}", f"is of {shape[-1]} experts, not of {num_experts}", REWRITE)
        experts.num_bytes += tensor.num_bytes
        return
    if len(shape) < 2 or (*shape, 1, 1)[2:4] != (num_experts, 1):
        problem = f"has the shape {list(shape)}, not that of {num_experts} matrices"
        raise refuse(f"tensor {tensor.name!r}", problem, REWRITE)
    role = GATE_UP if role == "up_gate" else role
    if role in experts.shapes:
        raise refuse(f"tensor {tensor.name!r}", "comes twice under two names", REWRITE)
    experts.num_bytes += tensor.num_bytes
    experts.kinds.add(tensor.kind)
    experts.shapes[role] = (shape[0], shape[1])


def _add_single(
    block: Block, numbered: Mapping[int, Tensor], role: str, kind: str, num_experts: int, refuse: Refuse
) -> None:
    """Count the tensors of one expert each, `ffn_gate.0.weight` and on."""
    members = list(numbered.values())
    first = members[0]
    if numbered.keys() != set(range(num_experts)) or (block.experts is not None and role in block.experts.shapes):
        problem = f"is one of {len(members)} of its kind, and there are {num_experts} experts"
        raise refuse(f"tensor {first.name!r}", problem, REWRITE)
    experts = block.experts = block.experts or Experts()
    experts.num_bytes += sum(tensor.num_bytes for tensor in members)
    if kind != "weight":
        return
    for tensor in members:
        if tensor.shape != first.shape or len(tensor.shape) != 2:
            problem = f"has the shape {list(tensor.shape)}, another than {first.name!r} or none of a matrix"
            raise refuse(f"tensor {tensor.name!r}", problem, REWRITE)
    experts.kinds.update(tensor.kind for tensor in members)
    experts.shapes[role] = (first.shape[0], first.shape[1])


def _check_experts(where: str, experts: Experts, refuse: Refuse) -> None:
    """Widths of the matrices that are there fit each other."""
    shapes = experts.shapes
    if GATE_UP in shapes and (GATE in shapes or UP in shapes):
        raise refuse(where, "has ffn_gate_up_exps beside ffn_gate_exps or ffn_up_exps", REWRITE)
    if not experts.whole:
        return
    outer, inner = experts.outer, experts.width
    for role, shape in shapes.items():
        wanted = {DOWN: (inner, outer), GATE_UP: (outer, 2 * inner)}.get(role, (outer, inner))
        if shape != wanted:
            problem = f"has experts of {inner} to {outer} (ffn_down) and of {shape[0]} to {shape[1]} (ffn_{role})"
            raise refuse(where, problem, REWRITE)


def check_whole(where: str, block: Block, refuse: Refuse) -> None:
    """TraceError where a matrix is missing without which no model computes."""
    if block.experts is not None:
        if not block.experts.whole:
            there = ", ".join(f"ffn_{role}_exps" for role in sorted(block.experts.shapes))
            raise refuse(where, f"has of its experts {there or 'no matrix'} alone", REWRITE)
        if not block.part("router").num_bytes:
            raise refuse(where, "has experts and no router (ffn_gate_inp)", REWRITE)
    for suffix in ("", "_shexp"):
        names = [f"ffn_{role}{suffix}" for role in (UP, DOWN)]
        if block.has(*names) and not all(map(block.has, names)):
            raise refuse(where, f"has one of {names[0]} and {names[1]} alone", REWRITE)
    if block.part("attention").weights and not block.part("linear").num_bytes and not block.has("attn_output"):
        raise refuse(where, "has attention and no attn_output", REWRITE)
