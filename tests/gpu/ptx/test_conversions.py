"""Conversions against torch's, rounding ties and edges included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.ptx.conversions import from_bf16, to_bf16, to_tf32, truncated_tf32
from tests.gpu.ptx.hand_written import execute, values

EDGES = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 3e38, -3.39e38, 1e-40, 65520.0]
REAL = np.resize(np.array([*EDGES, float("inf"), float("nan")], np.float32), 32)


def test_bf16_rounds_as_torch_does() -> None:
    random = torch.randn(4096).mul_(torch.randn(4096).exp())
    for value in (random, torch.tensor(EDGES)):
        bits = to_bf16(value.numpy())
        assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), value.bfloat16())
        assert np.array_equal(from_bf16(bits), value.bfloat16().float().numpy())
    assert to_bf16(np.array([np.nan], np.float32)) == 0x7FFF


def test_tf32_keeps_ten_bits() -> None:
    one = np.array([1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11], np.float32)
    assert to_tf32(one).tolist() == [1 + 2**-10, 1, -1 - 2**-10]
    assert truncated_tf32(one.view(np.uint32)).tolist() == [1, 1, -1]


def test_instructions() -> None:
    machine = execute(
        """cvt.rn.f16x2.f32 %r2, %r1, 0f3F800000; cvt.rn.bf16x2.f32 %r3, 0f3F800000, %r1; cvt.rn.f16.f32 %rs1, %r1;
           cvt.f32.f16 %r4, %rs1; cvt.rn.bf16.f32 %rs2, %r1; cvt.f32.bf16 %r5, %rs2; cvt.rzi.s32.f32 %r6, %r1;""",
        given={"%r1": REAL},
    )
    half = torch.from_numpy(REAL).half()
    with np.errstate(all="ignore"):
        assert np.array_equal(values(machine, "%r4", "f4"), half.float().numpy(), equal_nan=True)
    assert (values(machine, "%r2", "u4") & 0xFFFF == 0x3C00).all()
    assert np.array_equal(values(machine, "%r2", "u4") >> 16, values(machine, "%rs1", "u2"))
    assert (values(machine, "%r3", "u4") >> 16 == 0x3F80).all()
    assert np.array_equal(values(machine, "%r3", "u4") & 0xFFFF, values(machine, "%rs2", "u2"))
    largest = 2**31 - 1
    assert values(machine, "%r6", "i4")[6:12].tolist() == [largest, -largest - 1, 0, 65520, largest, 0]


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_arithmetic_in_halves(kind: str, dtype: torch.dtype) -> None:
    a, b = (torch.randn(64).to(dtype) for _ in range(2))
    given = {f"%r{i}": t.view(torch.int32).numpy() for i, t in enumerate((a, b), 1)}
    machine = execute(f"add.{kind}x2 %r3, %r1, %r2; mul.{kind}x2 %r4, %r1, %r2;", given=given)
    for register, expected in (("%r3", a + b), ("%r4", a * b)):
        assert np.array_equal(values(machine, register, "i4"), expected.view(torch.int32).numpy())


def test_signs_fill_wider_registers() -> None:
    machine = execute(
        "cvt.s8.s32 %rs1, %r1; cvt.u8.u32 %rs2, %r1;", given={"%r1": np.full(32, 0x1FF, np.int32)}
    )
    assert (values(machine, "%rs1", "i2") == -1).all()
    assert (values(machine, "%rs2", "i2") == 255).all()
