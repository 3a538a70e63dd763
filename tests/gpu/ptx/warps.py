"""What threads do together: barriers, exchanges within a warp, and the tensor cores of sm_80."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conversions import from_bf16, truncated_tf32
from .faults import Diverged, UnknownInstruction
from .machine import Active, Machine, Run, executes, source, target
from .parser import Program, vector
from .transfers import address


@executes(r"bar(?:rier)?\.(?:cta\.)?sync(?:\.aligned)?")
def _barrier(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    if operands not in (("0",), ("0", str(program.n_threads))):
        raise UnknownInstruction(f"{match[0]} {', '.join(operands)}: a barrier of part of the program")
    return lambda machine, active: machine.shared.barrier(machine.programs(active))


@executes(r"bar\.warp\.sync")
def _warp_barrier(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    if operands[0] not in ("-1", "0xffffffff"):
        raise UnknownInstruction(f"{match[0]} of part of the warp")

    def run(machine: Machine, active: Active) -> None:
        machine.whole(active, 32, "warp")
        machine.shared.warp_barrier(active.lanes)

    return run


@executes(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return lambda machine, active: machine.shared.fence(machine.programs(active))


@executes(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def _shuffle(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    out, _, found = operands[0].partition("|")
    write = target(out, "b32", program)
    write_found = target(found, "pred", program) if found else None
    value, distance, limits = (
        source(text, kind, program) for text, kind in zip(operands[1:4], ("b32", "u32", "u32"), strict=True)
    )
    if operands[4] not in ("-1", "0xffffffff"):
        raise UnknownInstruction(f"{match[0]} of part of the warp")

    def run(machine: Machine, active: Active) -> None:
        lane = np.arange(machine.n_lanes) % 32
        by, limit = (
            np.broadcast_to(each(machine), machine.n_lanes).astype(np.int64) for each in (distance, limits)
        )
        segment, clamp = limit >> 8 & 31, limit & 31
        lowest = lane & segment
        highest = lowest | (clamp & ~segment)
        by &= 31
        start = {"bfly": lane ^ by, "idx": lowest | (by & ~segment), "up": lane - by, "down": lane + by}[
            match[1]
        ]
        inside = start >= highest if match[1] == "up" else start <= highest
        start = np.where(inside, start, lane) + np.arange(machine.n_lanes) // 32 * 32
        if not active.everyone and not active.mask[start[active.lanes]].all():
            raise Diverged("takes the value of a thread that is not there", int(active.lanes[0]))
        write(machine, np.broadcast_to(value(machine), machine.n_lanes)[start], active)
        if write_found is not None:
            write_found(machine, inside, active)

    return run


_TOGETHER = {"add": np.add, "min": np.minimum, "max": np.maximum}
_TOGETHER |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@executes(r"redux\.sync\.(add|min|max|and|or|xor)\.([sub]32)")
def _reduce(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind = match[2]
    value, members = source(operands[1], kind, program), source(operands[2], "u32", program)
    write = target(operands[0], kind, program)

    def run(machine: Machine, active: Active) -> None:
        machine.whole(active, 32, "warp")
        if (np.broadcast_to(members(machine), machine.n_lanes)[active.lanes] != 0xFFFFFFFF).any():
            raise UnknownInstruction(f"{match[0]} of part of the warp")
        warps = np.broadcast_to(value(machine), machine.n_lanes).reshape(-1, 32)
        write(machine, np.repeat(_TOGETHER[match[1]].reduce(warps, 1), 32), active)

    return run


@executes(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _matrices(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    """8×8 matrices of 16-bit elements: threads 8j to 8j+7 give row addresses of matrix j, thread t holds row t/4,
    columns 2(t%4) and the next; transposed, rows and columns change places."""
    load, n, transposed = match[1] == "ld", int(match[2]), bool(match[3])
    registers = vector(operands[0 if load else 1])
    where = address(operands[1 if load else 0], program)
    reads = [] if load else [source(text, "b32", program) for text in registers]
    writes = [target(text, "b32", program) for text in registers] if load else []

    def run(machine: Machine, active: Active) -> None:
        warps = np.flatnonzero(machine.whole(active, 32, "warp"))
        # [warps, n, 8], the threads whose addresses count.
        lanes = (warps[:, None] * 32 + np.arange(8 * n)).reshape(-1)
        at = where(machine, lanes)
        if load:
            rows = machine.shared.load(at, 16, lanes, whole_warp=True)
            matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(len(warps), n, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 1, 3, 2)
            held = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), n, 32)
            for i, write in enumerate(writes):
                full = np.zeros((machine.n_lanes // 32, 32), np.uint32)
                full[warps] = held[:, i]
                write(machine, full.reshape(-1), active)
            return
        held = np.stack(
            [np.broadcast_to(read(machine), machine.n_lanes).reshape(-1, 32)[warps] for read in reads], 1
        )
        matrices = np.ascontiguousarray(held).view(np.uint16).reshape(len(warps), n, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(len(lanes), 16)
        machine.shared.store(at, rows, lanes, whole_warp=True)

    return run


def numbers(bits: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """What the tensor cores take of operands of a type: the bits of bf16 and f16 elements, whole registers for TF32."""
    if kind == "tf32":
        return truncated_tf32(bits)
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def unpacked(registers: NDArray[np.uint32], kind: str) -> NDArray[np.float32]:
    """Registers [...] → the numbers in each [..., 2], or [..., 1] in TF32."""
    if kind == "tf32":
        return numbers(registers, kind)[..., None]
    halves = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
    return numbers(halves, kind)


# The columns of K by type and instruction: (shape, type).
_SHAPES = {("m16n8k16", "bf16"), ("m16n8k8", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "f16")}
_SHAPES |= {("m16n8k8", "tf32"), ("m16n8k4", "tf32")}


@executes(r"mma\.sync\.aligned\.(m16n8k(4|8|16))\.row\.col\.f32\.(bf16|f16|tf32)\.\3\.f32")
def _multiply(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    """[16, K] @ [K, 8] + [16, 8] a warp. Products are exact, summed in float64 and rounded once to float32: the
    hardware's order of summation is not documented.

    With g = t/4 and c = t%4, thread t holds row g (+ 8 in every second register) of the first operand, column g of the
    second, and of each its elements p·c, … along K, where p are in a register; further registers are 4p on.
    """
    kind, depth = match[3], int(match[2])
    if (match[1], kind) not in _SHAPES:
        raise UnknownInstruction(match[0])
    texts = [vector(operand) for operand in operands]
    left, right = ([source(text, "b32", program) for text in texts[i]] for i in (1, 2))
    added = [source(text, "f32", program) for text in texts[3]]
    writes = [target(text, "f32", program) for text in texts[0]]
    per = 1 if kind == "tf32" else 2
    lane = np.arange(32)
    g, c = lane // 4, lane % 4

    def run(machine: Machine, active: Active) -> None:
        machine.whole(active, 32, "warp")
        n_warps = machine.n_lanes // 32

        def held(reads: list[Any]) -> NDArray[Any]:
            """[n_warps, 32, n] of registers."""
            columns = [np.broadcast_to(read(machine), machine.n_lanes) for read in reads]
            return np.stack(columns, 1).reshape(n_warps, 32, -1)

        a, b = unpacked(held(left), kind), unpacked(held(right), kind)
        # In float64 from the start: no conversion afterwards.
        rows, columns = np.zeros((n_warps, 16, depth)), np.zeros((n_warps, depth, 8))
        for j in range(per):
            for i in range(len(left)):
                rows[:, g + 8 * (i % 2), per * c + j + 4 * per * (i // 2)] = a[:, :, i, j]
            for i in range(len(right)):
                columns[:, per * c + j + 4 * per * i, g] = b[:, :, i, j]
        # [16, K] @ [K, 8] -> [16, 8]
        product = rows @ columns
        given = held(added)
        for i, write in enumerate(writes):
            part = product[:, g + 8 * (i // 2), 2 * c + i % 2] + given[:, :, i]
            write(machine, part.astype(np.float32).reshape(-1), active)

    return run
