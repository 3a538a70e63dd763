"""The one in-memory form of every data set: uint8 images and, for each class, the rows it owns."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class ImageStore:
    """Images of one split, on one device.

    Args:
        images: uint8 [N, H, W, 3], RGB.
        labels: int64 [N], 0..C-1, on the device of `images`; every class has at least one image.
        class_names: C names, by label.
        super_class_names: C names, the super-class of each class, or None.
        name: what error messages call the store, such as ``/data/birds/train``.

    Attributes:
        class_counts: int64 [C], images in each class.
        class_index: int64 [C, max_count], the rows of each class in ascending order, padded with -1.
        kept_on_host: whether the images alone are in host memory, too many for the device (`data.residency`).

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes, devices, label range or number of names that do not fit together.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    super_class_names: tuple[str, ...] | None = None
    name: str = "the image store"
    class_counts: Tensor = field(init=False)
    class_index: Tensor = field(init=False)
    kept_on_host: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.super_class_names is not None:
            object.__setattr__(self, "super_class_names", tuple(self.super_class_names))
        self._check()
        counts = torch.bincount(self.labels, minlength=self.n_classes)
        if bool((counts == 0).any()):
            empty = int((counts == 0).nonzero()[0])
            raise ValueError(
                f"labels: class {empty} ({self.class_names[empty]!r}) of {self.n_classes} has no image"
            )
        object.__setattr__(self, "class_counts", counts)
        object.__setattr__(self, "class_index", _rows_by_class(self.labels, counts))

    def _check(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8, got {images.dtype}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64, got {labels.dtype}")
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ValueError(f"images: expected a non-empty [N, H, W, 3], got {list(images.shape)}")
        if labels.ndim != 1 or len(labels) != len(images):
            raise ValueError(
                f"labels: expected [{len(images)}] for images {list(images.shape)}, got {list(labels.shape)}"
            )
        if labels.device != images.device:
            raise ValueError(
                f"labels are on {labels.device}, images on {images.device}; move them to one device"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.n_classes:
            raise ValueError(
                f"labels: {low}..{high} do not fit 0..{self.n_classes - 1} of {self.n_classes} class names"
            )
        supers = self.super_class_names
        if supers is not None and len(supers) != self.n_classes:
            raise ValueError(
                f"super_class_names: {len(supers)} names for {self.n_classes} classes; give one each"
            )

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def n_images(self) -> int:
        return self.images.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def device(self) -> torch.device:
        """Where it is used: of labels and indices, and of the images unless they are `kept_on_host`."""
        return self.labels.device

    def to(self, device: torch.device | str) -> ImageStore:
        """The same store on `device`; itself if it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = copy.copy(self)
        for name in ("images", "labels", "class_counts", "class_index"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    def __repr__(self) -> str:
        height, width = self.image_size
        return (
            f"ImageStore({self.name}: {self.n_images} images {height}x{width}, {self.n_classes} classes of "
            f"{int(self.class_counts.min())}..{int(self.class_counts.max())}, {self.device})"
        )


def _rows_by_class(labels: Tensor, counts: Tensor) -> Tensor:
    """int64 [C, max(counts)]: the positions of each label in ascending order, padded with -1."""
    order = torch.argsort(labels, stable=True)
    position = torch.arange(int(counts.max()), device=labels.device)
    place = (counts.cumsum(0) - counts)[:, None] + position
    rows = order[place.clamp(max=len(labels) - 1)]
    return torch.where(position < counts[:, None], rows, -1)
