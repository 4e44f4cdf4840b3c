"""The emulator of PTX against programs and results by hand; and that it notices what it says it notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gpu.ptx import program as programs
from tests.gpu.ptx.arithmetic import UnknownInstruction
from tests.gpu.ptx.program import Program, run_block
from tests.gpu.ptx.state import LANES, Array, Fault, Landing, Memory

LANE = np.arange(LANES)
START = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r2, %r1, 2;
"""
"""%rd4, %rd5: where the thread's 4 bytes of the input and of the output lie; %r2 the same in shared memory."""


def program(body: str, warps: int = 1) -> Program:
    """A kernel of an input and an output."""
    head = ".visible .entry k(\n.param .u64 k_param_0,\n.param .u64 k_param_1\n)\n"
    return Program(f"{head}.reqntid {warps * LANES}\n{{\n{START}{body}\n}}\n")


def run(body: str, given: Any = (0,) * 64, warps: int = 1, dtype: Any = np.uint32, **options: Any) -> Array:
    """What the kernel writes, 64 values of 4 bytes; it meets no hazard."""
    found, hazards = run_with_hazards(body, given, warps, dtype, **options)
    assert hazards == []
    return found


def run_with_hazards(
    body: str, given: Any = (0,) * 64, warps: int = 1, dtype: Any = np.uint32, **options: Any
) -> tuple[Array, list[str]]:
    memory, out = Memory(), np.zeros(64, dtype)
    addresses = [memory.add("input", np.array(given, dtype), writable=False), memory.add("output", out)]
    hazards = run_block(program(body, warps), memory, addresses, shared_bytes=256, **options)
    return out, hazards


