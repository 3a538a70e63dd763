"""Programs that run together, thread beside thread: registers, the order of execution, and the table of instructions.

Each file of instructions names, by `executes`, the opcodes it knows; whatever matches none raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .copies import Copies
from .faults import Diverged, Fault, UnknownInstruction
from .memory import GlobalMemory, Lanes
from .parser import Instruction, Program
from .products import Products
from .shared import SharedMemory

Mask = NDArray[np.bool_]
# bfloat16 has no numpy type: its bits are read as b16 and widened by `numbers`.
TYPES: dict[str, DTypeLike] = {f"{kind}{bits}": f"u{bits // 8}" for kind in "ub" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)}
TYPES |= {"f16": "f2", "f32": "f4", "f64": "f8", "pred": "?"}


SPECIAL = {"%laneid", "%warpid"} | {
    f"%{name}.{i}" for name in ("tid", "ntid", "ctaid", "nctaid") for i in "xyz"
}


class Active:
    """The threads that execute an instruction.

    Args:
        mask: by lane.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.everyone = bool(mask.all())

    @cached_property
    def lanes(self) -> Lanes:
        """Their numbers."""
        return np.flatnonzero(self.mask)


Run = Callable[["Machine", Active], None]
Decode = Callable[["re.Match[str]", tuple[str, ...], Program], Run]
_KNOWN: list[tuple[re.Pattern[str], Decode]] = []


def executes(pattern: str) -> Callable[[Decode], Decode]:
    """Registers a decoder: it is given the opcode's match, the operands and the program, once for an instruction."""

    def register(decode: Decode) -> Decode:
        _KNOWN.append((re.compile(pattern), decode))
        return decode

    return register


@dataclass(frozen=True)
class Decoded:
    """An instruction and what it does; without `run` it is a jump or a return."""

    instruction: Instruction
    run: Run | None
    jump: int | None


@lru_cache(maxsize=256)
def _decoded(key: _ByIdentity) -> tuple[Decoded, ...]:
    return tuple(_decode(instruction, key.program) for instruction in key.program.instructions)


