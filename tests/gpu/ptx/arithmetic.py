"""Instructions on each thread's own registers: whole numbers, bits, predicates, selection and floating point.

Floating point rounds once, to nearest even. The approximations of the hardware (``ex2.approx`` and the like, within 2
units in the last place) are computed exactly and rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import UnknownInstruction
from .machine import TYPES, Active, Machine, Run, elementwise, executes, source, target
from .parser import Program, vector

_INTEGER = r"([sub](?:16|32|64))"
_SMALLEST = np.finfo(np.float32).tiny


def _divided(a: Any, b: Any) -> Any:
    """Rounded towards zero; by zero, all ones, as the hardware does."""
    safe = np.where(b == 0, np.ones_like(b), b)
    quotient = a // safe
    quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(quotient), quotient)


def _shifted_left(a: Any, n: Any) -> Any:
    bits = 8 * a.dtype.itemsize
    moved = a << np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, np.zeros_like(moved), moved)


def _shifted_right(a: Any, n: Any) -> Any:
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n >= bits, np.zeros_like(moved), moved)


_WHOLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "div": _divided,
    "rem": lambda a, b: a - _divided(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@executes(rf"(add|sub|mul\.lo|div|rem|min|max|and|or|xor)\.{_INTEGER}")
def _whole(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return elementwise(_WHOLE[match[1]], match[2], [match[2]] * 2)(match, operands, program)


@executes(r"(add|min|max)\.([su])16x2")
def _whole_pair(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    """On both halves of a register."""
    half = np.dtype(TYPES[f"{match[2]}16"])

    def function(a: Any, b: Any) -> Any:
        halves = (np.atleast_1d(value).view(half).reshape(-1, 2) for value in (a, b))
        return np.ascontiguousarray(_WHOLE[match[1]](*halves)).view(np.uint32)[:, 0]

    return elementwise(function, "b32", ["b32", "b32"])(match, operands, program)


@executes(rf"(neg|abs|not)\.{_INTEGER}")
def _one_whole(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    function = {"neg": np.negative, "abs": np.abs, "not": np.invert}[match[1]]
    return elementwise(function, match[2], [match[2]])(match, operands, program)


@executes(rf"mad\.lo\.{_INTEGER}")
def _multiply_add(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    return elementwise(lambda a, b, c: a * b + c, match[1], [match[1]] * 3)(match, operands, program)


@executes(r"(mul|mad)\.wide\.([su])(16|32)")
def _wide(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind, double = match[2] + match[3], f"{match[2]}{2 * int(match[3])}"
    wide = np.dtype(TYPES[double])
    if match[1] == "mul":
        return elementwise(lambda a, b: a.astype(wide) * b.astype(wide), double, [kind] * 2)(
            match, operands, program
        )
    return elementwise(lambda a, b, c: a.astype(wide) * b.astype(wide) + c, double, [kind, kind, double])(
        match, operands, program
    )


@executes(r"mul\.hi\.([su])(16|32|64)")
def _high(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind, bits = match[1] + match[2], int(match[2])

    def function(a: Any, b: Any) -> Any:
        # Whole numbers of Python, for 128 bits are no type of numpy's.
        product = np.asarray(a).astype(object) * np.asarray(b).astype(object)
        return np.asarray(product >> bits, object).astype(TYPES[kind])

    return elementwise(function, kind, [kind] * 2)(match, operands, program)


@executes(rf"(shl|shr)\.{_INTEGER}")
def _shift(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    function = _shifted_left if match[1] == "shl" else _shifted_right
    return elementwise(function, match[2], [match[2], "u32"])(match, operands, program)


@executes(r"shf\.(l|r)\.wrap\.b32")
def _funnel(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    def function(low: Any, high: Any, n: Any) -> Any:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        n = (n & np.uint32(31)).astype(np.uint64)
        moved = (both << n) >> np.uint64(32) if match[1] == "l" else both >> n
        return moved.astype(np.uint32)

    return elementwise(function, "b32", ["b32", "b32", "u32"])(match, operands, program)


@executes(r"bfe\.([su])(32|64)")
def _extract(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind, bits = match[1] + match[2], int(match[2])

    def function(a: Any, start: Any, length: Any) -> Any:
        start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(bits))
        # To the top and back down: what lies beyond the field is its highest bit, or zero.
        up = np.uint32(bits) - length
        return _shifted_right(_shifted_left(_shifted_right(a, start), up), up) * (length > 0).astype(a.dtype)

    return elementwise(function, kind, [kind, "u32", "u32"])(match, operands, program)


@executes(r"bfi\.b(32|64)")
def _insert(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind = f"b{match[1]}"
    one = np.dtype(TYPES[kind]).type(1)

    def function(a: Any, b: Any, start: Any, length: Any) -> Any:
        field = _shifted_left(_shifted_left(one + np.zeros_like(b), length) - one, start)
        return (_shifted_left(a, start) & field) | (b & ~field)

    return elementwise(function, kind, [kind, kind, "u32", "u32"])(match, operands, program)


@executes(r"prmt\.b32")
def _permute(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    def function(a: Any, b: Any, choice: Any) -> Any:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out: Any = np.uint32(0)
        for i in range(4):
            nibble = (choice >> np.uint32(4 * i)) & np.uint32(15)
            byte = (
                (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            ).astype(np.uint32)
            signs = np.where(byte >= 128, np.uint32(255), np.uint32(0))
            out = out | (np.where(nibble >= 8, signs, byte) << np.uint32(8 * i))
        return out

    return elementwise(function, "b32", ["b32", "b32", "u32"])(match, operands, program)


@executes(r"lop3\.b32")
def _three_way(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    table = int(operands[4], 0)

    def function(a: Any, b: Any, c: Any) -> Any:
        out = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return elementwise(function, "b32", ["b32"] * 3)(match, operands[:4], program)


@executes(r"(and|or|xor|not)\.pred")
def _predicates(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    functions = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
    kinds = ["pred"] * (1 if match[1] == "not" else 2)
    return elementwise(functions[match[1]], "pred", kinds)(match, operands, program)


def _either_nan(a: Any, b: Any) -> Any:
    return np.isnan(a) | np.isnan(b)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _or_nan(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: compare(a, b) | _either_nan(a, b)


_UNORDERED = {f"{name}u": _or_nan(compare) for name, compare in _COMPARE.items()}


@executes(
    r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(?:\.(and|or|xor))?(\.ftz)?\.([sub]16|[sub]32|[sub]64|f32|f16)"
)
def _set(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    relation, join, flush, kind = match.groups()
    real = kind.startswith("f")
    if relation in _COMPARE:
        compare = _COMPARE[relation]
        ordered = compare
        if real and relation == "ne":
            compare = lambda a, b: ordered(a, b) & ~_either_nan(a, b)  # noqa: E731
    elif real:
        also = {"num": lambda a, b: ~_either_nan(a, b), "nan": _either_nan}
        compare = also[relation] if relation in also else _UNORDERED[relation]
    else:
        raise UnknownInstruction(match[0])
    base = compare
    if flush:
        compare = lambda a, b: base(_flushed(a), _flushed(b))  # noqa: E731
    if join is None:
        return elementwise(compare, "pred", [kind] * 2)(match, operands, program)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
    final = compare
    return elementwise(lambda a, b, p: combine(final(a, b), p), "pred", [kind, kind, "pred"])(
        match, operands, program
    )


@executes(r"selp\.([subf](?:16|32|64))")
def _select(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind = "b" + match[1][1:]
    return elementwise(lambda a, b, p: np.where(p, a, b), kind, [kind, kind, "pred"])(
        match, operands, program
    )


def _flushed(a: Any) -> Any:
    """Numbers below the normal ones become zeros of their sign."""
    return np.where(np.abs(a) < _SMALLEST, np.copysign(np.float32(0), a), a)


def _fused(a: Any, b: Any, c: Any) -> Any:
    # The product of two float32 is exact in float64; the sum is rounded there, then to float32.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _reciprocal(a: Any) -> Any:
    return np.float32(1) / a


_REAL: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "min.NaN": (2, np.minimum),
    "max.NaN": (2, np.maximum),
    "fma.rn": (3, _fused),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "ex2.approx": (1, lambda a: np.exp2(a.astype(np.float64)).astype(np.float32)),
    "lg2.approx": (1, lambda a: np.log2(a.astype(np.float64)).astype(np.float32)),
    "rsqrt.approx": (1, lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)),
}
_REAL |= {f"div.{how}": (2, np.divide) for how in ("rn", "full", "approx")}
_REAL |= {f"rcp.{how}": (1, _reciprocal) for how in ("rn", "approx")}
_REAL |= {f"sqrt.{how}": (1, np.sqrt) for how in ("rn", "approx")}


@executes(r"([a-z0-9]+(?:\.(?:rn|full|approx|NaN))?)(\.ftz)?(\.NaN)?\.f32")
def _real(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    name = match[1] + (match[3] or "")
    if name in ("add.rn", "sub.rn", "mul.rn"):
        name = name[:3]
    if name not in _REAL:
        raise UnknownInstruction(match[0])
    n, exact = _REAL[name]
    function = exact
    if match[2]:
        function = lambda *given: _flushed(exact(*(_flushed(value) for value in given)))  # noqa: E731
    return elementwise(function, "f32", ["f32"] * n)(match, operands, program)


@executes(r"mov\.([sub](?:16|32|64)|f32|f64|pred)")
def _move(match: re.Match[str], operands: tuple[str, ...], program: Program) -> Run:
    kind = match[1] if match[1] == "pred" else f"b{match[1][1:]}"
    parts = [vector(operand) for operand in operands]
    n = max(len(part) for part in parts)
    if n == 1:
        return elementwise(lambda a: a, kind, [kind])(match, operands, program)
    # Packing and unpacking: the first element is the lowest.
    width = int(kind[1:]) // n
    small, whole = np.dtype(f"u{width // 8}"), np.dtype(TYPES[kind])
    if len(parts[0]) == n:
        read = source(operands[1], kind, program)
        writes = [target(part, f"b{width}", program) for part in parts[0]]

        def unpack(machine: Machine, active: Active) -> None:
            value = read(machine)
            for i, write in enumerate(writes):
                write(machine, (value >> whole.type(i * width)).astype(small), active)

        return unpack
    reads = [source(part, f"b{width}", program) for part in parts[1]]
    write_whole = target(operands[0], kind, program)

    def pack(machine: Machine, active: Active) -> None:
        value: Any = whole.type(0)
        for i, each in enumerate(reads):
            value = value | (each(machine).astype(whole) << whole.type(i * width))
        write_whole(machine, value, active)

    return pack
