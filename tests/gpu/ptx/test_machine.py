"""Order of execution: loops and branches that threads take apart; registers and operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.ptx.faults import OutOfBounds, UnknownInstruction
from tests.gpu.ptx.hand_written import execute, values


def test_threads_leave_a_loop_one_by_one_and_meet_again() -> None:
    machine = execute(
        """mov.u32 %r1, %tid.x; mov.b32 %r2, 0;
$LOOP:
        add.s32 %r2, %r2, %r1; sub.s32 %r1, %r1, 1; setp.gt.s32 %p1, %r1, 0; @%p1 bra $LOOP;
        setp.lt.s32 %p2, %r2, 100; @%p2 bra $LOW;
        mov.b32 %r3, 1; bra.uni $END;
$LOW:
        mov.b32 %r3, 2;
$END:
        bar.sync 0;"""
    )
    sums = [n * (n + 1) // 2 for n in range(32)]
    assert values(machine, "%r2", "i4").tolist() == sums
    assert values(machine, "%r3", "i4").tolist() == [2 if total < 100 else 1 for total in sums]


def test_threads_that_have_ended_are_not_waited_for() -> None:
    body = (
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; mov.b32 %r2, 0; @%p1 ret; bar.sync 0; mov.b32 %r2, 1;"
    )
    assert values(execute(body), "%r2", "i4").tolist() == [0] * 16 + [1] * 16


def test_programs_know_their_places() -> None:
    machine = execute("mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %tid.x;", n_programs=3)
    assert values(machine, "%r1", "i4").tolist() == np.repeat(range(3), 32).tolist()
    assert set(values(machine, "%r2", "i4").tolist()) == {3}
    assert values(machine, "%r3", "i4").tolist() == list(range(32)) * 3


def test_registers_start_as_nan() -> None:
    assert np.isnan(values(execute("mov.b32 %r1, %r1;"), "%r1", "f4")).all()


def test_a_fault_names_program_thread_and_instruction() -> None:
    body = "ld.param.b64 %rd1, [f_param_0]; mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;"
    body += "ld.global.b32 %r2, [%rd2];"
    with pytest.raises(
        OutOfBounds, match=r"program \(2, 0, 0\), thread 0 reads 4 bytes at byte 8 of 0 .*: ld\.global"
    ):
        execute(body, torch.zeros(2), n_programs=3)


@pytest.mark.parametrize(
    "body",
    [
        "dp4a.u32.u32 %r1, %r2, %r3, %r4;",
        "add.sat.s32 %r1, %r2, %r3;",
        "add.rz.f32 %r1, %r2, %r3;",
        "ld.global.acquire.b32 %r1, [%rd1];",
        "atom.global.add.f32 %r1, [%rd1], %r2;",
        "add.s32 %r1, %r2, elsewhere;",
        "add.s64 %rd1, %r1, %rd2;",
        "add.s32 %r1, %r2;",
        "mov.b32 %r1, %clock;",
    ],
)
def test_what_is_not_known_raises(body: str) -> None:
    with pytest.raises(UnknownInstruction):
        execute(body, torch.zeros(2))
