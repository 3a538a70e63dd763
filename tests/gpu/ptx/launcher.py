"""Runs the PTX of a launch on the CPU, its tensors being CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mtl_fast.kernels.triton.ahead import CHIPS, compile_launch, specialised
from mtl_fast.kernels.triton.launch import Launch, configured_for, observed

# The files of instructions name what they know when they are imported.
from . import arithmetic, conversions, transfers, warpgroups, warps  # noqa: F401
from .faults import UnknownInstruction
from .machine import Machine
from .memory import GlobalMemory
from .parser import parse

# As many programs run side by side as give about so many threads: numpy's cost a call is shared by them.
THREADS_TOGETHER = 4096
Written = dict[int, NDArray[np.bool_]]


def run(
    launch: Launch,
    chip: str = "sm_80",
    uninitialised: Iterable[Tensor] = (),
    *,
    alter: Callable[[str], str] | None = None,
) -> None:
    """Compiles a launch for a chip and executes the PTX; results are written into the launch's tensors.

    Args:
        launch: with CPU tensors.
        chip: ``sm_80`` or ``sm_90``.
        uninitialised: tensors whose contents count as never written.
        alter: changes the PTX first, for faults put in on purpose.

    Raises:
        Fault: the kernel does what it must not, or an instruction is not known.
    """
    _run(launch, chip, {_key(tensor): _unwritten(tensor) for tensor in uninitialised}, alter)


def _run(launch: Launch, chip: str, written: Written, alter: Callable[[str], str] | None) -> None:
    compiled = compile_launch(launch, chip)
    program = parse(alter(compiled.ptx) if alter else compiled.ptx)
    signature, _, _ = specialised(launch)
    given = {name: launch.arguments[name] for name, kind in signature.items() if kind != "constexpr"}
    memory = GlobalMemory(
        {name: value for name, value in given.items() if isinstance(value, Tensor)}, written
    )
    arguments: list[Any] = [
        memory.address(name) if isinstance(value, Tensor) else value for name, value in given.items()
    ]
    if len(arguments) + 2 != len(program.parameters):
        raise UnknownInstruction(
            f"{program.name} has {len(program.parameters)} parameters for {list(given)} and 2"
        )
    # Triton's last two parameters are scratch memories, which these kernels do not use.
    arguments += [0, 0]
    grid = (*launch.grid, 1, 1)[:3]
    indices = np.array([index[::-1] for index in product(*(range(n) for n in reversed(grid)))], np.int64)
    together = max(1, THREADS_TOGETHER // program.n_threads)
    with np.errstate(all="ignore"):
        for start in range(0, len(indices), together):
            part = indices[start : start + together]
            Machine(program, memory, arguments, part, grid, compiled.shared).run()
    memory.write_back()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unwritten(tensor: Tensor) -> NDArray[np.bool_]:
    return np.zeros(tensor.untyped_storage().nbytes(), np.bool_)


class _Empties(TorchDispatchMode):
    """Notes the storages of tensors that torch made without writing them, until torch writes them."""

    _MAKERS = (
        "aten::empty",
        "aten::new_empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty_strided",
    )

    def __init__(self) -> None:
        super().__init__()
        self.written: Written = {}
        # Kept alive, so that no later storage gets an address that is noted here.
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in self._MAKERS:
            self.written[_key(out)] = _unwritten(out)
            self._kept.append(out)
        else:
            for position, argument in enumerate(func._schema.arguments):
                value = args[position] if position < len(args) else (kwargs or {}).get(argument.name)
                if argument.alias_info and argument.alias_info.is_write and isinstance(value, Tensor):
                    self.written.pop(_key(value), None)
        return out


@contextmanager
def emulated(chip: str, configured: str | None = None) -> Iterator[list[Launch]]:
    """Within it, launches are executed here. What `torch.empty` makes counts as never written, launch after launch.

    Args:
        chip: ``sm_80`` or ``sm_90``, whose PTX is executed.
        configured: the chip whose launch configurations are taken, by default the same.
    """
    empties = _Empties()

    def execute(launch: Launch) -> None:
        # What the emulator itself does with the tensors is none of the caller's writing.
        with _disable_current_modes():
            _run(launch, chip, empties.written, None)

    with configured_for(CHIPS[configured or chip].capability), empties, observed(execute) as launches:
        yield launches
