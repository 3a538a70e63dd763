"""Barriers, exchanges within a warp, matrices in shared memory and the products of sm_80."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.ptx.faults import Diverged, UnknownInstruction
from tests.gpu.ptx.hand_written import execute, values

LANE = np.arange(32)


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        ("bfly.b32 %r2, %r1, 5, 31", LANE ^ 5),
        ("idx.b32 %r2, %r1, 7, 31", LANE * 0 + 7),
        ("up.b32 %r2, %r1, 3, 0", np.where(LANE < 3, LANE, LANE - 3)),
        ("down.b32 %r2, %r1, 3, 31", np.where(LANE > 28, LANE, LANE + 3)),
        # Segments of 8: 0x18 keeps the upper bits.
        ("idx.b32 %r2, %r1, 2, 0x181f", LANE // 8 * 8 + 2),
        ("down.b32 %r2, %r1, 1, 0x181f", np.where(LANE % 8 == 7, LANE, LANE + 1)),
    ],
)
def test_exchanges(exchange: str, expected: np.ndarray) -> None:
    machine = execute(f"mov.u32 %r1, %tid.x; shfl.sync.{exchange}, -1;", n_threads=64)
    assert np.array_equal(values(machine, "%r2", "u4"), np.concatenate([expected, expected + 32]))


def test_reductions_of_a_warp() -> None:
    given = {"%r1": np.concatenate([LANE - 40, LANE]).astype(np.int32)}
    machine = execute(
        "redux.sync.max.s32 %r2, %r1, -1; redux.sync.add.s32 %r3, %r1, -1;", n_threads=64, given=given
    )
    assert values(machine, "%r2", "i4")[[0, 31, 32, 63]].tolist() == [-9, -9, 31, 31]
    assert values(machine, "%r3", "i4")[[0, 63]].tolist() == [sum(range(-40, -8)), sum(range(32))]


@pytest.mark.parametrize(
    "body",
    ["bar.sync 0;", "bar.warp.sync -1;", "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;", "cp.async.commit_group;"],
)
def test_what_only_some_threads_reach(body: str) -> None:
    if body.startswith("shfl"):
        body = "shfl.sync.idx.b32 %r2, %r1, 31, 31, -1;"
    with pytest.raises(Diverged):
        execute(
            f"mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @!%p1 bra $L1; {body}\n$L1:\nmov.u32 %r3, 0;"
        )


@pytest.mark.parametrize("body", ["bar.sync 1;", "bar.sync 0, 32;", "shfl.sync.idx.b32 %r2, %r1, 0, 31, 15;"])
def test_parts_of_programs_are_not_known(body: str) -> None:
    with pytest.raises(UnknownInstruction):
        execute(body, n_threads=64)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_out_and_come_back(transposed: bool) -> None:
    """Stored as the manual says, loaded as a thread's own rows would be."""
    trans = ".trans" if transposed else ""
    registers = "{%r2, %r3, %r4, %r5}"
    given = {
        f"%r{i}": (LANE * 2 + 64 * (i - 2) | (LANE * 2 + 1 + 64 * (i - 2)) << 16).astype(np.int32)
        for i in range(2, 6)
    }
    machine = execute(
        f"""mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 4; stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {registers};
        bar.warp.sync -1; ld.shared.b16 %rs1, [%r1 + 2];
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r1];""",
        shared=512,
        given=given,
    )
    for i in range(2, 6):
        assert np.array_equal(values(machine, f"%r{i + 4}", "i4"), given[f"%r{i}"])
    # Thread t gave the address of row t%8 of matrix t/8: its second element.
    row, matrix = LANE % 8, LANE // 8
    second = row + 8 if transposed else row * 8 + 1
    assert np.array_equal(values(machine, "%rs1", "u2"), 64 * matrix + second)


SHAPES = [
    ("m16n8k16", "bf16"),
    ("m16n8k8", "bf16"),
    ("m16n8k16", "f16"),
    ("m16n8k8", "tf32"),
    ("m16n8k4", "tf32"),
]


@pytest.mark.parametrize(("shape", "kind"), SHAPES)
def test_products(shape: str, kind: str) -> None:
    """Fragments laid out element by element, as the manual's formulas say."""
    depth, per = int(shape.split("k")[1]), 1 if kind == "tf32" else 2
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=g) for s in ((16, depth), (depth, 8), (16, 8)))
    a, b = a.to(dtype), b.to(dtype)
    n_a, n_b = (16 * depth) // (32 * per), (8 * depth) // (32 * per)
    left, right = torch.zeros(n_a, 32, per, dtype=dtype), torch.zeros(n_b, 32, per, dtype=dtype)
    added = np.zeros((4, 32), np.float32)
    for lane in range(32):
        row, column = lane >> 2, lane % 4
        for j in range(per):
            for i in range(n_a):
                at = column * per + j + (4 * per if i >= 2 else 0)
                left[i, lane, j] = a[row + (8 if i in (1, 3) else 0), at]
            for i in range(n_b):
                right[i, lane, j] = b[column * per + j + (4 * per if i else 0), row]
        for i in range(4):
            added[i, lane] = c[row + (8 if i >= 2 else 0), 2 * column + i % 2]
    given = {
        f"%r{i}": t.contiguous().view(torch.int32).numpy().reshape(32)
        for i, t in enumerate([*left, *right], 4)
    }
    given |= {f"%r{i}": t for i, t in enumerate(added, 20)}
    names = [f"%r{i}" for i in range(4, 4 + n_a + n_b)]
    body = (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r0, %r1, %r2, %r3}}, {{{', '.join(names[:n_a])}}}, "
        f"{{{', '.join(names[n_a:])}}}, {{%r20, %r21, %r22, %r23}};"
    )
    machine = execute(body, given=given)
    if kind == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    expected = (a.double() @ b.double() + c.double()).float()
    for lane in range(32):
        for i in range(4):
            found = values(machine, f"%r{i}", "f4")[lane]
            assert found == expected[(lane >> 2) + (8 if i >= 2 else 0), 2 * (lane % 4) + i % 2]


def test_an_unknown_product_raises() -> None:
    with pytest.raises(UnknownInstruction):
        execute("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};")
