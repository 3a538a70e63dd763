"""A compiled kernel's text, assembly (PTX) or machine code: its instructions, its loops, what its products compute."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

Instructions = Sequence[str]


class Grammar(NamedTuple):
    """How a label, an instruction behind its predicate and a branch's label are written."""

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    branch: re.Pattern[str]


# Of `nvdisasm`'s listing.
MACHINE_CODE = Grammar(
    re.compile(r"(\.L_x_\d+):"),
    re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?(.*?)\s*;"),
    re.compile(r"BRA\b.*`\((\.L_x_\d+)\)"),
)
PTX = Grammar(
    re.compile(r"(\$L__BB\w+):"),
    re.compile(r"\s+(?:@!?%p\d+\s+)?([a-z].*?)\s*;"),
    re.compile(r"bra(?:\.uni)?\s+(\$L__BB\w+)"),
)
# Everything that copies global memory to shared memory without holding it in registers.
ASYNCHRONOUS = r"LDGSTS|UTMALDG|UBLKCP"
PTX_MATRIX = r"mma\.|wgmma\.|tcgen05\.mma"


def instructions_and_loops(
    text: str, grammar: Grammar = MACHINE_CODE
) -> tuple[Instructions, list[Instructions]]:
    """A kernel's instructions without their predicates, and those of each loop: from a label to a branch back."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[Instructions] = []
    for line in text.splitlines():
        if label := grammar.label.match(line):
            labels[label[1]] = len(instructions)
        elif found := grammar.instruction.match(line):
            instructions.append(found[1])
            branch = grammar.branch.match(instructions[-1])
            # One that only branches to itself stands behind the kernel's end.
            if branch and labels.get(branch[1], len(instructions)) < len(instructions) - 1:
                loops.append(instructions[labels[branch[1]] :])
    return instructions, loops


def main_loop(loops: Sequence[Instructions], matrix: str) -> Instructions:
    """The shortest loop with instructions of the pattern `matrix`; without any the longest that holds no other."""
    with_products = [loop for loop in loops if count(loop, matrix)]
    if with_products:
        return min(with_products, key=len)
    innermost = [loop for loop in loops if not any(_holds(loop, other) for other in loops)]
    return max(innermost, key=len, default=())


def _holds(loop: Instructions, other: Instructions) -> bool:
    """Whether `other` is a part of `loop`: instructions are compared as objects, for two loops may read alike."""
    return len(other) < len(loop) and any(first is other[0] for first in loop)


def count(instructions: Instructions, pattern: str) -> int:
    """How many instructions begin with the pattern."""
    return sum(bool(re.match(pattern, instruction)) for instruction in instructions)


def divides(ptx: str) -> bool:
    """Whether the main loop divides whole numbers by one that the compiler does not know.

    In machine code a division is many instructions, some of them moved out of the loop; PTX still names it.
    """
    loop = main_loop(instructions_and_loops(ptx, PTX)[1], PTX_MATRIX)
    return count(loop, r"(div|rem)\.[su]\d+") > 0


def matrix_flop(instructions: Instructions, num_warps: int, descriptors: Sequence[int] = ()) -> int:
    """Operations, two a multiply-add, of a program's pass through matrix instructions.

    ``HMMA.16816`` is 16×8×16 a warp, ``HGMMA.64x128x16`` that much for four warps together. The fifth
    generation's ``UTCHMMA`` computes for the whole program and keeps its shape in a descriptor.

    Args:
        instructions: such as a loop's.
        num_warps: of the program.
        descriptors: of the instructions in the fifth generation (`instruction_descriptors`), all of one size.
    """
    total = 0
    for instruction in instructions:
        if found := re.match(r"HMMA\.16(8)(\d+)\.", instruction):
            total += 2 * 16 * int(found[1]) * int(found[2]) * num_warps
        elif found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", instruction):
            total += 2 * math.prod(map(int, found.groups())) * num_warps // 4
        elif re.match(r"UTC\w*MMA", instruction) and descriptors:
            total += max(map(_descriptor_flop, descriptors))
    return total


def instruction_descriptors(ptx: str) -> tuple[int, ...]:
    """Those of the fifth generation's matrix instructions, as constants in the assembly."""
    names = set(re.findall(r"tcgen05\.mma\.\S+\s+\[[^\]]*\], %\w+, %\w+, (%\w+),", ptx))
    constants = dict(re.findall(r"mov\.b32\s+(%\w+), (\d+);", ptx))
    return tuple(sorted({int(constants[name]) for name in names if name in constants}))


def _descriptor_flop(descriptor: int) -> int:
    """Bits 17–22 are N/8, bits 24–28 are M/16, bits 7–9 the type of A, of which 2 is TF32; K is 32 bytes (PTX)."""
    n, m = (descriptor >> 17 & 0x3F) * 8, (descriptor >> 24 & 0x1F) * 16
    return 2 * m * n * (8 if descriptor >> 7 & 0x7 == 2 else 16)
