"""PTX text → instructions. One kernel a text, as Triton writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

_DIRECTIVE = re.compile(r"\.(loc|file|section)\b[^\n]*\n|\.pragma\b[^;]*;")
_LABEL = re.compile(r"(\$?[A-Za-z_]\w*):(?!:)")
_STATEMENT = re.compile(r"[^;]*;")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
_REGISTER = re.compile(r"%[a-z_]+[0-9]+\b")
_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
_WIDTHS |= {f"{sign}{bits}": bits for sign in "su" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        opcode: with its modifiers, ``add.s32``.
        operands: as written, vectors ``{%r1, %r2}`` and addresses ``[ %rd1 + 16 ]`` whole.
        guard: predicate register, ``%p1``, or "".
        negated: whether it runs where the guard is false.
        text: the statement on one line.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str
    negated: bool
    text: str

    @cached_property
    def registers(self) -> frozenset[str]:
        """All that it reads or writes."""
        return frozenset(_REGISTER.findall(self.text))

    @cached_property
    def targets(self) -> frozenset[str]:
        """Registers of the first operand, unless that is an address: what it writes, if it writes registers."""
        if not self.operands or self.operands[0].startswith("["):
            return frozenset()
        return frozenset(_REGISTER.findall(self.operands[0]))


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        name: its entry point.
        n_threads: a program, ``.reqntid``.
        parameters: types in order, such as ``u64``.
        instructions: in order.
        labels: instruction's index by name.
        widths: bits by register, 1 for predicates.
    """

    name: str
    n_threads: int
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: dict[str, int]


@lru_cache(maxsize=256)
def parse(ptx: str) -> Program:
    """The one kernel of a text.

    Raises:
        ValueError: no kernel or several, functions, or a statement that is none.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    heads = list(re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", text))
    if len(heads) != 1 or re.search(r"\.func\b", text):
        raise ValueError(f"{len(heads)} kernels, and functions or not; expected one kernel alone")
    head = heads[0]
    threads = re.search(r"\.reqntid\s+(\d+)\s*(?:,\s*1\s*)*$", head[3].strip())
    if threads is None:
        raise ValueError(f"{head[1]} does not say .reqntid of one axis")
    parameters = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", head[2])
    instructions, labels, widths = _body(text, head.end())
    return Program(head[1], int(threads[1]), tuple(parameters), tuple(instructions), labels, widths)


def _body(text: str, position: int) -> tuple[list[Instruction], dict[str, int], dict[str, int]]:
    """Statements up to the brace that closes the kernel's."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    depth = 1
    while True:
        while text[position].isspace():
            position += 1
        # At a statement's start braces are scopes: a vector of operands comes after its opcode.
        if text[position] in "{}":
            depth += 1 if text[position] == "{" else -1
            position += 1
            if depth == 0:
                return instructions, labels, widths
            continue
        if match := _DIRECTIVE.match(text, position):
            position = match.end()
            continue
        if match := _LABEL.match(text, position):
            labels[match[1]] = len(instructions)
            position = match.end()
            continue
        match = _STATEMENT.match(text, position)
        if match is None:
            raise ValueError(f"not a statement: {text[position : position + 60]!r}")
        position = match.end()
        statement = " ".join(match[0][:-1].split())
        if statement.startswith(".reg"):
            widths |= _declared(statement)
        elif statement:
            instructions.append(_instruction(statement))


def _declared(statement: str) -> dict[str, int]:
    """``.reg .b32 %r<3>`` → the widths of %r0, %r1 and %r2; also names one by one."""
    _, kind, names = statement.split(None, 2)
    widths: dict[str, int] = {}
    for name in names.replace(" ", "").split(","):
        match = re.fullmatch(r"(%?\w+)(?:<(\d+)>)?", name)
        if match is None:
            raise ValueError(f"not a declaration of registers: {statement}")
        several = [f"{match[1]}{i}" for i in range(int(match[2]))] if match[2] else [match[1]]
        widths |= dict.fromkeys(several, _WIDTHS[kind[1:]])
    return widths


def _instruction(statement: str) -> Instruction:
    guard = _GUARD.match(statement)
    rest = statement[guard.end() :] if guard else statement
    opcode, _, operands = rest.partition(" ")
    if not re.fullmatch(r"[a-z][\w.:]*", opcode):
        raise ValueError(f"not an instruction: {statement}")
    return Instruction(
        opcode, tuple(split(operands)), guard[2] if guard else "", bool(guard and guard[1]), statement
    )


def split(operands: str) -> list[str]:
    """At the commas outside of braces and brackets.

    >>> split("{%r1, %r2}, [%rd1+4], 0x10")
    ['{%r1, %r2}', '[%rd1+4]', '0x10']
    """
    found, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*found, last] if last else found


def vector(operand: str) -> list[str]:
    """The elements of ``{a, b}``; of anything else, itself."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]