# -- what is computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("mad.lo.s32 %r3, %r1, 3, -5;", [3 * lane - 5 for lane in range(LANES)]),
        ("add.s32 %r3, %r1, 0x7fffffff;", [(2**31 - 1 + lane + 2**31) % 2**32 - 2**31 for lane in range(LANES)]),
        ("sub.s32 %r4, %r1, 4; min.s32 %r3, %r4, 1;", [min(lane - 4, 1) for lane in range(LANES)]),
        ("sub.s32 %r4, %r1, 9; shr.s32 %r3, %r4, 1;", [(lane - 9) // 2 for lane in range(LANES)]),
        ("mov.b32 %r4, -8; shr.u32 %r3, %r4, 29;", [7] * LANES),
        ("shl.b32 %r3, 1, %r2;", [1 << 4 * lane if lane < 8 else 0 for lane in range(LANES)]),
        ("bfe.u32 %r3, %r1, 1, 2;", [lane // 2 % 4 for lane in range(LANES)]),
        ("popc.b32 %r3, %r1;", [lane.bit_count() for lane in range(LANES)]),
        # Signed and unsigned, -1 is below and above 3; what is put into 64 bits keeps its sign.
        ("sub.s32 %r4, 0, %r1; setp.lt.s32 %p1, %r4, 3; selp.b32 %r3, 1, 0, %p1;", [1] * LANES),
        ("sub.s32 %r4, 0, %r1; setp.lt.u32 %p1, %r4, 3; selp.b32 %r3, 1, 0, %p1;", [1] + [0] * (LANES - 1)),
        ("mul.wide.s32 %rd7, -3, %r1; shr.s64 %rd8, %rd7, 32; cvt.u32.u64 %r3, %rd8;", [0] + [-1] * (LANES - 1)),
        ("mul.wide.u32 %rd7, -3, 2; shr.u64 %rd8, %rd7, 32; cvt.u32.u64 %r3, %rd8;", [1] * LANES),
        ("mov.b64 %rd7, 0x1fffffffe; cvt.s64.s32 %rd8, %rd7; cvt.u32.u64 %r3, %rd8;", [-2] * LANES),
        ("mov.b64 %rd7, 0x500000006; mov.b64 {_, %r3}, %rd7;", [5] * LANES),
        ("mov.b32 {%rs1, %rs2}, 0x20003; mov.b32 %r3, {%rs2, %rs1};", [0x30002] * LANES),
        # A guard leaves the other lanes as they were.
        ("mov.b32 %r3, 7; setp.ge.s32 %p1, %r1, 30; @%p1 mov.b32 %r3, 8;", [7] * 30 + [8] * 2),
        ("mov.b32 %r3, 7; setp.ge.s32 %p1, %r1, 30; @!%p1 mov.b32 %r3, 8;", [8] * 30 + [7] * 2),
        # Lanes give each other what they have.
        ("shfl.sync.bfly.b32 %r3, %r1, 4, 31, -1;", [lane ^ 4 for lane in range(LANES)]),
        ("redux.sync.add.s32 %r3, %r1, -1;", [496] * LANES),
        # 1 + 2 + ... + 10 by a loop.
        (
            "mov.b32 %r3, 0; mov.b32 %r4, 0;\n$L:\nadd.s32 %r4, %r4, 1; add.s32 %r3, %r3, %r4;"
            "setp.lt.s32 %p1, %r4, 10; @%p1 bra $L;",
            [55] * LANES,
        ),
        ("mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.y; mad.lo.s32 %r3, %r4, 10, %r5;", [23] * LANES),
    ],
)
def test_whole_numbers(body: str, wanted: list[int]) -> None:
    found = run(f"{body} st.global.b32 [%rd5], %r3;", dtype=np.int32, block=(0, 2, 0), grid=(1, 3, 1))
    assert found.tolist() == wanted + [0] * LANES


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("mov.b32 %r4, 0f3F000000; mul.f32 %r3, %r5, %r4;", LANE / 2),
        ("fma.rn.f32 %r3, %r5, %r5, 0fBF800000;", LANE**2 - 1.0),
        ("sub.f32 %r3, 0f40400000, %r5;", 3.0 - LANE),
        ("max.f32 %r3, %r5, 0f40400000;", np.maximum(3.0, LANE)),
        ("ex2.approx.f32 %r3, %r5;", 2.0**LANE),
        ("add.f32 %r4, %r5, %r5; div.full.f32 %r3, %r4, 0f40000000;", LANE),
        # 1 + lane / 256: bfloat16 keeps 7 bits behind the point, of two as near the even one.
        (
            "fma.rn.f32 %r4, %r5, 0f3B800000, 0f3F800000; cvt.rn.bf16.f32 %rs1, %r4; cvt.f32.bf16 %r3, %rs1;",
            [1 + (lane + (lane % 4 == 3) - (lane % 4 == 1)) / 256 for lane in range(LANES)],
        ),
        ("cvt.rn.bf16x2.f32 %r4, %r5, 0f40400000; and.b32 %r3, %r4, 0xffff0000;", LANE),
        ("cvt.rn.bf16x2.f32 %r4, %r5, 0f40400000; shl.b32 %r3, %r4, 16;", [3.0] * LANES),
        ("cvt.rn.f16.f32 %rs1, %r5; cvt.f32.f16 %r3, %rs1;", LANE),
    ],
)
def test_numbers_with_a_point(body: str, wanted: Any) -> None:
    given = np.concatenate([LANE, LANE]).astype(np.float32)
    found = run(f"ld.global.b32 %r5, [%rd4]; {body} st.global.b32 [%rd5], %r3;", given, dtype=np.float32)
    assert found[:LANES].tolist() == np.array(wanted, np.float32).tolist()


def test_vectors_are_read_and_written_in_order_in_global_and_shared_memory() -> None:
    body = """
        mul.wide.u32 %rd6, %r1, 8; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd2, %rd6; shl.b32 %r9, %r1, 3;
        ld.global.v2.b32 {%r3, %r4}, [%rd7 + 0];
        st.shared.v2.b32 [%r9], {%r4, %r3};
        ld.shared.b64 %rd9, [%r9];
        st.global.b64 [%rd8], %rd9;
    """
    # Each pair is turned round.
    assert run(body, range(64)).tolist() == [number ^ 1 for number in range(64)]


