"""What the emulator leaves to the assembler, read off its machine code: registers of sm_90's products and their fence.

PTX wants `wgmma.fence` behind the last write to a register that a product is given. LLVM puts copies between the two, and
the emulator lets it (`products.Products.changed`): the assembler has to move them in front. Here is seen that it did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FENCE = "WARPGROUP.ARRIVE"
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x\d+\.\S+ R(\d+), (?:R(\d+), )?gdesc")
_WRITE = re.compile(r"(\S+) (?:U?P(?:\d+|T), )*R(\d+)\b")
_NO_WRITE = re.compile(r"ST|RED|BRA|BAR|EXIT|WARP|[A-Z]+SETP")
# Registers of a target by the instruction's suffix; all others write one.
_WIDTHS = {"64": 2, "128": 4, "WIDE": 2}


def late_writes(instructions: Sequence[str]) -> list[str]:
    """Instructions that write what a product is given, between the last fence and the product, in the listing's order.

    Args:
        instructions: without their predicates, as `machine_code.instructions_and_loops` gives them.

    Raises:
        ValueError: a product that is written in another way.
    """
    late: list[str] = []
    since: dict[int, str] = {}
    for instruction in instructions:
        if instruction.startswith(FENCE):
            since.clear()
        elif instruction.startswith("HGMMA"):
            product = _PRODUCT.match(instruction)
            if product is None:
                raise ValueError(f"not a product of known form: {instruction}")
            rows, columns, first, left = (int(n) if n else None for n in product.groups())
            # 128 threads share the accumulator; a first operand of 32 bytes a row is four registers.
            given = set(range(first, first + rows * columns // 128))
            given |= set() if left is None else set(range(left, left + 4))
            late += sorted({since[register] for register in given & since.keys()})
        elif (write := _WRITE.match(instruction)) and not _NO_WRITE.match(instruction):
            width = max((n for suffix, n in _WIDTHS.items() if f".{suffix}" in write[1]), default=1)
            since |= dict.fromkeys(range(int(write[2]), int(write[2]) + width), instruction)
    return late
