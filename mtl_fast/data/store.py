"""The one in-memory form of every data set: uint8 images and, for each class, the rows it owns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mtl_fast.data.arrays import Layout, code_labels, pairs_of, uint8_images
from mtl_fast.errors import InputError


class ClassIndex(Protocol):
    """What drawing episodes takes: which rows each class owns; attributes as those of `ImageStore`."""

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def n_classes(self) -> int: ...
    @property
    def n_images(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def class_counts(self) -> Tensor: ...
    @property
    def class_index(self) -> Tensor: ...


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
        object.__setattr__(self, "class_index", rows_by_class(self.labels, counts))

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

    @classmethod
    def from_arrays(
        cls,
        images: Any,
        labels: Any,
        class_names: Sequence[str] | None = None,
        *,
        layout: Layout | None = None,
        name: str = "the image store",
    ) -> ImageStore:
        """A store of images and labels as people hold them.

        Args:
            images: an array or a tensor, or a sequence of arrays, tensors or PIL images of one size:
                uint8, or floating in 0..1; [N, H, W, C] or [N, C, H, W] with C 3 (RGB) or 1, or [N, H, W].
            labels: N numbers, strings or other hashable values. Without `class_names` each distinct one is a
                class, in ascending order, and gives it its name.
            class_names: the names of labels 0..C-1.
            layout: ``HWC`` or ``CHW``, where the shape leaves it open.
            name: what error messages call the store.

        Returns:
            The store, on the device of `images`; may share their memory.

        Raises:
            InputError: images or labels of another form, one line that says which.
            ValueError: labels that do not fit the images or `class_names`.
        """
        pixels = uint8_images(images, layout)
        values, codes = code_labels(labels)
        if class_names is None:
            class_names = [str(value) for value in values]
        elif all(isinstance(value, int) for value in values):
            codes = torch.tensor(values, dtype=torch.int64)[codes]
        else:
            raise InputError(
                f"labels: {values[0]!r} is no number of one of the {len(class_names)} class_names"
            )
        return cls(pixels, codes.to(pixels.device), tuple(class_names), name=name)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        class_names: Sequence[str] | None = None,
        *,
        layout: Layout | None = None,
        name: str = "the image store",
    ) -> ImageStore:
        """A store of a map-style torch data set: ``dataset[i]``, i < ``len(dataset)``, is (image, label).

        All of it is read, once, into memory. Images, labels, other arguments and errors as `from_arrays`.
        """
        return cls.from_arrays(*pairs_of(dataset), class_names, layout=layout, name=name)

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


def rows_by_class(labels: Tensor, counts: Tensor) -> Tensor:
    """int64 [C, max(counts)]: the positions of each label in ascending order, padded with -1."""
    order = torch.argsort(labels, stable=True)
    position = torch.arange(int(counts.max()), device=labels.device)
    place = (counts.cumsum(0) - counts)[:, None] + position
    rows = order[place.clamp(max=len(labels) - 1)]
    return torch.where(position < counts[:, None], rows, -1)