def test_matrices_spread_rows_over_lanes() -> None:
    """A row of eight values of 16 bits goes to four lanes, two each; storing is the way back."""
    body = """
        shl.b32 %r9, %r1, 3;
        st.shared.b32 [%r2], %r1; st.shared.b32 [%r2 + 128], %r1; bar.warp.sync -1;
        and.b32 %r4, %r1, 7; shl.b32 %r5, %r4, 4;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r5];
        bar.warp.sync -1;
        xor.b32 %r6, %r5, 112;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6 + 128], {%r3};
        bar.warp.sync -1;
        ld.shared.b32 %r7, [%r2 + 128];
        st.global.b32 [%rd5], %r3; st.global.b32 [%rd5 + 128], %r7;
    """
    found = run(body)
    # As lane l had 4 bytes at 4 * l, lane l has them again; then the rows were stored from the last to the first.
    assert found[:LANES].tolist() == LANE.tolist()
    assert found[LANES:].reshape(8, 4).tolist() == LANE.reshape(8, 4)[::-1].tolist()


def test_an_atomic_gives_each_lane_what_was_there() -> None:
    body = """
        mov.b64 %rd7, 2;
        atom.global.gpu.acq_rel.add.u64 %rd8, [%rd2], %rd7;
        add.s64 %rd9, %rd2, %rd3; cvt.u32.u64 %r3, %rd8; st.global.b32 [%rd9 + 128], %r3;
    """
    found = run(body)
    assert found[0] == 2 * LANES
    assert sorted(found[LANES:]) == list(range(0, 2 * LANES, 2))


# -- asynchronous copies -------------------------------------------------------------------------------------

COPY = "cp.async.ca.shared.global [%r2], [%rd4], 0x4; cp.async.commit_group;"
GIVEN = np.arange(64, dtype=np.float32) + 1


@pytest.mark.parametrize("landing", ["late", "early", "mixed"])
def test_a_copy_is_there_when_its_group_was_waited_for(landing: Landing) -> None:
    body = f"""
        {COPY}
        cp.async.ca.shared.global [%r2 + 128], [%rd4 + 128], 0x4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd5], %r3;
        cp.async.wait_group 0; ld.shared.b32 %r4, [%r2 + 128]; st.global.b32 [%rd5 + 128], %r4;
    """
    assert run(body, GIVEN, dtype=np.float32, landing=landing).tolist() == GIVEN.tolist()


def test_before_it_is_waited_for_it_is_nan_unless_it_was_early_and_always_told() -> None:
    body = f"{COPY} cp.async.wait_group 1; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd5], %r3;"
    late, hazards = run_with_hazards(body, GIVEN, dtype=np.float32, landing="late", seed=5)
    assert np.isnan(late[:LANES]).all()
    assert hazards == [
        "byte 0: read before a copy to it was waited for; warp 0 at: ld.shared.b32 %r3, [%r2]; "
        "k, block (0, 0, 0) of (1, 1, 1), copies late, seed 5"
    ]
    early, hazards = run_with_hazards(body, GIVEN, dtype=np.float32, landing="early")
    assert early[:LANES].tolist() == GIVEN[:LANES].tolist()
    assert len(hazards) == 1


def test_of_a_copy_of_no_bytes_zeros_are_left() -> None:
    body = """
        setp.lt.s32 %p1, %r1, 30; selp.b32 %r3, 4, 0, %p1;
        cp.async.ca.shared.global [%r2], [%rd4], 0x4, %r3; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd5], %r4;
    """
    assert run(body, GIVEN, dtype=np.float32)[:LANES].tolist() == [*GIVEN[:30], 0, 0]


