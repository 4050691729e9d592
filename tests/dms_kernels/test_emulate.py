"""The emulator of compiled kernels by itself, on PTX written by hand: numbers rounded once, matrices, and each fault that it must find."""

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

KERNELS = str(Path(__file__).resolve().parents[2] / "kernels")
sys.path.insert(0, KERNELS)
try:
    from emulate import floats
    from emulate.findings import Finding, NotEmulatedError
    from emulate.grid import run_grid
    from emulate.machine import Machine
    from emulate.memory import GlobalMemory, poison
    from emulate.parse import parse
finally:
    sys.path.remove(KERNELS)

# Of each thread: its number, and pointers to its 4 bytes of the two tensors.
PROLOGUE = """
    ld.param.b64 %rd1, [k_param_0]; ld.param.b64 %rd2, [k_param_1];
    mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.s32 %r2, %r2, %r3;
"""


def run(body: str, given: torch.Tensor, out: torch.Tensor, num_threads=64, grid=1, **options) -> torch.Tensor:
    ptx = f"""
    .visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u64 .ptr .global .align 1 k_param_1)
    .reqntid {num_threads}
    {{
        .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
        {PROLOGUE}
        .loc 1 7 1 // kernels.py:7:1
        {body}
        ret;
    }}"""
    memory = GlobalMemory()
    memory.add(given, "given")
    memory.add(out, "out")
    run_grid(parse(ptx), memory, (grid, 1, 1), 4096, {"k_param_0": given.data_ptr(), "k_param_1": out.data_ptr()}, **options)
    return out


def ints(n=64) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def test_a_loop_with_threads_that_leave_it_one_by_one():
    """Thread t adds t, t times."""
    body = """
    mov.b32 %r4, 0; mov.b32 %r5, 0;
    $loop: setp.ge.s32 %p1, %r4, %r1; @%p1 bra $done;
    add.s32 %r5, %r5, %r1; add.s32 %r4, %r4, 1; bra.uni $loop;
    $done: st.global.b32 [ %rd5 + 0 ], { %r5 };
    """
    assert torch.equal(run(body, ints(), ints()), ints() ** 2)


def test_integers():
    body = """
    ld.global.b32 { %r4 }, [ %rd4 + 0 ]; div.s32 %r5, %r4, -7; rem.s32 %r6, %r4, -7; bfe.s32 %r7, %r4, 1, 3; shr.s32 %r8, %r4, 40;
    mad.lo.s32 %r9, %r5, -7, %r6; sub.s32 %r9, %r9, %r4; shl.b32 %r10, %r7, 4; or.b32 %r10, %r10, %r9; xor.b32 %r10, %r10, %r8;
    shf.l.wrap.b32 %r11, %r4, %r4, 8; prmt.b32 %r12, %r11, %r11, 0x0321; sub.s32 %r12, %r12, %r4; or.b32 %r10, %r10, %r12;
    mul.hi.s32 %r13, %r4, 0x40000000; shr.s32 %r14, %r4, 2; sub.s32 %r13, %r13, %r14; or.b32 %r10, %r10, %r13;
    cvt.u16.u32 %rs1, %r1; mul.hi.u16 %rs2, %rs1, 21846; cvt.u32.u16 %r15, %rs2; div.u32 %r16, %r1, 3; sub.s32 %r15, %r15, %r16;
    or.b32 %r10, %r10, %r15;
    st.global.b32 [ %rd5 + 0 ], { %r10 };
    """
    given = ints() - 32
    field = (given >> 1 & 7).where(given >> 3 & 1 == 0, (given >> 1 & 7) - 8)
    assert torch.equal(run(body, given, ints()), (field << 4) ^ (given >> 31))


def test_fields_of_64_bits():
    """A byte across the middle, with the highest bit set beside it; the last bits, and what begins behind them."""
    body = """
    ld.global.b32 { %r4 }, [ %rd4 + 0 ]; mov.b32 %r5, 0x80000000; or.b32 %r5, %r5, %r1; mov.b64 %rd6, { %r4, %r5 };
    bfe.u64 %rd7, %rd6, 28, 8; cvt.u32.u64 %r6, %rd7; bfe.u64 %rd8, %rd6, 63, 8; cvt.u32.u64 %r7, %rd8; shl.b32 %r7, %r7, 8; or.b32 %r6, %r6, %r7;
    bfe.u64 %rd9, %rd6, 64, 8; cvt.u32.u64 %r8, %rd9; or.b32 %r6, %r6, %r8; st.global.b32 [ %rd5 + 0 ], { %r6 };
    """
    given = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(body, given, ints()), (given >> 28 & 15) | (ints() & 15) << 4 | 1 << 8)


