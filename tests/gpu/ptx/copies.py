"""Asynchronous copies, delivered as late as the kernel allows: when their group is waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .memory import Bytes, Lanes
from .shared import SharedMemory


@dataclass
class _Copy:
    """One instruction's copies: places, values [k, n], lanes and the group of each lane's program."""

    rows: Lanes
    values: Bytes
    lanes: Lanes
    groups: NDArray[np.int64]


class Copies:
    """Those of the programs that run together.

    Args:
        shared: where they land.
        program_of: [n_lanes].
        n_programs: that run together.
    """

    def __init__(self, shared: SharedMemory, program_of: Lanes, n_programs: int) -> None:
        self._shared, self._program_of = shared, program_of
        self._group = np.zeros(n_programs, np.int64)
        self._under_way: list[_Copy] = []

    def start(self, address: Lanes, values: Bytes, lanes: Lanes) -> None:
        """Values [k, n] leave for shared memory."""
        rows = self._shared.announce(address, values.shape[1], lanes)
        self._under_way.append(_Copy(rows, values, lanes, self._group[self._program_of[lanes]]))

    def commit(self, programs: NDArray[np.bool_]) -> None:
        """What these programs started since the last commit is a group."""
        self._group[programs] += 1

    def wait(self, programs: NDArray[np.bool_], n_left: int | None) -> None:
        """All but the last `n_left` groups land; with None everything, committed or not."""
        still: list[_Copy] = []
        for copy in self._under_way:
            owner = self._program_of[copy.lanes]
            due = programs[owner]
            if n_left is not None:
                due &= copy.groups < self._group[owner] - n_left
            if due.any():
                self._shared.land(copy.rows[due], copy.values[due], copy.lanes[due])
            if not due.all():
                left = ~due
                still.append(_Copy(copy.rows[left], copy.values[left], copy.lanes[left], copy.groups[left]))
        self._under_way = still
