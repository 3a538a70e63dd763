"""Loads, stores and asynchronous copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import UnknownInstruction
from .machine import TYPES, Active, Machine, Run, executes, source, target
from .memory import Bytes, Lanes
from .parser import Program, vector

_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")


def address(text: str, program: Program) -> Callable[[Machine, Lanes], Lanes]:
    """How an address ``[ %rd1 + 16 ]`` is computed for some lanes."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UnknownInstruction(f"not an address: {text}")
    offset = int(match[2] or 0)
    read = source(match[1], "u64" if program.widths.get(match[1]) == 64 else "u32", program)
    # [n] of int64: what lies below zero is found to be out of bounds.
    return lambda machine, lanes: (
        np.broadcast_to(read(machine), machine.n_lanes)[lanes].astype(np.int64) + offset
    )


@executes(r"ld\.param\.([busf](?:32|64))")
def _parameter(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    found = re.fullmatch(rf"\[\s*{program.name}_param_(\d+)\s*\]", operands[1])
    if found is None:
        raise UnknownInstruction(f"not a parameter: {operands[1]}")
    position = int(found[1])
    dtype = np.dtype(TYPES[match[1]])
    write = target(operands[0], match[1], program)

    def run(machine: Machine, active: Active) -> None:
        value = machine.arguments[position]
        if isinstance(value, float):
            write(machine, np.float32(value).view(np.uint32).view(dtype), active)
        else:
            wide = np.array(value & ((1 << 64) - 1), np.uint64)
            write(machine, wide.astype(f"u{dtype.itemsize}").view(dtype), active)

    return run


_SPACE = r"(global|shared(?:::cta)?)"
_VECTOR = r"(?:\.v([248]))?\.([busf](?:8|16|32|64))"


@executes(rf"ld(?:\.volatile)?\.{_SPACE}(?:\.(?:ca|cg|nc))?(?:\.L1::evict_(?:first|last))?{_VECTOR}")
def _load(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    shared, kind = match[1] != "global", match[3]
    size, n = np.dtype(TYPES[kind]).itemsize, int(match[2] or 1)
    writes = [target(text, kind, program) for text in vector(operands[0])]
    if len(writes) != n or len(operands) != 2:
        raise UnknownInstruction(f"{match[0]} of {len(writes)} registers and {len(operands)} operands")
    where = address(operands[1], program)

    def run(machine: Machine, active: Active) -> None:
        lanes = active.lanes
        at = where(machine, lanes)
        if shared:
            values = machine.shared.load(at, n * size, lanes)
        else:
            values = machine.memory.load(at, n * size, lanes, machine.numbers[lanes])
        # [n_lanes, n], of which the active lanes' rows are used.
        full = np.zeros((machine.n_lanes, n), TYPES[kind])
        full[lanes] = np.ascontiguousarray(values).view(TYPES[kind])
        for i, write in enumerate(writes):
            write(machine, full[:, i], active)

    return run


def _gathered(reads: list[Callable[[Machine], Any]], machine: Machine, lanes: Lanes) -> Bytes:
    """The registers of some lanes side by side, as bytes [lanes, n]."""
    columns = [np.broadcast_to(read(machine), machine.n_lanes)[lanes] for read in reads]
    together = np.stack(columns, 1)
    return np.ascontiguousarray(together).view(np.uint8).reshape(len(lanes), -1)


@executes(rf"st(?:\.volatile)?\.{_SPACE}(?:\.(?:wb|cg))?{_VECTOR}")
def _store(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    shared, kind = match[1] != "global", match[3]
    reads = [source(text, kind, program) for text in vector(operands[1])]
    if len(reads) != int(match[2] or 1) or len(operands) != 2:
        raise UnknownInstruction(f"{match[0]} of {len(reads)} registers and {len(operands)} operands")
    where = address(operands[0], program)

    def run(machine: Machine, active: Active) -> None:
        lanes = active.lanes
        values = _gathered(reads, machine, lanes)
        if shared:
            machine.shared.store(where(machine, lanes), values, lanes)
        else:
            machine.memory.store(where(machine, lanes), values, lanes, machine.numbers[lanes])

    return run


@executes(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\d+B)?")
def _copy(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    to, start = address(operands[0], program), address(operands[1], program)
    n = int(operands[2], 0)
    if n not in (4, 8, 16) or len(operands) > 4:
        raise UnknownInstruction(f"{match[0]} of {n} bytes and {len(operands)} operands")
    given = source(operands[3], "u32", program) if len(operands) == 4 else None

    def run(machine: Machine, active: Active) -> None:
        lanes = active.lanes
        read = (
            np.full(len(lanes), n)
            if given is None
            else np.broadcast_to(given(machine), machine.n_lanes)[lanes]
        )
        values = np.zeros((len(lanes), n), np.uint8)
        if not np.isin(read, (0, n)).all():
            raise UnknownInstruction(f"{match[0]} that reads a part of its {n} bytes")
        # Nothing is read where the size is 0, whatever the address: zeros land.
        full = read == n
        if full.any():
            some = lanes[full]
            values[full] = machine.memory.load(start(machine, some), n, some, machine.numbers[some])
        machine.copies.start(to(machine, lanes), values, lanes)

    return run


@executes(r"cp\.async\.commit_group")
def _commit(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return lambda machine, active: machine.copies.commit(machine.programs(active))


@executes(r"cp\.async\.wait_(group|all)")
def _wait(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    n_left = int(operands[0], 0) if match[1] == "group" else None
    return lambda machine, active: machine.copies.wait(machine.programs(active), n_left)
