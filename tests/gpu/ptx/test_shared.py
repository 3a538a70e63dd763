"""Shared memory: who may touch what since the last barrier."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.ptx.faults import EarlyAccess, Misaligned, MissingFence, OutOfBounds, Race, Uninitialised
from tests.gpu.ptx.shared import SharedMemory

ALL = np.ones(1, np.bool_)
WORD = np.arange(4, dtype=np.uint8)[None]


def lanes(*numbers: int) -> np.ndarray:
    return np.array(numbers)


def memory() -> SharedMemory:
    """64 bytes of one program of 64 threads; thread 0 has written the first word."""
    made = SharedMemory(1, 64, 64)
    made.store(lanes(0), WORD, lanes(0))
    return made


def test_a_thread_reads_what_it_wrote_and_others_after_the_barrier() -> None:
    shared = memory()
    assert shared.load(lanes(0), 4, lanes(0)).tolist() == WORD.tolist()
    with pytest.raises(Race, match="reads what another thread has written"):
        shared.load(lanes(0), 4, lanes(1))
    shared.barrier(ALL)
    assert shared.load(lanes(0), 4, lanes(63)).tolist() == WORD.tolist()


def test_writes_after_reads_of_others_need_a_barrier() -> None:
    for readers in ([5], [5, 6], [5, 40], [5, 6, 7, 40, 41]):
        shared = memory()
        shared.barrier(ALL)
        shared.load(np.zeros(len(readers), np.int64), 4, lanes(*readers))
        with pytest.raises(Race, match="has read"):
            shared.store(lanes(0), WORD, lanes(5 if len(readers) > 1 else 0))
        shared.barrier(ALL)
        shared.store(lanes(0), WORD, lanes(0))


def test_a_barrier_of_a_warp_is_for_that_warp() -> None:
    shared = memory()
    shared.warp_barrier(np.arange(32))
    shared.load(lanes(0), 4, lanes(31))
    with pytest.raises(Race):
        shared.load(lanes(0), 4, lanes(32))
    shared = memory()
    shared.warp_barrier(np.arange(32, 64))
    with pytest.raises(Race):
        shared.load(lanes(0), 4, lanes(31))


def test_equal_values_may_be_written_at_once_and_are_then_nobody_s() -> None:
    shared = memory()
    shared.barrier(ALL)
    shared.store(lanes(0, 0), WORD.repeat(2, 0), lanes(3, 4))
    with pytest.raises(Race):
        shared.load(lanes(0), 4, lanes(3))
    shared.warp_barrier(np.arange(32))
    shared.load(lanes(0), 4, lanes(3))
    shared.barrier(ALL)
    with pytest.raises(Race, match="different values"):
        shared.store(lanes(0, 0), np.concatenate([WORD, WORD + 1]), lanes(3, 4))


def test_matrices_are_read_by_whole_warps() -> None:
    shared = SharedMemory(1, 64, 64)
    shared.store(lanes(0), np.zeros((1, 16), np.uint8), lanes(0))
    with pytest.raises(Race):
        shared.load(lanes(0), 16, lanes(0), whole_warp=True)
    shared.barrier(ALL)
    shared.load(lanes(0), 16, lanes(0), whole_warp=True)
    with pytest.raises(Race):
        shared.store(lanes(0), WORD, lanes(0))


def test_programs_do_not_meet() -> None:
    shared = SharedMemory(2, 16, 64)
    shared.store(lanes(0), WORD, lanes(0))
    shared.store(lanes(0), WORD + 9, lanes(64))
    assert shared.load(lanes(0, 0), 4, lanes(0, 64)).tolist() == [*WORD.tolist(), *(WORD + 9).tolist()]
    shared.barrier(np.array([True, False]))
    shared.load(lanes(0), 4, lanes(1))
    with pytest.raises(Race):
        shared.load(lanes(0), 4, lanes(65))


def test_bounds_alignment_and_initialisation() -> None:
    shared = memory()
    for address in (-4, 64):
        with pytest.raises(OutOfBounds):
            shared.load(lanes(address), 4, lanes(0))
    with pytest.raises(Misaligned):
        shared.load(lanes(2), 4, lanes(0))
    with pytest.raises(Uninitialised):
        shared.load(lanes(4), 4, lanes(0))


def test_copies_are_untouchable_until_they_land() -> None:
    shared = memory()
    shared.barrier(ALL)
    rows = shared.announce(lanes(0), 4, lanes(0))
    for touch in (
        lambda: shared.load(lanes(0), 4, lanes(0)),
        lambda: shared.store(lanes(0), WORD, lanes(0)),
        lambda: shared.announce(lanes(0), 4, lanes(0)),
    ):
        with pytest.raises(EarlyAccess):
            touch()
    shared.land(rows, WORD + 7, lanes(0))
    assert shared.load(lanes(0), 4, lanes(0)).tolist() == (WORD + 7).tolist()
    with pytest.raises(Race):
        shared.load(lanes(0), 4, lanes(1))


def test_products_read_behind_a_barrier_and_a_fence_and_undisturbed() -> None:
    shared = SharedMemory(1, 64, 128)
    shared.store(lanes(0), np.zeros((1, 16), np.uint8), lanes(0))
    with pytest.raises(Race):
        shared.begin_reading(lanes(0), lanes(0))
    shared.barrier(ALL)
    with pytest.raises(MissingFence):
        shared.begin_reading(lanes(0), lanes(0))
    shared.fence(ALL)
    rows = shared.begin_reading(lanes(0), lanes(0))
    with pytest.raises(EarlyAccess, match="product"):
        shared.store(lanes(0), WORD, lanes(0))
    shared.end_reading(rows)
    with pytest.raises(Race):
        shared.store(lanes(0), WORD, lanes(0))
    shared.barrier(ALL)
    shared.store(lanes(0), WORD, lanes(0))
