"""A data set as features: what an encoder, ours or another, made of its images."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtl_fast.data.store import rows_by_class


@dataclass(frozen=True, eq=False, repr=False)
class FeatureStore:
    """Features of one split, on one device; episodes are drawn from it as from an `ImageStore`.

    Args:
        features: float32 [N, D], finite.
        labels: int64 [N], 0..C-1, on the device of `features`; every class has at least one row.
        class_names: C names, by label.
        mirrored: features of the mirror images, as `features`, or None.
        name: what error messages call the store.

    Attributes:
        class_counts: int64 [C], rows of each class.
        class_index: int64 [C, max_count], the rows of each class in ascending order, padded with -1.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or number of names that do not fit together, a class without a row, or numbers that are not
            finite.
    """

    features: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mirrored: Tensor | None = None
    name: str = "the features"
    class_counts: Tensor = field(init=False)
    class_index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        features, labels = self.features, self.labels
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"features: expected a non-empty [N, D], got {list(features.shape)}")
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels: expected [{len(features)}] for features {list(features.shape)}, got {list(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64, got {labels.dtype}")
        for name, tensor in (("features", features), ("mirrored", self.mirrored)):
            if tensor is None:
                continue
            if tensor.shape != features.shape:
                raise ValueError(f"{name}: expected {list(features.shape)}, got {list(tensor.shape)}")
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {tensor.dtype}")
            finite = tensor.isfinite().all(dim=1)
            if not bool(finite.all()):
                raise ValueError(
                    f"{name}: row {int((~finite).nonzero()[0])} holds numbers that are not finite"
                )
        counts = torch.bincount(labels, minlength=self.n_classes) if int(labels.min()) >= 0 else None
        if counts is None or len(counts) > self.n_classes or bool((counts == 0).any()):
            raise ValueError(
                f"labels: {int(labels.min())}..{int(labels.max())} do not fill 0..{self.n_classes - 1} of "
                f"{self.n_classes} class names"
            )
        object.__setattr__(self, "class_counts", counts)
        object.__setattr__(self, "class_index", rows_by_class(labels, counts))

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def n_images(self) -> int:
        return len(self.features)

    @property
    def device(self) -> torch.device:
        return self.features.device

    def to(self, device: torch.device | str) -> FeatureStore:
        """The same store on `device`."""
        moved = copy.copy(self)
        for name in ("features", "labels", "mirrored", "class_counts", "class_index"):
            tensor = getattr(self, name)
            object.__setattr__(moved, name, None if tensor is None else tensor.to(device))
        return moved

    def __repr__(self) -> str:
        n, width = self.features.shape
        return f"FeatureStore({self.name}: {n} features of {width}, {self.n_classes} classes, {self.device})"