def test_two_integers_a_register():
    body = """
    ld.global.b32 { %r4 }, [ %rd4 + 0 ]; add.s16x2 %r5, %r4, %r4; max.s16x2 %r6, %r5, %r4; min.u16x2 %r6, %r6, %r5;
    st.global.b32 [ %rd5 + 0 ], { %r6 };
    """
    given = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    x = given.view(torch.int16)
    unsigned = [y.view(torch.uint16).int() for y in (torch.maximum(x + x, x), x + x)]
    assert torch.equal(run(body, given, ints()).view(torch.uint16).int(), torch.minimum(*unsigned))


def test_a_reduction_over_a_warp():
    body = """
    ld.global.b32 { %r4 }, [ %rd4 + 0 ];
    shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1; add.s32 %r4, %r4, %r5; shfl.sync.bfly.b32 %r5, %r4, 8, 31, -1; add.s32 %r4, %r4, %r5;
    shfl.sync.bfly.b32 %r5, %r4, 4, 31, -1; add.s32 %r4, %r4, %r5; shfl.sync.bfly.b32 %r5, %r4, 2, 31, -1; add.s32 %r4, %r4, %r5;
    shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1; add.s32 %r4, %r4, %r5; redux.sync.add.s32 %r6, %r1, -1; sub.s32 %r4, %r4, %r6;
    shfl.sync.up.b32 %r7, %r1, 3, 0, -1; sub.s32 %r7, %r1, %r7; add.s32 %r4, %r4, %r7; st.global.b32 [ %rd5 + 0 ], { %r4 };
    """
    assert torch.equal(run(body, ints(), ints()), torch.where(ints() % 32 < 3, 0, 3).int())


def _rounded(exact: Fraction, mantissa: int) -> float:
    """To the nearest number of so many bits, ties to even; without the limits of exponents."""
    if exact == 0:
        return 0.0
    scale = Fraction(2) ** (mantissa - 1)
    while abs(exact) * scale >= 2**mantissa:
        scale /= 2
    while abs(exact) * scale < 2 ** (mantissa - 1):
        scale *= 2
    return float(Fraction(round(exact * scale)) / scale)


def test_multiply_and_add_round_once():
    """Against exact fractions, many of them next to a half-way point, where float64 in between would round twice."""
    rng = np.random.default_rng(0)
    a, b = (1 + rng.integers(0, 2**12, (2, 1000)) / 2.0**12).astype(np.float32)
    product = a.astype(np.float64) * b
    half = (np.exp2(np.floor(np.log2(product)) - 24) * rng.choice([1.0, -1.0, 2.0**-30, -(2.0**-32), 1.0 + 2.0**-29], 1000)).astype(
        np.float32
    )
    exact = [_rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), 24) for x, y, z in zip(a, b, half, strict=True)]
    assert np.array_equal(floats.fma(a, b, half), np.array(exact, np.float32))
    for kind, mantissa in (("bf16", 8), ("f16", 11)):
        a, b = floats.values_of(floats.bits_of((1 + rng.random((2, 1000))).astype(np.float32), kind), kind)
        tiny = (rng.choice([2.0**-7, 2.0**-8, 2.0**-9, 2.0**-11, 2.0**-12, 2.0**-14], 1000) * (1 + rng.integers(0, 4, 1000) / 4)).astype(
            np.float32
        )
        exact = [
            _rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), mantissa) for x, y, z in zip(a, b, tiny, strict=True)
        ]
        assert np.array_equal(floats.values_of(floats.half_fma(a, b, tiny, kind), kind), np.array(exact, np.float32))


def test_bfloat16_is_torchs():
    x = torch.randn(1000) * torch.randn(1000).exp2() ** 20
    x[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, 3.4e38])
    assert np.array_equal(floats.bf16_bits(x.numpy()).view(np.int16), x.bfloat16().view(torch.int16).numpy())
    assert torch.from_numpy(floats.bf16_values(floats.bf16_bits(np.float32([np.nan])))).isnan().all()


