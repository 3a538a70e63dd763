"""PTX text → instructions."""

from __future__ import annotations

import pytest

from tests.gpu.ptx.hand_written import text
from tests.gpu.ptx.parser import parse, split, vector


def test_statements_labels_guards_and_scopes() -> None:
    program = parse(
        text(
            """
    .loc 1 2 3 // a comment; with a semicolon
$L__BB0_1:
    { .reg .b32 %q<2>; mov.u32 %q1, %r1; }
    @!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 8 ];
    cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10, %r4;
    @%p2 bra $L__BB0_1;
""",
            n_threads=64,
        )
    )
    assert (program.name, program.n_threads, program.parameters) == ("f", 64, ("u64", "u64"))
    assert program.labels == {"$L__BB0_1": 0}
    assert program.widths["%q1"] == 32
    assert (program.widths["%p8"], program.widths["%rs0"], program.widths["%rd19"]) == (1, 16, 64)
    move, load, copy, branch, end = program.instructions
    assert (move.opcode, move.targets) == ("mov.u32", {"%q1"})
    assert (load.guard, load.negated, load.operands) == ("%p1", True, ("{ %r1, %r2 }", "[ %rd1 + 8 ]"))
    assert load.targets == {"%r1", "%r2"}
    assert load.registers == {"%p1", "%r1", "%r2", "%rd1"}
    assert (copy.targets, copy.operands[2:]) == (frozenset(), ("0x10", "%r4"))
    assert (branch.guard, branch.negated, branch.operands) == ("%p2", False, ("$L__BB0_1",))
    assert end.opcode == "ret"


def test_operands_split_outside_of_braces() -> None:
    assert split("{%r1, %r2}, [%r3+4], 0x10") == ["{%r1, %r2}", "[%r3+4]", "0x10"]
    assert split("") == []
    assert vector("{%r1, %r2}") == ["%r1", "%r2"]
    assert vector("%r1") == ["%r1"]


@pytest.mark.parametrize(
    "ptx",
    [
        "",
        text("") + text(""),
        ".func g() { ret; }\n" + text(""),
        text("").replace(".reqntid 32", ""),
        text("12 %r1;"),
    ],
    ids=["empty", "two kernels", "function", "no threads", "number"],
)
def test_what_is_no_kernel_is_refused(ptx: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse(ptx)
