"""The tensor cores of sm_90: products of a warpgroup (four warps), read from shared memory, asynchronous."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import UnknownInstruction, first
from .machine import Active, Machine, Run, executes, source, target
from .memory import Lanes
from .parser import Program, vector
from .warps import numbers, unpacked

# Bytes of a row by the swizzle field of a descriptor, and how many bits of the row's number are mixed in.
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


def element_addresses(
    descriptor: NDArray[np.uint64], extent: int, depth: int, size: int, along_rows: bool
) -> Lanes:
    """Shared addresses [n, extent, depth] of a tile's elements (PTX ISA, asynchronous warpgroup level matrix layouts).

    Args:
        descriptor: [n]; start, leading and stride offset in units of 16 bytes, swizzle in the top two bits.
        extent: rows of the first operand, columns of the second.
        depth: elements along K.
        size: bytes of an element.
        along_rows: whether neighbours in memory are neighbours along `extent`, not along K.
    """
    fields = descriptor.astype(np.uint64)
    start, leading, stride = (
        (((fields >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.int64) << 4)[:, None, None]
        for shift in (0, 16, 32)
    )
    swizzles = np.unique(fields >> np.uint64(62))
    if (
        len(swizzles) != 1
        or int(swizzles[0]) not in _SWIZZLES
        or ((fields >> np.uint64(49)) & np.uint64(7)).any()
    ):
        raise UnknownInstruction("a shared memory descriptor without swizzle, or with a base offset")
    pitch, mixed = _SWIZZLES[int(swizzles[0])]
    r, k = np.arange(extent)[None, :, None], np.arange(depth)[None, None, :]
    if along_rows:
        per_row = pitch // size
        at = start + r // per_row * leading + k // 8 * stride + k % 8 * pitch + r % per_row * size
    else:
        at = start + r // 8 * stride + r % 8 * pitch + k * size
    return at ^ (((at >> 7) & mixed) << 4)


def _is_one(text: str) -> bool:
    if text not in ("0", "1"):
        raise UnknownInstruction(f"not 0 or 1: {text}")
    return text == "1"


@executes(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.\3")
def _multiply(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    """[64, K] @ [K, N] a warpgroup, added to the accumulator where scale-d says so.

    Of the accumulator and of a first operand in registers, thread t of warp w holds row 16w + t/4 (+ 8 in every second
    pair), and columns 2(t%4) and the next, 8 columns on in every fourth.
    """
    n, depth, kind = int(match[1]), int(match[2]), match[3]
    size = 4 if kind == "tf32" else 2
    if depth * size != 32 or n % 8 or not 8 <= n <= 256:
        raise UnknownInstruction(match[0])
    accumulator = vector(operands[0])
    in_registers = operands[1].startswith("{")
    adds = source(operands[3], "pred", program)
    flags = operands[6:]
    if (
        operands[4:6] != ("1", "1")
        or len(accumulator) != n // 2
        or len(flags) != (0 if size == 4 else 2 - in_registers)
    ):
        raise UnknownInstruction(
            f"{match[0]} with {', '.join(operands[3:])} and {len(accumulator)} accumulators"
        )
    left_flag, right_flag = (_is_one(text) for text in (["0", "0", *flags])[-2:])
    if in_registers:
        left_flag = False
    left = [source(text, "b32", program) for text in vector(operands[1])] if in_registers else []
    left_at = None if in_registers else source(operands[1], "u64", program)
    right_at = source(operands[2], "u64", program)
    writes = [target(text, "f32", program) for text in accumulator]
    sums = [source(text, "f32", program) for text in accumulator]
    held = frozenset(accumulator) | (frozenset(vector(operands[1])) if in_registers else frozenset())
    thread = np.arange(128)
    row, column = 16 * (thread // 32) + thread % 32 // 4, thread % 4 * 2
    per = 1 if kind == "tf32" else 2

    def tile(
        machine: Machine, groups: Lanes, values: Any, extent: int, along_rows: bool
    ) -> tuple[NDArray[np.float32], Lanes, Lanes]:
        """(numbers [groups, extent, depth], the 16-byte pieces they lie in, each piece's first lane)."""
        descriptors = np.broadcast_to(values, machine.n_lanes).reshape(-1, 128)[groups]
        differ = (descriptors != descriptors[:, :1]).any(1)
        if differ.any():
            raise UnknownInstruction("descriptors differ within a warpgroup", first(differ, groups * 128))
        at = element_addresses(descriptors[:, 0], extent, depth, size, along_rows)
        owner = np.broadcast_to((groups * 128)[:, None, None], at.shape)
        step = 16 // size
        pieces, owners = (
            (at[:, ::step], owner[:, ::step]) if along_rows else (at[..., ::step], owner[..., ::step])
        )
        bits = machine.shared.elements(at, machine.program_of[owner], size)
        return numbers(bits, kind), (pieces & ~15).reshape(-1), owners.reshape(-1)

    def run(machine: Machine, active: Active) -> None:
        groups = np.flatnonzero(machine.whole(active, 128, "warpgroup"))
        machine.products.ready(held)
        b, pieces, owners = tile(machine, groups, right_at(machine), n, right_flag)
        if left_at is not None:
            a, more, more_owners = tile(machine, groups, left_at(machine), 64, left_flag)
            pieces, owners = np.concatenate([pieces, more]), np.concatenate([owners, more_owners])
        else:
            registers = np.stack([np.broadcast_to(read(machine), machine.n_lanes) for read in left], 1)
            taken = unpacked(registers.reshape(-1, 128, len(left))[groups], kind)
            a = np.zeros((len(groups), 64, depth), np.float32)
            for i in range(len(left)):
                for j in range(per):
                    a[:, row + 8 * (i % 2), per * (thread % 4) + j + 4 * per * (i // 2)] = taken[:, :, i, j]
        # [64, K] @ [K, N] -> [64, N]
        product = a.astype(np.float64) @ b.astype(np.float64).transpose(0, 2, 1)
        keeps = np.broadcast_to(adds(machine), machine.n_lanes).reshape(-1, 128)[groups]
        for i, (read, write) in enumerate(zip(sums, writes, strict=True)):
            value = product[:, row + 8 * (i // 2 % 2), column + i % 2 + 8 * (i // 4)]
            before = read(machine).reshape(-1, 128)
            full = before.copy()
            full[groups] = np.where(keeps, before[groups].astype(np.float64), 0) + value
            write(machine, full.reshape(-1), active)
        rows = {}
        of = machine.program_of[owners]
        for program_index in np.unique(of):
            mine = of == program_index
            rows[int(program_index)] = machine.shared.begin_reading(pieces[mine], owners[mine])
        chosen = np.zeros(machine.n_programs, np.bool_)
        chosen[list(rows)] = True
        machine.products.start(rows, held, chosen)

    return run


@executes(r"wgmma\.fence\.sync\.aligned")
def _fence(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return lambda machine, active: machine.products.fence()


@executes(r"wgmma\.commit_group\.sync\.aligned")
def _commit(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return lambda machine, active: machine.products.commit(machine.programs(active))


@executes(r"wgmma\.wait_group\.sync\.aligned")
def _wait(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    n_left = int(operands[0], 0)
    return lambda machine, active: machine.products.wait(machine.programs(active), n_left)