SHARE = "st.shared.b32 [ %r2 + 0 ], %r1; {between} xor.b32 %r5, %r2, 128; ld.shared.b32 %r6, [%r5]; st.global.b32 [ %rd5 + 0 ], {{ %r6 }};"
COPY = """
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd4 + 0 ], 0x4; cp.async.commit_group; {between} ld.shared.b32 %r6, [%r2];
    st.global.b32 [ %rd5 + 0 ], {{ %r6 }};
"""


def test_shared_memory_between_warps():
    assert torch.equal(run(SHARE.format(between="bar.sync 0;"), ints(), ints()), ints() ^ 32)
    with pytest.raises(
        Finding, match=r"reads shared memory that another warp has written .* `ld.shared.b32 %r6, \[%r5\]` \(kernels.py:7:1\)"
    ):
        run(SHARE.format(between=""), ints(), ints())
    again = "bar.sync 0; ld.shared.b32 %r7, [%r2]; st.shared.b32 [ %r8 + 0 ], %r1;"
    with pytest.raises(Finding, match="writes to shared memory that another warp has read"):
        run(
            SHARE.format(between="").replace("ld.shared.b32 %r6, [%r5];", "xor.b32 %r8, %r2, 128;" + again + "mov.b32 %r6, 0;"),
            ints(),
            ints(),
        )
    with pytest.raises(Finding, match="reads shared memory that nobody has written"):
        run("ld.shared.b32 %r6, [%r2];", ints(), ints())
    with pytest.raises(Finding, match="two threads write different values"):
        run("st.shared.b32 [global_smem], %r1;", ints(), ints())
    with pytest.raises(Finding, match="out of bounds, at byte 4224 of 4096 of shared memory"):
        run("@%p1 bra $end; setp.gt.u32 %p1, %r1, 31; @%p1 st.shared.b32 [ %r2 + 4096 ], %r1; $end:", ints(), ints())


def test_copies_land_when_they_are_waited_for():
    assert torch.equal(run(COPY.format(between="cp.async.wait_group 0;"), ints(), ints() * 0), ints())
    for between in ("", "cp.async.wait_group 1;", "bar.sync 0;"):
        with pytest.raises(Finding, match="nobody has written" if "1" not in between and not between else "written|waited for"):
            run(COPY.format(between=between), ints(), ints())
    # What was there before is read in vain.
    before = "st.shared.b32 [ %r2 + 0 ], %r1; bar.sync 0;"
    with pytest.raises(Finding, match="an asynchronous copy to it has not been waited for"):
        run(before + COPY.format(between="cp.async.wait_group 1;"), ints(), ints())
    # A copy is its own warp's until a barrier.
    with pytest.raises(Finding, match="that another warp has written"):
        run(COPY.format(between="cp.async.wait_group 0; xor.b32 %r2, %r2, 128;"), ints(), ints())


def test_global_memory():
    shifted = "setp.le.u32 %p1, %r1, {last}; @%p1 ld.global.b32 {{ %r4 }}, [ %rd4 + 0 ]; @%p1 st.global.b32 [ %rd5 + 0 ], {{ %r4 }};"
    assert torch.equal(run(shifted.format(last=49), ints(50), ints(50) * 0), ints(50))
    with pytest.raises(Finding, match="read of 4 bytes out of bounds, at byte 200 of given, which has 200"):
        run(shifted.format(last=50), ints(50), ints(64))
    with pytest.raises(Finding, match="write of 4 bytes out of bounds, at byte 200 of out"):
        run(shifted.format(last=50), ints(64), ints(50))
    with pytest.raises(Finding, match="misaligned read of 4 bytes at byte 2 of given"):
        run("ld.global.b32 { %r4 }, [ %rd4 + 2 ];", ints(65), ints())
    unwritten = poison(torch.zeros(64, dtype=torch.bfloat16))
    with pytest.raises(Finding, match="reads of given what nobody has written"):
        run("mul.wide.u32 %rd6, %r1, 2; add.s64 %rd6, %rd6, %rd1; ld.global.b16 { %rs1 }, [ %rd6 + 0 ];", unwritten, ints())