class _ByIdentity:
    """A program as the key of a cache: the parser returns the same one for the same text."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __hash__(self) -> int:
        return id(self.program)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.program is self.program


def _decode(instruction: Instruction, program: Program) -> Decoded:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in ("bra", "bra.uni"):
        return Decoded(instruction, None, program.labels[operands[0]])
    if opcode in ("ret", "exit"):
        return Decoded(instruction, None, len(program.instructions))
    for pattern, decode in _KNOWN:
        if match := pattern.fullmatch(opcode):
            return Decoded(instruction, decode(match, operands, program), None)
    raise UnknownInstruction(f"unknown instruction: {instruction.text}")


class Machine:
    """Some programs of a launch.

    Args:
        program: what they run.
        memory: global memory.
        arguments: of the kernel, addresses and numbers, in order.
        indices: [n_programs, 3], of each program in the grid.
        grid: programs along the three axes.
        shared: bytes of shared memory of each.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        arguments: list[float],
        indices: NDArray[np.int64],
        grid: tuple[int, ...],
        shared: int,
    ) -> None:
        self.memory, self.arguments = memory, arguments
        self._program, self._indices = program, indices
        self.n_threads = program.n_threads
        self.n_programs = len(indices)
        self.n_lanes = self.n_programs * self.n_threads
        lanes = np.arange(self.n_lanes)
        # [n_lanes], the program among those that run together.
        self.program_of = lanes // self.n_threads
        # [n_lanes], the program in the whole grid.
        self.numbers = (indices[:, 0] + grid[0] * (indices[:, 1] + grid[1] * indices[:, 2]))[self.program_of]
        self.shared = SharedMemory(self.n_programs, shared, self.n_threads)
        self.copies = Copies(self.shared, self.program_of, self.n_programs)
        self.products = Products(self.shared, self.n_programs)
        self.live = np.ones(self.n_lanes, np.bool_)
        thread = lanes % self.n_threads
        self.special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32}
        for i, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = indices[self.program_of, i]
            self.special[f"%nctaid.{axis}"] = np.full(self.n_lanes, grid[i])
            self.special[f"%ntid.{axis}"] = np.full(self.n_lanes, self.n_threads if i == 0 else 1)
            self.special.setdefault(f"%tid.{axis}", np.zeros(self.n_lanes, np.int64))
        # Registers start full of ones: a NaN in every floating type, -1 in every integer.
        self.registers: dict[str, NDArray[Any]] = {}
        for width in set(program.widths.values()):
            names = [name for name, bits in program.widths.items() if bits == width]
            shape = (len(names), self.n_lanes)
            pool: NDArray[Any] = (
                np.ones(shape, np.bool_) if width == 1 else np.full(shape, (1 << width) - 1, f"u{width // 8}")
            )
            self.registers |= zip(names, pool, strict=True)

    def run(self) -> None:
        """Executes to the end, the threads that are furthest behind first."""
        code = _decoded(_ByIdentity(self._program))
        end = len(code)
        waiting = {0: self.live.copy()}
        while waiting:
            position = min(waiting)
            mask = waiting.pop(position)
            active = Active(mask)
            while position < end and position not in waiting:
                decoded = code[position]
                chosen = self._guarded(decoded.instruction, active)
                if chosen is None:
                    position += 1
                    continue
                if decoded.run is not None:
                    self._execute(decoded, chosen)
                    position += 1
                    continue
                assert decoded.jump is not None
                stay = mask & ~chosen.mask
                if decoded.jump < end:
                    _join(waiting, decoded.jump, chosen.mask)
                else:
                    self.live &= ~chosen.mask
                if stay.any():
                    _join(waiting, position + 1, stay)
                break
            else:
                if position < end:
                    _join(waiting, position, mask)

    def whole(self, active: Active, size: int, what: str) -> Mask:
        """Which groups of `size` neighbouring lanes execute, [n_lanes / size].

        Raises:
            Diverged: a group executes in part, the ended threads aside.
        """
        groups = active.mask.reshape(-1, size)
        some = groups.any(1)
        if not active.everyone and (some[:, None] & ~groups & self.live.reshape(-1, size)).any():
            raise Diverged(f"not all threads of a {what} reach it together", int(active.lanes[0]))
        return some

    def programs(self, active: Active) -> Mask:
        """Which programs execute, all their threads together."""
        return self.whole(active, self.n_threads, "program")

    def _guarded(self, instruction: Instruction, active: Active) -> Active | None:
        if not instruction.guard:
            return active
        guard = self.registers[instruction.guard]
        chosen = active.mask & (~guard if instruction.negated else guard)
        return Active(chosen) if chosen.any() else None

    def _execute(self, decoded: Decoded, active: Active) -> None:
        instruction = decoded.instruction
        assert decoded.run is not None
        try:
            if self.products.busy and not instruction.opcode.startswith("wgmma"):
                self.products.check(instruction, self.program_of[active.lanes])
            self.products.changed(instruction)
            decoded.run(self, active)
        except Fault as fault:
            who = ""
            if fault.lane is not None:
                index = tuple(int(i) for i in self._indices[fault.lane // self.n_threads])
                who = f"program {index}, thread {fault.lane % self.n_threads} "
            raise type(fault)(f"{who}{fault}: {instruction.text}") from None


def _join(waiting: dict[int, Mask], position: int, mask: Mask) -> None:
    waiting[position] = waiting[position] | mask if position in waiting else mask


def source(text: str, kind: str, program: Program) -> Callable[[Machine], Any]:
    """How an operand is read, as [n_lanes] or one value of a type of `TYPES`; wider registers give their low bits."""
    dtype = np.dtype(TYPES[kind])
    if text in program.widths:
        width = program.widths[text]
        if width == max(8 * dtype.itemsize, 8) or (width == 1 and kind == "pred"):
            return lambda machine: machine.registers[text].view(dtype)
        if width < 8 * dtype.itemsize or kind == "pred" or width == 1:
            raise UnknownInstruction(f"{text} has {width} bits, read as {kind}")
        return lambda machine: machine.registers[text].astype(f"u{dtype.itemsize}").view(dtype)
    if text.startswith("%"):
        if text not in SPECIAL:
            raise UnknownInstruction(f"not a register: {text}")
        return lambda machine: machine.special[text].astype(dtype)
    value = _literal(text, kind)
    return lambda machine: value


def _literal(text: str, kind: str) -> Any:
    dtype = np.dtype(TYPES[kind])
    if kind == "pred":
        return np.bool_(int(text, 0) != 0)
    if text == "global_smem":
        return dtype.type(0)
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        number = int(match[1], 16)
    elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        number = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    else:
        raise UnknownInstruction(f"not an operand: {text}")
    return np.array(number, f"u{dtype.itemsize}").view(dtype)[()]


def target(text: str, kind: str, program: Program) -> Callable[[Machine, Any, Active], None]:
    """How a value of a type of `TYPES` is written; a wider register is filled by sign or by zeros."""
    if text == "_":
        return lambda machine, value, active: None
    if text not in program.widths:
        raise UnknownInstruction(f"not a register: {text}")
    dtype = np.dtype(TYPES[kind])
    width = program.widths[text]
    if (
        (width == 1) != (kind == "pred")
        or width not in (1, 8, 16, 32, 64)
        or 8 * dtype.itemsize > max(width, 8)
    ):
        raise UnknownInstruction(f"{text} has {width} bits, written as {kind}")
    unsigned = np.dtype("?" if width == 1 else f"u{width // 8}")
    same = dtype.itemsize == unsigned.itemsize

    def write(machine: Machine, value: Any, active: Active) -> None:
        value = np.asarray(value, dtype)
        if same:
            value = value.view(unsigned)
        elif dtype.kind == "i":
            value = value.astype(f"i{width // 8}").view(unsigned)
        else:
            value = value.view(f"u{dtype.itemsize}").astype(unsigned)
        if active.everyone:
            machine.registers[text][...] = value
        else:
            np.copyto(machine.registers[text], value, where=active.mask)

    return write


def elementwise(function: Callable[..., Any], out: str, kinds: list[str]) -> Decode:
    """A decoder of an instruction that is a function of each thread's own operands, of these types."""

    def decode(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
        if len(operands) != len(kinds) + 1:
            raise UnknownInstruction(f"{match[0]} with {len(operands)} operands")
        reads = [source(text, kind, program) for text, kind in zip(operands[1:], kinds, strict=True)]
        write = target(operands[0], out, program)
        return lambda machine, active: write(machine, function(*(read(machine) for read in reads)), active)

    return decode
