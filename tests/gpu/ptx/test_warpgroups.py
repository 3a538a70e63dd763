"""Products of sm_90, from tiles laid out in shared memory chunk by chunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.ptx.faults import EarlyAccess, MissingFence, Race, UnknownInstruction
from tests.gpu.ptx.hand_written import execute, values

# 10 KiB of global memory into shared, 16 bytes a thread and step.
FILL = "ld.param.b64 %rd1, [f_param_0]; mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 4; cvt.u64.u32 %rd2, %r1;"
FILL += "add.s64 %rd1, %rd1, %rd2;" + "".join(
    f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd1 + {2048 * i}];"
    f"st.shared.v4.b32 [%r1 + {2048 * i}], {{%r2, %r3, %r4, %r5}};"
    for i in range(5)
)
SHARED = 10240
MEET = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
B_AT = 8192


def swizzled(rows: Tensor) -> Tensor:
    """[r, 128 bytes] → bytes in which 16-byte chunk c of row r lies where chunk c ^ (r % 8) would."""
    raw = rows.contiguous().view(torch.uint8).view(len(rows), 8, 16)
    out = torch.empty_like(raw)
    for r in range(len(rows)):
        for c in range(8):
            out[r, c ^ (r % 8)] = raw[r, c]
    return out.flatten()


def descriptor(start: int) -> int:
    """Rows of 128 bytes, groups of 8 rows 1024 bytes apart, swizzled."""
    return start >> 4 | 64 << 32 | 1 << 62


def multiply(n: int, a: str, b: int, *, adds: str = "0", flags: str = ", 0, 0", kind: str = "bf16") -> str:
    sums = ", ".join(f"%r{i}" for i in range(8, 8 + n // 2))
    depth = 8 if kind == "tf32" else 16
    return f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {{{sums}}}, {a}, {b}, {adds}, 1, 1{flags};"


def found(machine: object, n: int) -> np.ndarray:
    """The accumulator [64, n], thread by thread."""
    out = np.zeros((64, n), np.float32)
    for i in range(n // 2):
        held = values(machine, f"%r{8 + i}", "f4")  # type: ignore[arg-type]
        for t in range(128):
            row = 16 * (t // 32) + t % 32 // 4 + (8 if i % 4 >= 2 else 0)
            out[row, 8 * (i // 4) + 2 * (t % 4) + i % 2] = held[t]
    return out


def tiles(dtype: torch.dtype, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """A [64, per_row], B [8, per_row], and both as they lie in shared memory."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, per_row, generator=g).to(dtype) for n in (64, 8))
    memory = torch.cat([swizzled(a), swizzled(b), torch.zeros(1024, dtype=torch.uint8)])
    return a, b, memory


@pytest.mark.parametrize("piece", [0, 1, 3])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("tf32", torch.float32)]
)
def test_products_along_rows_of_memory(piece: int, kind: str, dtype: torch.dtype) -> None:
    """Each piece of 32 bytes of a swizzled row, added to what was there."""
    depth = 8 if kind == "tf32" else 16
    a, b, memory = tiles(dtype, 128 // dtype.itemsize)
    flags = "" if kind == "tf32" else ", 0, 0"
    body = multiply(
        8, str(descriptor(32 * piece)), descriptor(B_AT + 32 * piece), adds="1", flags=flags, kind=kind
    )
    before = {f"%r{i}": np.full(128, 0.5, np.float32) for i in range(8, 12)}
    machine = execute(FILL + MEET + body + DONE, memory, n_threads=128, shared=SHARED, given=before)
    if kind == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    part = slice(depth * piece, depth * (piece + 1))
    expected = (a[:, part].double() @ b[:, part].double().T + 0.5).float()
    assert np.array_equal(found(machine, 8), expected.numpy())


def test_columns_next_to_each_other_and_a_first_operand_in_registers() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(64, 16, generator=g).bfloat16(), torch.randn(16, 64, generator=g).bfloat16()
    memory = torch.cat([swizzled(b), torch.zeros(8192, dtype=torch.uint8)])
    given = {}
    for i in range(4):
        t = torch.arange(128)
        row, column = 16 * (t // 32) + t % 32 // 4 + 8 * (i % 2), t % 4 * 2 + 8 * (i // 2)
        pair = torch.stack([a[row, column], a[row, column + 1]], 1).contiguous()
        given[f"%r{i + 4}"] = pair.view(torch.int32).flatten().numpy()
    body = multiply(64, "{%r4, %r5, %r6, %r7}", descriptor(0), flags=", 1")
    # The loads use the same registers: what they hold is put back through copies.
    keep = "".join(f"mov.b64 %rd{5 + i}, {{%r{4 + 2 * i}, %r{5 + 2 * i}}};" for i in range(2))
    back = "".join(f"mov.b64 {{%r{4 + 2 * i}, %r{5 + 2 * i}}}, %rd{5 + i};" for i in range(2))
    machine = execute(
        keep + FILL + back + MEET + body + DONE, memory, n_threads=128, shared=SHARED, given=given
    )
    assert np.array_equal(found(machine, 64), (a.double() @ b.double()).float().numpy())


GOOD = multiply(8, str(descriptor(0)), descriptor(B_AT))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (MEET.replace("fence.proxy.async.shared::cta;", "") + GOOD, MissingFence),
        (MEET.replace("bar.sync 0;", "") + GOOD, Race),
        (MEET.replace("wgmma.fence.sync.aligned;", "add.s32 %r8, %r1, 0;") + GOOD, MissingFence),
        (MEET + GOOD + "wgmma.commit_group.sync.aligned; mov.b32 %r1, %r8;", EarlyAccess),
        (
            MEET
            + GOOD
            + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; mov.b32 %r1, %r8;",
            EarlyAccess,
        ),
        (MEET + GOOD + "st.shared.b32 [%r1], %r2;", EarlyAccess),
        (MEET + GOOD + DONE + "st.shared.b32 [%r1], %r2;", Race),
        (MEET + multiply(8, "12", descriptor(B_AT)), UnknownInstruction),
        (MEET + GOOD.replace("1, 1, 0", "-1, 1, 0"), UnknownInstruction),
    ],
    ids=[
        "proxy",
        "barrier",
        "fence",
        "read",
        "one under way",
        "write",
        "write by others",
        "no swizzle",
        "negated",
    ],
)
def test_what_asynchronous_products_need(body: str, fault: type[Exception]) -> None:
    memory = tiles(torch.bfloat16, 64)[2]
    with pytest.raises(fault):
        execute(FILL + body, memory, n_threads=128, shared=SHARED)
