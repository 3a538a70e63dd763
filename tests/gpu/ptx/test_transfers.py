"""Loads, stores and asynchronous copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.ptx.faults import EarlyAccess, OutOfBounds, Race, UnknownInstruction
from tests.gpu.ptx.hand_written import execute, values

# %rd3, %rd4: this thread's 16 bytes of either tensor; %r1: of shared memory.
HEAD = """
ld.param.b64 %rd1, [f_param_0]; ld.param.b64 %rd2, [f_param_1]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd5, %r1, 16;
add.s64 %rd3, %rd1, %rd5; add.s64 %rd4, %rd2, %rd5; shl.b32 %r1, %r1, 4;
"""


def test_vectors_predicates_and_offsets() -> None:
    x, y = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """
    setp.lt.u32 %p1, %r1, 256; mov.b32 %r4, 7; mov.b32 %r5, 7;
    @%p1 ld.global.v2.b32 { %r4, %r5 }, [ %rd3 + 8 ];
    @!%p1 st.global.b32 [ %rd4 + 4 ], { %r4 };
    @%p1 st.global.v2.b32 [ %rd4 + 0 ], { %r5, %r4 };
    """
    execute(HEAD + body, x, y)
    expected = torch.zeros(32, 4, dtype=torch.int32)
    expected[:16, :2] = x.view(32, 4)[:16, [3, 2]]
    expected[16:, 1] = 7
    assert torch.equal(y.view(32, 4), expected)


def test_small_types_fill_registers() -> None:
    x, y = torch.full((512,), 0x80, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    machine = execute(
        HEAD + "ld.global.b8 %rs1, [%rd3]; ld.global.s8 %rs2, [%rd3]; st.global.b8 [%rd4], %rs1;", x, y
    )
    assert values(machine, "%rs1", "u2")[0] == 0x80
    assert values(machine, "%rs2", "i2")[0] == -128
    assert y[::16].eq(0x80).all()
    assert not y[1::16].any()


COPY = HEAD + "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd3 + 0 ], 0x10, %r9; cp.async.commit_group; "
SIZE = np.where(np.arange(32) < 20, 16, 0).astype(np.int32)


def test_copies_land_when_waited_for_zeros_where_nothing_is_read() -> None:
    """The last threads' addresses are out of bounds, and not touched."""
    x, y = torch.arange(80, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """cp.async.wait_group 0; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];
    st.global.v4.b32 [%rd4], {%r2, %r3, %r4, %r5};"""
    execute(COPY + body, x, y, shared=512, given={"%r9": SIZE})
    assert torch.equal(y[:80], x)
    assert not y[80:].any()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.shared.b32 %r2, [%r1];", EarlyAccess),
        ("cp.async.wait_group 1; ld.shared.b32 %r2, [%r1];", EarlyAccess),
        ("cp.async.wait_group 0; xor.b32 %r2, %r1, 16; ld.shared.b32 %r2, [%r2];", Race),
        ("cp.async.cg.shared.global [%r1], [%rd3], 16, %r9;", EarlyAccess),
        ("cp.async.wait_group 0; cp.async.cg.shared.global [%r1], [%rd3], 16;", OutOfBounds),
        ("cp.async.cg.shared.global [%r1], [%rd3], 12;", UnknownInstruction),
        ("ld.global.v3.b32 {%r2, %r3, %r4}, [%rd3];", UnknownInstruction),
        ("ld.local.b32 %r2, [%rd3];", UnknownInstruction),
    ],
    ids=["at once", "one under way", "another's", "twice", "out of bounds", "12 bytes", "v3", "local"],
)
def test_wrong_copies_and_loads(body: str, fault: type[Exception]) -> None:
    x = torch.arange(80, dtype=torch.int32)
    with pytest.raises(fault):
        execute(COPY + body, x, x.clone(), shared=512, given={"%r9": SIZE})


def test_an_older_group_may_be_read() -> None:
    x, y = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """cp.async.ca.shared.global [%r1 + 512], [%rd3], 4; cp.async.commit_group; cp.async.wait_group 1;
    ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd4], %r2;"""
    execute(COPY + body, x, y, shared=1024, given={"%r9": np.full(32, 16, np.int32)})
    assert torch.equal(y[::4], x[::4])
