"""Asynchronous products under way: what they read, and the registers that are theirs until they are waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .faults import EarlyAccess, MissingFence
from .memory import Lanes
from .parser import Instruction
from .shared import SharedMemory

Programs = NDArray[np.bool_]


@dataclass
class _Product:
    rows: dict[int, Lanes]
    registers: frozenset[str]
    groups: NDArray[np.int64]


class Products:
    """Those of the programs that run together.

    Args:
        shared: what they read.
        n_programs: that run together.
    """

    def __init__(self, shared: SharedMemory, n_programs: int) -> None:
        self._shared = shared
        self._group = np.zeros(n_programs, np.int64)
        self._under_way: list[_Product] = []
        # Registers written by other instructions since the last fence.
        self._changed: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether any product is under way."""
        return bool(self._under_way)

    def changed(self, instruction: Instruction) -> None:
        """Notes the registers an instruction writes; a constant, or a copy of what was ready, is ready.

        LLVM puts such moves between fence and product, and Triton relies on the assembler to place them.
        """
        if instruction.opcode == "mov.b32" and not self._changed & (
            instruction.registers - instruction.targets
        ):
            self._changed -= instruction.targets
            return
        if not instruction.opcode.startswith("wgmma"):
            self._changed |= instruction.targets

    def fence(self) -> None:
        """Registers written before may be given to products."""
        self._changed.clear()

    def ready(self, registers: frozenset[str]) -> None:
        """Raises if a product is given registers that were written with no fence since."""
        if changed := sorted(registers & self._changed):
            raise MissingFence(f"{changed[0]} was written with no wgmma.fence since")

    def start(self, rows: dict[int, Lanes], registers: frozenset[str], programs: Programs) -> None:
        """A product begins; rows are, by program, what `SharedMemory.begin_reading` gave."""
        groups = np.where(programs, self._group, np.iinfo(np.int64).min)
        self._under_way.append(_Product(rows, registers, groups))

    def commit(self, programs: Programs) -> None:
        """What these programs started since the last commit is a group."""
        self._group[programs] += 1

    def wait(self, programs: Programs, n_left: int) -> None:
        """All but the last `n_left` groups are done."""
        for product in self._under_way:
            done = programs & (product.groups < self._group - n_left)
            for program in np.flatnonzero(done):
                if int(program) in product.rows:
                    self._shared.end_reading(product.rows.pop(int(program)))
        self._under_way = [product for product in self._under_way if product.rows]

    def check(self, instruction: Instruction, programs: Lanes) -> None:
        """Raises if an ordinary instruction touches a register of a product that is under way."""
        for product in self._under_way:
            taken = product.registers & instruction.registers
            if taken and any(int(program) in product.rows for program in np.unique(programs)):
                raise EarlyAccess(f"{min(taken)} belongs to an asynchronous product not waited for")
