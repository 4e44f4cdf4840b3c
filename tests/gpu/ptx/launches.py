"""Launches of the project's kernels: what Triton compiles of them for an H200, and that run on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu.ptx.arithmetic import UnknownInstruction
from tests.gpu.ptx.program import Program, run_block
from tests.gpu.ptx.state import Landing, Memory

Call = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""Kernel, grid, arguments, options."""
Place = tuple[int, int, int]
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"
_compiled: dict[str, tuple[str, Program, int]] = {}


class Launches:
    """Stands for the module of kernels: keeps every launch, or does with it what it is told."""

    def __init__(self, launched: Callable[[Call], object] | None = None) -> None:
        self.calls: list[Call] = []
        self._launched = self.calls.append if launched is None else launched

    def __getattr__(self, name: str) -> Any:
        launched = self._launched

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *arguments, **options: launched((name, grid, arguments, options))

        return Kernel()


def _source(call: Call, programs: str | ModuleType) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(the kernel, what it is compiled for, options of the compiler) of a launch, as Triton's launcher finds them."""
    name, _, arguments, options = call
    module = import_module(f"replay.machine.{programs}") if isinstance(programs, str) else programs
    kernel = getattr(module, name)
    chosen = {key: value for key, value in options.items() if key in ("num_warps", "num_stages")}
    constants = {key: value for key, value in options.items() if key not in chosen}
    signature, aligned = {}, {}
    for place, (key, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        # As Triton's launcher does: the types, and which addresses and numbers are multiples of 16.
        is_tensor = isinstance(value, torch.Tensor)
        signature[key] = TYPES[value.dtype] if is_tensor else "i32"
        if key not in kernel.do_not_specialize and (is_tensor or value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    return kernel, {"signature": signature, "constexprs": constants, "attrs": aligned}, chosen


def compiled(call: Call, programs: str | ModuleType = "slot_programs") -> Any:
    """What an H100 or H200 would run for this launch: the same types, constants and alignments."""
    compiler = pytest.importorskip("triton.compiler", reason="pip install 'expertflow[kernels]'")
    from triton.backends.compiler import GPUTarget

    kernel, wanted, chosen = _source(call, programs)
    source = compiler.ASTSource(fn=kernel, **wanted)
    return compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=chosen)


def is_pinned(version: str) -> bool:
    """Whether CI has this version of Triton."""
    return f"triton=={version}" in CONSTRAINTS.read_text(encoding="utf-8").splitlines()


def readable(text: str) -> Program:
    """PTX that Triton has made. What another version emits may be unknown here, what CI's does may not."""
    import triton

    try:
        return Program(text)
    except UnknownInstruction as error:
        if is_pinned(triton.__version__):
            raise
        pytest.skip(f"Triton {triton.__version__} emits what the emulator does not know: {error}")


def program_of(call: Call, programs: str | ModuleType = "slot_programs") -> tuple[str, Program, int]:
    """The PTX of a launch, its program, and the bytes of shared memory that its blocks take."""
    pytest.importorskip("triton.compiler", reason="pip install 'expertflow[kernels]'")
    kernel, wanted, chosen = _source(call, programs)
    key = f"{kernel.fn.__code__.co_filename} {call[0]} {wanted} {chosen}"
    if key not in _compiled:
        binary = compiled(call, programs)
        text = binary.asm["ptx"]
        _compiled[key] = text, readable(text), binary.metadata.shared
    return _compiled[key]


def run_launch(
    call: Call,
    programs: str | ModuleType = "slot_programs",
    *,
    seed: int,
    places: Iterable[Place] | None = None,
    outputs: Sequence[torch.Tensor] | None = None,
    landings: Sequence[Landing] = ("late", "early", "mixed"),
    spoil: Callable[[str], str] | None = None,
) -> list[str]:
    """Run blocks of a launch in any order, all or those in `places`, and tell their hazards.

    outputs: what may be written; None: any argument. Each block draws when its copies land.
    spoil: changes the PTX, to see that it is noticed.
    """
    _, grid, arguments, _ = call
    kernel, _, _ = _source(call, programs)
    x, y, z = (*grid, 1, 1)[:3]
    text, program, shared_bytes = program_of(call, programs)
    if spoil is not None:
        program = Program(spoil(text))
    memory, numbers, known = Memory(), [], {}
    written = None if outputs is None else {output.untyped_storage().data_ptr() for output in outputs}
    for key, value in zip(kernel.arg_names, arguments, strict=False):
        if not isinstance(value, torch.Tensor):
            # The launcher makes constants of 1, and another program of what needs more bits.
            assert value != 1 or key in kernel.do_not_specialize
            assert abs(value) < 1 << 31
            numbers.append(value)
            continue
        storage = value.untyped_storage()
        start = storage.data_ptr()
        if start not in known:
            array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            known[start] = memory.add(key, array, writable=written is None or start in written)
        numbers.append(known[start] + value.data_ptr() - start)
        assert numbers[-1] % 16 == 0 or key in kernel.do_not_specialize
    draws = random.Random(seed)
    chosen = list(product(range(x), range(y), range(z))) if places is None else list(places)
    draws.shuffle(chosen)
    hazards = []
    for block in chosen:
        hazards += run_block(
            program,
            memory,
            numbers,
            block=block,
            grid=(x, y, z),
            shared_bytes=shared_bytes,
            seed=draws.getrandbits(32),
            landing=draws.choice(landings),
        )
    return hazards


def emulated(name: str, seed: int) -> Launches:
    """Stands for a module of kernels: its launches run here, and meet no hazard."""

    def launched(call: Call) -> None:
        assert run_launch(call, name, seed=seed) == []

    return Launches(launched)
