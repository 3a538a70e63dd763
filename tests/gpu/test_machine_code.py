"""Reading a kernel's text: loops, the main one, divisions, and what matrix instructions compute."""

from __future__ import annotations

import pytest

from mtl_fast.kernels.triton.machine_code import (
    PTX,
    count,
    divides,
    instruction_descriptors,
    instructions_and_loops,
    main_loop,
    matrix_flop,
)

pytestmark = pytest.mark.proof

LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   S2R R2, SR_TID.X ;
.L_x_1:
        /*0020*/               @P0 LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0030*/              @!UP1 HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/               @P2 BRA `(.L_x_1) ;
        /*0050*/               @P3 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0090*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00a0*/              @!PT BRA `(.L_x_3) ;
        /*00b0*/               @P1 BRA `(.L_x_5) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
.L_x_5:
"""


def test_loops_of_machine_code() -> None:
    instructions, loops = instructions_and_loops(LISTING)
    assert len(instructions) == 14
    assert instructions[2] == "LDGSTS.E.BYPASS.128 [R1], [R2.64]"
    # Neither a branch forward nor the one behind the end is a loop.
    assert [len(loop) for loop in loops] == [3, 5, 5]
    assert main_loop(loops, "HMMA") == loops[0]
    assert count(loops[1], "HMMA") == 1


def test_without_products_the_longest_innermost_loop_is_the_main_one() -> None:
    _, loops = instructions_and_loops(LISTING.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert main_loop(loops, "HMMA") == loops[2]
    assert main_loop([], "HMMA") == ()


ASSEMBLY = """
$L__BB0_1:                              // %loop
	ld.global.b32 	%r1, [%rd1];
	@%p1 {op} 	%r2, %r1, %r3;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{ %r4 }}, {{ %r5 }}, {{ %r6 }}, {{ %r4 }};
	@%p2 bra 	$L__BB0_1;
	rem.s32 	%r7, %r1, %r3;
"""


@pytest.mark.parametrize(
    ("op", "is_division"),
    [("rem.u32", True), ("div.s64", True), ("div.full.f32", False), ("mul.hi.u32", False)],
)
def test_a_division_counts_inside_the_main_loop_only(op: str, is_division: bool) -> None:
    text = ASSEMBLY.format(op=op)
    assert len(instructions_and_loops(text, PTX)[0]) == 5
    assert divides(text) == is_division


@pytest.mark.parametrize(
    ("instruction", "num_warps", "flop"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4", 1, 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R10, R4", 4, 4 * 2 * 16 * 8 * 8),
        ("HMMA.1684.F32.TF32 R4, R8, R10, R4", 4, 4 * 2 * 16 * 8 * 4),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", 8, 2 * 2 * 64 * 128 * 16),
        ("FFMA R1, R2, R3, R4", 4, 0),
    ],
)
def test_operations_of_a_matrix_instruction(instruction: str, num_warps: int, flop: int) -> None:
    assert matrix_flop([instruction, instruction], num_warps) == 2 * flop


def test_the_fifth_generation_keeps_its_shape_in_a_descriptor() -> None:
    ptx = """
	mov.b32 	%r69, 136316048;
	mov.b32 	%r70, 7;
	@%p14 tcgen05.mma.cta_group::1.kind::f16 [ %r391 + 0 ], %rd26, %rd27, %r69, %p13;
"""
    descriptors = instruction_descriptors(ptx)
    assert descriptors == (136316048,)
    assert matrix_flop(["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR12]"], 4, descriptors) == 2 * 128 * 128 * 16
    tf32 = descriptors[0] & ~(7 << 7) | 2 << 7
    assert matrix_flop(["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR12]"], 4, [tf32]) == 2 * 128 * 128 * 8
