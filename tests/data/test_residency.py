"""Where images lie: on the device, or in host memory behind a worker; the same images either way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mtl_fast.data.residency import N_BUFFERS, Ahead, Gathered, gathered, kept_on_host, moved, placed
from mtl_fast.data.store import ImageStore

CPU, META = torch.device("cpu"), torch.device("meta")


def pin(tensor: Tensor) -> Tensor:
    """What stands for pinned memory where there is no GPU."""
    return tensor.clone()


@pytest.mark.parametrize("free", [None, 10**6])
def test_a_store_that_fits_is_moved(small_store: ImageStore, free: int | None) -> None:
    found = placed(small_store, META, lambda: free)
    assert found.images.is_meta
    assert not found.kept_on_host
    assert found.device == META


def test_half_of_the_free_memory_is_the_limit(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    size = small_store.images.nbytes
    assert not placed(small_store, META, lambda: 2 * size).kept_on_host
    kept = placed(small_store, META, lambda: 2 * size - 1)
    assert kept.kept_on_host
    assert kept.images.device == CPU
    assert torch.equal(kept.images, small_store.images)
    # Everything that tasks are drawn with is on the device.
    assert kept.device == META
    assert kept.labels.is_meta
    assert kept.class_index.is_meta
    assert not small_store.kept_on_host


def test_on_the_host_nothing_is_asked_or_moved(small_store: ImageStore) -> None:
    assert placed(small_store, CPU, lambda: pytest.fail("asked")) is small_store


def test_rows_of_either_store_are_the_same_images(small_store: ImageStore) -> None:
    kept = kept_on_host(small_store, CPU, pin)
    rows = torch.tensor([5, 0, 5, 41])
    for store in (small_store, kept, Gathered(small_store.images)):
        images, place = gathered(store, rows)
        assert torch.equal(images[place], small_store.images[rows])
    assert gathered(small_store, rows)[0] is small_store.images
    assert len(gathered(kept, rows)[0]) == 4


@pytest.fixture
def ahead(small_store: ImageStore) -> Iterator[Ahead]:
    with Ahead(small_store.images, CPU, pin) as worker:
        yield worker


def test_batches_come_in_order_whatever_their_sizes(small_store: ImageStore, ahead: Ahead) -> None:
    batches = [torch.randint(46, (n,)) for n in (4, 4, 4, 7, 4, 4, 1, 4)]
    ahead.submit(batches[:5])
    taken = [ahead.next() for _ in range(2)]
    ahead.submit(batches[5:])
    assert len(ahead) == 6
    taken += [ahead.next() for _ in range(6)]
    # Looked at after all were taken: no buffer is handed out twice.
    for rows, images in zip(batches, taken, strict=True):
        assert torch.equal(images, small_store.images[rows])


def test_a_worker_gathers_before_it_is_asked_and_only_as_far_as_its_buffers_reach(
    small_store: ImageStore,
) -> None:
    made, enough = [], threading.Event()

    def counting(tensor: Tensor) -> Tensor:
        made.append(threading.current_thread().name)
        if len(made) == N_BUFFERS:
            enough.set()
        return tensor

    with Ahead(small_store.images, CPU, counting) as ahead:
        ahead.submit([torch.arange(3)] * 10)
        assert enough.wait(60)
        for _ in range(9):
            ahead.next()
        assert len(made) == N_BUFFERS
        assert all(name.startswith("mtl-fast-gather") for name in made)


def test_leaving_ends_the_worker_even_when_it_waits_for_a_buffer(small_store: ImageStore) -> None:
    with Ahead(small_store.images, CPU, pin) as ahead:
        ahead.submit([torch.arange(3)] * 10)
    assert not [t for t in threading.enumerate() if t.name.startswith("mtl-fast-gather")]


def test_a_row_that_does_not_exist_is_the_takers_error(ahead: Ahead) -> None:
    ahead.submit([torch.tensor([1000])])
    with pytest.raises((IndexError, RuntimeError), match="index"):
        ahead.next()


def test_to_a_gpu_tensors_go_by_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3)
    assert moved(x, CPU) is x
    said: list[object] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (said.append("pinned"), self)[1])
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **kw: said.append((*a, kw)))
    moved(x, torch.device("cuda"))
    assert said == ["pinned", (torch.device("cuda"), {"non_blocking": True})]
