"""Where a store's images lie: on the training device, or in pinned host memory, gathered ahead by a worker."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from .store import ImageStore

# Of the device's free memory: the network and its activations want the rest.
SHARE = 0.5
N_BUFFERS = 3  # one being copied to the device, one full, one being filled

Pin = Callable[[Tensor], Tensor]


def pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that a GPU reads by itself."""
    return tensor.pin_memory()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to CUDA from pinned memory, so that the host need not wait for the device."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return pinned(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def placed(store: ImageStore, device: torch.device, free: Callable[[], int | None]) -> ImageStore:
    """The store for training on `device`: all of it there if half of the free memory holds it, else `kept_on_host`.

    Args:
        free: bytes that the device has left; asked only where it is not the host. None counts as enough.
    """
    if device.type == "cpu" or store.device == device:
        return store.to(device)
    available = free()
    if available is None or store.images.nbytes <= SHARE * available:
        return store.to(device)
    return kept_on_host(store, device)


def kept_on_host(store: ImageStore, device: torch.device, pin: Pin = pinned) -> ImageStore:
    """The store with its images in pinned host memory, labels and indices on `device`."""
    kept = copy.copy(store)
    object.__setattr__(kept, "images", pin(store.images.cpu()))
    for name in ("labels", "class_counts", "class_index"):
        object.__setattr__(kept, name, getattr(store, name).to(device))
    object.__setattr__(kept, "kept_on_host", True)
    return kept


class Gathered(NamedTuple):
    """Some images of a store, on the training device, in the order of their rows."""

    images: Tensor  # uint8 [B, H, W, 3]


def gathered(store: ImageStore | Gathered, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images and the rows [B] in them: the whole store, or the very images of one that is kept on the host.

    The second reads `rows` back and copies while the device waits; `Ahead` is for the training loop.
    """
    if isinstance(store, Gathered) or not store.kept_on_host:
        return store.images, rows
    images = store.images.index_select(0, rows.to(store.images.device))
    return moved(images, rows.device), torch.arange(len(rows), device=rows.device)


class Ahead:
    """Gathers images of coming batches from host memory while the device works on earlier ones.

    A context manager: its worker ends with it.

    Args:
        images: uint8 [N, H, W, 3], in host memory.
        device: where the batches go.
        pin: makes a buffer that the device can copy from by itself.
    """

    def __init__(self, images: Tensor, device: torch.device, pin: Pin = pinned) -> None:
        self._images, self._device, self._pin = images, device, pin
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mtl-fast-gather")
        self._coming: deque[Future[Tensor]] = deque()
        self._free: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | None] = SimpleQueue()
        for _ in range(N_BUFFERS):
            self._free.put(None)

    def submit(self, batches: Iterable[Tensor]) -> None:
        """Row indices [B] of some batches, in host memory; they come out of `next` in this order."""
        for rows in batches:
            self._coming.append(self._worker.submit(self._gather, rows))

    def next(self) -> Tensor:
        """The next batch's images, uint8 [B, H, W, 3] on the device; the host waits for the worker alone."""
        buffer = self._coming.popleft().result()
        if self._device.type != "cuda":
            batch = buffer.to(self._device, copy=True)
            self._free.put((buffer, None))
            return batch
        batch = buffer.to(self._device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._free.put((buffer, copied))
        return batch

    def __len__(self) -> int:
        """Batches that were submitted and not yet taken."""
        return len(self._coming)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the worker; what it has not begun is dropped."""
        for future in self._coming:
            future.cancel()
        # One that waits for a buffer gets it.
        self._free.put(None)
        self._worker.shutdown()

    def _gather(self, rows: Tensor) -> Tensor:
        """In the worker."""
        free = self._free.get()
        buffer = None
        if free is not None:
            buffer, copied = free
            if copied is not None:
                copied.synchronize()
        shape = (len(rows), *self._images.shape[1:])
        if buffer is None or buffer.shape != shape:
            buffer = self._pin(torch.empty(shape, dtype=torch.uint8))
        return torch.index_select(self._images, 0, rows, out=buffer)