def test_products_that_overflow():
    body = "ld.global.b32 {{ %r4 }}, [ %rd4 + 0 ]; {product} st.global.b32 [ %rd5 + 0 ], {{ %r5 }};"
    given = torch.full((64,), 2**16 - 1, dtype=torch.int32)
    run(body.format(product="mul.lo.s32 %r5, %r4, 32768;"), given, ints())
    for product in ("mul.lo.s32 %r5, %r4, %r4;", "mad.lo.s32 %r5, %r4, %r4, 1;"):
        with pytest.raises(Finding, match="a product of 32-bit numbers overflows"):
            run(body.format(product=product), given, ints())
    # Of threads that compute it.
    run(body.format(product="setp.gt.u32 %p1, %r1, 99; @%p1 mul.lo.s32 %r5, %r4, %r4; mov.b32 %r5, 0;"), given, ints())


def test_what_is_not_known_is_named():
    for instruction in (
        "bfind.u32 %r4, %r1;",
        "add.sat.s32 %r4, %r1, %r1;",
        "cvt.rn.satfinite.e5m2x2.f32 %rs1, %r4, %r5;",
        "bar.sync 1, 64;",
    ):
        with pytest.raises(NotEmulatedError, match=r"k, program \(0, 0, 0\): .*" + instruction.split(" ")[0]):
            run(instruction, ints(), ints())
    with pytest.raises(NotEmulatedError, match="16 warps"):
        run("", ints(), ints(), num_threads=512)


TICKETS = """
    setp.eq.b32 %p1, %r1, 0; mov.b32 %r5, 1;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r4, [ %rd2 + 0 ], %r5;
    {wait}
    @%p1 ld.global.b32 {{ %r6 }}, [ %rd2 + 0 ]; mov.u32 %r7, %ctaid.x; mul.wide.u32 %rd6, %r7, 4; add.s64 %rd6, %rd6, %rd1;
    @%p1 st.global.b32 [ %rd6 + 0 ], {{ %r4 }};
"""


def test_programs_take_turns_in_random_order():
    orders = []
    for seed, resident in ((0, 1), (1, 1), (1, 3)):
        order, count = ints(8) * 0 - 1, ints(1) * 0
        run(TICKETS.format(wait=""), order, count, grid=8, seed=seed, resident=resident)
        assert sorted(order.tolist()) == list(range(8)) and count == 8
        orders.append(order.tolist())
    assert orders[0] != orders[1] and orders[0] != list(range(8))


def test_programs_that_wait_for_each_other():
    wait = "$again: ld.global.b32 { %r8 }, [ %rd2 + 0 ]; setp.lt.s32 %p2, %r8, 2; @%p2 bra $again;"
    run(TICKETS.format(wait=wait), ints(2), ints(1) * 0, grid=2, resident=2)
    with pytest.raises(Finding, match="k has not ended after"):
        run(TICKETS.format(wait=wait), ints(2), ints(1) * 0, grid=2, most_instructions=2000)


def test_a_part_of_a_warp():
    with pytest.raises(Finding, match="a part of a warp executes what whole warps must"):
        run("setp.gt.u32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r5, %r1, 16, 31, -1;", ints(), ints())
    with pytest.raises(Finding, match="threads end while others wait"):
        run("setp.gt.u32 %p1, %r1, 31; @%p1 bra $end; bar.sync 0; $end:", ints(), ints())


def machine(num_threads: int, registers: str, shared_bytes: int = 65536) -> Machine:
    program = parse(f".visible .entry k() .reqntid {num_threads}\n{{ {registers} ret; }}")
    found = Machine(program, GlobalMemory(), shared_bytes, {})
    found.start((0, 0, 0), (1, 1, 1))
    return found


def execute(on: Machine, *instructions: str) -> None:
    from emulate.instructions import make
    from emulate.parse import _instruction

    for text in instructions:
        make(on, _instruction(text, ""))(True)


