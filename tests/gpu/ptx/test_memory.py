"""Global memory: bounds, alignment, initialisation, programs apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.ptx.faults import Misaligned, OutOfBounds, Race, Uninitialised
from tests.gpu.ptx.memory import GlobalMemory, Lanes

ONE = np.array([0])


def at(*addresses: int) -> tuple[Lanes, Lanes, Lanes]:
    """(addresses, lanes, programs) of so many lanes of one program."""
    return np.array(addresses), np.arange(len(addresses)), np.zeros(len(addresses), np.int64)


def test_values_come_and_go() -> None:
    x, y = torch.arange(8, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    memory = GlobalMemory({"x": x, "y": y}, {})
    where, lanes, programs = at(memory.address("x") + 4, memory.address("x") + 20)
    found = memory.load(where, 4, lanes, programs)
    assert found.view(np.int32)[:, 0].tolist() == [1, 5]
    memory.store(*at(memory.address("y") + 8)[:1], found[1:], lanes[:1], programs[:1])
    assert y.tolist() == [0, 0, 0, 0]
    memory.write_back()
    assert y.tolist() == [0, 0, 5, 0]


@pytest.mark.parametrize("offset", [-4, 32, 1 << 32, -(1 << 50), 1 << 60])
def test_bounds(offset: int) -> None:
    memory = GlobalMemory({"x": torch.zeros(8), "y": torch.zeros(8)}, {})
    with pytest.raises(OutOfBounds):
        memory.load(np.array([memory.address("x") + offset]), 4, ONE, ONE)
    with pytest.raises(OutOfBounds):
        memory.store(np.array([memory.address("x") + offset]), np.zeros((1, 4), np.uint8), ONE, ONE)


def test_pointers_need_64_bits() -> None:
    memory = GlobalMemory({"x": torch.zeros(8)}, {})
    with pytest.raises(OutOfBounds, match="in no tensor"):
        memory.load(np.array([memory.address("x") & 0xFFFFFFFF]), 4, ONE, ONE)


def test_a_view_is_its_own_elements_alone() -> None:
    whole = torch.arange(12.0).view(3, 4)
    memory = GlobalMemory({"x": whole[:, 1:3]}, {})
    start = memory.address("x")
    assert memory.load(np.array([start + 16]), 4, ONE, ONE).view(np.float32).tolist() == [[5.0]]
    with pytest.raises(OutOfBounds, match="byte 12 of x"):
        memory.load(np.array([start + 8]), 4, ONE, ONE)
    both = GlobalMemory({"x": whole[0], "y": whole[1]}, {})
    assert both.address("y") - both.address("x") == 16


def test_alignment() -> None:
    memory = GlobalMemory({"x": torch.zeros(8)}, {})
    with pytest.raises(Misaligned, match="no multiple of 8"):
        memory.load(np.array([memory.address("x") + 4]), 8, ONE, ONE)


def test_reads_of_what_nobody_wrote() -> None:
    x = torch.zeros(4)
    written = {x.untyped_storage().data_ptr(): np.zeros(16, np.bool_)}
    memory = GlobalMemory({"x": x}, written)
    start = memory.address("x")
    memory.store(np.array([start]), np.zeros((1, 4), np.uint8), ONE, ONE)
    memory.load(np.array([start]), 4, ONE, ONE)
    with pytest.raises(Uninitialised, match="byte 4 of x"):
        memory.load(np.array([start + 4]), 4, ONE, ONE)
    memory.write_back()
    assert next(iter(written.values())).tolist() == [True] * 4 + [False] * 12


def test_programs_share_nothing_that_one_writes() -> None:
    memory = GlobalMemory({"x": torch.zeros(4)}, {})
    start = np.array([memory.address("x")])
    memory.store(start, np.zeros((1, 4), np.uint8), ONE, ONE)
    with pytest.raises(Race, match="another program"):
        memory.load(start, 4, ONE, ONE + 1)
    with pytest.raises(Race, match="another program"):
        memory.store(start, np.zeros((1, 4), np.uint8), ONE, ONE + 1)


def test_two_threads_write_different_values() -> None:
    memory = GlobalMemory({"x": torch.zeros(4)}, {})
    where, lanes, programs = at(memory.address("x"), memory.address("x"))
    memory.store(where, np.ones((2, 4), np.uint8), lanes, programs)
    with pytest.raises(Race, match="different values"):
        memory.store(where, np.arange(8, dtype=np.uint8).reshape(2, 4), lanes, programs)
