"""Compilation for a GPU that need not be there, with what its machine code takes of the chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .launch import Launch


@dataclass(frozen=True)
class Chip:
    """A compute capability and the limits of a multiprocessor (CUDA programming guide, compute capabilities).

    Attributes:
        capability: 80 is compute capability 8.0.
        shared: bytes of shared memory that one program may have.
        shared_all, registers, threads: of a multiprocessor.
        matrix: machine instructions of its tensor cores that Triton takes there, as a pattern.
    """

    capability: int
    shared: int
    shared_all: int
    threads: int
    matrix: str
    registers: int = 65536

    @property
    def name(self) -> str:
        """Such as ``sm_80``."""
        return f"sm_{self.capability}"


KB = 1024
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(80, 163 * KB, 164 * KB, 2048, "HMMA"),
        Chip(86, 99 * KB, 100 * KB, 1536, "HMMA"),
        Chip(89, 99 * KB, 100 * KB, 1536, "HMMA"),
        Chip(90, 227 * KB, 228 * KB, 2048, "HGMMA"),
        Chip(100, 227 * KB, 228 * KB, 2048, r"UTC\w*MMA"),
        Chip(120, 99 * KB, 100 * KB, 1536, "HMMA"),
    )
}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a chip.

    Attributes:
        chip: what for.
        ptx, cubin: assembly and binary.
        metadata: Triton's, with `shared`, `num_warps`, `name`.
    """

    chip: Chip
    ptx: str
    cubin: bytes
    metadata: Any

    @property
    def shared(self) -> int:
        """Bytes of shared memory a program."""
        return int(self.metadata.shared)

    @cached_property
    def machine_code(self) -> str:
        """`nvdisasm`'s listing, without its analysis of dataflow, a third of the time that names nothing read here."""
        return _tool("nvdisasm", self.cubin, "-c", "-ndf")

    @cached_property
    def _usage(self) -> dict[str, int]:
        found = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", _tool("cuobjdump", self.cubin, "-res-usage"))
        return {name: int(value) for name, value in found}

    @property
    def registers(self) -> int:
        """A thread."""
        return self._usage["REG"]

    @property
    def spilled(self) -> int:
        """Bytes of stack and local memory a thread."""
        return self._usage["STACK"] + self._usage["LOCAL"]


def compile_launch(launch: Launch, chip: Chip | str) -> Compiled:
    """Compiles a launch's kernel as the runtime would for these arguments.

    Pointers and whole numbers that are multiples of 16 are said to be; ones and None become constants.

    Raises:
        RuntimeError: the kernels are interpreted in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: in this process kernels are interpreted, not compiled")
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    signature, constants, attributes = specialised(launch)
    compiled = triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", chip.capability, 32),
        options=launch.options,
    )
    return Compiled(chip, compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """(type, constant, attributes) by argument: what Triton's runtime makes of a launch's arguments."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = launch.arguments | launch.constants
    for position, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        free = not parameter.do_not_specialize
        if value is None or (free and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type(value)
        aligned = isinstance(value, Tensor) or (free and type(value) is int and value % 16 == 0)
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "uint8": "u8",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of one of the CUDA tools that lie inside Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
