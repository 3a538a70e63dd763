"""Instructions on registers, against whole numbers of Python and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.gpu.ptx.hand_written import execute, values

A = np.random.default_rng(0).integers(-(2**31), 2**31, 32, dtype=np.int64)
B = np.random.default_rng(1).integers(-(2**31), 2**31, 32, dtype=np.int64) >> np.arange(32)
A[:4], B[:4] = [0, -1, 2**31 - 1, -(2**31)], [7, -7, 3, 1]
U = 1 << 32


def truncated(a: int, b: int) -> int:
    return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


WHOLE: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: a * b >> 32,
    "mul.hi.u32": lambda a, b: (a % U) * (b % U) >> 32,
    "div.s32": truncated,
    "div.u32": lambda a, b: (a % U) // (b % U) if b else -1,
    "rem.u32": lambda a, b: (a % U) % (b % U) if b else a,
    "rem.s32": lambda a, b: a - truncated(a, b) * b if b else a,
    "min.s32": min,
    "max.u32": lambda a, b: max(a % U, b % U),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << (b % U) if b % U < 32 else 0,
    "shr.u32": lambda a, b: (a % U) >> (b % U) if b % U < 32 else 0,
    "shr.s32": lambda a, b: a >> min(b % U, 31),
    "add.s16x2": lambda a, b: ((a + b) & 0xFFFF) | ((a >> 16) + (b >> 16)) << 16,
}


@pytest.mark.parametrize("opcode", WHOLE)
def test_whole_numbers(opcode: str) -> None:
    machine = execute(
        f"{opcode} %r3, %r1, %r2;", given={"%r1": A.astype(np.int32), "%r2": B.astype(np.int32)}
    )
    expected = [WHOLE[opcode](int(a), int(b)) % U for a, b in zip(A, B, strict=True)]
    assert values(machine, "%r3", "u4").tolist() == expected


@pytest.mark.parametrize(("kind", "span"), [("s", 0), ("u", 1 << 64)])
def test_the_high_half_of_128_bits(kind: str, span: int) -> None:
    a, b = A << 31, B << 29
    machine = execute(f"mul.hi.{kind}64 %rd3, %rd1, %rd2;", given={"%rd1": a, "%rd2": b})
    expected = [
        ((int(x) + span * int(x < 0)) * (int(y) + span * int(y < 0)) >> 64) % (1 << 64)
        for x, y in zip(a, b, strict=True)
    ]
    assert values(machine, "%rd3", "u8").tolist() == expected


def test_64_bits_do_not_wrap_at_32() -> None:
    given = {"%r1": A.astype(np.int32), "%r2": B.astype(np.int32), "%rd1": A << 20}
    machine = execute(
        """mul.wide.s32 %rd2, %r1, %r2; mul.wide.u32 %rd3, %r1, %r2; mad.wide.s32 %rd4, %r1, 12, %rd1;
           cvt.s64.s32 %rd5, %r1; mad.lo.s64 %rd6, %rd5, 4294967296, %rd1; shl.b64 %rd7, %rd5, 3;
           cvt.u64.u32 %rd8, %r1;""",
        given=given,
    )
    a, b = A.tolist(), B.tolist()
    assert values(machine, "%rd2", "i8").tolist() == [x * y for x, y in zip(a, b, strict=True)]
    assert values(machine, "%rd3", "u8").tolist() == [(x % U) * (y % U) for x, y in zip(a, b, strict=True)]
    assert values(machine, "%rd4", "i8").tolist() == [x * 12 + (x << 20) for x in a]
    wrapped = [((x << 32) + (x << 20) + 2**63) % 2**64 - 2**63 for x in a]
    assert values(machine, "%rd6", "i8").tolist() == wrapped
    assert values(machine, "%rd7", "i8").tolist() == [x * 8 for x in a]
    assert values(machine, "%rd8", "u8").tolist() == [x % U for x in a]


@pytest.mark.parametrize(("start", "length"), [(0, 1), (4, 5), (0, 32), (28, 8), (31, 1), (5, 0), (40, 3)])
def test_fields_of_bits(start: int, length: int) -> None:
    machine = execute(
        f"bfe.u32 %r2, %r1, {start}, {length}; bfe.s32 %r3, %r1, {start}, {length};"
        f"bfi.b32 %r4, %r1, %r5, {start}, {length};",
        given={"%r1": A.astype(np.int32), "%r5": B.astype(np.int32)},
    )
    for i, a in enumerate(A.tolist()):
        wide = a % U >> start
        assert values(machine, "%r2", "u4")[i] == wide % (1 << length)
        # Beyond the register the sign goes on.
        field = (a >> min(start, 31)) % (1 << length)
        signed = field - (1 << length) if length and field >> (length - 1) else field
        assert values(machine, "%r3", "i4")[i] == signed
        mask = ((1 << length) - 1) << start
        assert values(machine, "%r4", "u4")[i] == ((a << start & mask) | (int(B[i]) & ~mask)) % U


def test_bytes_and_tables() -> None:
    machine = execute(
        """prmt.b32 %r2, 0x33221100, 0x77665584, 0x4c71; lop3.b32 %r3, 12, 10, 6, 0xe8;
           shf.l.wrap.b32 %r4, 0x80000001, 0x7, 4; mul.hi.u16 %rs3, 30000, 21846;
           mov.b64 %rd1, {%r2, %r3}; mov.b32 {%rs1, %rs2}, %r2;"""
    )
    assert values(machine, "%r2", "u4")[0] == 0x84FF7711
    assert values(machine, "%r3", "u4")[0] == (12 & 10 | 12 & 6 | 10 & 6)
    assert values(machine, "%r4", "u4")[0] == 0x78
    assert values(machine, "%rs3", "u2")[0] == 30000 * 21846 >> 16
    assert values(machine, "%rd1", "u8")[0] == (14 << 32) | 0x84FF7711
    assert [int(values(machine, f"%rs{i}", "u2")[0]) for i in (1, 2)] == [0x7711, 0x84FF]


REAL = {
    "eq": [0, 0, 1],
    "ne": [1, 0, 0],
    "lt": [1, 0, 0],
    "ge": [0, 0, 1],
    "neu": [1, 1, 0],
    "equ": [0, 1, 1],
    "ltu": [1, 1, 0],
    "num": [1, 0, 1],
    "nan": [0, 1, 0],
}


@pytest.mark.parametrize("relation", REAL)
def test_comparisons_with_nan(relation: str) -> None:
    """1 and 2, 1 and NaN, 1 and 1."""
    b = np.resize(np.array([2, np.nan, 1], np.float32), 32)
    machine = execute(f"setp.{relation}.f32 %p1, 0f3F800000, %r1;", given={"%r1": b})
    assert machine.registers["%p1"][:3].astype(int).tolist() == REAL[relation]


def test_joined_comparisons_and_selection() -> None:
    machine = execute(
        """setp.lt.s32 %p1, %r1, 0; setp.lt.and.u32 %p2, %r1, 100, %p1; setp.gt.or.s32 %p3, %r1, 5, %p1;
           not.pred %p4, %p1; selp.b32 %r2, 1, %r1, %p3;""",
        given={"%r1": np.arange(32, dtype=np.int32) - 16},
    )
    a = np.arange(32) - 16
    assert not machine.registers["%p2"].any()
    assert (machine.registers["%p4"] == (a >= 0)).all()
    assert (values(machine, "%r2", "i4") == np.where((a > 5) | (a < 0), 1, a)).all()


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.f32", lambda a, b: a + b),
        ("sub.rn.f32", lambda a, b: a - b),
        ("mul.f32", lambda a, b: a * b),
        ("div.full.f32", lambda a, b: a / b),
        ("min.f32", np.fmin),
        ("max.NaN.f32", np.maximum),
    ],
)
def test_real_numbers_round_once(opcode: str, function: Callable[[Any, Any], Any]) -> None:
    random = np.random.default_rng(2)
    a, b = (random.normal(size=32).astype(np.float32) for _ in range(2))
    a[0] = b[1] = np.nan
    machine = execute(f"{opcode} %r3, %r1, %r2;", given={"%r1": a, "%r2": b})
    expected = function(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(values(machine, "%r3", "f4"), expected)


def test_a_fused_product_is_not_rounded_between() -> None:
    a = np.full(32, 1 + 2**-12, np.float32)
    machine = execute("fma.rn.f32 %r2, %r1, %r1, 0fBF800000; mul.f32 %r3, %r1, %r1;", given={"%r1": a})
    assert values(machine, "%r2", "f4")[0] == 2**-11 + 2**-24
    assert values(machine, "%r3", "f4")[0] == 1 + 2**-11


def test_functions_and_small_numbers() -> None:
    a = np.resize(np.array([1e-40, 3.0, np.inf], np.float32), 32)
    machine = execute(
        """ex2.approx.f32 %r2, %r1; lg2.approx.f32 %r3, %r1; add.ftz.f32 %r4, %r1, 0f00000000;
           add.f32 %r5, %r1, 0f00000000; rcp.approx.ftz.f32 %r6, %r1; neg.f32 %r7, %r1;""",
        given={"%r1": a},
    )
    assert values(machine, "%r2", "f4")[:3].tolist() == [1, 8, np.inf]
    np.testing.assert_allclose(values(machine, "%r3", "f4")[1], np.log2(3), rtol=1e-7)
    assert values(machine, "%r4", "f4")[0] == 0
    assert values(machine, "%r5", "f4")[0] == np.float32(1e-40)
    assert values(machine, "%r6", "f4")[:3].tolist() == [np.inf, np.float32(1) / np.float32(3), 0]
    assert values(machine, "%r7", "f4")[1] == -3
