"""Global memory: a launch's tensors, far apart, every access checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .faults import Misaligned, OutOfBounds, Race, Uninitialised, first

Bytes = NDArray[np.uint8]
Lanes = NDArray[np.int64]
# A storage starts at a multiple of this: no sum of strides reaches another tensor, no 32-bit address any.
SPACING = 1 << 40
_ALIGNED = 256


def storage_bytes(tensor: Tensor) -> Bytes:
    """All bytes of the storage under a CPU tensor, shared with it."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def covered(tensor: Tensor) -> NDArray[np.bool_]:
    """The storage's bytes that are elements of this view."""
    mask = torch.zeros(len(storage_bytes(tensor)) // tensor.element_size(), dtype=torch.bool)
    mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    padded = np.zeros(len(storage_bytes(tensor)), np.bool_)
    whole = np.repeat(mask.numpy(), tensor.element_size())
    padded[: len(whole)] = whole
    return padded


class GlobalMemory:
    """The storages of a launch's tensors.

    Bytes of a storage that belong to no element of a registered view are out of bounds. `written` tells the bytes that
    hold something; `author` the program that wrote a byte in this launch, -1 if none did: programs run in any order,
    so what one writes no other may touch.

    Args:
        tensors: arguments by name, on the CPU.
        written: by storage address, for each storage that was not wholly written before: changed in place.
    """

    def __init__(self, tensors: dict[str, Tensor], written: dict[int, NDArray[np.bool_]]) -> None:
        self._storages: dict[int, int] = {}
        self._names: list[str] = []
        self._originals: list[Bytes] = []
        self._marks: list[NDArray[np.bool_] | None] = []
        inside: list[NDArray[np.bool_]] = []
        self._addresses: dict[str, int] = {}
        for name, tensor in tensors.items():
            key = tensor.untyped_storage().data_ptr()
            if key not in self._storages or not tensor.numel():
                self._storages[key] = len(self._names)
                self._names.append(name)
                self._originals.append(storage_bytes(tensor))
                self._marks.append(written.get(key))
                inside.append(np.zeros(len(self._originals[-1]), np.bool_))
            index = self._storages[key]
            inside[index] |= covered(tensor)
            offset = tensor.storage_offset() * tensor.element_size()
            self._addresses[name] = (index + 1) * SPACING + offset
        sizes = [len(original) for original in self._originals]
        self._sizes = np.array([0, *sizes], np.int64)
        rooms = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        self._starts = np.array([0, *np.cumsum([0, *rooms[:-1]])] if sizes else [0], np.int64)
        total = max(sum(rooms), _ALIGNED)
        self._data = np.zeros(total, np.uint8)
        self._inside = np.zeros(total, np.bool_)
        self._written = np.zeros(total, np.bool_)
        self._author = np.full(total, -1, np.int32)
        for start, size, original, mark, mask in zip(
            self._starts[1:], sizes, self._originals, self._marks, inside, strict=True
        ):
            span = slice(int(start), int(start) + size)
            self._data[span] = original
            self._inside[span] = mask
            self._written[span] = True if mark is None else mark

    def address(self, name: str) -> int:
        """What a kernel gets for this argument."""
        return self._addresses[name]

    def load(self, address: Lanes, n: int, lanes: Lanes, programs: Lanes) -> Bytes:
        """Reads n bytes a lane, [lanes, n]."""
        rows = self._rows(address, n, lanes, "read")
        unknown = ~self._written.reshape(-1, n)[rows].all(1)
        if unknown.any():
            lane = first(unknown, lanes)
            raise Uninitialised(f"reads {self._where(address[unknown][0])}, which nobody has written", lane)
        self._alone(rows, n, lanes, programs, address)
        return self._data.reshape(-1, n)[rows]

    def store(self, address: Lanes, values: Bytes, lanes: Lanes, programs: Lanes) -> None:
        """Writes values [lanes, n]."""
        n = values.shape[1]
        rows = self._rows(address, n, lanes, "write")
        self._alone(rows, n, lanes, programs, address)
        data = self._data.reshape(-1, n)
        data[rows] = values
        lost = (data[rows] != values).any(1)
        if lost.any():
            lane = first(lost, lanes)
            raise Race(f"two threads write different values to {self._where(address[lost][0])}", lane)
        self._written.reshape(-1, n)[rows] = True
        self._author.reshape(-1, n)[rows] = programs[:, None]

    def write_back(self) -> None:
        """Results go into the tensors, what was written into the marks."""
        for start, original, mark in zip(self._starts[1:], self._originals, self._marks, strict=True):
            span = slice(int(start), int(start) + len(original))
            changed = self._author[span] >= 0
            original[changed] = self._data[span][changed]
            if mark is not None:
                mark |= changed

    def _rows(self, address: Lanes, n: int, lanes: Lanes, verb: str) -> Lanes:
        """Index of each access in an array of rows of n bytes."""
        index = address // SPACING
        offset = address - index * SPACING
        known = (index > 0) & (index < len(self._sizes))
        index = np.where(known, index, 0)
        bad = ~known | (offset + n > self._sizes[index])
        if not bad.any():
            if (address % n).any():
                odd = address % n != 0
                where = self._where(address[odd][0])
                raise Misaligned(f"{verb}s {n} bytes at {where}, no multiple of {n}", first(odd, lanes))
            rows = (self._starts[index] + offset) // n
            bad = ~self._inside.reshape(-1, n)[rows].all(1)
            if not bad.any():
                return rows
        where = self._where(address[bad][0])
        raise OutOfBounds(f"{verb}s {n} bytes at {where}", first(bad, lanes))

    def _alone(self, rows: Lanes, n: int, lanes: Lanes, programs: Lanes, address: Lanes) -> None:
        author = self._author.reshape(-1, n)[rows]
        shared = ((author >= 0) & (author != programs[:, None])).any(1)
        if shared.any():
            lane = first(shared, lanes)
            raise Race(f"touches {self._where(address[shared][0])}, which another program writes", lane)

    def _where(self, address: Any) -> str:
        index, offset = divmod(int(address), SPACING)
        if not 0 < index < len(self._sizes):
            return f"address {int(address):#x}, in no tensor"
        return f"byte {offset} of {self._names[index - 1]} ({self._sizes[index]} bytes)"