def test_mma_and_ldmatrix():
    """A [16, 16] and B [16, 8] through shared memory, as a kernel does it; the result back by the figure of the manual."""
    on = machine(32, ".reg .b32 %r<20>; .reg .f32 %f<5>;")
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    at = np.arange(0, 512, 2)
    on.shared.store(at, a.view(torch.int16).numpy().reshape(-1, 1).view(np.uint16), np.full(256, 1, np.uint8))
    on.shared.store(512 + at[:128], b.view(torch.int16).numpy().reshape(-1, 1).view(np.uint16), np.full(128, 1, np.uint8))
    lane = np.arange(32)
    on.target("%r1", "u32")[:] = lane % 16 * 32 + lane // 16 * 16
    on.target("%r2", "u32")[:] = 512 + lane % 16 * 16
    execute(
        on,
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r1]",
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r8, %r9}, [%r2+0]",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%f1, %f2, %f3, %f4}",
    )
    out = torch.zeros(16, 8)
    for i in range(4):
        out[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = torch.from_numpy(on.source(f"%f{i + 1}", "f32").copy())
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("along_rows", [False, True])
def test_wgmma(along_rows):
    """A [64, 16] and B [16, 64] under the swizzle of 128 bytes, B by rows and by columns; nothing is known before the wait."""
    names = ", ".join(f"%f{i}" for i in range(32))
    on = machine(128, ".reg .b64 %rd<3>; .reg .f32 %f<32>; .reg .pred %p<2>;")
    a, b = torch.randn(64, 16).half(), torch.randn(64, 16).half()

    def put(x: torch.Tensor, start: int, lines_of_k: bool) -> None:
        row, k = np.arange(64)[:, None], np.arange(16)[None, :]
        line, along = (k, row) if lines_of_k else (row, k)
        at = start + line * 128 + along * 2
        at ^= (at >> 7 & 7) << 4
        on.shared.store(at.reshape(-1), x.numpy().view(np.uint16).reshape(-1, 1), np.full(1024, 1, np.uint8))

    put(a, 1024, False)
    put(b, 16384, along_rows)
    for name, start in (("%rd1", 1024), ("%rd2", 16384)):
        on.target(name, "u64")[:] = np.uint64((1 << 62) | ((1024 >> 4) << 32) | (1 << 16) | (start >> 4))
    multiply = "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%s}, %%rd1, %%rd2, %%p1, 1, 1, 0, %d" % (names, along_rows)  # noqa: UP031
    with pytest.raises(Finding, match="another warp has written"):
        execute(on, multiply)
    on.shared.barrier()
    for i in range(32):
        on.target(f"%f{i}", "f32")[:] = 1.0
    on.target("%p1", "pred")[:] = True
    execute(on, multiply, multiply, "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned 1")
    assert np.isnan(on.source("%f3", "f32")).all()
    execute(on, "wgmma.wait_group.sync.aligned 0")
    thread, out = np.arange(128), torch.zeros(64, 64)
    for i in range(32):
        out[thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2] = torch.from_numpy(
            on.source(f"%f{i}", "f32").copy()
        )
    torch.testing.assert_close(out, 1 + 2 * a.float() @ b.float().T, rtol=1e-4, atol=1e-4)
    execute(on, multiply, "wgmma.commit_group.sync.aligned")
    on.shared.barrier()
    put(a + 1, 1024, False)
    on.shared.barrier()
    with pytest.raises(Finding, match="a matrix changed before the product that reads it was waited for"):
        execute(on, "wgmma.wait_group.sync.aligned 0")


def test_numbers_of_eight_bits():
    body = """
    ld.global.b32 { %r4 }, [ %rd4 + 0 ]; mul.f32 %r5, %r4, 0f43800000; cvt.rn.satfinite.e4m3x2.f32 %rs1, %r4, %r5; cvt.rn.f16x2.e4m3x2 %r6, %rs1;
    st.global.b32 [ %rd5 + 0 ], { %r6 };
    """
    given = torch.randn(64)
    expected = torch.stack([(given * 256).clamp(-448, 448), given], 1).to(torch.float8_e4m3fn).half()
    assert torch.equal(run(body, given, ints()).view(torch.float16).view(64, 2), expected)


def test_numbers_by_their_bits():
    body = "mov.b32 %r4, 0f3FC00000; cvt.rn.bf16x2.f32 %r5, %r4, 0f40490FDB; st.global.b32 [ %rd5 + 0 ], { %r5 };"
    low, high = (struct.unpack("<f", struct.pack("<I", bits))[0] for bits in (0x40490FDB, 0x3FC00000))
    assert torch.equal(run(body, ints(), ints()).view(torch.bfloat16)[:2], torch.tensor([low, high]).bfloat16())