@pytest.mark.parametrize(
    ("body", "hazard"),
    [
        (f"{COPY} {COPY} cp.async.wait_group 0;", "two copies to it under way"),
        (f"{COPY} st.shared.b32 [%r2], %r1; cp.async.wait_group 0;", "written while a copy to it is under way"),
        # Waited for by the thread that copied, not by its neighbour.
        (
            f"{COPY} cp.async.wait_group 0; xor.b32 %r3, %r2, 4; ld.shared.b32 %r4, [%r3];",
            "read with no barrier after another thread's write",
        ),
    ],
)
def test_what_may_meet_a_copy_is_told(body: str, hazard: str) -> None:
    for landing in ("late", "early", "mixed"):
        assert any(hazard in told for told in run_with_hazards(body, GIVEN, dtype=np.float32, landing=landing)[1])


# -- races ---------------------------------------------------------------------------------------------------

EXCHANGE = """
    st.shared.b32 [%r2], %r1;
    {barrier}
    xor.b32 %r3, %r2, {other}; ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd5], %r4;
"""


@pytest.mark.parametrize(
    ("warps", "other", "barriers"),
    [(2, 128, {"": True, "bar.warp.sync -1;": True, "bar.sync 0;": False})]
    + [(1, 4, {"": True, "bar.warp.sync -1;": False, "bar.sync 0;": False})],
    ids=["between-warps", "between-lanes"],
)
def test_a_read_of_what_another_thread_wrote_needs_a_barrier(warps: int, other: int, barriers: dict[str, bool]) -> None:
    for barrier, is_race in barriers.items():
        # Whichever of the warps is first.
        for seed in range(6):
            found, hazards = run_with_hazards(EXCHANGE.format(barrier=barrier, other=other), warps=warps, seed=seed)
            assert bool(hazards) is is_race
            if not is_race:
                assert found[: warps * LANES].tolist() == [lane ^ other // 4 for lane in range(warps * LANES)]


@pytest.mark.parametrize(
    ("body", "is_race"),
    [
        (
            "ld.shared.b32 %r3, [global_smem]; st.shared.b32 [global_smem + 128], %r3; setp.eq.b32 %p1, %r1, 40;"
            "@%p1 st.shared.b32 [global_smem], %r1;",
            True,
        ),
        ("shr.u32 %r3, %r1, 5; st.shared.b32 [global_smem], %r3;", True),
        # All hold the same value.
        ("st.shared.b32 [global_smem], 7;", False),
        ("st.shared.b32 [global_smem], 7; bar.sync 0; ld.shared.b32 %r3, [global_smem];", False),
        # Read by both warps, then written by one of them.
        ("ld.shared.b32 %r3, [global_smem]; setp.eq.b32 %p1, %r1, 0; @%p1 st.shared.b32 [%r2], %r1;", True),
        ("ld.shared.b32 %r3, [global_smem]; bar.sync 0; setp.eq.b32 %p1, %r1, 0; @%p1 st.shared.b32 [%r2], 1;", False),
    ],
)
def test_a_write_where_others_read_or_write_needs_a_barrier(body: str, is_race: bool) -> None:
    for seed in range(6):
        assert bool(run_with_hazards(body, warps=2, seed=seed)[1]) is is_race


def test_of_lanes_that_write_to_one_place_any_is_left() -> None:
    left = {int(run("st.global.b32 [%rd2], %r1;", seed=seed)[0]) for seed in range(20)}
    assert len(left) > 5


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "warps", "message"),
    [
        ("ld.global.b32 %r3, [%rd4 + 2];", 1, r"a read of 4 bytes at input\+2, which has 256: not aligned"),
        ("ld.global.b32 %r3, [%rd4 + 132];", 1, r"a read of 4 bytes at input\+256, which has 256: out of bounds"),
        ("ld.global.b32 %r3, [%rd4 + -4];", 1, "a read of 4 bytes at 0x.*: out of bounds"),
        ("st.global.b32 [%rd5 + 132], %r1;", 1, r"a store of 4 bytes at output\+256, which has 256: out of bounds"),
        ("st.global.b32 [%rd4], %r1;", 1, "a store to input, which may only be read"),
        ("ld.shared.b32 %r3, [%r2 + 1];", 1, "a read of 4 shared bytes at 1: not aligned"),
        ("st.shared.b32 [%r2 + 132], %r1;", 1, "a store of 4 shared bytes at 256, of 256: out of bounds"),
        ("cp.async.ca.shared.global [%r2], [%rd4 + 2], 0x4;", 1, "the source of a copy is not aligned"),
        ("cp.async.ca.shared.global [%r2 + 2], [%rd4], 0x4;", 1, "a copy of 4 shared bytes at 2: not aligned"),
        ("ld.param.b64 %rd9, [%rd3];", 1, "no parameter is at 124"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 bra $L;\n$L:\nret;", 1, "9 of 32 lanes take it; .*@%p1 bra"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 bar.sync 0;", 1, "9 of 32 lanes take it; .*@%p1 bar.sync 0"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", 1, "not all lanes take part"),
        ("shfl.sync.bfly.b32 %r3, %r1, 1, 31, 0xff;", 1, "not all lanes take part"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 bar.sync 0;", 2, r"warps \[0\] of \[0, 1\] wait at barriers"),
        (
            "setp.lt.s32 %p1, %r1, 32; @%p1 bra $A;\nbar.sync 0; ret;\n$A:\nbar.sync 0;",
            2,
            r"warps \[0, 1\] of \[0, 1\] wait at barriers",
        ),
        ("$L:\nbra $L;", 1, "no end after 1000 instructions"),
    ],
)
def test_what_a_gpu_would_not_do_is_refused(
    body: str, warps: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match=f"{message}.*; k, block .* seed 3"):
        run(body, warps=warps, seed=3)


@pytest.mark.parametrize(
    "text",
    [
        "tanh.approx.f32 %r3, %r4",
        "add.sat.s32 %r3, %r1, 1",
        "add.s32 %r3, %r1",
        "add.s32 %rd9, %r1, 1",
        "add.s32 %r3, %tid.y, 1",
        "ld.global.b8 %rs1, [%rd4]",
        "ld.global.v2.b32 {%r3}, [%rd4]",
        "ld.global.b32 %r3, [%rd4 * 2]",
        "cp.async.wait_all",
        "bar.sync 1",
        "bra $NOWHERE",
        "wgmma.fence.sync.aligned",
    ],
)
def test_what_is_not_known_is_said_when_a_program_is_read(text: str) -> None:
    with pytest.raises(UnknownInstruction) as raised:
        program(f"{text};")
    assert text in str(raised.value)


def test_while_the_host_writes_each_value_is_read_by_itself_and_by_no_cache() -> None:
    memory, given, out = Memory(), np.zeros(64, np.uint32), np.zeros(64, np.uint32)

    def count() -> None:
        given[:] += 1

    addresses = [memory.add("host", given, before_read=count), memory.add("output", out)]
    read = program("ld.volatile.global.b32 %r3, [%rd4]; st.global.b32 [%rd5], %r3;")
    run_block(read, memory, addresses, seed=1)
    # In any order of the lanes.
    assert sorted(out[:LANES]) == list(range(1, LANES + 1))
    assert out[:LANES].tolist() != list(range(1, LANES + 1))
    with pytest.raises(Fault, match="a read of host that a cache may answer"):
        run_block(program("ld.global.b32 %r3, [%rd4];"), memory, addresses)


def test_a_seed_says_all() -> None:
    body = "st.global.b32 [%rd2], %r1; st.shared.b32 [global_smem], %r1;"
    for seed in range(5):
        one, other = (run_with_hazards(body, warps=2, seed=seed) for _ in range(2))
        assert one[0].tolist() == other[0].tolist()
        assert one[1] == other[1]
