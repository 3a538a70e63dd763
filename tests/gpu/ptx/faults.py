"""What the emulator finds: each is an error of the kernel, or of the emulator's own knowledge."""

from __future__ import annotations

from collections.abc import Sequence


class Fault(Exception):
    """Something that a GPU would do silently wrong, hang or trap at.

    Args:
        what: one line.
        lane: the first thread that does it, counted over all programs that run together, where one is known.
    """

    def __init__(self, what: str, lane: int | None = None) -> None:
        super().__init__(what)
        self.lane = lane


class UnknownInstruction(Fault):
    """An opcode, a modifier or an operand that the emulator does not know."""


class OutOfBounds(Fault):
    """An address outside of every tensor, or outside of shared memory."""


class Misaligned(Fault):
    """An address that is no multiple of the access's size."""


class Uninitialised(Fault):
    """A read of memory that nobody has written."""


class Race(Fault):
    """Two threads touch the same byte of shared memory with no barrier between, or two programs the same byte."""


class EarlyAccess(Fault):
    """What an asynchronous instruction still reads or writes was touched before it was waited for."""


class MissingFence(Fault):
    """A fence is missing between ordinary and asynchronous accesses."""


class Diverged(Fault):
    """An instruction that all threads of a warp, warpgroup or program execute together was reached by some."""


def first(bad: Sequence[bool], lanes: Sequence[int]) -> int:
    """The lane of the first true entry."""
    return int(next(lane for wrong, lane in zip(bad, lanes, strict=True) if wrong))
