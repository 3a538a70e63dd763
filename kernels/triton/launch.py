"""One launch of one kernel as plain data: run it, or compile, emulate, count and model it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Run-time arguments by name: tensors (any device, meta too), None, numbers.
Arguments = dict[str, Tensor | float | None]

# Who wants to see launches instead of having them run: (launch) -> None.
_observer: ContextVar[Callable[[Launch], None] | None] = ContextVar("observer", default=None)
# The chip that somebody wants launches for, instead of their tensors' device.
_target: ContextVar[int | None] = ContextVar("target", default=None)
# The chip of tensors that are on no GPU: its configurations are those of every chip that has none of its own.
BASE = 80


@contextmanager
def configured_for(capability: int) -> Iterator[None]:
    """Within it, launches are configured for this compute capability (80 is 8.0), whatever device their tensors are on.

    >>> with configured_for(120):
    ...     chip_of(torch.device("meta"))
    120
    """
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def chip_of(device: torch.device) -> int:
    """The compute capability that launches of tensors on the device are configured for: 80 is 8.0."""
    target = _target.get()
    if target is not None:
        return target
    return _capability(device) if device.type == "cuda" else BASE


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Work:
    """What a launch has to do at least, for the model of its time.

    Attributes:
        flop: operations of the algorithm, two a multiply-add, padding left out.
        read, written: compulsory bytes, each tensor element once.
        l2_read: bytes that all programs together ask of L2; 0 counts as `read`.
        matrix: whether `flop` is tensor-core work.
        padded: operations of products of whole blocks, padding and all; 0 counts as `flop`.
    """

    flop: int = 0
    read: int = 0
    written: int = 0
    l2_read: int = 0
    matrix: bool = False
    padded: int = 0


def n_bytes(*tensors: Tensor | None) -> int:
    """Of all elements, each once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def in_blocks(n: int, block: int) -> int:
    """n, up to the end of its last block: what a product's padded sizes are made of."""
    return -(-n // block) * block


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and everything it is given.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along up to three axes.
        arguments: run-time arguments by name, in the kernel's order: tensors (any device, meta too), None, numbers.
        constants: `constexpr` arguments by name.
        num_warps, num_stages: of the launch configuration.
        work: what the model of its time starts from.
        programs: how many a multiprocessor is to hold, as the second number of CUDA's launch bounds: the assembler
            shares its registers out to so many. None leaves it to guess, from registers alone.
        is_contracted: whether a multiply and an add may round once. Not so where the product goes into a sum over
            threads: each would round the other's and keep its own exact, and so two threads would hold different sums.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    work: Work = field(default_factory=Work)
    programs: int | None = None
    is_contracted: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told beside the arguments."""
        # Said, not left to the version's default.
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.is_contracted,
        }
        bounds = {} if self.programs is None else {"ptx_options": f"--minnctapersm {self.programs}"}
        return options | bounds

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    def run(self) -> None:
        """Launches the kernel, or hands it to whoever observes."""
        observer = _observer.get()
        if observer is None:
            self.start()
        else:
            observer(self)

    def start(self) -> None:
        """Launches the kernel on the current stream of its tensors' device, whoever observes."""
        device = next((t.device for t in self.arguments.values() if isinstance(t, Tensor)), None)
        on_gpu = device is not None and device.type == "cuda"
        # Triton takes the current device, on which another GPU's tensors are not.
        with torch.cuda.device(device) if on_gpu else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


class observed:
    """Within it, launches are collected instead of run.

    >>> with observed() as launches:
    ...     pass
    >>> launches
    []

    Args:
        then: called with each launch after it was noted; an emulator runs it here.
    """

    def __init__(self, then: Callable[[Launch], None] | None = None) -> None:
        self._then = then
        self._launches: list[Launch] = []

    def __enter__(self) -> list[Launch]:
        self._token = _observer.set(self._note)
        return self._launches

    def __exit__(self, *_: object) -> None:
        _observer.reset(self._token)

    def _note(self, launch: Launch) -> None:
        self._launches.append(launch)
        if self._then is not None:
            self._then(launch)
