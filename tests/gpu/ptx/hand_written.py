"""Kernels written by hand, an instruction or two, for tests of the emulator's instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# The files of instructions name what they know when they are imported.
from . import launcher  # noqa: F401
from .machine import Machine
from .memory import GlobalMemory
from .parser import parse


def text(body: str, *, n_threads: int = 32, n_parameters: int = 2) -> str:
    """PTX of a kernel with registers enough, and 64-bit parameters."""
    parameters = ", ".join(f".param .u64 f_param_{i}" for i in range(n_parameters))
    registers = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;"
    return f".visible .entry f({parameters}) .reqntid {n_threads}\n{{\n{registers}\n{body}\nret;\n}}\n"


def execute(
    body: str,
    *tensors: Tensor,
    n_threads: int = 32,
    shared: int = 0,
    n_programs: int = 1,
    given: dict[str, Any] | None = None,
) -> Machine:
    """Runs a body whose parameters are tensors; `given` registers hold values at the start. Writes results back."""
    program = parse(text(body, n_threads=n_threads, n_parameters=len(tensors)))
    memory = GlobalMemory({str(i): tensor for i, tensor in enumerate(tensors)}, {})
    indices = np.stack([np.arange(n_programs), *[np.zeros(n_programs, np.int64)] * 2], 1)
    arguments: list[float] = [memory.address(str(i)) for i in range(len(tensors))]
    machine = Machine(program, memory, arguments, indices, (n_programs, 1, 1), shared)
    for name, value in (given or {}).items():
        register = machine.registers[name]
        register[...] = np.asarray(value).astype(np.asarray(value).dtype).view(register.dtype)
    with np.errstate(all="ignore"):
        machine.run()
    memory.write_back()
    return machine


def values(machine: Machine, register: str, dtype: str) -> NDArray[Any]:
    """A register of all threads."""
    return machine.registers[register].view(dtype)
