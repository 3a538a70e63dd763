"""Shared memory of several programs, with who touched which byte since the last barrier."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .faults import EarlyAccess, Misaligned, MissingFence, OutOfBounds, Race, Uninitialised, first
from .memory import Bytes, Lanes

Codes = NDArray[np.int16]
# Who touched a byte: a thread by its number, or one of these.
NOBODY, MANY = -1, -2
# A warp (plus its number) whose threads have synchronised since, and one whose threads have not.
SYNCED, UNSYNCED = 1024, 2048
_N_CODES = 4096
_CODES = np.arange(_N_CODES, dtype=np.int16)
# The warp of a code, NOBODY and MANY being their own.
_WARP = np.where(_CODES < SYNCED, _CODES // 32, _CODES % 1024).astype(np.int16)
_WARP[[NOBODY, MANY]] = [NOBODY, MANY]


class SharedMemory:
    """Bytes of shared memory and what is known about each.

    Args:
        n_programs: that run together.
        size: bytes of one.
        n_threads: of one.
    """

    def __init__(self, n_programs: int, size: int, n_threads: int) -> None:
        self.size = -(-max(size, 16) // 16) * 16
        self._declared = size
        self._n_threads = n_threads
        shape = (n_programs, self.size)
        self._data = np.zeros(shape, np.uint8)
        self._written = np.zeros(shape, np.bool_)
        self._writer = np.full(shape, NOBODY, np.int16)
        self._reader = np.full(shape, NOBODY, np.int16)
        # Bytes that an asynchronous copy will write, and those that so many products are reading.
        self._awaited = np.zeros(shape, np.bool_)
        self._being_read = np.zeros(shape, np.uint8)
        # Written by ordinary instructions, and no proxy fence since.
        self._unfenced = np.zeros(shape, np.bool_)

    def load(self, address: Lanes, n: int, lanes: Lanes, whole_warp: bool = False) -> Bytes:
        """Reads n bytes a lane, [lanes, n]; by `whole_warp` instructions other threads of the warp get them."""
        rows = self._rows(address, n, lanes, "reads")
        who, synced = self._codes(lanes, whole_warp)
        self._readable(rows, n, lanes)
        self._apart(self._writer, rows, n, who, synced, lanes, "reads what another thread has written")
        self._note_readers(rows, n, who)
        return self._data.reshape(-1, n)[rows]

    def store(self, address: Lanes, values: Bytes, lanes: Lanes, whole_warp: bool = False) -> None:
        """Writes values [lanes, n]."""
        n = values.shape[1]
        rows = self._rows(address, n, lanes, "writes")
        who = self._writable(rows, n, lanes, whole_warp)
        self._put(rows, values, who, lanes)

    def announce(self, address: Lanes, n: int, lanes: Lanes) -> Lanes:
        """An asynchronous copy of n bytes a lane begins: nobody may touch them until it lands. Returns its place."""
        rows = self._rows(address, n, lanes, "copies to")
        who = self._writable(rows, n, lanes, False)
        self._awaited.reshape(-1, n)[rows] = True
        self._writer.reshape(-1, n)[rows] = who[:, None]
        return rows

    def land(self, rows: Lanes, values: Bytes, lanes: Lanes) -> None:
        """The copy's values [lanes, n] arrive at its place; they are its thread's until a barrier."""
        self._awaited.reshape(-1, values.shape[1])[rows] = False
        self._put(rows, values, self._codes(lanes, False)[0], lanes)

    def begin_reading(self, address: Lanes, lanes: Lanes) -> Lanes:
        """Products begin to read 16 bytes at each address for a lane's warpgroup. Returns what `end_reading` takes."""
        rows = self._rows(address, 16, lanes, "multiplies")
        self._readable(rows, 16, lanes)
        fresh = (self._writer.reshape(-1, 16)[rows] != NOBODY).any(1)
        if fresh.any():
            raise Race("multiplies what was written with no barrier since", first(fresh, lanes))
        unfenced = self._unfenced.reshape(-1, 16)[rows].any(1)
        if unfenced.any():
            what = "multiplies what ordinary instructions wrote with no fence.proxy.async since"
            raise MissingFence(what, first(unfenced, lanes))
        rows = np.unique(rows)
        self._being_read.reshape(-1, 16)[rows] += 1
        return rows

    def end_reading(self, rows: Lanes) -> None:
        """The products are done; threads that did not wait for them learn it at the next barrier."""
        self._being_read.reshape(-1, 16)[rows] -= 1
        self._reader.reshape(-1, 16)[rows] = MANY

    def elements(self, address: Lanes, programs: Lanes, size: int) -> NDArray[np.unsignedinteger]:
        """Elements of `size` bytes, unchecked: `begin_reading` has looked at them. Shapes broadcast."""
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[size]
        return self._data.reshape(-1).view(kind)[(address + programs * self.size) // size]

    def barrier(self, programs: NDArray[np.bool_]) -> None:
        """All threads of these programs have met."""
        chosen = slice(None) if programs.all() else programs
        self._writer[chosen] = NOBODY
        self._reader[chosen] = NOBODY

    def warp_barrier(self, lanes: Lanes) -> None:
        """All threads of the warps of these lanes have met, a warp for itself."""
        warps = np.zeros((len(self._data), -(-self._n_threads // 32)), np.bool_)
        warps[lanes // self._n_threads, lanes % self._n_threads // 32] = True
        for marks in (self._writer, self._reader):
            warp = _WARP[marks]
            met = (warp >= 0) & np.take_along_axis(warps, np.maximum(warp, 0).astype(np.int64), 1)
            marks[met] = SYNCED + warp[met]

    def fence(self, programs: NDArray[np.bool_]) -> None:
        """Ordinary writes of these programs become visible to asynchronous readers."""
        self._unfenced[programs] = False

    def _rows(self, address: Lanes, n: int, lanes: Lanes, verb: str) -> Lanes:
        """Index of each access in an array of rows of n bytes."""
        bad = (address < 0) | (address + n > self._declared)
        if bad.any():
            where = f"shared byte {address[bad][0]} of {self._declared}"
            raise OutOfBounds(f"{verb} {n} bytes at {where}", first(bad, lanes))
        odd = address % n != 0
        if odd.any():
            where = f"shared byte {address[odd][0]}"
            raise Misaligned(f"{verb} {n} bytes at {where}, no multiple of {n}", first(odd, lanes))
        return (address + lanes // self._n_threads * self.size) // n

    def _codes(self, lanes: Lanes, whole_warp: bool) -> tuple[Codes, Codes]:
        """(who touches, who of the same warp may have touched before) by lane."""
        thread = (lanes % self._n_threads).astype(np.int16)
        warp = thread // 32
        return (UNSYNCED + warp if whole_warp else thread), SYNCED + warp

    def _readable(self, rows: Lanes, n: int, lanes: Lanes) -> None:
        self._landed(rows, n, lanes)
        unknown = ~self._written.reshape(-1, n)[rows].all(1)
        if unknown.any():
            raise Uninitialised("reads shared memory that nobody has written", first(unknown, lanes))

    def _landed(self, rows: Lanes, n: int, lanes: Lanes) -> None:
        early = self._awaited.reshape(-1, n)[rows].any(1)
        if early.any():
            raise EarlyAccess("touches what an asynchronous copy has not delivered yet", first(early, lanes))

    def _writable(self, rows: Lanes, n: int, lanes: Lanes, whole_warp: bool) -> Codes:
        self._landed(rows, n, lanes)
        busy = self._being_read.reshape(-1, n)[rows].any(1)
        if busy.any():
            raise EarlyAccess("writes what an asynchronous product still reads", first(busy, lanes))
        who, synced = self._codes(lanes, whole_warp)
        self._apart(self._writer, rows, n, who, synced, lanes, "writes what another thread has written")
        self._apart(self._reader, rows, n, who, synced, lanes, "writes what another thread has read")
        return who

    @staticmethod
    def _apart(marks: Codes, rows: Lanes, n: int, who: Codes, synced: Codes, lanes: Lanes, what: str) -> None:
        """Raises where somebody else's mark stands."""
        found = marks.reshape(-1, n)[rows]
        theirs = (found != NOBODY) & (found != who[:, None]) & (found != synced[:, None])
        # An unsynchronised warp's own mark is of other threads of it, if it is one.
        theirs |= found >= UNSYNCED
        if theirs.any():
            raise Race(f"{what} with no barrier between", first(theirs.any(1), lanes))

    def _note_readers(self, rows: Lanes, n: int, who: Codes) -> None:
        """Marks readers; several of a warp become the warp, several warps become many."""
        before = self._reader.reshape(-1, n)[rows]
        mine = np.broadcast_to(who[:, None], before.shape)
        new = np.where((before == NOBODY) | (before == mine), mine, _together(before, mine))
        self._mark(self._reader, rows, new)

    @staticmethod
    def _mark(marks: Codes, rows: Lanes, new: Codes) -> None:
        """Sets marks [lanes, n]; lanes that touch the same bytes in one instruction become their warp, or many."""
        marks = marks.reshape(-1, new.shape[1])
        marks[rows] = new
        for _ in range(3):
            after = marks[rows]
            lost = (after != new).any(1)
            if not lost.any():
                return
            new = np.where(after == new, new, _together(after, new))
            marks[rows[lost]] = new[lost]
        marks[rows[(marks[rows] != new).any(1)]] = MANY

    def _put(self, rows: Lanes, values: Bytes, who: Codes, lanes: Lanes) -> None:
        n = values.shape[1]
        data = self._data.reshape(-1, n)
        data[rows] = values
        lost = (data[rows] != values).any(1)
        if lost.any():
            raise Race("two threads write different values to a shared byte", first(lost, lanes))
        # Several threads may write the same value at once.
        self._mark(self._writer, rows, np.broadcast_to(who[:, None], values.shape))
        self._written.reshape(-1, n)[rows] = True
        self._unfenced.reshape(-1, n)[rows] = True


def _together(one: Codes, other: Codes) -> Codes:
    """The mark of two different ones."""
    warp = _WARP[one]
    return np.where((warp == _WARP[other]) & (warp >= 0), UNSYNCED + warp, MANY).astype(np.int16)
