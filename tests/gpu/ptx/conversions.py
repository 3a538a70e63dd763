"""Conversions between types, rounded as the hardware does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .machine import TYPES, Active, Machine, Run, elementwise, executes, source, target
from .parser import Program

Floats = NDArray[np.float32]


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """bfloat16 bits → float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: Floats) -> NDArray[np.uint16]:
    """float32 → bfloat16 bits, to nearest even; every NaN becomes 0x7fff, as ``cvt.rn.bf16`` does."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_tf32(value: Floats) -> Floats:
    """float32 → TF32, to nearest, ties away from zero (``cvt.rna.tf32``)."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(value), rounded, value)


def truncated_tf32(bits: NDArray[np.uint32]) -> Floats:
    """What a product takes of a register in TF32: its low 13 bits are ignored (PTX ISA, alternate floating point)."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


@executes(r"cvta(\.to)?\.(global|shared)\.u64")
def _generic(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return elementwise(lambda a: a, "u64", ["u64"])(match, operands, program)


@executes(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _whole(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    to = TYPES[match[1]]
    return elementwise(lambda a: a.astype(to), match[1], [match[2]])(match, operands, program)


@executes(r"cvt\.rn\.f32\.([su](?:8|16|32|64))")
def _to_real(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return elementwise(lambda a: a.astype(np.float32), "f32", [match[1]])(match, operands, program)


@executes(r"cvt\.r(z|n|m|p)i(\.ftz)?\.([su])(8|16|32|64)\.f32")
def _to_whole(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind = match[3] + match[4]
    towards = {"z": np.trunc, "n": np.rint, "m": np.floor, "p": np.ceil}[match[1]]
    limits = np.iinfo(TYPES[kind])

    def function(a: Floats) -> Any:
        # Out of range saturates and NaN is 0. The largest 64-bit numbers are no float64: they are put in afterwards.
        rounded = towards(np.nan_to_num(a.astype(np.float64), nan=0.0, posinf=1e300, neginf=-1e300))
        inside = (rounded >= float(limits.min)) & (rounded < float(limits.max) + 1)
        whole = np.where(inside, rounded, 0).astype(TYPES[kind])
        whole = np.where(rounded >= float(limits.max) + 1, whole.dtype.type(limits.max), whole)
        return np.where(rounded < float(limits.min), whole.dtype.type(limits.min), whole)

    return elementwise(function, kind, ["f32"])(match, operands, program)


@executes(r"cvt\.(f32\.f16|f32\.bf16|rn\.f16\.f32|rn\.bf16\.f32|rna\.tf32\.f32)")
def _real(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    function, out, kind = {
        "f32.f16": (lambda a: a.astype(np.float32), "f32", "f16"),
        "f32.bf16": (from_bf16, "f32", "b16"),
        "rn.f16.f32": (lambda a: a.astype(np.float16), "f16", "f32"),
        "rn.bf16.f32": (to_bf16, "b16", "f32"),
        "rna.tf32.f32": (to_tf32, "f32", "f32"),
    }[match[1]]
    return elementwise(function, out, [kind])(match, operands, program)


@executes(r"cvt\.rn\.(b?)f16x2\.f32")
def _pair(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    def half(value: Floats) -> NDArray[np.uint32]:
        bits = to_bf16(value) if match[1] else value.astype(np.float16).view(np.uint16)
        return bits.astype(np.uint32)

    # The first operand goes to the upper half.
    return elementwise(
        lambda upper, lower: (half(upper) << np.uint32(16)) | half(lower), "b32", ["f32", "f32"]
    )(match, operands, program)


@executes(r"(add|sub|mul|fma|min|max)(?:\.rn)?\.(b?)f16(x2)?")
def _half(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    """Arithmetic in halves: computed in float64, which holds every product and sum of them, and rounded once."""
    name, brain, packed = match.groups()
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}
    n = 3 if name == "fma" else 2
    kind = "b32" if packed else "b16"
    reads = [source(text, kind, program) for text in operands[1 : n + 1]]
    write = target(operands[0], kind, program)

    def compute(given: list[Any]) -> Any:
        wide = [
            (from_bf16(value) if brain else value.view(np.float16)).astype(np.float64)
            for value in (np.asarray(each, np.uint16) for each in given)
        ]
        exact = wide[0] * wide[1] + wide[2] if name == "fma" else functions[name](*wide)
        return to_bf16(exact.astype(np.float32)) if brain else exact.astype(np.float16).view(np.uint16)

    def run(machine: Machine, active: Active) -> None:
        given = [np.asarray(read(machine)) for read in reads]
        if not packed:
            write(machine, compute(given), active)
            return
        lower = compute([value.astype(np.uint16) for value in given]).astype(np.uint32)
        upper = compute([(value >> np.uint32(16)).astype(np.uint16) for value in given]).astype(np.uint32)
        write(machine, lower | (upper << np.uint32(16)), active)

    return run
